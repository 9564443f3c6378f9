"""What `tiles` works on: pieces of a head's rows with their keys, caps that hide some of these, and
memory that is used again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Protocol

import torch
from torch import Tensor

#: Scores that one thread computes at a time: with their keys and values they stay in its cache.
SCORES = 3 * 2**16


class Memory:
    """Tensors by name, each in the place of the one that had its name before."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._whole: dict[str, Tensor] = {}
        self._views: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Uninitialised, of `shape`."""
        view = self._views.get((name, shape))
        if view is None:
            numbers = torch.Size(shape).numel()
            if name not in self._whole or self._whole[name].numel() < numbers:
                self._whole[name] = self._like.new_empty(numbers)
                self._views = {key: kept for key, kept in self._views.items() if key[0] != name}
            view = self._views[name, shape] = self._whole[name][:numbers].view(shape)
        return view


@dataclass(frozen=True)
class Cap:
    """What hides some keys of a piece.

    start, stop: where these keys stand among those of the piece
    largest: the largest that their scores may be, broadcastable to (parts, rows, stop - start):
        -inf where hidden, else inf
    """

    start: int
    stop: int
    largest: Tensor


class Piece(Protocol):
    """Rows of one head in parts of one size, each part with as many keys of its own."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Parts, rows of each, keys of each."""
        ...

    @property
    def caps(self) -> Sequence[Cap]:
        """What hides some of the keys."""
        ...

    def rows(self, x: Tensor) -> Tensor:
        """(query_length, d) -> (parts, size, d), a view."""
        ...

    def keys(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        """(key_length, d) -> (parts, keys, d), a view, or fetched to the memory of this name."""
        ...

    def add(self, gradient: Tensor, total: Tensor) -> None:
        """Add what `keys` sends back, (parts, keys, d), to (key_length, d)."""
        ...


#: The pieces of every head, or of every sample and head, for q and the table that the caller gave.
Pieces = Callable[[Tensor, "Tensor | None"], Sequence[Sequence[Piece]]]


def cap(visible: Tensor, like: Tensor) -> Tensor:
    """The largest that scores may be: inf where visible, -inf elsewhere. A minimum hides a score
    whatever it is; a sum would not hide inf.

    visible: bool
    like: of whose dtype the cap is
    """
    return torch.where(visible, torch.inf, -torch.inf).to(like.dtype)


def parts_at_a_time(size: int, keys: int, threads: int | None = None) -> int:
    """How many parts of `size` rows with `keys` keys each make a piece.

    threads: those that share a piece, all by default
    """
    return max(1, SCORES // (size * keys)) * (threads or torch.get_num_threads())


@dataclass(frozen=True)
class Slices:
    """A `Piece` of consecutive rows, whose keys are consecutive too: views, nothing is fetched.

    first: its first row
    shape: parts, rows of each, keys of each
    low: the first key of the first part; those of the next part begin as many keys later as a part
        has rows
    """

    first: int
    shape: tuple[int, int, int]
    low: int
    caps: tuple[Cap, ...] = ()

    def rows(self, x: Tensor) -> Tensor:
        parts, size, _ = self.shape
        line, number = x.stride()  # one view, not three: there are many pieces
        return x.as_strided(
            (parts, size, x.shape[1]),
            (size * line, line, number),
            x.storage_offset() + self.first * line,
        )

    def keys(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        parts, size, keys = self.shape
        line, number = x.stride()
        return x.as_strided(
            (parts, keys, x.shape[1]),
            (size * line, line, number),
            x.storage_offset() + self.low * line,
        )

    def add(self, gradient: Tensor, total: Tensor) -> None:
        parts, size, keys = self.shape
        if parts == 1:
            self._span(total).add_(gradient[0])
        elif not gradient.is_contiguous():
            for part, its_gradient in enumerate(gradient):
                total.narrow(0, self.low + part * size, keys).add_(its_gradient)
        else:
            unit, width = gcd(size, keys), total.shape[1]
            index = torch.arange(parts)[:, None] * (size // unit) + torch.arange(keys // unit)
            self._span(total).view(-1, unit, width).index_add_(
                0, index.flatten(), gradient.view(-1, unit, width)
            )

    def _span(self, x: Tensor) -> Tensor:
        parts, size, keys = self.shape
        return x.narrow(0, self.low, (parts - 1) * size + keys)
