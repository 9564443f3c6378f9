"""The sparse engine for key blocks that the data select.

    A_ij = exp(s_ij) / Σ_{l ∈ S(i)} exp(s_il) if j ∈ S(i), else 0,    s_ij = scale · q_i·k_j

S(i) are the keys of the blocks that a selector names for query i and that the masks leave visible.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import is_recorded
from attnzoo.engines.engine import Backend, Cost, Shape, causal_pairs, never_refuses
from attnzoo.engines.softmax import sdpa
from attnzoo.engines.softmax.cache import KeyValueCache
from attnzoo.engines.softmax.native import attend as native
from attnzoo.engines.softmax.native import one_row
from attnzoo.engines.softmax.reference import REFERENCE, visible, weights_of
from attnzoo.engines.softmax.softmax import Softmax, softmax_cost
from attnzoo.engines.sparse.dense import too_large
from attnzoo.engines.sparse.reference import is_short_input
from attnzoo.engines.sparse.selected import selected_native, selected_tiles
from attnzoo.engines.sparse.selected.selected_rows import Sizes, attend_selected, most_pairs
from attnzoo.engines.sparse.selected.selection import Placed, Selector
from attnzoo.engines.sparse.support_mask import attend_supported
from attnzoo.sequences.padding import fetched, leading


def with_sums(
    call: Call, state: KeyValueCache, size: int, *, of_values: bool = False
) -> tuple[Call, KeyValueCache]:
    """A step of one token over all keys with the sums of their stretches, and the state with them;
    both as they are where nobody would read them."""
    if call.query_length > 1 or is_recorded():
        return call, state
    state = state.with_sums(size, of_values=of_values)
    return (call if state.sums is None else state.sums.given(call)), state


class SelectedSoftmax(Softmax):
    """Softmax attention in which a query sees the key blocks that the data select for it.

    Its backends in order: `native_row`, one query in C++, and `native`, short inputs in C++, where
    that has been compiled; `dense`, one SDPA call, where every key is seen; `tiles`, on a CPU in
    memory that stays in cache; `selected`, the same in operators that graphs and transforms follow;
    the reference. Only `dense` and the last form a row for every key.

    selector: names the key blocks that each query sees
    scale: factor of the scores, 1/sqrt(head_dim) by default
    """

    def __init__(self, selector: Selector, scale: float | None = None) -> None:
        super().__init__(scale)
        self.selector = selector

    def with_past(self, call: Call, state: KeyValueCache) -> tuple[Call, KeyValueCache]:
        whole, state = super().with_past(call, state)
        size = self.selector.summed
        return (whole, state) if size is None else with_sums(whole, state, size)

    def is_dense(self, query_length: int, key_length: int) -> bool:
        """Whether exact attention, under a dense mask where the selection hides keys, takes less
        time than what skips them."""
        return self.selector.sees_all(key_length) or is_short_input(query_length, key_length)

    def support(self, call: Call) -> Tensor:
        """Which keys the selected blocks show, (batch, heads, query_length, key_length) bool.
        Memory is quadratic in the length."""
        placed, size = Placed.of(call), self.selector.block_size
        blocks = self.selector.select(placed).of_heads(call.q.shape[1])
        key_blocks = -(-call.key_length // size)
        # Numbers, not truth values: a trace knows no scatter of these.
        shown = blocks.new_zeros(*blocks.shape[:3], key_blocks + 1, dtype=torch.uint8)
        shown = shown.scatter(3, torch.where(blocks < 0, key_blocks, blocks), 1) > 0
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
        size, group = self.selector.block_size, shape.heads // shape.kv_heads
        key_blocks = -(-shape.key_length // size)
        width = self.selector.width(key_blocks)
        lengths = shape.query_length, shape.key_length
        pairs = most_pairs(*lengths, width, size, is_causal=shape.is_causal)
        sizes = Sizes.of(group * pairs, key_blocks)
        scores = shape.kv_heads * sizes.tiles * sizes.rows * size
        support = min(pairs * size, shape.query_length * shape.key_length)
        if shape.is_causal and self.selector.takes_own:
            support = pairs * size - _behind(*lengths, size)
        elif shape.is_causal:
            beyond = causal_pairs(lengths[0], max(0, lengths[1] - width * size))
            support = causal_pairs(*lengths) - beyond
        is_dense = self.is_dense(*lengths)
        if is_dense:
            scores = shape.heads * shape.query_length * shape.key_length
        cost = softmax_cost(shape, scores, shape.heads * support, None)
        elementwise = scores + 2 * shape.heads * shape.query_length * width
        elementwise = cost.elementwise if is_dense else shape.batch_size * elementwise
        return replace(
            cost,
            macs=cost.macs + self.selector.macs(shape),
            elementwise=elementwise + self.selector.elementwise(shape),
        )


def _behind(query_length: int, key_length: int, size: int) -> int:
    """Slots behind causal queries in their own blocks of this size, empty ones among them."""

    def places(length: int) -> int:
        """The sum of the places of the first positions within their blocks."""
        blocks, rest = divmod(length, size)
        return blocks * (size * (size - 1) // 2) + rest * (rest - 1) // 2

    first = max(0, key_length - query_length)
    return (key_length - first) * (size - 1) - (places(key_length) - places(first))


def _compiled(engine: SelectedSoftmax, call: Call) -> Tensor:
    if _sees_all(engine, call):
        return selected_native.attend_all(engine, call)
    placed = Placed.of(call)
    selection = engine.selector.select(placed)
    return selected_native.attend(engine, placed, selection, engine.selector.block_size)


def _sees_all(engine: SelectedSoftmax, call: Call) -> bool:
    """Whether every key is seen, of so few that a mask of all pairs is small."""
    is_short = is_short_input(call.query_length, call.key_length)
    return is_short and engine.selector.sees_all(call.key_length)


def _compiled_passed_over(engine: SelectedSoftmax, call: Call) -> str | None:
    if engine.selector.sees_all(call.key_length) and not _sees_all(engine, call):
        return "every key is seen, and one call of SDPA is exact attention"
    return selected_native.passed_over(call)


def _in_tiles(engine: SelectedSoftmax, call: Call) -> Tensor:
    placed = Placed.of(call)
    selection = engine.selector.select(placed)
    return selected_tiles.attend_in_tiles(engine, placed, selection, engine.selector.block_size)


def _in_operators(engine: SelectedSoftmax, call: Call) -> Tensor:
    placed = Placed.of(call)
    selection = engine.selector.select(placed)
    return attend_selected(engine, placed, selection, engine.selector.block_size)


def _dense(engine: SelectedSoftmax, call: Call) -> Tensor:
    if engine.selector.sees_all(call.key_length):
        return sdpa.attend(engine, call)
    return attend_supported(engine, call)


def _dense_why_not(engine: SelectedSoftmax, call: Call) -> str | None:
    if not engine.is_dense(call.query_length, call.key_length):
        return "the selection may hide keys, and a dense mask of them is quadratic in the length"
    return too_large(call) or sdpa.cannot(engine, call)


def _one_row(engine: SelectedSoftmax, call: Call) -> Tensor:
    selector = engine.selector
    if selector.sees_all(call.key_length):
        return one_row.attend(engine, call)
    placed = Placed.of(call)
    blocks, size = selector.of_one(placed), selector.block_size
    return one_row.attend(engine, placed.call, blocks=blocks, block_size=size)


SelectedSoftmax.backends = (
    one_row.backend(_one_row),
    Backend(
        "native",
        _compiled,
        native.why_not,
        untried=_compiled_passed_over,
        skips_padding=_sees_all,
    ),
    Backend("dense", _dense, _dense_why_not),
    Backend("tiles", _in_tiles, selected_tiles.why_not),
    Backend("selected", _in_operators, never_refuses),
    REFERENCE,
)
