"""The plan of a mask of all pairs: for inputs so short that the mask is small."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnzoo.engines.softmax.native.tile_plan import TilePlan, ranges_of
from attnzoo.engines.softmax.tiles.tile_pieces import cap

ROWS = 64  # rows of a tile, as many as the C++ computes together
GAP = 16  # so few keys between two runs that no row of a tile sees are computed with them


def plan_of_mask(seen: Tensor, dtype: torch.dtype) -> TilePlan:
    """The plan of a mask on the CPU.

    seen: (heads or 1, query_length, key_length) bool, True where a query sees a key
    dtype: of the call
    """
    tiles: list[tuple[int, ...]] = []
    runs: list[tuple[int, int, int]] = []
    caps: list[tuple[int, ...]] = []
    spans: list[Tensor] = []
    limits: list[Tensor] = []
    starts, limit_count, span_count = [0], 0, 0
    for of_head in seen:
        for first in range(0, of_head.shape[0], ROWS):
            rows = of_head[first : first + ROWS]
            counts, size = rows.sum(0), len(rows)
            first_run, first_cap = len(runs), len(caps)
            found = list(_stretches(counts > 0, GAP))
            runs += [(start, end - start, 0) for start, end in found]
            places = [torch.arange(start, end, device="cpu") for start, end in found]
            keys = torch.cat([torch.empty(0, dtype=torch.long, device="cpu"), *places])
            for start, end in _stretches(counts[keys] < size, GAP):
                own = rows[:, keys[start:end]].mT  # (keys, rows)
                caps.append((start, end, limit_count, span_count, 1))
                limits.append(cap(own, torch.empty(0, dtype=dtype)).flatten())
                spans.append(_spans(own))
                limit_count, span_count = limit_count + own.numel(), span_count + len(own)
            tiles.append((first, size, first_run, len(runs), first_cap, len(caps)))
        starts.append(len(tiles))
    return TilePlan(
        _table(tiles, 6),
        _table(runs, 3),
        _table(caps, 5),
        torch.cat([torch.empty(0, 2, dtype=torch.int32, device="cpu"), *spans]),
        torch.cat([torch.empty(0, dtype=dtype, device="cpu"), *limits]),
        ranges_of(starts),
    )


def _stretches(flags: Tensor, gap: int) -> Iterator[tuple[int, int]]:
    """Begin and end of the stretches in which a flag is up; so few others between two join them."""
    places = flags.nonzero().flatten()
    if not len(places):
        return
    breaks = (places.diff() > gap).nonzero().flatten() + 1
    for part in places.tensor_split(breaks):
        yield int(part[0]), int(part[-1]) + 1


def _spans(seen: Tensor) -> Tensor:
    """The first row that sees each key and the end of those, (keys, 2) int32; 0 and 0 for none."""
    flags = seen.int()
    first, behind = flags.argmax(1), flags.flip(1).argmax(1)
    end = torch.where(seen.any(1), seen.shape[1] - behind, 0)
    return torch.stack([first, end], 1).int()


def _table(rows: list[tuple[int, ...]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device="cpu").view(-1, width)
