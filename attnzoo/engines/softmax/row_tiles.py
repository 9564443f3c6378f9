"""Tiles of rows, each with all the keys that one of them sees, one behind the other: the pieces of
an attention without a pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from attnzoo.call import Call
from attnzoo.engines.softmax.tile_pieces import SCORES, Cap, Slices, cap

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
    diagonal = cap(torch.ones(side, side, dtype=torch.bool).tril(), call.q)
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
