"""A window and global tokens: every row sees the global tokens beside its window, and a global
token's row sees every key.

The keys of the global tokens are fetched and laid beside every slice of the window as more columns,
so that one softmax goes over both; in the window itself they are hidden, so that a key counts once.
The rows of the global tokens are computed apart and written over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from attnzoo.arguments import check_count
from attnzoo.call import Call, UnsupportedError
from attnzoo.eager import can_look, is_recorded
from attnzoo.engines.engine import Backend, Cost, Shape, StateSizes, never_refuses
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS, bias_of_rows
from attnzoo.engines.softmax.reference import reference, visible, weights_of
from attnzoo.engines.softmax.rows import attend_rows
from attnzoo.engines.softmax.softmax import softmax_cost
from attnzoo.engines.sparse import dense
from attnzoo.engines.sparse.global_cache import GlobalCache
from attnzoo.engines.sparse.patterns.grid import Grid, grid_of
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.sparse import Sparse
from attnzoo.engines.sparse.support_mask import attend_supported
from attnzoo.engines.sparse.windows import dilated
from attnzoo.engines.sparse.windows.columns import Columns
from attnzoo.engines.sparse.windows.window_sparse import WindowSparse
from attnzoo.sequences.padding import fetched, first_real, slots_of
from attnzoo.spec import Input

GLOBAL_MASK = Input("global_mask", "batch keys", "bool", padded=False)
#: q, k and v of the rows of global tokens.
OWN = (
    Input("global_q", "batch heads queries width", like="q"),
    Input("global_k", "batch kv_heads keys width", padded=0.0, like="k"),
    Input("global_v", "batch kv_heads keys value_width", padded=0.0, like="v"),
)


@dataclass(frozen=True)
class GlobalCall(Call):
    """A call with global tokens: its input global_mask names them all.

    counts: the most global keys, and the most global queries, of a sample.
    """

    counts: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, call: Call, mask: Tensor, counts: tuple[int, int]) -> Self:
        return cls(**{**vars(call.giving(GLOBAL_MASK, mask)), "counts": counts})

    @property
    def mask(self) -> Tensor:
        """Which keys are global, (batch, key_length)."""
        return self.inputs["global_mask"]

    @property
    def query_mask(self) -> Tensor:
        """Which queries are, (batch, query_length)."""
        return _of_queries(self.mask, self)

    @property
    def has_own(self) -> bool:
        """Whether the rows of global tokens have other q, k or v."""
        return any(one.name in self.inputs for one in OWN)

    @property
    def own(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of the rows of global tokens."""
        q, k, v = (
            self.inputs.get(one.name, x)
            for one, x in zip(OWN, (self.q, self.k, self.v), strict=True)
        )
        return q, k, v


def _plain(call: Call) -> Call:
    """The call without what global tokens alone need."""
    return replace(call.over(call.q, call.k, call.v, call.key_mask), segments=call.segments)


class WindowAndGlobals(WindowSparse):
    """Softmax over a window and the global tokens, which see every key and which every row sees.

    pattern: the window
    global_tokens: how many real tokens at the beginning of every sample are global, besides those
        of the call's global_mask
    scale: factor of the scores, 1/sqrt(head_dim) by default
    dropout: probability that an entry of A is dropped, in training only
    softcap: keeps scores within ±softcap; None: they are as they are
    """

    def __init__(
        self,
        pattern: Window,
        global_tokens: int = 0,
        scale: float | None = None,
        dropout: float = 0.0,
        *,
        softcap: float | None = None,
    ) -> None:
        super().__init__(pattern, scale, dropout, softcap=softcap)
        self.global_tokens = check_count("global_tokens", global_tokens)

    @property
    def reach(self) -> int | None:
        return None if self.global_tokens else super().reach

    def completed(self, call: Call) -> Call:
        """A `GlobalCall`, or a call without global tokens."""
        named = call.get("global_mask")
        if named is None and not self.global_tokens:
            return _plain(call)
        first = min(self.global_tokens, call.key_length)
        if call.key_mask is None:
            mask = (torch.arange(call.key_length, device=call.q.device) < first).expand(
                call.k.shape[0], -1
            )
        else:
            mask = first_real(call.key_mask, first)
        if named is not None:
            mask = mask | (named if call.key_mask is None else named & call.key_mask)
            counts = _most(mask), _most(_of_queries(mask, call))
        elif call.key_mask is None:
            counts = first, min(max(0, first - call.offset), call.query_length, first)
        else:
            counts = (
                _most(mask, first),
                _most(_of_queries(mask, call), min(first, call.query_length)),
            )
        return GlobalCall.of(call, mask, counts) if counts[0] else _plain(call)

    def support(self, call: Call) -> Tensor:
        if not isinstance(call, GlobalCall):
            return super().support(call)
        seen_by_globals = call.query_mask[:, None, :, None]
        return self.pattern.mask(grid_of(call)) | call.mask[:, None, None] | seen_by_globals

    def matrix(self, call: Call) -> Tensor:
        weights = super().matrix(call)
        if not isinstance(call, GlobalCall) or not call.has_own:
            return weights
        mask, (q, k, _) = visible(call), call.own
        rows = call.query_mask[:, None, :, None]
        return torch.where(rows, weights_of(self, replace(call, q=q, k=k), mask), weights)

    @property
    def state_type(self) -> type | None:
        return GlobalCache

    def init_state(self, sizes: StateSizes) -> GlobalCache:
        return GlobalCache.around(super().init_state(sizes), self.global_tokens)

    def with_past(self, call: Call, state: GlobalCache) -> tuple[Call, GlobalCache]:
        if state.is_window(call):
            after = state.append(call, None)
            return call.over(call.q, after.window.k, after.window.v, None), after
        mask = state.new_globals(call)
        own = {one: call.inputs[one.name] for one in OWN if one.name in call.inputs}
        if mask is not None and own and state.seen:
            raise UnsupportedError(
                "a global token with a projection of its own must come in the first step: the "
                "state has no such keys of the past"
            )
        new = 0 if mask is None else _most(mask)
        whole, named = state.joined(call, mask)
        if state.kept or new:
            for one, x in own.items() if new else ():  # of all keys: there is no past
                whole = whole.giving(one, x)
            whole = GlobalCall.of(whole, named, (state.kept + new, new))
        return whole, state.append(call, mask)

    def has_columns(self, call: Call) -> bool:
        return isinstance(call, GlobalCall)

    def skips_padding(self, call: Call, requested: str) -> bool:
        if self.global_tokens or call.get(GLOBAL_MASK.name) is not None:
            return False  # not asked of `completed`, which would look for global tokens twice
        return super().skips_padding(call, requested)

    def columns_of(self, call: Call) -> tuple[Call, Columns | None]:
        if not isinstance(call, GlobalCall):
            return call, None
        slots = slots_of(call.mask, call.counts[0])
        others = ~call.mask if call.key_mask is None else call.key_mask & ~call.mask
        columns = Columns.at(call, slots, call.mask.gather(1, slots))
        return replace(_plain(call), key_mask=others), columns

    def finished(self, call: Call, out: Tensor) -> Tensor:
        """`out` with the rows of global tokens made anew: they see every key."""
        if not isinstance(call, GlobalCall) or not call.counts[1]:
            return out
        return _with_global_rows(self, call, out, call.counts[1])

    def cost(self, shape: Shape) -> Cost:
        if not self.global_tokens:
            return super().cost(shape)
        grid = Grid(shape.heads, shape.query_length, shape.key_length, shape.is_causal)
        is_short = self.softcap is None and Sparse.is_short(self, grid)
        keys = min(self.global_tokens, shape.key_length)
        queries = min(max(0, keys - grid.offset), shape.query_length, keys)
        executed = dilated.count_executed(self.pattern, shape, keys)
        executed += shape.heads * queries * shape.key_length
        if is_short:
            executed = shape.heads * shape.query_length * shape.key_length
        support = dilated.count_support(self.pattern, grid, keys)
        cost = softmax_cost(shape, executed, support, self.pattern.near + self.global_tokens)
        return self.with_softcap(cost, shape)


