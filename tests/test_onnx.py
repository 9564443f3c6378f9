"""Every variant as an ONNX graph, run by onnxruntime, says what it says here, for other values and
masks than it was exported with."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case, cases, usual_cases
from small import build_small, of_each_folder
from stages import only, staged
from torch import Tensor, nn

from attnzoo import Attention, MultiheadAttention

onnxruntime = pytest.importorskip(
    "onnxruntime", reason="needs onnx, onnxscript and onnxruntime: pip install 'attnzoo[test]'"
)
pytest.importorskip(
    "onnxscript", reason="needs onnx, onnxscript and onnxruntime: pip install 'attnzoo[test]'"
)
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
OPSETS = (20, 23)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The exporter tells of every package that it did not find."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


class Masked(nn.Module):
    def __init__(self, attn: Attention, is_causal: bool) -> None:
        super().__init__()
        self.attn, self.is_causal = attn, is_causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        return self.attn(q, k, v, key_mask=key_mask, is_causal=self.is_causal)


def exported(
    module: nn.Module, inputs: tuple[Tensor, ...], opset: int, *, optimize: bool = True
) -> Any:
    """As a function of other inputs. optimize: as by default, which is half of the time."""
    with torch.no_grad():
        program: Any = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            opset_version=opset,
            optimize=optimize,
            verbose=False,
        )
    buffer = io.BytesIO()
    program.save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda *others: torch.from_numpy(
        session.run(None, {name: x.numpy() for name, x in zip(names, others, strict=True)})[0]
    )


def masks(length: int) -> tuple[Tensor, Tensor]:
    """To export with, and to run with; each hides everything from one sample."""
    first, second = torch.ones(3, length, dtype=torch.bool), torch.ones(3, length, dtype=torch.bool)
    first[0, :5], first[1, -4:], first[2] = False, False, False
    second[0, -2:], second[1], second[2, :3] = False, False, False
    return first, second


def check_export(
    attn: Attention,
    is_causal: bool,
    opset: int,
    length: int,
    shift: float,
    *,
    masked: bool = True,
    optimize: bool = True,
) -> None:
    def inputs(mask: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (
            torch.randn(3, heads, length, attn.head_dim) + shift * (heads > 0)
            for heads in (4, 2, 2)
        )
        return (q, k, v, mask) if masked else (q, k, v)

    first, second = masks(length)
    module = Masked(attn, is_causal)
    graph = exported(module, inputs(first), opset, optimize=optimize)
    for others in (inputs(first), inputs(second)):
        expected = module(*others).detach()
        found = graph(*others)
        torch.testing.assert_close(
            found, expected, rtol=0.0, atol=1e-4 * max(1.0, float(expected.abs().max()))
        )
        if masked:
            assert not found[~others[3].any(1)].any()


#: Every variant in every form by one opset, in turn, so that a variant of two forms has both;
#: `standard` by all, for opset 23 has an attention of its own.
EXPORTS = [
    staged(
        case,
        is_causal,
        opset,
        first=case.variant in of_each_folder()[:1]
        and form == place % len(case.spec.forms)
        and opset == OPSETS[(place + form) % 2],
    )
    for place, case in enumerate(usual_cases())
    for form, is_causal in enumerate(case.spec.forms)
    for opset in OPSETS
    if case.variant == "standard" or opset == OPSETS[(place + form) % 2]
]


@pytest.mark.parametrize(("case", "is_causal", "opset"), EXPORTS)
def test_every_variant_exports(case: Case, is_causal: bool, opset: int) -> None:
    """Optimized by opset 20 alone, of bidirectional calls."""
    attn = build_small(case.variant, 4, 8)
    check_export(
        attn, is_causal, opset, 20, case.shift, optimize=opset == OPSETS[0] and not is_causal
    )


@pytest.mark.slow
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_case_exports_at_a_length_of_several_blocks(case: Case, opset: int) -> None:
    for is_causal in case.spec.forms:
        for masked in (False, True):
            check_export(case.build(), is_causal, opset, 150, case.shift, masked=masked)


class Padded(nn.Module):
    """A layer whose padding is torch's float mask."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.layer = MultiheadAttention(16, 4, batch_first=True, attention=attention)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]


@pytest.mark.parametrize("attention", only(["linear"], ["standard", "linear"]))
def test_a_mask_that_was_of_zeros_is_applied_and_one_that_cannot_be_gives_nan(
    attention: str,
) -> None:
    """Assertions are lost in ONNX; an additive mask that linear attention cannot apply must not be
    dropped."""
    layer = Padded(attention)
    x, padding = torch.randn(2, 9, 16), torch.zeros(2, 9)
    graph = exported(layer, (x, padding), 20)
    hidden, added = padding.clone(), padding.clone()
    hidden[0, 6:], added[0, 6:] = float("-inf"), 1.0
    torch.testing.assert_close(graph(x, hidden), layer(x, hidden).detach(), rtol=0.0, atol=1e-4)
    if attention == "standard":
        torch.testing.assert_close(graph(x, added), layer(x, added).detach(), rtol=0.0, atol=1e-4)
    else:
        assert graph(x, added).isnan().all()
