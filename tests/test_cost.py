"""Closed forms of memory, against autograd itself and against states that were decoded."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from cases import Case, can, cases, derived_by_hand, usual_cases
from torch.autograd.profiler import profile

import attnzoo
from attnzoo import Attention

SIZES = [(1, 1), (63, 63), (257, 257), (600, 600), (640, 640), (1, 65), (140, 257), (65, 18)]


class Held:
    """What autograd holds in a tensor's place, alive for as long as it holds it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def held_bytes(
    attn: Attention,
    batch: int,
    lengths: tuple[int, int],
    kv_heads: int,
    is_causal: bool,
    dtype: torch.dtype,
) -> int:
    """Storage behind one output, without the parameters and buffers."""
    heads, head_dim = attn.heads, attn.head_dim
    q = torch.randn(batch, heads, lengths[0], head_dim, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(batch, kv_heads, lengths[1], head_dim, dtype=dtype, requires_grad=True)
        for _ in "kv"
    )
    own = {tensor.untyped_storage().data_ptr() for tensor in (*attn.parameters(), *attn.buffers())}
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Held:
        place = Held(tensor)
        held.add(place)
        return place

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda place: place.tensor):
        out = attn(q, k, v, is_causal=is_causal)
    storages = {
        place.tensor.untyped_storage().data_ptr(): place.tensor.untyped_storage().nbytes()
        for place in held
    }
    assert out.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in own)


def left_bytes(
    attn: Attention,
    batch: int,
    lengths: tuple[int, int],
    kv_heads: int,
    is_causal: bool,
    dtype: torch.dtype,
) -> int:
    """Bytes that a forward leaves allocated beside its output: what autograd holds, what it holds
    for functions that it will call again too."""
    heads, head_dim = attn.heads, attn.head_dim
    q = torch.randn(batch, heads, lengths[0], head_dim, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(batch, kv_heads, lengths[1], head_dim, dtype=dtype, requires_grad=True)
        for _ in "kv"
    )
    if getattr(attn.engine, "share_qk", False):
        k = q
    profiler: Any = profile(profile_memory=True)
    with profiler:
        out = attn(q, k, v, is_causal=is_causal)
    return (
        sum(
            event.nbytes()
            for event in profiler.kineto_results.events()
            if event.name() == "[memory]"
        )
        - out.untyped_storage().nbytes()
    )


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(
    "case",
    [case for case in cases() if case.variant == "reformer"]
    + [Case("reformer", {"share_qk": True})],
    ids=str,
)
def test_kept_bytes_of_hashing_are_what_a_forward_leaves(case: Case, is_causal: bool):
    """float32's k and v are kept as the caller gave them (k, scaled anew, where it is q; q is
    scaled anew in any case), and so leave nothing."""
    shared = "share_qk" in case.options
    for lengths in [size for size in SIZES if size[0] == size[1] or not shared]:
        for batch, kv_heads in ((2, 4),) if shared else ((2, 2), (1, 4), (3, 1)):
            for dtype in (torch.float32, torch.bfloat16):
                attn = case.build(dtype=dtype)
                closed = attn.cost(
                    batch, *lengths, kv_heads=kv_heads, is_causal=is_causal, dtype=dtype
                ).kept_bytes
                given = 2 * batch * kv_heads * lengths[1] * 8 * 4 if dtype == torch.float32 else 0
                left = given + left_bytes(attn, batch, lengths, kv_heads, is_causal, dtype)
                # The allocator counts one number more, whatever the sizes.
                assert closed is not None and left - 8 <= closed <= left, (
                    lengths,
                    batch,
                    kv_heads,
                    dtype,
                )


UNKNOWN = [case for case in cases() if not derived_by_hand(case)]


def test_bytes_kept_of_a_users_own_map_are_not_known():
    """Autograd differentiates what the library does not know."""
    assert UNKNOWN
    for case in UNKNOWN:
        assert case.build().cost(1, 4).kept_bytes is None


