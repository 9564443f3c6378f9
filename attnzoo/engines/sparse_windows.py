"""Window attention in blocks: every block of queries reads one slice of the keys, and all slices are views of one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.softmax import Softmax, sdpa
from attnzoo.patterns import Grid, Window

BLOCK = 64  # queries that share a slice: larger wastes scores outside the window, smaller starves the matmuls


@dataclass(frozen=True)
class Plan:
    """Rows [0, start) and [stop, query_length) are edges, computed densely; between them stand whole blocks with whole windows."""

    start: int
    stop: int
    before: int  # keys of a slice before the block's first query
    slice_length: int

    @property
    def blocks(self) -> int:
        return (self.stop - self.start) // BLOCK


def plan(pattern: Window, grid: Grid) -> Plan:
    """Where every row of a block has its whole window inside the keys."""
    before = pattern.window - 1
    after = 0 if grid.is_causal else before
    start = min(max(0, before - grid.offset), grid.query_length)
    end = min(grid.query_length, grid.key_length - after - grid.offset)
    blocks = max(0, end - start) // BLOCK
    return Plan(start, start + blocks * BLOCK, before, before + BLOCK + after)


def edges(pattern: Window, grid: Grid) -> list[tuple[int, int, int, int]]:
    """Dense pieces as (first row, end row, first key, end key)."""
    found = plan(pattern, grid)
    spans = [(0, found.start), (found.stop, grid.query_length)] if found.blocks else [(0, grid.query_length)]
    after = 1 if grid.is_causal else pattern.window
    pieces = []
    for first, end in spans:
        low = max(0, grid.offset + first - pattern.window + 1)
        high = min(grid.key_length, grid.offset + end - 1 + after)
        if first < end:
            pieces.append((first, end, low, max(low, high)))
    return pieces


def count_pairs(pattern: Window, grid: Grid) -> tuple[int, int]:
    """(query, key) pairs of one head: those computed, and those inside the window."""
    found = plan(pattern, grid)
    computed = found.blocks * BLOCK * found.slice_length + sum((end - first) * (high - low) for first, end, low, high in edges(pattern, grid))
    positions = torch.arange(grid.offset, grid.key_length)
    ahead = 1 if grid.is_causal else pattern.window
    inside = (positions + ahead).clamp(max=grid.key_length) - (positions - pattern.window + 1).clamp(min=0)
    return computed, int(inside.clamp(min=0).sum())


def attend(engine: Softmax, pattern: Window, call: Call, grid: Grid) -> Tensor:
    """A·v for a window pattern."""
    found = plan(pattern, grid)
    pieces = [_edge(engine, pattern, call, grid, *piece) for piece in edges(pattern, grid)]
    if found.blocks:
        pieces.insert(1 if found.start else 0, _middle(engine, pattern, call, grid, found))
    return torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0]


def _edge(engine: Softmax, pattern: Window, call: Call, grid: Grid, first: int, end: int, low: int, high: int) -> Tensor:
    """Rows first..end over keys low..high, densely."""
    q, k, v = call.q[:, :, first:end], call.k[:, :, low:high], call.v[:, :, low:high]
    if low == high:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    key_mask = None if call.key_mask is None else call.key_mask[:, None, None, low:high]
    seen_by_first = grid.offset + first + (1 if grid.is_causal else pattern.window) >= high
    seen_by_last = grid.offset + end - 1 - pattern.window < low
    if seen_by_first and seen_by_last:
        return sdpa(engine, q, k, v, key_mask)
    square = grid.offset + first == low and end - first == high - low
    if grid.is_causal and square and seen_by_last and key_mask is None:
        return sdpa(engine, q, k, v, is_causal=True)
    mask = _band(pattern, grid, torch.arange(grid.offset + first, grid.offset + end, device=q.device), torch.arange(low, high, device=q.device))
    return sdpa(engine, q, k, v, mask[None, None] if key_mask is None else mask & key_mask)


def _band(pattern: Window, grid: Grid, query_positions: Tensor, key_positions: Tensor) -> Tensor:
    distance = query_positions[:, None] - key_positions
    return (distance.abs() < pattern.window) & (distance >= 0) if grid.is_causal else distance.abs() < pattern.window


def _middle(engine: Softmax, pattern: Window, call: Call, grid: Grid, found: Plan) -> Tensor:
    """Whole blocks, one SDPA call: batch × kv_heads, blocks, (group × block) rows against one slice each."""
    first_key = grid.offset + found.start - found.before
    keys = slice(first_key, first_key + (found.blocks - 1) * BLOCK + found.slice_length)
    q, k, v = call.q[:, :, found.start : found.stop], call.k[:, :, keys], call.v[:, :, keys]
    band = _band(pattern, grid, torch.arange(BLOCK, device=q.device) + found.before, torch.arange(found.slice_length, device=q.device))
    band = band.repeat(call.group, 1)[None, None]
    if call.key_mask is None:
        return _slices(engine, q, k, v, band, found, padded=False)
    masks = call.key_mask[:, keys].unfold(1, found.slice_length, BLOCK)[:, None, :, None, :]  # (batch, 1, blocks, 1, slice)
    samples = [slice(sample, sample + 1) for sample in range(q.shape[0])]
    return torch.cat([_slices(engine, q[one], k[one], v[one], band & masks[one][0], found, padded=True) for one in samples])


def _slices(engine: Softmax, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, found: Plan, *, padded: bool) -> Tensor:
    batch, heads, rows, head_dim = q.shape
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    q = q.reshape(batch * kv_heads, group, found.blocks, BLOCK, head_dim).transpose(1, 2).flatten(2, 3)
    k_slices, v_slices = (_Slices.apply(x.flatten(0, 1), found.slice_length) for x in (k, v))
    out = sdpa(engine, q, k_slices, v_slices, mask, every_row_sees=not padded)
    return out.unflatten(2, (group, BLOCK)).transpose(1, 2).reshape(batch, heads, rows, v.shape[3])


class _Slices(torch.autograd.Function):
    """Overlapping slices of the length as views, (batch, length, d) -> (batch, blocks, slice_length, d).

    autograd's own backward of such a view scatters element by element; adding block-wide pieces is two times faster.
    """

    @staticmethod
    def forward(x: Tensor, slice_length: int) -> Tensor:
        return x.unfold(1, slice_length, BLOCK).mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.length, ctx.slice_length = inputs[0].shape[1], inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        batch, blocks, slice_length, width = gradient.shape
        pieces = -(-slice_length // BLOCK)
        total = gradient.new_zeros(batch, (blocks + pieces - 1) * BLOCK, width)
        for piece in range(pieces):
            part = gradient[:, :, piece * BLOCK : (piece + 1) * BLOCK]
            target = total[:, piece * BLOCK : (piece + blocks) * BLOCK].unflatten(1, (blocks, BLOCK))
            target[:, :, : part.shape[2]] += part
        return total[:, : ctx.length], None
