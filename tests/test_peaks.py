"""Closed forms of peak memory, against the allocator's own events."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, can, cases, derived_by_hand

import attnzoo
from attnzoo import Attention
from attnzoo.bench.peak_memory import peak_bytes
from attnzoo.registry import sized, spec_of

SIZES = [(1, 1), (63, 63), (257, 257), (800, 800), (1, 65), (140, 257), (65, 18), (300, 600)]


def measured(
    attn: Attention,
    batch: int,
    lengths: tuple[int, int],
    kv_heads: int,
    is_causal: bool,
    dtype: torch.dtype,
    training: bool,
) -> int:
    """Peak of a forward without gradients, or of a forward and its backward pass."""
    q = torch.randn(
        batch, attn.heads, lengths[0], attn.head_dim, dtype=dtype, requires_grad=training
    )
    k, v = (
        torch.randn(batch, kv_heads, lengths[1], attn.head_dim, dtype=dtype, requires_grad=training)
        for _ in "kv"
    )
    upstream = torch.randn_like(q)

    def run() -> torch.Tensor:
        with torch.set_grad_enabled(training):
            out = attn(q, k, v, is_causal=is_causal)
        if training:
            out.backward(upstream)
        return out

    attn.zero_grad()
    return peak_bytes(run)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(
    "case", [case for case in cases() if case.variant in ("standard", "linformer")], ids=str
)
def test_peaks_are_the_allocators(case: Case, is_causal: bool) -> None:
    if not can(case.spec, is_causal):
        pytest.skip(f"{case.variant} cannot run so")
    for dtype in (torch.float32, torch.float64):
        attn = case.build(dtype=dtype)
        for lengths in SIZES:
            for batch, kv_heads in ((2, 2), (1, 4), (3, 1)):
                cost = attn.cost(
                    batch, *lengths, kv_heads=kv_heads, is_causal=is_causal, dtype=dtype
                )
                peaks = [
                    measured(attn, batch, lengths, kv_heads, is_causal, dtype, training)
                    for training in (False, True)
                ]
                assert peaks == [cost.forward_bytes, cost.training_bytes], (
                    lengths,
                    batch,
                    kv_heads,
                    dtype,
                )


@pytest.mark.parametrize("threads", [1, 3])
def test_every_thread_has_working_memory(threads: int) -> None:
    """Large enough that each kernel works on whole tiles."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        attn = Case("standard").build()
        cost = attn.cost(1, 1000)
        assert [
            measured(attn, 1, (1000, 1000), 4, False, torch.float32, training)
            for training in (False, True)
        ] == [
            cost.forward_bytes,
            cost.training_bytes,
        ]
    finally:
        torch.set_num_threads(before)


IN_PIECES = [
    ("sliding_window", {}, 0.01),
    ("bigbird", {}, 0.01),
    ("linear", {}, 0.15),
    ("linear", {"feature_map": "softmax"}, 0.15),
    ("performer", {}, 0.15),
    ("cosformer", {}, 0.15),
    ("retention", {}, 0.15),
    ("flash", {}, 0.05),
    ("nystromformer", {}, 0.1),
    ("nystromformer", {"convolution": 33}, 0.1),
    ("sparse_transformer", {}, 0.05),
    ("sparse_transformer", {"pattern": "fixed"}, 0.05),
    ("sparse_transformer", {"factors": "by_head"}, 0.15),
    ("reformer", {}, 0.05),
    ("sliding_window", {"sinks": 4}, 0.02),
    ("sliding_window", {"sinks": 4, "sink_logits": True}, 0.02),
    ("sliding_window", {"dilation": 4}, 0.02),
    ("sliding_window", {"dilation": [1, 3]}, 0.1),
    ("longformer", {"global_tokens": 2}, 0.02),
    ("longformer", {"global_tokens": 40, "dilation": 3}, 0.1),
    ("longformer", {"global_tokens": 3, "dilation": [1, 2]}, 0.15),
]


@pytest.mark.parametrize(
    ("name", "options", "left_out", "is_causal"),
    [(*row, is_causal) for row in IN_PIECES for is_causal in spec_of(row[0]).forms],
)
def test_peaks_of_engines_in_pieces(
    name: str, options: dict[str, Any], left_out: float, is_causal: bool
) -> None:
    """left_out: the part that is too small for the formula, such as indices, or masks and sums of
    one chunk. 3,000 tokens need padding."""
    attn = attnzoo.build(name, heads=2, head_dim=64, **options, **sized(name, 4096))
    for n, kv_heads in ((4096, 2), (3000, 1)):
        cost = attn.cost(1, n, kv_heads=kv_heads, is_causal=is_causal)
        assert cost.forward_bytes is not None and cost.training_bytes is not None
        peaks = [
            measured(attn, 1, (n, n), kv_heads, is_causal, torch.float32, training)
            for training in (False, True)
        ]
        expected = [
            pytest.approx(formula, rel=left_out)
            for formula in (cost.forward_bytes, cost.training_bytes)
        ]
        assert peaks == expected, (n, kv_heads)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_which_moment_of_a_tile_is_the_busiest(head_dim: int, is_causal: bool) -> None:
    """Short enough that one tile more or less is a tenth of the peak: weighing keys, or adding
    rows, by the width of a head."""
    attn = attnzoo.build("flash", heads=2, head_dim=head_dim)
    formula = attn.cost(1, 1024, kv_heads=2, is_causal=is_causal).forward_bytes
    assert measured(attn, 1, (1024, 1024), 2, is_causal, torch.float32, False) == pytest.approx(
        formula, rel=0.03
    )


IN_HALF_PRECISION = [
    ("flash", {}, 0.1),
    ("nystromformer", {}, 0.25),
    ("sparse_transformer", {}, 0.05),
    ("reformer", {}, 0.05),
    ("sliding_window", {}, 0.2),
    ("sliding_window", {"sinks": 4}, 0.2),
    ("bigbird", {}, 0.25),
    ("longformer", {"global_tokens": 2}, 0.2),
]


@pytest.mark.parametrize(("name", "options", "left_out"), IN_HALF_PRECISION)
def test_peaks_in_half_precision(name: str, options: dict[str, int], left_out: float) -> None:
    """Coarser: what oneDNN packs depends on the machine. The forms count what it packs for AMX;
    elsewhere it packs less, and those of the sparse engine are an upper bound."""
    attn = attnzoo.build(name, heads=2, head_dim=64, **options).to(torch.bfloat16)
    cost = attn.cost(1, 1500, kv_heads=2, dtype=torch.bfloat16)
    assert cost.forward_bytes is not None and cost.training_bytes is not None
    peaks = [
        measured(attn, 1, (1500, 1500), 2, False, torch.bfloat16, training)
        for training in (False, True)
    ]
    for peak, formula in zip(peaks, (cost.forward_bytes, cost.training_bytes), strict=True):
        assert peak <= formula * (1 + left_out)
        assert peak >= formula * (1 - left_out) or not torch.cpu._is_amx_tile_supported()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_variant_has_its_forms(case: Case, dtype: torch.dtype) -> None:
    """But for a user's own map, which autograd differentiates and the library does not know."""
    for is_causal in case.spec.forms:
        cost = case.build().cost(2, 600, kv_heads=2, is_causal=is_causal, dtype=dtype)
        known = derived_by_hand(case)
        assert cost.forward_bytes is not None
        assert (cost.kept_bytes is not None, cost.training_bytes is not None) == (known, known)
