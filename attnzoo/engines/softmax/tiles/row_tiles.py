"""Tiles of rows, each with all the keys that one of them sees, one behind the other: the pieces of
an attention without a pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.softmax.tiles import tiles
from attnzoo.engines.softmax.tiles.tile_pieces import SCORES, Cap, InPieces, Slices, cap

#: Rows of a tile: fewer where a row has many keys, so that a tile stays in the cache.
MOST_ROWS, LEAST_ROWS = 128, 32


def starts_of(rows: int, keys: int) -> range:
    """The first rows of the tiles of so many rows, of which one sees at most so many keys."""
    together = max(LEAST_ROWS, min(MOST_ROWS, 2 * SCORES // max(1, keys)))
    return range(0, rows, together)


def row_tiles(
    call: Call,
    lows: list[int] | None = None,
    make: Callable[..., Slices] = Slices,
) -> Iterator[Slices]:
    """The tiles of one head.

    lows: the first key that a row of each tile of `starts_of` sees; None: that is the first of all
    make: what a tile is made by
    """
    rows, keys, offset = call.query_length, call.key_length, call.offset
    starts = starts_of(rows, keys)
    side = min(rows, starts.step)
    diagonal = cap(torch.ones(side, side, dtype=torch.bool, device="cpu").tril(), call.q)
    for place, first in enumerate(starts):
        size = min(starts.step, rows - first)
        # Rows before the first key see nothing: a tile of them has no keys.
        high = max(0, offset + first + size) if call.is_causal else keys
        low = min(lows[place] if lows else 0, high)
        caps = ()
        if call.is_causal and high:
            near = max(low, offset + first)
            hidden = diagonal[:size, size - (high - near) : size]
            caps = (Cap(near - low, high - low, hidden),)
        yield make(first, (1, size, high - low), low, caps, offset)


def attend(
    engine: SoftmaxReference,
    call: Call,
    openly: Callable[[Call], Tensor],
    pieces: Callable[[Call], Sequence[Sequence[Slices]]] | None = None,
    **added: Tensor | None,
) -> Tensor:
    """A·v by tiles of rows, (batch, heads, query_length, value_dim) in q's dtype, in the precision
    of sums; the backward pass computes A again.

    call: of which `tiles.cannot_work_alone` says nothing, without an attn_mask
    openly: A·v of such a call in operators that autograd can follow, for second derivatives
    pieces: of every sample and head, of the call in that precision; None: all keys, or causally all
        up to a row's own
    added: `log_decay`, `bias` or `row_bias`, as `InPieces` has them
    """
    dtype = accumulation_dtype(call.q.dtype)
    precise = replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))
    frame = precise.frame()  # not the call: autograd holds `compute`, which would hold its tensors
    gates = next((one for one, _ in call.given() if one.name == "log_decay"), None)

    def compute(q: Tensor, k: Tensor, v: Tensor, _: None, *log_decay: Tensor) -> Tensor:
        again = frame(q, k, v)
        return openly(again.giving(gates, *log_decay) if gates and log_decay else again)

    found = [list(row_tiles(precise))] if pieces is None else pieces(precise)
    given = (precise.q, precise.k, precise.v, lambda *_: found, compute, call.key_mask)
    return tiles.attend(engine, InPieces(*given, **added)).to(call.q.dtype)
