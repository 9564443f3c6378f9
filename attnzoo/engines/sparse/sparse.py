"""Engine 2, sparse: softmax on the support that a pattern draws, without ever laying it out over n
× n."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.call import Call
from attnzoo.engines.engine import (
    SOFTMAX_OPERATIONS,
    Backend,
    Cost,
    Shape,
    causal_pairs,
    never_refuses,
)
from attnzoo.engines.softmax import tiles
from attnzoo.engines.softmax.cache import KeyValueCache
from attnzoo.engines.softmax.softmax import (
    Softmax,
    causal_mask,
    dense_weights,
    reference,
    sdpa,
    softmax_cost,
    visible,
)
from attnzoo.engines.sparse import blocks, dilated, flex, windows
from attnzoo.engines.sparse.columns import Columns, attend_dilated
from attnzoo.engines.sparse.global_cache import GlobalCache
from attnzoo.engines.sparse.patterns import BlockPattern, Grid, Pattern, Window, grid_of, padded
from attnzoo.padding import (
    ends_real,
    fetched,
    first_real,
    moved_back,
    moved_behind,
    on_leading_zero,
    slots_of,
    squared,
    starts_real,
)

MASKED = 2**22  # slots of a dense mask, at most


class Sparse(Softmax):
    """Softmax attention in which query i sees only the keys that `pattern` shows it (and the masks
    allow).

    sink_logits: of a window, learn so many logits, one a head: each is one more score of every row,
    that counts in the row's sum and weighs no value, so that a row of A may sum to less than 1.
    """

    def __init__(
        self,
        pattern: Pattern,
        scale: float | None = None,
        dropout: float = 0.0,
        *,
        sink_logits: int = 0,
    ) -> None:
        super().__init__(scale, dropout)
        self.pattern = pattern
        self.sink_logits = nn.Parameter(torch.zeros(sink_logits)) if sink_logits else None

    def reset_parameters(self) -> None:
        """Set what is learned to what it begins with."""
        if self.sink_logits is not None:
            nn.init.zeros_(self.sink_logits)

    def completed(self, call: Call) -> Call:
        return call if self.sink_logits is None else replace(call, sink_logits=self.sink_logits)

    def run(self, call: Call, backend: str) -> tuple[Tensor, str]:
        chosen = self.choose(call, backend)
        by_slots = chosen.run is not reference and self.pattern.counts_positions
        if by_slots and not starts_real(call.key_mask):
            return self._from_first_real(chosen, call), chosen.name
        return chosen.run(self, call), chosen.name

    def matrix(self, call: Call) -> Tensor:
        pattern, mask = self.pattern, visible(call)
        if call.key_mask is None or mask is None:
            seen = pattern.mask(grid_of(call))
            return dense_weights(self, call, seen if mask is None else seen & mask)
        if isinstance(pattern, Window):
            seen = replace(pattern, sinks=0).mask(grid_of(call))
            return dense_weights(
                self, call, mask & (seen | first_real(call.key_mask, pattern.sinks)[:, None, None])
            )
        if not pattern.counts_positions:
            return dense_weights(self, call, mask & pattern.mask(grid_of(call)))
        seen = pattern.mask(padded(grid_of(call), call.key_mask))
        weights = dense_weights(self, call, mask & seen)
        return on_leading_zero(weights, call.key_mask) if not call.offset else weights

    def _from_first_real(self, chosen: Backend, call: Call) -> Tensor:
        """A·v of a padded call by a backend that lays positions out from the first slot."""
        assert call.key_mask is not None
        if call.query_length == 1 or call.offset < 0 or (call.offset and not call.is_causal):
            return reference(self, call)
        square = squared(call)
        out = chosen.run(self, moved_behind(square))
        return moved_back(out, call.key_mask)[:, :, call.offset :]

    def init_state(
        self,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        max_length: int | None,
        dtype: torch.dtype,
        device: Any,
    ) -> Any:
        sizes, like = (batch_size, kv_heads, head_dim, max_length), (dtype, device)
        if isinstance(self.pattern, Window) and self.pattern.sinks:
            return GlobalCache.around(
                KeyValueCache.empty(*sizes, self.pattern.near - 1, *like), self.pattern.sinks
            )
        reach = self.pattern.reach
        return KeyValueCache.empty(*sizes, None if reach is None else reach - 1, *like)

    def step(self, call: Call, state: Any, backend: str) -> tuple[Tensor, Any, str]:
        if not isinstance(state, GlobalCache):
            return super().step(call, state, backend)
        mask = state.new_globals(call)
        out, name = self(replace(state.joined(call, mask), global_mask=None), backend)
        return out, state.append(call, mask), name

    def cost(self, shape: Shape) -> Cost:
        grid = Grid(shape.heads, shape.query_length, shape.key_length, shape.is_causal)
        whole = self._is_whole(grid) and self.sink_logits is None
        if whole:
            executed = shape.heads * shape.query_length * shape.key_length
            support = (
                shape.heads * causal_pairs(shape.query_length, shape.key_length)
                if shape.is_causal
                else executed
            )
        elif isinstance(self.pattern, Window):
            executed, support = (
                dilated.count_executed(self.pattern, shape),
                dilated.count_support(self.pattern, grid),
            )
        elif isinstance(self.pattern, BlockPattern):
            executed, support = blocks.count_pairs(self.pattern, grid)
        else:
            executed = shape.heads * shape.query_length * shape.key_length
            support = _count_pairs(self.pattern, grid)
        cost = softmax_cost(shape, executed, support, self.pattern.remembers)
        cost = replace(cost, skipped_macs=cost.macs - cost.support_macs if whole else 0)
        return (
            cost
            if self.sink_logits is None
            else self._with_logits(cost, shape, len(self.sink_logits))
        )

    def attend_whole(self, call: Call) -> Tensor | None:
        """A·v as exact attention computes it, where nothing but causality and padding hides a key;
        else None, as where a mask of both is large."""
        grid, mask = grid_of(call), call.key_mask
        if call.sink_logits is not None or not self._is_whole(grid):
            return None
        if self.pattern.tied_to_end and not grid.is_causal and not ends_real(mask):
            return None
        if mask is None:
            return sdpa(
                self, call.q, call.k, call.v, is_causal=grid.is_causal and grid.query_length > 1
            )
        mask = mask[:, None, None]
        if grid.is_causal and grid.query_length > 1:
            if mask.numel() * grid.query_length > MASKED:
                return None
            mask = mask & causal_mask(grid.query_length, grid.key_length, mask.device)
        return sdpa(self, call.q, call.k, call.v, mask)

    def _is_whole(self, grid: Grid) -> bool:
        """Whether exact attention can stand for the pattern: causal, it must be a square, or the
        last row of one."""
        return self.pattern.hides_nothing(grid) and (
            not grid.is_causal or grid.query_length in (1, grid.key_length)
        )

    def _with_logits(self, cost: Cost, shape: Shape, logits: int) -> Cost:
        """One more term in the softmax of every row."""
        assert isinstance(self.pattern, Window)
        parts = dilated.parts(self.pattern, shape)
        rows = sum(part.shape.batch_size * part.heads * part.shape.query_length for part in parts)
        return replace(
            cost,
            parameters=logits,
            elementwise=cost.elementwise + SOFTMAX_OPERATIONS * rows,
            moved_bytes=cost.moved_bytes + logits * shape.dtype.itemsize,
        )


def _count_pairs(pattern: Pattern, grid: Grid) -> int:
    """Visible (head, query, key) triples of a pattern without a layout in blocks: over its whole
    mask, as its only backend does."""
    mask = pattern.mask(grid)
    if grid.is_causal:
        mask = mask & torch.ones(grid.query_length, grid.key_length, dtype=torch.bool).tril(
            grid.offset
        )
    return int(mask.sum()) * (grid.heads // mask.shape[0])


def _blocks(engine: Sparse, call: Call) -> Tensor:
    whole = engine.attend_whole(call)
    if whole is not None:
        return whole
    if isinstance(engine.pattern, Window):
        return attend_windows(engine, engine.pattern, call)
    assert isinstance(engine.pattern, BlockPattern)
    return blocks.attend(engine, engine.pattern, call, grid_of(call))


def attend_windows(engine: Sparse, pattern: Window, call: Call) -> Tensor:
    """A·v for a window of any dilation, with or without sinks."""
    return dilated.by_dilation(pattern, call, partial(_window, engine))


def _window(engine: Sparse, window: Window, call: Call) -> Tensor:
    """For heads of one dilation."""
    if window.sinks or not (call.sink_logits is None or tiles.serves(engine, call)):
        near, columns = _with_sinks(call, min(window.sinks, grid_of(call).key_length))
        return attend_dilated(engine, window, near, columns)
    return dilated.of_one_dilation(window, call, lambda plain, part: _plain(engine, plain, part))


def _plain(engine: Sparse, window: Window, call: Call) -> Tensor:
    return windows.attend(engine, window, call, grid_of(call), partial(_window, engine, window))


def _with_sinks(call: Call, count: int) -> tuple[Call, Columns]:
    """The first slots, of padded samples the first real ones, as columns, and the call in whose
    window they are hidden."""
    if count and call.key_mask is not None:
        first = first_real(call.key_mask, count)
        slots = slots_of(first, count)
        columns = Columns(
            fetched(call.k, slots), fetched(call.v, slots), first.gather(1, slots), slots
        )
        return replace(call, key_mask=call.key_mask & ~first), columns
    slots = torch.arange(call.key_length, device=call.q.device).expand(call.k.shape[0], -1)
    behind = slots >= count
    columns = Columns(
        call.k[:, :, :count], call.v[:, :, :count], ~behind[:, :count], slots[:, :count]
    )
    return replace(call, key_mask=behind) if count else call, columns


def _blocks_why_not(engine: Sparse, call: Call) -> str | None:
    if isinstance(engine.pattern, Window | BlockPattern):
        return None
    return f"the pattern {type(engine.pattern).__name__} has no layout in blocks"


Sparse.backends = (
    Backend("blocks", _blocks, _blocks_why_not),
    Backend("flex", flex.run, flex.why_not),  # by name only, until it has run on a GPU
    Backend("reference", reference, never_refuses),
)