def _most(mask: Tensor, bound: int | None = None) -> int:
    """The most True in a row of (batch, length); `bound`, where there is one and a look would
    stall, and all where nobody may look."""
    if not can_look(mask, may_stall=bound is None):
        return mask.shape[1] if bound is None else bound
    return int(mask.sum(1).amax()) if mask.numel() else 0


def _of_queries(mask: Tensor, call: Call) -> Tensor:
    """(batch, key_length) -> (batch, query_length): what stands at the queries' positions, False
    before the first."""
    return torch.nn.functional.pad(mask, (max(0, -call.offset), 0))[:, max(0, call.offset) :]


def _with_global_rows(
    engine: WindowAndGlobals, call: GlobalCall, out: Tensor, count: int
) -> Tensor:
    """`out` with the rows of global tokens, at most `count` a sample, made anew."""
    mask = call.query_mask
    rows = slots_of(mask, count)
    q, k, v = call.own
    visible_keys = None if call.key_mask is None else call.key_mask[:, None, None]
    if call.is_causal:
        past = (
            torch.arange(call.key_length, device=q.device) <= (rows + call.offset)[:, None, :, None]
        )
        visible_keys = past if visible_keys is None else past & visible_keys
    bias = call.get(DISTANCE_BIAS.name)
    bias = None if bias is None else bias_of_rows(bias, rows + call.offset, call)
    made = attend_rows(engine, fetched(q, rows), k, v, visible_keys, None, bias)
    made = torch.where(mask.gather(1, rows)[:, None, :, None], made, fetched(out, rows))
    index = rows[:, None, :, None].expand_as(made)
    in_place = not (out.requires_grad or made.requires_grad or is_recorded())
    return out.scatter_(2, index, made) if in_place else out.scatter(2, index, made)


def _reference(engine: WindowAndGlobals, call: Call) -> Tensor:
    if not (isinstance(call, GlobalCall) and call.has_own):
        return reference(engine, call)
    plain = GlobalCall.of(_plain(call), call.mask, call.counts)
    q, k, v = call.own
    of_globals = reference(engine, replace(plain, q=q, k=k, v=v))
    rows = call.query_mask[:, None, :, None]
    return torch.where(rows, of_globals, reference(engine, plain))


def _dense(engine: WindowAndGlobals, call: Call) -> Tensor:
    if not isinstance(call, GlobalCall):
        return dense.attend(engine, call)
    out = attend_supported(engine, call)
    return engine.finished(call, out) if call.has_own else out


def _dense_why_not(engine: WindowAndGlobals, call: Call) -> str | None:
    if not isinstance(call, GlobalCall):
        return dense.why_not(engine, call)
    if not Sparse.is_short(engine, grid_of(call)):
        return "a dense mask of the window and the global tokens is quadratic in the length"
    return dense.cannot(engine, call)


_NATIVE, _, *_FAST, _ = WindowSparse.backends
WindowAndGlobals.backends = (
    _NATIVE,
    Backend("dense", _dense, _dense_why_not),
    *_FAST,
    Backend("reference", _reference, never_refuses),
)
