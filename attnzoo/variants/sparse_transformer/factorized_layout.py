"""Where factorized attention's queries and keys stand: in rows of `stride`, of which each factor
shows some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.variants.sparse_transformer.factorized_patterns import (
    Factor,
    Neighbours,
    OwnBlock,
    Strided,
    Summaries,
)


@dataclass(frozen=True)
class Rows:
    """Where queries and keys stand when they are laid in rows of `stride`: queries in `count` rows
    from row `first` on, keys in `key_rows`."""

    stride: int
    first: int
    count: int
    key_rows: int
    ahead: int
    spare: int

    @classmethod
    def of(cls, stride: int, grid: Grid) -> Rows:
        ahead, spare = grid.offset % stride, -grid.key_length % stride
        count = (ahead + grid.query_length + spare) // stride
        return cls(
            stride, grid.offset // stride, count, (grid.key_length + spare) // stride, ahead, spare
        )

    def queries(self, x: Tensor) -> Tensor:
        """(batch, heads, query_length, d) -> (batch, heads, count, stride, d)."""
        padded = (
            torch.nn.functional.pad(x, (0, 0, self.ahead, self.spare))
            if self.ahead or self.spare
            else x
        )
        return padded.unflatten(2, (self.count, self.stride))

    def taken(self, x: Tensor) -> Tensor:
        """Takes `queries` back."""
        return x.flatten(2, 3)[:, :, self.ahead : self.count * self.stride - self.spare]

    def keys(self, x: Tensor) -> Tensor:
        """(batch, heads, key_length, d) -> (batch, heads, key_rows, stride, d)."""
        padded = torch.nn.functional.pad(x, (0, 0, 0, self.spare)) if self.spare else x
        return padded.unflatten(2, (self.key_rows, self.stride))


@dataclass(frozen=True)
class Near:
    """Keys of the query's own row, and of so many rows before and behind."""

    rows: Rows
    before: int
    after: int

    @property
    def width(self) -> int:
        return (self.before + 1 + self.after) * self.rows.stride

    def runs(self) -> list[tuple[range, range]]:
        """Rows of queries that have equally many rows of keys, and the places of those among all
        that there could be: at the ends of the sequence some lie beyond it."""
        runs: list[tuple[range, range]] = []
        for row in range(self.rows.count):
            first = self.rows.first + row - self.before  # the row of the first key
            most = self.before + 1 + self.after
            places = range(min(max(0, -first), most), max(0, min(most, self.rows.key_rows - first)))
            if runs and runs[-1][1] == places:
                runs[-1] = (range(runs[-1][0].start, row + 1), places)
            else:
                runs.append((range(row, row + 1), places))
        return runs

    def keys(self, x: Tensor, rows: range, places: range) -> Tensor:
        """(batch, heads, key_rows, stride, d) -> (batch, heads, rows, places · stride, d)."""
        starts = [self.rows.first - self.before + rows.start + place for place in places]
        return torch.cat([x[:, :, start : start + len(rows)] for start in starts], 3)

    def _beyond(self, places: range) -> tuple[int, int]:
        """Keys that are missing before and behind."""
        return places.start * self.rows.stride, self.width - places.stop * self.rows.stride

    def positions(self, device: torch.device) -> Tensor:
        """Of the keys, broadcastable to (count, stride, width)."""
        rows = torch.arange(
            self.rows.first - self.before,
            self.rows.first - self.before + self.rows.count,
            device=device,
        )
        return rows[:, None, None] * self.rows.stride + torch.arange(self.width, device=device)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        parts = []
        for rows, places in self.runs():
            some = q[:, :, rows.start : rows.stop]
            if places:
                found = some @ self.keys(k, rows, places).mT
                parts.append(torch.nn.functional.pad(found, self._beyond(places)))
            else:
                parts.append(some.new_zeros(*some.shape[:4], self.width))
        return torch.cat(parts, 2)

    def times(self, attention: Tensor, v: Tensor) -> Tensor:
        parts = []
        for rows, places in self.runs():
            some = attention[:, :, rows.start : rows.stop]
            if places:
                before, behind = self._beyond(places)
                parts.append(some[..., before : self.width - behind] @ self.keys(v, rows, places))
            else:
                parts.append(some.new_zeros(*some.shape[:4], v.shape[4]))
        return torch.cat(parts, 2)

    def mask(self, key_mask: Tensor) -> Tensor:
        """(batch, 1, key_rows, stride, 1) -> broadcastable to (batch, heads, count, stride,
        width)."""
        first, most = self.rows.first - self.before, self.before + 1 + self.after
        padded = torch.nn.functional.pad(key_mask, (0, 0, 0, 0, max(0, -first), most))
        starts = [max(0, first) + place for place in range(most)]
        return torch.cat([padded[:, :, start : start + self.rows.count] for start in starts], 3).mT


