"""Sink logits that a call brings: the oracle's numbers and gradients, in decoding, and gpt-oss with
its own, swapped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FEW_SITUATIONS, Case, Situation, close, gradients_of, tensors
from small import small
from stages import in_turn

import attnzoo
from attnzoo import UnsupportedError
from attnzoo.oracles import ORACLES
from attnzoo.registry import names, spec_of

TAKE_THEM = [name for name in names() if spec_of(name).takes("sink_logits")]
WINDOW = {"standard": 300, "sliding_window": 7}  # for the oracle of windows


def logits_of(heads: int) -> torch.Tensor:
    return 3 * torch.randn(heads, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def build(name: str, heads: int = 4, **options: Any) -> attnzoo.Attention:
    own = {"window": WINDOW[name]} if name == "sliding_window" else {}
    return Case(name, own).build(heads, dtype=torch.float64, **options)


def test_who_takes_them() -> None:
    assert set(WINDOW) == set(TAKE_THEM)


@pytest.mark.parametrize(
    ("situation", "is_causal", "name", "backend"),
    in_turn(
        [(situation, way) for way in (False, True) for situation in FEW_SITUATIONS],
        [
            ("standard", "sdpa"),
            ("standard", "reference"),
            ("sliding_window", "tiles"),
            ("sliding_window", "windows"),
        ],
    ),
)
def test_equals_the_oracle(name: str, backend: str, situation: Situation, is_causal: bool) -> None:
    attn = build(name, situation.heads, backend=backend)
    q, k, v, upstream = tensors(situation)
    leaves = [x.requires_grad_() for x in (q, k, v, logits_of(situation.heads))]
    masks: dict[str, Any] = {"key_mask": situation.key_mask(), "is_causal": is_causal}
    expected, a = ORACLES["sliding_window"](
        q, k, v, window=WINDOW[name], sink_logits=leaves[3], **masks
    )
    out = attn(q, k, v, sink_logits=leaves[3], **masks)
    close(out, expected, 1e-10, "output")
    close(attn.weights(q, k, sink_logits=leaves[3], **masks), a, 1e-10, "A")
    wanted = gradients_of(expected, upstream, *leaves)
    for which, one, other in zip(
        ["q", "k", "v", "logits"], gradients_of(out, upstream, *leaves), wanted, strict=True
    ):
        close(one, other, 1e-9, f"gradient of {which}")


@pytest.mark.parametrize("kind", ["bool", "float", "broadcast"])
def test_beside_an_attn_mask(kind: str) -> None:
    q, k, v, _ = tensors(Situation(65, 65, "interior"))
    mask = (
        torch.rand(
            4, 65, 1 if kind == "broadcast" else 65, generator=torch.Generator().manual_seed(3)
        )
        < 0.7
    )
    attn_mask = mask.double() if kind == "float" else mask
    options: dict[str, Any] = {
        "attn_mask": attn_mask,
        "key_mask": Situation(65, 65, "interior").key_mask(),
        "is_causal": True,
    }
    out = build("standard", backend="sdpa")(q, k, v, sink_logits=logits_of(4), **options)
    close(
        out,
        build("standard", backend="reference")(q, k, v, sink_logits=logits_of(4), **options),
        1e-12,
        "output",
    )


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.7])
def test_any_scale(scale: float) -> None:
    q, k, v, _ = tensors(Situation(65, 65))
    attn = build("standard", scale=scale)
    expected, _ = ORACLES["sliding_window"](
        q, k, v, window=2000, sink_logits=logits_of(4), scale=scale, is_causal=True
    )
    close(attn(q, k, v, sink_logits=logits_of(4), is_causal=True), expected, 1e-10, "output")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    q, k, v, _ = (x.to(dtype) for x in tensors(Situation(140, 140)))
    logits = logits_of(4).to(dtype)
    expected = build("standard", backend="reference")(
        q.double(), k.double(), v.double(), sink_logits=logits.double()
    )
    found = attnzoo.build("standard", heads=4, head_dim=8, backend="sdpa")(
        q, k, v, sink_logits=logits
    )
    close(found, expected, 4 * torch.finfo(dtype).eps, "output")


@pytest.mark.parametrize("name", TAKE_THEM)
@pytest.mark.parametrize("tokens", [1, 4])
def test_decoding(name: str, tokens: int) -> None:
    attn, logits = build(name), logits_of(4)
    q, k, v, _ = tensors(Situation(24, 24))
    whole, state = (
        attn(q, k, v, sink_logits=logits, is_causal=True),
        attn.init_state(2, kv_heads=2, dtype=torch.float64),
    )
    for i in range(0, 24, tokens):
        new = slice(i, i + tokens)
        rows, state = attn.step(q[:, :, new], k[:, :, new], v[:, :, new], state, sink_logits=logits)
        close(rows, whole[:, :, new], 1e-10, f"rows from {i}")


def test_bad_sink_logits() -> None:
    q, k, v, _ = tensors(Situation(5, 5))
    for logits, message in (
        (torch.zeros(3), r"sink_logits has shape \(3,\)"),
        (torch.zeros(4, dtype=torch.long), "torch.int64"),
        (0.0, "is a float"),
    ):
        with pytest.raises(ValueError, match=message):
            build("standard")(q, k, v, sink_logits=logits)  # type: ignore[arg-type]
    for name in set(names()) - set(TAKE_THEM):
        attn = Case(name, small(name)).build(dtype=torch.float64)
        with pytest.raises(
            UnsupportedError, match=rf"{name} has no place for sink_logits.*use .*standard"
        ):
            attn(q, k, v, sink_logits=logits_of(4), is_causal=not attn.spec.bidirectional)
    with pytest.raises(UnsupportedError, match="build it with sink_logits=False"):
        build("sliding_window", sink_logits=True)(q, k, v, sink_logits=logits_of(4))
