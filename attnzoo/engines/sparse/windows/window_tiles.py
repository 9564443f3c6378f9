"""Backend `tiles` of a window: its edges, and its blocks with one slice of the keys each, computed
in memory that stays in a CPU's cache."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.softmax.tiles import tile_pieces, tiles
from attnzoo.engines.softmax.tiles.tile_pieces import Cap, InPieces, Slices, Way, cap, kept
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.windows.window_plan import BLOCK, band, edges, plan
from attnzoo.engines.sparse.windows.window_slices import in_slices, with_logits
from attnzoo.sequences.bad_slots import clear_padding


def in_tiles(
    engine: SoftmaxReference, pattern: Window, call: Call, way: Way = tiles.IN_CACHE
) -> Tensor:
    """A·v for a plain window, a few rows at a time on the CPU.

    engine: gives scale, dropout and softcap
    pattern: a window without dilation
    call: the whole call, which may have sink logits and a bias by distance
    way: how pieces are computed

    Returns (batch, heads, query_length, value_dim).
    """
    grid = grid_of(call)
    frame = call.frame()  # and not the call: autograd holds `compute`, which would hold its tensors

    def compute(q: Tensor, k: Tensor, v: Tensor, logits: Tensor | None) -> Tensor:
        again = clear_padding(frame(q, k, v))
        return in_slices(engine, pattern, with_logits(again, logits))

    def of_heads(q: Tensor, _: Tensor | None) -> list[list[Slices]]:
        return [pieces_of_head(q, pattern, grid, way)] * grid.heads

    added = {"sink_logits": call.get("sink_logits"), "bias": call.get("distance_bias")}
    whole = InPieces(call.q, call.k, call.v, of_heads, compute, call.key_mask, **added)
    return way.attend(engine, whole)


@kept
def pieces_of_head(
    like: Tensor, pattern: Window, grid: Grid, way: Way, more: int = 0
) -> list[Slices]:
    """The edges of one head, some rows at a time, and its whole blocks, some blocks at a time.

    like: of whose dtype the caps are
    pattern: a window without dilation
    grid: the sizes of the call
    way: how pieces are computed
    more: keys that each row will get beside these
    """
    found, slices, offset = plan(pattern, grid), [], grid.offset
    for first, end, low, high in edges(pattern, grid):
        rows = max(BLOCK, tile_pieces.SCORES // max(1, high - low + more))
        for start in range(first, end, rows):
            stop = min(start + rows, end)
            caps = _caps(pattern, grid, (offset + start, offset + stop), (low, high), like)
            slices.append(Slices(start, (1, stop - start, high - low), low, caps, offset))
    caps = _caps(pattern, grid, (found.before, found.before + BLOCK), (0, found.slice_length), like)
    together = way.together(BLOCK, found.slice_length + more)
    for block in range(0, found.blocks, together):
        first, blocks = found.start + block * BLOCK, min(together, found.blocks - block)
        shape, low = (blocks, BLOCK, found.slice_length), offset + first - found.before
        slices.append(Slices(first, shape, low, caps, offset))
    return slices


def _caps(
    pattern: Window, grid: Grid, rows: tuple[int, int], keys: tuple[int, int], like: Tensor
) -> tuple[Cap, ...]:
    """What hides keys from rows. The keys in the middle, which every row sees, need no cap.

    rows, keys: positions from..to
    like: of whose dtype the caps are
    """
    low, high = keys
    seen_from, seen_to = (
        rows[1] - pattern.window,
        rows[0] + (1 if grid.is_causal else pattern.window),
    )
    spans = (
        [(low, min(seen_from, high)), (max(seen_to, low), high)]
        if seen_from < seen_to
        else [(low, high)]
    )
    bands = [
        (
            a - low,
            b - low,
            band(
                pattern, grid, torch.arange(*rows, device="cpu"), torch.arange(a, b, device="cpu")
            ),
        )
        for a, b in spans
        if a < b
    ]
    return tuple(Cap(a, b, cap(band, like)) for a, b, band in bands)