@dataclass(frozen=True)
class OwnColumn:
    """Keys of the query's own column."""

    rows: Rows

    @property
    def width(self) -> int:
        return self.rows.key_rows

    def positions(self, device: torch.device) -> Tensor:
        column = torch.arange(self.rows.stride, device=device)[:, None]
        return (torch.arange(self.width, device=device) * self.rows.stride + column)[None]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q.transpose(2, 3) @ k.transpose(2, 3).mT).transpose(2, 3)

    def times(self, attention: Tensor, v: Tensor) -> Tensor:
        return (attention.transpose(2, 3) @ v.transpose(2, 3)).transpose(2, 3)

    def mask(self, key_mask: Tensor) -> Tensor:
        return key_mask[..., 0].mT[:, :, None]


@dataclass(frozen=True)
class Last:
    """Keys of the last columns of all rows."""

    rows: Rows
    columns: int

    @property
    def width(self) -> int:
        return self.rows.key_rows * self.columns

    def keys(self, x: Tensor) -> Tensor:
        return x[:, :, :, self.rows.stride - self.columns :].flatten(2, 3)

    def positions(self, device: torch.device) -> Tensor:
        every = torch.arange(self.rows.key_rows * self.rows.stride, device=device)
        return self.keys(every.view(1, 1, self.rows.key_rows, -1, 1)).view(1, 1, -1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q.flatten(2, 3) @ self.keys(k).mT).unflatten(2, q.shape[2:4])

    def times(self, attention: Tensor, v: Tensor) -> Tensor:
        return (attention.flatten(2, 3) @ self.keys(v)).unflatten(2, attention.shape[2:4])

    def mask(self, key_mask: Tensor) -> Tensor:
        return self.keys(key_mask).mT[:, :, None]


FactorKeys = Near | OwnColumn | Last


def keys_of_factor(factor: Factor, rows: Rows, is_causal: bool) -> FactorKeys:
    """Where the keys of a factor stand."""
    if isinstance(factor, Neighbours):
        return Near(rows, 1, 0 if is_causal else 1)
    if isinstance(factor, OwnBlock):
        return Near(rows, 0, 0)
    if isinstance(factor, Strided):
        return OwnColumn(rows)
    assert isinstance(factor, Summaries)
    return Last(rows, factor.width)


_SHOWN: dict[type[Factor], Callable[[Tensor, Tensor, int], Tensor]] = {
    Neighbours: lambda i, j, stride: (i - j).abs() <= stride,
    OwnBlock: lambda i, j, stride: i - i % stride == j - j % stride,
}
"""Which of the keys computed for the first factor belong to it; the second owns all of its keys."""


def shown(factor: Factor, near: Factor | None, grid: Grid, i: Tensor, j: Tensor) -> Tensor:
    """Which of the keys at positions j, computed for this factor, queries at positions i see. near:
    the factor that shows some of them already."""
    seen = (j >= 0) & (j < grid.key_length)
    if grid.is_causal:
        seen = seen & (j <= i)
    if type(factor) in _SHOWN:
        seen = seen & _SHOWN[type(factor)](i, j, factor.stride)
    return seen if near is None else seen & ~_SHOWN[type(near)](i, j, near.stride)
