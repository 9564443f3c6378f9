"""What is computed some blocks at a time equals the reference, also where there are many groups of
blocks."""

from __future__ import annotations

import pytest
import torch

import attnzoo
from attnzoo.engines.piece_by_piece import join
from attnzoo.engines.softmax.tiles import tile_pieces
from attnzoo.engines.sparse.blocks import gathered_blocks
from attnzoo.engines.sparse.windows import window_slices

LENGTHS = [(500, 500), (333, 500)]  # queries, keys: several blocks of 64 or 16, and a ragged end


@pytest.mark.parametrize("in_memory_used_again", [True, False])
@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize(
    ("name", "options"), [("sliding_window", {"window": 40}), ("bigbird", {"block_size": 16})]
)
def test_a_block_at_a_time(
    name,
    options,
    queries,
    keys,
    is_causal,
    recording,
    in_memory_used_again,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tile_pieces, "SCORES", 1)
    monkeypatch.setattr(window_slices, "SLICED", 1)
    monkeypatch.setattr(gathered_blocks, "GATHERED", 1)
    torch.manual_seed(0)
    shapes = [(2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=recording) for shape in shapes]
    weight = torch.randn(2, 4, queries, 8, dtype=torch.float64)
    found = []
    slices = "windows" if name == "sliding_window" else "blocks"
    for backend in ("tiles" if in_memory_used_again else slices, "reference"):
        with torch.set_grad_enabled(recording):
            out = attnzoo.build(name, heads=4, head_dim=8, backend=backend, **options)(
                *inputs, is_causal=is_causal
            )
        found.append(
            [out, *(torch.autograd.grad((out * weight).sum(), inputs) if recording else ())]
        )
    for fast, wanted in zip(*found, strict=True):
        torch.testing.assert_close(fast, wanted, rtol=1e-10, atol=1e-12)


def test_join_lays_pieces_side_by_side() -> None:
    whole = torch.randn(2, 7, 3)
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            assert torch.equal(join(iter(whole.split([2, 1, 4], 1)), 7, 1), whole)
            assert torch.equal(join(iter([whole]), 7, 1), whole)
