"""The sparse engine for windows, with or without dilation, sinks and sink logits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.call import Call
from attnzoo.engines.engine import SOFTMAX_OPERATIONS, Backend, Cost, Shape, StateSizes
from attnzoo.engines.softmax.cache import KeyValueCache
from attnzoo.engines.softmax.native import attend as native
from attnzoo.engines.softmax.reference import SINK_LOGITS, reference
from attnzoo.engines.softmax.softmax import softmax_cost
from attnzoo.engines.softmax.tiles import tiles
from attnzoo.engines.softmax.tiles.tile_pieces import Way
from attnzoo.engines.sparse import dense, flex, masked_tiles
from attnzoo.engines.sparse.global_cache import GlobalCache
from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.sparse import Sparse
from attnzoo.engines.sparse.windows import (
    columns,
    columns_in_slices,
    columns_in_tiles,
    dilated,
    window_slices,
    window_tiles,
)
from attnzoo.engines.sparse.windows.columns import Columns, bias_of_columns
from attnzoo.sequences.padding import first_real, slots_of

#: Queries and keys, each, up to which a dense mask serves every window; beyond, one that shows a
#: row at least so many keys for each pair of a query and a key: two fifths of 512, four of 1,024.
ALWAYS_SHORT, SPAN = 256, 0.8 / 1024


class WindowSparse(Sparse):
    """Softmax attention over a window.

    Its backends in order: `native`, `tiles` in C++, where that has been compiled; `dense`, one SDPA
    call, where the window hides nothing; `flex`, FlexAttention; `tiles`, a few rows at a
    time in memory that stays in a CPU's cache;
    `windows`, SDPA on a slice of the keys for every block of queries; `columns`, the same with keys
    beside each slice that every row sees; the reference.

    pattern: the window
    scale: factor of the scores, 1/sqrt(head_dim) by default
    dropout: probability that an entry of A is dropped, in training only
    sink_logits: how many logits to learn, one for each head, or 0 for none; each is one more score
        of every row, that counts in the row's sum and weighs no value, so that a row of A may sum
        to less than 1
    softcap: keeps scores within ±softcap; None: they are as they are
    """

    pattern: Window

    def __init__(
        self,
        pattern: Window,
        scale: float | None = None,
        dropout: float = 0.0,
        *,
        sink_logits: int = 0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(pattern, scale, dropout, softcap=softcap)
        self.sink_logits = nn.Parameter(torch.zeros(sink_logits)) if sink_logits else None

    def reset_parameters(self) -> None:
        """Set what is learned to what it begins with."""
        if self.sink_logits is not None:
            nn.init.zeros_(self.sink_logits)

    def completed(self, call: Call) -> Call:
        return call if self.sink_logits is None else call.giving(SINK_LOGITS, self.sink_logits)

    def farthest(self, call: Call) -> int:
        farthest = super().farthest(call)
        return farthest if self.has_columns(call) else min(farthest, self.pattern.near - 1)

    def has_columns(self, call: Call) -> bool:
        """Whether some keys of the call are seen by every row, wherever it stands."""
        return self.pattern.sinks > 0

    def columns_of(self, call: Call) -> tuple[Call, Columns | None]:
        """The keys that every row sees, and the call in whose window they are hidden."""
        if not self.pattern.sinks:
            return call, None
        return with_sinks(call, min(self.pattern.sinks, call.key_length))

    def finished(self, call: Call, out: Tensor) -> Tensor:
        """`out` with the rows that see more than the window and the columns."""
        return out

    @property
    def state_type(self) -> type | None:
        return GlobalCache if self.pattern.sinks else KeyValueCache

    def init_state(self, sizes: StateSizes) -> Any:
        cache = KeyValueCache.empty(sizes, self.pattern.near - 1)
        return GlobalCache.around(cache, self.pattern.sinks) if self.pattern.sinks else cache

    def with_past(self, call: Call, state: Any) -> tuple[Call, Any]:
        if not isinstance(state, GlobalCache):
            call, state = super().with_past(call, state)
            return self.completed(call), state
        mask = state.new_globals(call)
        whole, _ = state.joined(call, mask)
        return self.completed(whole), state.append(call, mask)

    def is_short(self, grid: Grid) -> bool:
        pairs = grid.query_length * grid.key_length
        is_short = super().is_short(grid)
        if self.pattern.sinks or max(self.pattern.dilations) > 1 or pairs <= ALWAYS_SHORT**2:
            return is_short
        # A mask costs a causal call what SDPA saves by leaving out the future.
        span = self.pattern.window * (1 if grid.is_causal else 2)
        return span >= SPAN * pairs and (is_short or not grid.is_causal)

    def is_dense(self, grid: Grid) -> bool:
        return self.sink_logits is None and super().is_dense(grid)

    def sparse_cost(self, shape: Shape, grid: Grid) -> Cost:
        sinks = min(self.pattern.sinks, shape.key_length)
        executed = dilated.count_executed(self.pattern, shape, sinks)
        support = dilated.count_support(self.pattern, grid)
        cost = softmax_cost(shape, executed, support, self.pattern.remembers)
        return self._with_logits(cost, shape)

    def _with_logits(self, cost: Cost, shape: Shape) -> Cost:
        """One more term in the softmax of every row, where logits are learned."""
        if self.sink_logits is None:
            return cost
        logits, calls = len(self.sink_logits), dilated.plain_shapes(self.pattern, shape)
        rows = sum(own.batch_size * own.heads * own.query_length for own in calls)
        return replace(
            cost,
            parameters=logits,
            elementwise=cost.elementwise + SOFTMAX_OPERATIONS * rows,
            moved_bytes=cost.moved_bytes + logits * shape.dtype.itemsize,
        )


def with_sinks(call: Call, count: int) -> tuple[Call, Columns]:
    """The first slots, of padded samples the first real ones, as columns, and the call in whose
    window they are hidden."""
    if call.key_mask is not None:
        first = first_real(call.key_mask, count)
        slots = slots_of(first, count)
        columns = Columns.at(call, slots, first.gather(1, slots))
        return replace(call, key_mask=call.key_mask & ~first), columns
    slots = torch.arange(call.key_length, device=call.q.device).expand(call.k.shape[0], -1)
    behind, first = slots >= count, slots[:, :count]
    columns = Columns(
        call.k[:, :, :count],
        call.v[:, :, :count],
        ~behind[:, :count],
        first,
        bias_of_columns(call, first),
    )
    return replace(call, key_mask=behind), columns


def _in_tiles(engine: WindowSparse, call: Call, way: Way = tiles.IN_CACHE) -> Tensor:
    def attend_heads(window: Window, part: Call) -> Tensor:
        near, beside = engine.columns_of(part)
        if beside is None:
            plain = partial(window_tiles.in_tiles, engine, way=way)
            return dilated.of_one_dilation(window, near, plain)
        with_columns = partial(columns_in_tiles.in_tiles, way=way)
        return columns.attend_dilated(engine, window, near, beside, with_columns)

    return engine.finished(call, dilated.by_dilation(engine.pattern, call, attend_heads))


def _compiled(engine: WindowSparse, call: Call) -> Tensor:
    if _as_mask(engine, call):
        return masked_tiles.attend(engine, call)
    return _in_tiles(engine, call, native.COMPILED)


def _as_mask(engine: WindowSparse, call: Call) -> bool:
    """Whether a short call takes less time by the mask of its pattern than by classes of a dilated
    window, or by sinks as columns."""
    sinks = engine.pattern.sinks > 0
    is_plain = engine.pattern.dilation == 1 and not sinks
    is_of_pattern = engine.has_columns(call) == sinks  # columns may also be a call's own
    return is_of_pattern and not is_plain and masked_tiles.serves(engine, call)


def _tiles_why_not(engine: WindowSparse, call: Call) -> str | None:
    if engine.has_columns(call) and "distance_bias" in call.inputs:
        return "it has no distance_bias beside keys that every row sees; `columns` has"
    return tiles.why_not(engine, call)


def _in_slices(engine: WindowSparse, call: Call) -> Tensor:
    def attend_heads(window: Window, part: Call) -> Tensor:
        return dilated.of_one_dilation(window, part, partial(window_slices.in_slices, engine))

    return dilated.by_dilation(engine.pattern, call, attend_heads)


def _slices_why_not(engine: WindowSparse, call: Call) -> str | None:
    if engine.has_columns(call):
        return "it has no keys that every row sees (sinks, global tokens); `columns` has"
    return _mixes_pieces(engine, call)


def _mixes_pieces(engine: WindowSparse, call: Call) -> str | None:
    if call.segments is not None and max(engine.pattern.dilations) > 1:
        return "residue classes of a dilated window would mix the pieces of packed rows"
    return None


def _reference_why_not(engine: WindowSparse, call: Call) -> str | None:
    if call.segments is not None and engine.pattern.sinks:
        return "the first tokens of every piece of a packed row are its sinks"
    return None


def _with_columns(engine: WindowSparse, call: Call) -> Tensor:
    def attend_heads(window: Window, part: Call) -> Tensor:
        near, beside = engine.columns_of(part)
        assert beside is not None
        return columns.attend_dilated(engine, window, near, beside, columns_in_slices.in_slices)

    return engine.finished(call, dilated.by_dilation(engine.pattern, call, attend_heads))


def _columns_why_not(engine: WindowSparse, call: Call) -> str | None:
    if engine.has_columns(call):
        return None
    return "it is for keys that every row sees (sinks, global tokens), and there are none"


def _by_flex(engine: WindowSparse, call: Call) -> Tensor:
    def attend_plain(window: Window, part: Call) -> Tensor:
        return flex.attend(engine, window, part)

    return dilated.attend(engine.pattern, call, attend_plain)


def _flex_why_not(engine: WindowSparse, call: Call) -> str | None:
    reason = flex.why_not(engine, call, max(engine.pattern.dilations))
    if reason is None and (engine.has_columns(call) or "sink_logits" in call.inputs):
        return "its tables have no keys that every row sees, and its softmax no sink logits"
    return reason or _mixes_pieces(engine, call)


WindowSparse.backends = (
    Backend(
        "native",
        _compiled,
        native.why_not,
        untried=lambda engine, call: native.passed_over(call),
        skips_padding=lambda engine, call: not engine.has_columns(call) or _as_mask(engine, call),
    ),
    Backend("dense", dense.attend, dense.why_not),
    Backend("flex", _by_flex, _flex_why_not, packs=True, untried=flex.untried),
    Backend("tiles", _in_tiles, _tiles_why_not),
    Backend("windows", _in_slices, _slices_why_not, packs=True),
    Backend("columns", _with_columns, _columns_why_not),
    Backend("reference", reference, _reference_why_not, packs=True),
)
