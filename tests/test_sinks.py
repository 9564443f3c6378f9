"""Attention sinks and sink logits of a window: against the oracle with logits that are not 0, in
decoding, and what they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FEW_SITUATIONS, Case, Situation, ask_oracle, close, gradients_of, tensors
from stages import in_turn
from torch import Tensor

import attnzoo
from attnzoo import Attention
from attnzoo.engines.sparse.patterns.window import Window

DIRECTION = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
OPTIONS: list[dict[str, Any]] = [
    {"window": 7, "sinks": 3},
    {"window": 7, "sink_logits": True},
    {"window": 7, "sinks": 20, "sink_logits": True},
    {"window": 5, "dilation": [1, 3, 1, 2], "sink_logits": True},
    {"window": 5, "dilation": 3, "sinks": 4},
    {"window": 5, "dilation": [1, 3, 1, 2], "sinks": 2, "sink_logits": True},
]


def with_logits(
    options: dict[str, Any], dtype: torch.dtype = torch.float64, **more: Any
) -> Attention:
    attn = Case("sliding_window", options).build(dtype=dtype, **more)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=3.0)
    return attn


@DIRECTION
@pytest.mark.parametrize(
    ("options", "situation"),
    in_turn(OPTIONS, [one for one in FEW_SITUATIONS if one.heads == 4]),
)
def test_equals_the_oracle(options: dict[str, Any], situation: Situation, is_causal: bool) -> None:
    """By every backend, and by operators, as where a transform looks in, without the function that
    computes in cache."""
    slices = "columns" if "sinks" in options else "windows"
    attn = with_logits(options)
    q, k, v, upstream = tensors(situation)
    leaves = {
        "q": q.requires_grad_(),
        "k": k.requires_grad_(),
        "v": v.requires_grad_(),
        **dict(attn.named_parameters()),
    }
    masks = {"key_mask": situation.key_mask(), "is_causal": is_causal}
    expected, a = ask_oracle(attn, q, k, v, options=options, **masks)
    wanted = gradients_of(expected, upstream, *leaves.values())
    close(attn.weights(q, k, **masks), a, 1e-10, "A")

    def out_of(*given: Tensor) -> Tensor:
        parameters = dict(zip(list(leaves)[3:], given[3:], strict=True))
        return torch.func.functional_call(attn, parameters, given[:3], masks)

    # torch.func's own gradient
    pulled: Any = torch.func.vjp(out_of, *(x.detach() for x in leaves.values()))
    ways = {"operators": (pulled[0], list(pulled[1](upstream)))}
    parameters: dict[str, Tensor] = {**dict(attn.named_parameters())}
    for backend in ("tiles", slices, "reference"):
        attn_by = with_logits(options, backend=backend)
        out = torch.func.functional_call(attn_by, parameters, (q, k, v), masks)
        ways[backend] = out, gradients_of(out, upstream, *leaves.values())
    for way, (out, found) in ways.items():
        close(out.detach(), expected.detach(), 1e-10, f"output by {way}")
        for name, one, other in zip(leaves, found, wanted, strict=True):
            close(one, other, 1e-9, f"gradient of {name} by {way}")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [(65, 65), (1, 65), (65, 17), (140, 257)], ids=str)
@DIRECTION
def test_support_is_counted(
    options: dict[str, Any], lengths: tuple[int, int], is_causal: bool
) -> None:
    attn = with_logits(options, torch.float32)
    q, k, _, _ = (x.float() for x in tensors(Situation(*lengths)))
    seen = int((attn.weights(q, k, is_causal=is_causal) != 0).sum())
    assert attn.cost(2, *lengths, kv_heads=2, is_causal=is_causal).support_macs == 2 * 8 * seen


@pytest.mark.parametrize(
    ("options", "tokens", "padding"),
    in_turn(
        [(options, tokens) for options in OPTIONS for tokens in (1, 4)],
        ["none", "left", "interior"],
    ),
)
def test_decoding_is_bounded(options: dict[str, Any], tokens: int, padding: str) -> None:
    attn, situation = with_logits(options), Situation(64, 64, padding)
    q, k, v, _ = tensors(situation)
    mask = situation.key_mask()
    whole, state = (
        attn(q, k, v, key_mask=mask, is_causal=True),
        attn.init_state(2, 64, kv_heads=2, dtype=torch.float64),
    )
    for i in range(0, 64, tokens):
        new = slice(i, i + tokens)
        row, after = attn.step(
            q[:, :, new],
            k[:, :, new],
            v[:, :, new],
            state,
            key_mask=None if mask is None else mask[:, new],
        )
        close(row, whole[:, :, new], 1e-10, f"rows from {i}")
        chosen = after.select(torch.tensor([1, 1]))
        assert torch.equal(chosen.k[0], after.k[1])
        again, _ = attn.step(
            q[:, :, new],
            k[:, :, new],
            v[:, :, new],
            state,
            key_mask=None if mask is None else mask[:, new],
        )
        assert torch.equal(row, again), "the old state stays valid"
        state = after
    pattern: Any = attn.engine.pattern  # type: ignore[union-attr]
    assert state.seen == 64
    assert state.k.shape[2] == pattern.remembers + tokens - 1
    if tokens == 1:
        assert attn.cost(2, 64, kv_heads=2, is_causal=True).state_elements == state.elements()
    with pytest.raises(ValueError, match="max_length=64"):
        attn.step(q[:, :, :1], k[:, :, :1], v[:, :, :1], state)


def test_rows_sum_to_less_than_one_by_what_the_logit_takes() -> None:
    """Equal scores: a row that sees m keys and the logit z gives each 1 / (m + exp(z))."""
    attn = with_logits({"window": 4, "sink_logits": True})
    z = attn.engine.sink_logits.detach()  # type: ignore[union-attr]
    q, k = torch.zeros(2, 1, 4, 9, 8, dtype=torch.float64)
    seen = torch.arange(1, 10).clamp(max=4)
    close(
        attn.weights(q, k, is_causal=True).sum(-1)[0],
        seen / (seen + z.exp()[:, None]),
        1e-12,
        "row sums",
    )


def test_logits_far_above_and_below_every_score() -> None:
    q, k, v, _ = tensors(Situation(65, 65))
    attn = Case("sliding_window", {"window": 7, "sink_logits": True}).build(dtype=torch.float64)
    torch.nn.init.constant_(attn.engine.sink_logits, -1e4)  # type: ignore[union-attr]
    close(
        attn(q, k, v),
        attnzoo.build("sliding_window", heads=4, head_dim=8, window=7)(q, k, v),
        1e-12,
        "without a sink",
    )
    torch.nn.init.constant_(attn.engine.sink_logits, 1e4)  # type: ignore[union-attr]
    assert not attn(q, k, v).any()


@pytest.mark.parametrize("options", [one for one in OPTIONS if "sink_logits" in one], ids=str)
def test_some_heads_keep_their_logits(options: dict[str, Any]) -> None:
    attn = with_logits(options)
    q, k, v, _ = tensors(Situation(65, 65, kv_heads=4))
    whole = attn(q, k, v)
    attn.keep_heads(1, 2)
    close(attn(q[:, 1:3], k[:, 1:3], v[:, 1:3]), whole[:, 1:3], 1e-12, "heads 1 and 2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_half_precision(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Within rounding of the output from float64 on the same rounded numbers."""
    attn = with_logits(options, dtype)
    exact = with_logits(options)
    exact.load_state_dict(attn.state_dict())
    q, k, v, _ = (x.to(dtype) for x in tensors(Situation(140, 140)))
    close(
        attn(q, k, v, is_causal=True),
        exact(q.double(), k.double(), v.double(), is_causal=True),
        4 * torch.finfo(dtype).eps,
        "output",
    )


def test_bad_sinks() -> None:
    with pytest.raises(ValueError, match="sinks=-1"):
        attnzoo.build("sliding_window", heads=4, head_dim=8, sinks=-1)
    with pytest.raises(ValueError, match="sinks=2 has no equal in flash-attn"):
        Window(4, sinks=2).to_flash_attention(is_causal=True)