MIXED = [
    Case("longformer", {"window": 9, "dilation": [1, 2, 1, 3], "global_tokens": 3}),
    Case("sliding_window", {"window": 5, "dilation": [3, 2, 2, 1], "sink_logits": True}),
    Case("sliding_window", {"window": 5, "dilation": [3, 2, 2, 1], "sinks": 2}),
    Case("sliding_window", {"window": 5, "dilation": 2, "sinks": 2, "sink_logits": True}),
]


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(
    "case",
    [case for case in cases() if case not in UNKNOWN and case.variant != "reformer"] + MIXED,
    ids=str,
)
def test_kept_bytes_are_what_autograd_holds(case: Case, is_causal: bool):
    if not can(case.spec, is_causal):
        pytest.skip(f"{case.variant} cannot run so")
    for lengths in SIZES:
        if lengths[0] != lengths[1] and not case.spec.cross:
            continue
        for batch, kv_heads in ((2, 2), (1, 4), (3, 1)):
            for dtype in (torch.float32, torch.bfloat16):
                attn = case.build(dtype=dtype)
                closed = attn.cost(
                    batch, *lengths, kv_heads=kv_heads, is_causal=is_causal, dtype=dtype
                ).kept_bytes
                assert closed == held_bytes(attn, batch, lengths, kv_heads, is_causal, dtype), (
                    lengths,
                    batch,
                    kv_heads,
                    dtype,
                )


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("name", ["standard", "sliding_window", "bigbird", "linear", "performer"])
def test_kept_bytes_of_a_long_sequence(name: str, is_causal: bool):
    """So long that a window computes its blocks in several groups, each with a mask of its own, and
    a linear state its chunks in several spans."""
    attn = attnzoo.build(name, heads=2, head_dim=64)
    closed = attn.cost(1, 4999, kv_heads=1, is_causal=is_causal).kept_bytes
    assert closed == held_bytes(attn, 1, (4999, 4999), 1, is_causal, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [case for case in usual_cases() if case.spec.decodes], ids=str)
def test_state_bytes_and_growth_are_what_decoding_carries(case: Case, dtype: torch.dtype):
    """Past the window of 16 a window's state stops growing; until then it grows by the token. A
    linear state never grows."""
    attn = case.build(dtype=dtype)
    state = attn.init_state(2, kv_heads=2, dtype=dtype)
    for n in range(1, 20):
        q, k = torch.randn(2, 4, 1, 8, dtype=dtype), torch.randn(2, 2, 1, 8, dtype=dtype)
        _, state = attn.step(q, k, k, state)
        tensors = (state.past.sums,) if case.spec.family == "kernel" else (state.k, state.v)
        now, after = (
            attn.cost(2, length, kv_heads=2, is_causal=True, dtype=dtype) for length in (n, n + 1)
        )
        assert sum(tensor.nbytes for tensor in tensors) == now.state_bytes
        assert after.state_bytes - now.state_bytes == now.state_growth


@pytest.mark.parametrize("name", attnzoo.names())
def test_moved_bytes_and_parameters_by_hand(name: str):
    """q and out of 4 heads, k and v of 2; Linformer reads the used rows of E and F of 4 heads, rank
    16; Performer 24 directions and Reformer 3 rotations to 3 directions in float32."""
    case = next(case for case in usual_cases() if case.variant == name)
    attn, n = case.build(), 100
    more = {
        "linformer": 2 * 4 * n * 16 * 2,
        "performer": 24 * 8 * 4,
        "reformer": 3 * 8 * 3 * 4,
    }.get(name, 0)
    cost = attn.cost(3, n, kv_heads=2, is_causal=not case.spec.bidirectional, dtype=torch.bfloat16)
    assert cost.moved_bytes == 3 * (2 * 4 + 2 * 2) * n * 8 * 2 + more
    assert cost.parameters == (2 * 4 * 1024 * 16 if name == "linformer" else 0)


def test_refuses_a_dtype_without_fractions():
    with pytest.raises(ValueError, match=r"dtype=torch.int64 is not a floating dtype"):
        attnzoo.build("standard", heads=1, head_dim=4).cost(1, 4, dtype=torch.int64)
