"""The state after the last token: what the oracles say it is, against what decoding carries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import Case, Situation, ask_oracle, cases, close, padding, tensors
from test_gates import gates_of
from torch import Tensor

import attnzoo
from attnzoo.engines.linear.state import LinearState
from attnzoo.oracles import ORACLES

HEADS, KV_HEADS, WIDTH, LENGTH = 4, 2, 8, 13
EXACT = 1e-10
RECURRENT = [
    case
    for case in cases()
    if case.spec.decodes and case.build(HEADS).engine.state_type is LinearState
]


def carried(case: Case, state: LinearState) -> Tensor:
    """What decoding carries, as the oracle has it. Sums are held divided by exp(log_scale), half
    the scale of Retention's scores is in its keys, and a column of normalisers is carried where
    nothing reads it."""
    assert state.past is not None
    sums, log_scale = state.past.sums, state.past.log_scale
    if log_scale is not None:
        sums = sums * log_scale.exp()[..., None, None]
    if case.variant == "retention":
        sums = sums / math.sqrt(case.options.get("scale") or WIDTH**-0.5)
    unread = case.variant == "retention" or case.options.get("normalize") is False
    return sums[..., :-1] if unread else sums


def stepped(case: Case, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Any:
    attn = case.build(HEADS, WIDTH, dtype=torch.float64)
    start = attn.init_state(q.shape[0], kv_heads=KV_HEADS, dtype=torch.float64)
    return attn.step(q, k, v, start, **given)[1]


def test_every_recurrent_variant_is_asked() -> None:
    names = {case.variant for case in RECURRENT}
    assert names >= {"linear", "performer", "cosformer", "retention", "log_linear", "rwkv7"}


@pytest.mark.parametrize("kind", ["none", "left", "interior", "whole"])
@pytest.mark.parametrize("case", RECURRENT, ids=str)
def test_the_state_of_the_oracle_is_what_decoding_carries(case: Case, kind: str) -> None:
    situation = Situation(LENGTH, LENGTH, heads=HEADS, kv_heads=KV_HEADS)
    q, k, v, _ = tensors(situation, WIDTH, shift=case.shift)
    v = torch.cat([v, v[..., :3].cos()], -1)  # wider than keys
    given = {"key_mask": padding(kind, 2, LENGTH), **gates_of(case.variant, LENGTH)}
    attn = case.build(HEADS, WIDTH, dtype=torch.float64)
    out, a, state = ask_oracle(
        attn, q, k, v, options=case.options, is_causal=True, output_final_state=True, **given
    )
    close(out, a @ v.repeat_interleave(HEADS // KV_HEADS, 1), EXACT, "A times v")
    close(carried(case, stepped(case, q, k, v, **given)), state, EXACT, f"state of {case}")


@pytest.mark.parametrize("name", ["gated_deltanet", "linear", "log_linear", "retention"])
def test_a_packed_row_ends_with_the_state_of_its_last_piece(name: str) -> None:
    case = Case(name)
    q, k, v, _ = tensors(Situation(LENGTH, LENGTH, heads=HEADS, kv_heads=KV_HEADS), WIDTH)
    gates: dict[str, Any] = gates_of(name, LENGTH)
    segments = torch.tensor([[4] * 6 + [1] * 7, [2] * 9 + [3] * 4])
    attn = case.build(HEADS, WIDTH)
    asked: dict[str, Any] = {"is_causal": True, "output_final_state": True}
    *_, state = ask_oracle(attn, q, k, v, segments=segments, **asked, **gates)
    for sample, first in ((0, 6), (1, 9)):
        here = (slice(sample, sample + 1), slice(None), slice(first, None))
        own: dict[str, Any] = {one: x[here] for one, x in gates.items()}
        *_, alone = ask_oracle(attn, q[here], k[here], v[here], **asked, **own)
        found = state[sample : sample + 1]
        if name == "log_linear":  # as many buckets as the whole row has
            assert not found[:, :, alone.shape[2] :].any()
            found = found[:, :, : alone.shape[2]]
        close(found, alone, 1e-12, f"sample {sample}")


def test_what_is_no_recurrence_says_so() -> None:
    q = torch.randn(1, 1, 3, 8)
    without = set(ORACLES) - {case.variant for case in RECURRENT}
    assert {"standard", "sliding_window", "path", "reformer"} <= without
    with pytest.raises(ValueError, match="standard is no recurrence: it has no final state but"):
        attnzoo.oracles.standard(q, q, q, output_final_state=True)


def test_the_state_is_differentiable() -> None:
    q, k, v, _ = tensors(Situation(5, 5, heads=HEADS, kv_heads=KV_HEADS), WIDTH)
    for name in ("kda", "linear"):
        leaf = k.clone().requires_grad_()
        *_, state = ORACLES[name](q, leaf, v, is_causal=True, output_final_state=True)
        assert torch.autograd.grad(state.sum(), leaf)[0].any()


def test_packed_rows_whose_last_pieces_have_trees_of_other_sizes() -> None:
    q = torch.randn(2, 1, 10, 4)
    segments = torch.tensor([[0] * 2 + [1] * 8, [0] * 9 + [1]])
    out, _ = ORACLES["log_linear"](q, q, q, segments=segments, is_causal=True)
    assert out.shape == q.shape
    with pytest.raises(ValueError, match="one sample at a time"):
        ORACLES["log_linear"](q, q, q, segments=segments, is_causal=True, output_final_state=True)
