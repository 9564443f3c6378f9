"""A window and global tokens: every row sees the global tokens beside its window, and a global
token's row sees every key.

The keys of the global tokens are fetched and laid beside every slice of the window as more columns,
so that one softmax goes over both; in the window itself they are hidden, so that a key counts once.
The rows of the global tokens are computed apart and written over.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.arguments import check_count
from attnzoo.call import Call
from attnzoo.eager import can_look, is_recorded
from attnzoo.engines.engine import Backend, Cost, Shape, never_refuses
from attnzoo.engines.softmax.softmax import dense_weights, reference, sdpa, softmax_cost, visible
from attnzoo.engines.sparse import dilated, flex
from attnzoo.engines.sparse.columns import Columns, attend_dilated
from attnzoo.engines.sparse.global_cache import GlobalCache
from attnzoo.engines.sparse.patterns import Grid, Window
from attnzoo.engines.sparse.sparse import Sparse, attend_windows, grid_of
from attnzoo.padding import fetched, first_real, slots_of


class WindowAndGlobals(Sparse):
    """Softmax over a window and the global tokens: those of the call's global_mask, and the first
    `global_tokens` real ones of every sample."""

    pattern: Window

    def __init__(
        self,
        pattern: Window,
        global_tokens: int = 0,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(pattern, scale, dropout)
        self.global_tokens = check_count("global_tokens", global_tokens)

    def completed(self, call: Call) -> Call:
        """The call with all its global tokens in its global_mask, and with their counts."""
        if call.global_mask is None and not self.global_tokens:
            return replace(call, global_qkv=None)
        first = min(self.global_tokens, call.key_length)
        if call.key_mask is None:
            mask = (torch.arange(call.key_length, device=call.q.device) < first).expand(
                call.k.shape[0], -1
            )
        else:
            mask = first_real(call.key_mask, first)
        if call.global_mask is not None:
            mask = mask | (
                call.global_mask if call.key_mask is None else call.global_mask & call.key_mask
            )
            counts = _most(mask), _most(_of_queries(mask, call))
        elif call.key_mask is None:
            counts = first, min(max(0, first - call.offset), call.query_length, first)
        else:
            counts = (
                _most(mask, first),
                _most(_of_queries(mask, call), min(first, call.query_length)),
            )
        return (
            replace(call, global_mask=mask, global_counts=counts)
            if counts[0]
            else replace(call, global_mask=None, global_qkv=None)
        )

    def matrix(self, call: Call) -> Tensor:
        if call.global_mask is None:
            return super().matrix(call)
        mask, near = (
            visible(call),
            self.pattern.mask(grid_of(call)) | call.global_mask[:, None, None],
        )
        weights = dense_weights(self, call, near if mask is None else near & mask)
        q, k, _ = (call.q, call.k, call.v) if call.global_qkv is None else call.global_qkv
        rows = _of_queries(call.global_mask, call)[:, None, :, None]
        return torch.where(rows, dense_weights(self, replace(call, q=q, k=k), mask), weights)

    def init_state(
        self,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        max_length: int | None,
        dtype: torch.dtype,
        device: Any,
    ) -> GlobalCache:
        return GlobalCache.around(
            super().init_state(batch_size, kv_heads, head_dim, max_length, dtype, device),
            self.global_tokens,
        )

    def step(self, call: Call, state: GlobalCache, backend: str) -> tuple[Tensor, GlobalCache, str]:
        mask = state.new_globals(call)
        new = 0 if mask is None else _most(mask)
        whole = replace(state.joined(call, mask), global_counts=(state.kept + new, new))
        if whole.global_counts == (0, 0):
            whole = replace(whole, global_mask=None, global_qkv=None)
        out, name = self.run(whole, backend)
        return out, state.append(call, mask), name

    def cost(self, shape: Shape) -> Cost:
        if not self.global_tokens:
            return super().cost(shape)
        grid = Grid(shape.heads, shape.query_length, shape.key_length, shape.is_causal)
        keys = min(self.global_tokens, shape.key_length)
        queries = min(max(0, keys - grid.offset), shape.query_length, keys)
        executed = (
            dilated.count_executed(self.pattern, shape) + shape.heads * queries * shape.key_length
        )
        for part in dilated.parts(self.pattern, shape):
            executed += (
                part.shape.batch_size
                // shape.batch_size
                * part.heads
                * part.shape.query_length
                * keys
            )
        support = dilated.count_support(self.pattern, grid, keys)
        return softmax_cost(shape, executed, support, self.pattern.near + self.global_tokens)


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


def _blocks(engine: WindowAndGlobals, call: Call) -> Tensor:
    if call.global_mask is None:
        whole = engine.attend_whole(call)
        return attend_windows(engine, engine.pattern, call) if whole is None else whole
    assert call.global_counts is not None
    keys, queries = call.global_counts
    slots = slots_of(call.global_mask, keys)
    out = dilated.by_dilation(
        engine.pattern, call, lambda window, part: _of_heads(engine, window, part, slots)
    )
    return _with_global_rows(engine, call, out, queries) if queries else out


def _of_heads(engine: WindowAndGlobals, window: Window, call: Call, slots: Tensor) -> Tensor:
    """The rows of heads of one dilation, all as if no query were global."""
    assert call.global_mask is not None
    columns = Columns(
        fetched(call.k, slots), fetched(call.v, slots), call.global_mask.gather(1, slots), slots
    )
    near = replace(
        call,
        key_mask=~call.global_mask if call.key_mask is None else call.key_mask & ~call.global_mask,
    )
    return attend_dilated(engine, window, near, columns)


def _with_global_rows(engine: WindowAndGlobals, call: Call, out: Tensor, count: int) -> Tensor:
    """`out` with the rows of global tokens, at most `count` a sample, made anew: they see every
    key."""
    assert call.global_mask is not None
    mask = _of_queries(call.global_mask, call)
    rows = slots_of(mask, count)
    q, k, v = (call.q, call.k, call.v) if call.global_qkv is None else call.global_qkv
    visible_keys = None if call.key_mask is None else call.key_mask[:, None, None]
    if call.is_causal:
        past = (
            torch.arange(call.key_length, device=q.device) <= (rows + call.offset)[:, None, :, None]
        )
        visible_keys = past if visible_keys is None else past & visible_keys
    made = sdpa(engine, fetched(q, rows), k, v, visible_keys)
    made = torch.where(mask.gather(1, rows)[:, None, :, None], made, fetched(out, rows))
    index = rows[:, None, :, None].expand_as(made)
    in_place = not (out.requires_grad or made.requires_grad or is_recorded())
    return out.scatter_(2, index, made) if in_place else out.scatter(2, index, made)


def _reference(engine: WindowAndGlobals, call: Call) -> Tensor:
    if call.global_qkv is None:
        return reference(engine, call)
    q, k, v = call.global_qkv
    of_globals = reference(engine, replace(call, q=q, k=k, v=v, global_qkv=None))
    assert call.global_mask is not None
    rows = _of_queries(call.global_mask, call)[:, None, :, None]
    return torch.where(rows, of_globals, reference(engine, replace(call, global_qkv=None)))


def _flex_why_not(engine: WindowAndGlobals, call: Call) -> str | None:
    differ = (
        None
        if call.global_mask is None
        else "global tokens differ from sample to sample, which its tables do not"
    )
    return flex.why_not(engine, call) or differ


WindowAndGlobals.backends = (
    Backend("blocks", _blocks, never_refuses),
    Backend("flex", flex.run, _flex_why_not),
    Backend("reference", _reference, never_refuses),
)
