"""Closed forms of what moves, and of states, against states that were decoded."""

from __future__ import annotations

import pytest
import torch
from cases import Case, usual_cases

import attnzoo


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [case for case in usual_cases() if case.spec.decodes], ids=str)
def test_state_bytes_and_growth_are_what_decoding_carries(case: Case, dtype: torch.dtype):
    """Past the window of 16 a window's state stops growing; until then it grows by the token. A
    linear state never grows, a tree of states where the length doubles."""
    attn = case.build(dtype=dtype)
    state = attn.init_state(2, kv_heads=2, dtype=dtype)
    for n in range(1, 20):
        q, k = torch.randn(2, 4, 1, 8, dtype=dtype), torch.randn(2, 2, 1, 8, dtype=dtype)
        _, state = attn.step(q, k, k, state)
        tensors = (state.past.sums,) if case.spec.family == "kernel" else ()
        if not tensors:
            tensors = (state.k, state.v, *getattr(state, "inputs", {}).values())
        now, after = (
            attn.cost(2, length, kv_heads=2, is_causal=True, dtype=dtype) for length in (n, n + 1)
        )
        assert sum(tensor.nbytes for tensor in tensors) == now.state_bytes
        assert after.state_bytes - now.state_bytes == now.state_growth


GATES = {"mamba2": 1, "deltanet": 1, "gated_deltanet": 2, "gla": 8, "kda": 9, "rwkv7": 24}


@pytest.mark.parametrize("name", attnzoo.names())
def test_moved_bytes_and_parameters_by_hand(name: str):
    """q and out of 4 heads, k and v of 2; Linformer reads the used rows of E and F of 4 heads, rank
    16; Performer 24 directions and Reformer 3 rotations to 3 directions in float32; gates are a
    number, or 8, for every key and head (of queries, in forgetting attention and, three of them,
    in `nsa`), and so is the strength of a write; a row of 100 tokens has 8 levels."""
    case = next(case for case in usual_cases() if case.variant == name)
    attn, n = case.build(), 100
    more = {
        "linformer": 2 * 4 * n * 16 * 2,
        **{one: 3 * 2 * n * 2 * numbers for one, numbers in GATES.items()},
        "log_linear": 3 * (2 * n + 4 * n * 8) * 2,
        "forgetting": 3 * 4 * n * 2,
        "path": 3 * (2 * n * 9 + 4 * n) * 2,
        "differential_v2": 3 * 4 * n * 2,
        "nsa": 3 * 3 * 4 * n * 2,
        "performer": 24 * 8 * 4,
        "reformer": 3 * 8 * 3 * 4,
    }.get(name, 0)
    cost = attn.cost(3, n, kv_heads=2, is_causal=not case.spec.bidirectional, dtype=torch.bfloat16)
    assert cost.moved_bytes == 3 * (2 * 4 + 2 * 2) * n * 8 * 2 + more
    learned = {"linformer": 2 * 4 * 1024 * 16, "differential": 4 * 4}
    assert cost.parameters == learned.get(name, 0)


def test_refuses_a_dtype_without_fractions():
    with pytest.raises(ValueError, match=r"dtype=torch.int64 is not a floating dtype"):
        attnzoo.build("standard", heads=1, head_dim=4).cost(1, 4, dtype=torch.int64)
