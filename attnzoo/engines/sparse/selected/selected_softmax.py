"""The sparse engine for key blocks that the data select.

    A_ij = exp(s_ij) / Σ_{l ∈ S(i)} exp(s_il) if j ∈ S(i), else 0,    s_ij = scale · q_i·k_j

S(i) are the keys of the blocks that a selector names for query i and that the masks leave visible.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import Backend, Cost, Shape, causal_pairs, never_refuses
from attnzoo.engines.softmax import sdpa
from attnzoo.engines.softmax.reference import REFERENCE, visible, weights_of
from attnzoo.engines.softmax.softmax import Softmax, softmax_cost
from attnzoo.engines.sparse.dense import LARGEST_MASK
from attnzoo.engines.sparse.selected import selected_tiles
from attnzoo.engines.sparse.selected.selected_rows import Sizes, attend_selected
from attnzoo.engines.sparse.selected.selection import Placed, Selector
from attnzoo.sequences.padding import fetched, leading


class SelectedSoftmax(Softmax):
    """Softmax attention in which a query sees the key blocks that the data select for it.

    Its backends in order: `dense`, one SDPA call, where every key is seen; `tiles`, on a CPU in
    memory that stays in cache; `selected`, the same in operators that graphs and transforms follow;
    the reference. Only the first and the last form a row for every key.

    selector: names the key blocks that each query sees
    scale: factor of the scores, 1/sqrt(head_dim) by default
    """

    def __init__(self, selector: Selector, scale: float | None = None) -> None:
        super().__init__(scale)
        self.selector = selector

    def support(self, call: Call) -> Tensor:
        """Which keys the selected blocks show, (batch, heads, query_length, key_length) bool.
        Memory is quadratic in the length."""
        placed, size = Placed.of(call), self.selector.block_size
        blocks = self.selector.select(placed).of_heads(call.q.shape[1])
        key_blocks = -(-call.key_length // size)
        shown = torch.zeros(
            *blocks.shape[:3], key_blocks + 1, dtype=torch.bool, device=blocks.device
        )
        shown = shown.scatter(3, torch.where(blocks < 0, key_blocks, blocks), True)
        keys = shown[..., :-1].repeat_interleave(size, 3)[..., : call.key_length]
        if call.key_mask is None or placed.call is call:
            return keys
        slots = torch.arange(call.key_length, device=keys.device)
        return fetched(keys, (slots - leading(call.key_mask)[:, None]) % call.key_length, 3)

    def matrix(self, call: Call) -> Tensor:
        support, mask = self.support(call), visible(call)
        return weights_of(self, call, support if mask is None else support & mask)

    def cost(self, shape: Shape) -> Cost:
        if self.selector.sees_all(shape.key_length):
            return super().cost(shape)
        size = self.selector.block_size
        key_blocks = -(-shape.key_length // size)
        rows = shape.query_length * (shape.heads // shape.kv_heads)
        width = self.selector.width(key_blocks)
        sizes = Sizes.of(rows, width, key_blocks)
        scores = shape.kv_heads * sizes.tiles * sizes.rows * size
        support = shape.heads * _most_pairs(shape, width, size)
        cost = softmax_cost(shape, scores, support, None)
        merging = 2 * shape.batch_size * shape.kv_heads * rows * width
        return replace(
            cost,
            macs=cost.macs + self.selector.macs(shape),
            elementwise=shape.batch_size * scores + merging + self.selector.elementwise(shape),
        )


def _most_pairs(shape: Shape, width: int, size: int) -> int:
    """The most (query, key) pairs that a head sees where each query sees `width` blocks."""
    if not shape.is_causal:
        return shape.query_length * min(shape.key_length, width * size)
    offset = shape.key_length - shape.query_length
    past = _past_pairs(shape.key_length, width, size) - _past_pairs(max(0, offset), width, size)
    return min(past, causal_pairs(shape.query_length, shape.key_length))


def _past_pairs(length: int, width: int, size: int) -> int:
    """The most pairs of the first `length` causal queries: at most width - 1 whole blocks, and the
    query's own as far as itself."""
    blocks, rest = divmod(length, size)
    filling = min(blocks, width - 1)  # blocks before which there are fewer than width - 1
    whole = filling * (filling - 1) // 2 + (blocks - filling) * (width - 1)
    own = blocks * (size * (size + 1) // 2) + rest * (rest + 1) // 2
    return size * size * whole + rest * size * filling + own


def _in_tiles(engine: SelectedSoftmax, call: Call) -> Tensor:
    placed = Placed.of(call)
    selection = engine.selector.select(placed)
    return selected_tiles.attend_in_tiles(engine, placed, selection, engine.selector.block_size)


def _in_operators(engine: SelectedSoftmax, call: Call) -> Tensor:
    placed = Placed.of(call)
    selection = engine.selector.select(placed)
    return attend_selected(engine, placed, selection, engine.selector.block_size)


def _dense_why_not(engine: SelectedSoftmax, call: Call) -> str | None:
    if not engine.selector.sees_all(call.key_length):
        return "the selection may hide keys, and a dense mask of them is quadratic in the length"
    if call.key_mask is not None and call.is_causal and call.query_length > 1:
        entries = call.key_mask.numel() * call.query_length
        if entries > LARGEST_MASK:
            return f"a mask of causality and padding has {entries} entries, over {LARGEST_MASK}"
    return sdpa.why_not(engine, call)


SelectedSoftmax.backends = (
    Backend("dense", sdpa.attend, _dense_why_not),
    Backend("tiles", _in_tiles, selected_tiles.why_not),
    Backend("selected", _in_operators, never_refuses),
    REFERENCE,
)
