"""The pieces of `tiles` as tensors that the C++ reads: tiles of rows, runs of keys, and caps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.eager import unrecorded
from attnzoo.engines.softmax.tiles.tile_pieces import Kept, Piece


class TilePlan(NamedTuple):
    """What `native_attention` takes; all of int32 but the limits, which have the dtype of the call.

    tiles: (tiles, 6), of each its first row, its rows, its first run and the end of its runs, its
        first cap and the end of its caps
    runs: (runs, 3), first key, number of keys, and a number that runs share which may be computed
        together
    caps: (caps, 5), first and end of the capped keys among those of the tile, the places of their
        limits and of their spans, and 1 where each key has its own of both, 0 where all share one
    spans: (spans, 2), of each capped key, or of all, the first row that sees it, and the end of
        those
    limits: of each cap (keys or 1, rows of the tile) one after the other
    ranges: (heads, 2), the first tile of each head, and the end of its tiles
    """

    tiles: Tensor
    runs: Tensor
    caps: Tensor
    spans: Tensor
    limits: Tensor
    ranges: Tensor


def ranges_of(starts: Sequence[int]) -> Tensor:
    """The `ranges` of heads whose tiles follow one another.

    starts: the first tile of each head, and the number of tiles
    """
    edges = torch.tensor(starts, dtype=torch.int32, device="cpu")
    return torch.stack([edges[:-1], edges[1:]], 1)


def plan_of(heads: Sequence[Sequence[Piece]], key_length: int, dtype: torch.dtype) -> TilePlan:
    """The plan of the pieces of every head, or of every sample and head.

    heads: where all heads share their pieces, the plan has one head
    key_length: number of keys of the call
    dtype: of the limits
    """
    shared = all(pieces is heads[0] for pieces in heads)
    found = heads[0] if shared else heads
    if isinstance(found, Kept):
        return _kept_plan(found, shared, key_length, dtype)
    return _plan_of(found, shared, key_length, dtype)


def _plan_of(found: Sequence[Any], shared: bool, key_length: int, dtype: torch.dtype) -> TilePlan:
    """found: the pieces of one head, which all share, or of every one"""
    parts, starts = _Parts(key_length), [0]
    for pieces in [found] if shared else found:
        for piece in pieces:
            parts.take(piece)
        starts.append(parts.tile_count)
    return parts.plan(starts, torch.empty(0, dtype=dtype, device="cpu"))


@lru_cache(maxsize=32)
def _kept_plan(found: Kept, shared: bool, key_length: int, dtype: torch.dtype) -> TilePlan:
    with unrecorded(), torch.inference_mode(False):
        return _plan_of(found, shared, key_length, dtype)


class _Parts:
    """The tensors of a plan, as far as pieces have been taken."""

    def __init__(self, key_length: int) -> None:
        self.key_length = key_length
        self.tile_count = self._run_count = self._cap_count = self._limit_count = (
            self._span_count
        ) = 0
        self._tiles: list[Tensor] = []
        self._runs: list[Tensor] = []
        self._caps: list[Tensor] = []
        self._spans: list[Tensor] = []
        self._limits: list[Tensor] = []
        self._places: dict[int, tuple[Tensor, int, int]] = {}

    def take(self, piece: Piece) -> None:
        """Add the tiles of a piece, one for each part."""
        parts, size, _ = piece.shape
        runs, caps = piece.runs(self.key_length), self._caps_of(piece)
        number = torch.arange(parts, device="cpu")
        first_run = self._run_count + number * runs.shape[1]
        first_cap = self._cap_count + number * caps.shape[1]
        columns = (
            piece.first + number * size,
            torch.full((parts,), size, device="cpu"),
            first_run,
            first_run + runs.shape[1],
            first_cap,
            first_cap + caps.shape[1],
        )
        self._tiles.append(torch.stack(columns, 1))
        self._runs.append(runs.flatten(0, 1))
        self._caps.append(caps.flatten(0, 1))
        self.tile_count += parts
        self._run_count += parts * runs.shape[1]
        self._cap_count += parts * caps.shape[1]

    def plan(self, starts: list[int], like: Tensor) -> TilePlan:
        """The plan of all pieces taken.

        starts: the first tile of each head, and the number of tiles
        like: of whose dtype the limits are
        """

        def joined(parts: list[Tensor], width: int) -> Tensor:
            return torch.cat([torch.empty(0, width, dtype=torch.long, device="cpu"), *parts]).int()

        return TilePlan(
            joined(self._tiles, 6),
            F.pad(joined(self._runs, 2), (0, 1)),
            joined(self._caps, 5),
            joined(self._spans, 2),
            torch.cat([like.new_empty(0), *self._limits]),
            ranges_of(starts),
        )

    def _caps_of(self, piece: Piece) -> Tensor:
        """(parts, caps, 5)"""
        parts, size, _ = piece.shape
        found = torch.ones(parts, len(piece.caps), 5, dtype=torch.long, device="cpu")
        for number, cap in enumerate(piece.caps):
            keys = cap.stop - cap.start
            limits, spans = self._places_of(cap.largest, size, keys)
            own = keys if cap.largest.dim() > 2 and len(cap.largest) > 1 else 0
            found[:, number, 0], found[:, number, 1] = cap.start, cap.stop
            found[:, number, 2] = limits + own * size * torch.arange(parts, device="cpu")
            found[:, number, 3] = spans + own * torch.arange(parts, device="cpu")
        return found

    def _places_of(self, largest: Tensor, size: int, keys: int) -> tuple[int, int]:
        """Where the limits and the spans of a cap stand; pieces share caps, which are kept once."""
        known = self._places.get(id(largest))
        if known is None:
            whole = largest if largest.dim() > 2 else largest[None]
            limits = whole.mT.expand(-1, keys, size)
            seen = (limits > -torch.inf).int()
            first, behind = seen.argmax(-1), seen.flip(-1).argmax(-1)
            end = torch.where(seen.any(-1), size - behind, 0)
            known = self._places[id(largest)] = (largest, self._limit_count, self._span_count)
            self._limits.append(limits.flatten())
            self._spans.append(torch.stack([first, end], -1).flatten(0, 1))
            self._limit_count += limits.numel()
            self._span_count += first.numel()
        return known[1], known[2]
