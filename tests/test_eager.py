"""Where Python may not look at values, nothing is decided by them: masks of a trace, of torch.func
and of a graph; what cannot be is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import Case, usual_cases
from multihead_cases import HEADS, SIZE, options_of
from small import causal_bool, of_each_folder
from stages import only
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import attnzoo
from attnzoo import MultiheadAttention, UnsupportedError
from attnzoo.eager import can_look

LENGTH = 9
CASES = pytest.mark.parametrize("case", usual_cases(), ids=str)
FEW = [case for case in usual_cases() if case.variant in of_each_folder()]
quiet = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",
    "ignore:.*is deprecated:DeprecationWarning",
    "ignore:There is a performance drop",
)


def layer_of(case: Case) -> MultiheadAttention:
    torch.manual_seed(2)
    return MultiheadAttention(SIZE, HEADS, batch_first=True, **options_of(case)).eval()


class WithMasks(nn.Module):
    """A layer as jit.trace takes it; with weights."""

    def __init__(self, layer: MultiheadAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x, x, x, attn_mask=mask, key_padding_mask=padding, is_causal=True)


@quiet
def test_nobody_looks_where_values_are_not_to_be_had() -> None:
    x, answers = torch.ones(3), []

    def look(x: Tensor) -> Tensor:
        answers.append(can_look(x))
        return x * 2

    torch.jit.trace(look, x, check_trace=False)
    torch.func.vmap(look)(x)
    make_fx(look)(x)
    with FakeTensorMode() as mode:
        look(mode.from_tensor(x))
    look(x.to("meta"))
    gradient = x.clone().requires_grad_()
    out = gradient * 1
    out.register_hook(look)
    torch.autograd.grad(out, gradient, torch.eye(3), is_grads_batched=True)
    assert answers == [False] * 6
    assert can_look(x) and can_look(x, x, may_stall=True)
    torch.compile(look, backend="eager", fullgraph=True)(x)
    assert answers[6:] == [False]


@quiet
@pytest.mark.parametrize("case", only(FEW, usual_cases()))
def test_masks_of_a_traced_layer_are_its_inputs(case: Case) -> None:
    """Traced with the causal mask and a padding of zeros, which eager code recognises by their
    values."""
    if not case.spec.causal:
        pytest.skip(f"{case.variant} cannot be causal")
    layer = WithMasks(layer_of(case))
    x, none = torch.randn(2, LENGTH, SIZE), torch.zeros(2, LENGTH)
    causal = torch.zeros(LENGTH, LENGTH).masked_fill(causal_bool(LENGTH), float("-inf"))
    with torch.no_grad():
        traced: Any = torch.jit.trace(layer, (x, causal, none), check_trace=False)
        hidden = none.masked_fill(torch.arange(LENGTH) >= 6, float("-inf"))
        for one, other in zip(traced(x, causal, hidden), layer(x, causal, hidden), strict=True):
            torch.testing.assert_close(one, other, rtol=0.0, atol=1e-5)
        for masks in ((torch.randn(LENGTH, LENGTH), none), (causal, torch.randn(2, LENGTH))):
            found = traced(x, *masks)
            if case.spec.attn_mask:
                for one, other in zip(found, layer(x, *masks), strict=True):
                    torch.testing.assert_close(one, other, rtol=0.0, atol=1e-5)
            else:  # eager refuses these, and a trace cannot fail
                assert all(x.isnan().all() for x in found)


@quiet
def test_a_mask_without_the_hint_is_refused_while_traced() -> None:
    layer = MultiheadAttention(SIZE, HEADS, batch_first=True, attention="linear").requires_grad_(
        False
    )

    def call(x: Tensor, mask: Tensor) -> Tensor:
        return layer(x, x, x, attn_mask=mask, need_weights=False)[0]

    with torch.no_grad(), pytest.raises(UnsupportedError, match="say so with is_causal=True"):
        torch.jit.trace(call, (torch.randn(1, 4, SIZE), causal_bool(4)), check_trace=False)


@quiet
@CASES
def test_gradients_of_each_sample_of_a_padded_encoder(case: Case) -> None:
    """vmap of grad over torch's encoder, which hands its layers a float mask."""
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(SIZE, HEADS, 8, 0.0, batch_first=True),
        1,
        enable_nested_tensor=False,
    )
    encoder.layers[0].self_attn = layer_of(case)
    encoder.train()
    x, padding = torch.randn(2, LENGTH, SIZE), torch.arange(LENGTH) >= torch.tensor([[6], [LENGTH]])
    masks: dict[str, Any] = (
        {} if case.spec.bidirectional else {"mask": causal_bool(LENGTH), "is_causal": True}
    )
    parameters = {name: parameter.detach() for name, parameter in encoder.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, padding: Tensor) -> Tensor:
        out = torch.func.functional_call(
            encoder, parameters, (x[None],), {"src_key_padding_mask": padding[None], **masks}
        )
        return out.masked_fill(padding[None, :, None], 0.0).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, padding)
    for sample in range(2):
        alone = torch.func.grad(loss)(parameters, x[sample], padding[sample])
        for name, gradient in alone.items():
            torch.testing.assert_close(
                found[name][sample],
                gradient,
                rtol=0.0,
                atol=1e-4 * max(1.0, float(gradient.abs().max())),
            )


@quiet
def test_named_globals_that_nobody_may_count() -> None:
    attn = attnzoo.build("longformer", heads=2, head_dim=8, window=3)
    q, k, v = torch.randn(3, 2, 2, 20, 8).unbind()
    few, many = torch.zeros(2, 20, dtype=torch.bool), torch.ones(2, 20, dtype=torch.bool)
    few[:, 3] = True

    def call(q: Tensor, k: Tensor, v: Tensor, global_mask: Tensor) -> Tensor:
        return attn(q, k, v, global_mask=global_mask)

    traced: Any = torch.jit.trace(call, (q, k, v, few))
    for mask in (few, many, ~many):
        torch.testing.assert_close(traced(q, k, v, mask), call(q, k, v, mask), rtol=0.0, atol=1e-5)
    masks = torch.stack([few, many])
    found = torch.func.vmap(call, in_dims=(None, None, None, 0))(q, k, v, masks)
    torch.testing.assert_close(
        found, torch.stack([call(q, k, v, mask) for mask in masks]), rtol=0.0, atol=1e-5
    )


@CASES
def test_scripting_is_refused_in_a_sentence(case: Case) -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(SIZE, HEADS, 8, 0.0, batch_first=True),
        1,
        enable_nested_tensor=False,
    )
    encoder.layers[0].self_attn = layer_of(case)
    for module in (layer_of(case), layer_of(case).attention, encoder):
        with (
            pytest.warns(DeprecationWarning, match="jit.script"),
            pytest.raises(
                UnsupportedError, match=f"torch.jit.script cannot compile {case.variant}"
            ),
        ):
            torch.jit.script(copy.deepcopy(module))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_nested_tensors_of_nothing(lengths: list[int]) -> None:
    layer = MultiheadAttention(SIZE, HEADS, batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(length, SIZE) for length in lengths])
    out, weights = layer(x, x, x)
    assert out.is_nested and [tuple(row.shape) for row in out.unbind()] == [(0, SIZE)] * len(
        lengths
    )
    assert weights is not None and weights.shape == (len(lengths), 0, 0)
    assert layer(x, x, x, average_attn_weights=False)[1].shape == (len(lengths), HEADS, 0, 0)  # pyright: ignore[reportOptionalMemberAccess]
    assert layer(x, x, x, need_weights=False)[1] is None
