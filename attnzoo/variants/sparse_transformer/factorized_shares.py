"""A factor's part of A in groups of rows that share keys, and where these keys stand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.variants.sparse_transformer.factorized_layout import (
    FactorKeys,
    Last,
    Near,
    OwnColumn,
    Rows,
    keys_of_factor,
    shown,
)
from attnzoo.variants.sparse_transformer.factorized_patterns import Factor

NUMBERS = 2**20  # of a call's keys, fetched or not, and of the scores that it hides one by one


@dataclass(frozen=True)
class Span:
    """Consecutive groups of a factor.

    first, end: of the groups
    low, high: of the rows of keys that the first group sees. With `Near` those of the next group
        begin one row further on, else all groups have the same.
    """

    first: int
    end: int
    low: int
    high: int


@dataclass(frozen=True)
class Share:
    """A factor's part of A. Rows that share keys are a group: with `OwnColumn` a column of queries,
    else a row of them.

    factor: shows the keys
    near: the factor that shows some of these keys already; None: there is none
    part: where queries and keys stand
    grid: of the call
    """

    factor: Factor
    near: Factor | None
    part: FactorKeys
    grid: Grid

    def fold(self, x: Tensor) -> Tensor:
        """A view in groups, (groups, rows, ...).

        x: (count, stride, ...)
        """
        return x.transpose(0, 1) if isinstance(self.part, OwnColumn) else x

    def keys(self, span: Span, x: Tensor) -> Tensor:
        """The keys of every group, (groups, keys, d): views, but with `Last` copies.

        x: (key_rows, stride, d)
        """
        if isinstance(self.part, OwnColumn):
            return x.transpose(0, 1)[span.first : span.end]
        if isinstance(self.part, Last):
            return self.part.keys(x[None, None])[0].expand(span.end - span.first, -1, -1)
        step, line, number = x.stride()
        shape = (span.end - span.first, (span.high - span.low) * x.shape[1], x.shape[2])
        return x.as_strided(shape, (step, line, number), x.storage_offset() + span.low * step)

    def add(self, span: Span, gradient: Tensor, total: Tensor) -> None:
        """Add the gradient of what `keys` gave.

        gradient: (groups, keys, d)
        total: (key_rows, stride, d)
        """
        if isinstance(self.part, OwnColumn):
            total.transpose(0, 1)[span.first : span.end] += gradient
        elif isinstance(self.part, Last):
            total[:, total.shape[1] - self.part.columns :] += gradient.sum(0).view(
                total.shape[0], self.part.columns, -1
            )
        else:
            for place, share in enumerate(gradient.split(total.shape[1], 1)):
                total.narrow(0, span.low + place, len(share)).add_(share)

    def spans(self, head_dim: int, is_padded: bool) -> Iterator[Span]:
        """Spans of groups that hide the same keys, padding apart, of at most `NUMBERS` numbers."""
        rows, part = self.part.rows, self.part
        if isinstance(part, Near):
            yield from self._near_spans(
                part, _together(part.width, rows.stride if is_padded else head_dim, head_dim)
            )
            return
        groups, size = (
            (rows.stride, rows.count)
            if isinstance(part, OwnColumn)
            else (rows.count, 1 if self._alike else rows.stride)
        )
        together = _together(part.width, size, head_dim)
        # Columns from `ragged` on lack their last key.
        ragged = groups - rows.spare if isinstance(part, OwnColumn) else groups
        for start, stop in ((0, ragged), (ragged, groups)):
            for first in range(start, stop, together):
                yield Span(first, min(first + together, stop), 0, rows.key_rows)

    def _near_spans(self, part: Near, together: int) -> Iterator[Span]:
        """The rows at the ends, whose keys are fewer or partly missing, one by one."""
        rows, inner = part.rows, []
        for row in range(rows.count):
            low, high = rows.first + row - part.before, rows.first + row + part.after + 1
            missing = low < 0 or high > rows.key_rows or (high == rows.key_rows and rows.spare > 0)
            if not missing and inner and len(inner) < together:
                inner.append(row)
                continue
            if inner:
                yield self._inner_span(part, inner)
            inner = [] if missing else [row]
            if missing and max(0, low) < min(rows.key_rows, high):
                yield Span(row, row + 1, max(0, low), min(rows.key_rows, high))
        if inner:
            yield self._inner_span(part, inner)

    @staticmethod
    def _inner_span(part: Near, inner: list[int]) -> Span:
        """Consecutive rows of which each has all its keys."""
        first = part.rows.first + inner[0]
        return Span(inner[0], inner[-1] + 1, first - part.before, first + part.after + 1)

    def sizes(self, span: Span) -> tuple[int, int, int]:
        """Groups, rows of each, and keys of each."""
        rows = self.part.rows
        keys = (
            (span.high - span.low) * rows.stride if isinstance(self.part, Near) else self.part.width
        )
        return (
            span.end - span.first,
            rows.count if isinstance(self.part, OwnColumn) else rows.stride,
            keys,
        )

    @property
    def _alike(self) -> bool:
        """Whether Last hides the same from every row of a group."""
        return self.near is not None or not self.grid.is_causal

    def seen(self, span: Span) -> Tensor:
        """Which keys the rows of a span see, padding left out: (groups or 1, rows or 1, keys)
        bool."""
        rows, part = self.part.rows, self.part
        first, end = rows.first * rows.stride, (rows.first + rows.count) * rows.stride
        queries = torch.arange(first, end, device="cpu").view(rows.count, rows.stride)
        keys = torch.arange(rows.key_rows * rows.stride, device="cpu").view(
            rows.key_rows, rows.stride
        )
        some = self.fold(queries)[span.first : span.end, :, None]
        if isinstance(part, Last):
            return shown(
                self.factor,
                self.near,
                self.grid,
                some[:, :1] if self._alike else some,
                part.positions(keys.device),
            )
        its_keys = self.keys(span, keys[..., None])[:1].mT
        return shown(self.factor, self.near, self.grid, some[:1], its_keys)


def _together(keys: int, rows: int, head_dim: int) -> int:
    """Groups of one call of the kernel, each of so many rows and keys."""
    return max(1, NUMBERS // (keys * max(rows, head_dim)))


def shares_of(factors: tuple[Factor, ...], rows: Rows, grid: Grid) -> list[Share]:
    """The shares of heads that see these factors together; the second is left out where it adds
    nothing."""
    near = factors[0]
    some = [one for one in factors if one is near or one.adds(grid)]
    return [
        Share(one, None if one is near else near, keys_of_factor(one, rows, grid.is_causal), grid)
        for one in some
    ]
