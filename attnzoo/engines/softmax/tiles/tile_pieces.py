"""What `tiles` works on: pieces, caps and memory that is used again.

A piece is some rows of one head with their keys. Its rows come in parts of one size, and each part
has keys of its own, so that one batched product computes the scores of all parts. A cap is the
largest value that a score may have, and hides a key by being -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from math import gcd
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from attnzoo.eager import unrecorded
from attnzoo.engines.differentiable import Compute

#: How many scores a thread computes at a time: so few stay in its cache with their keys and values.
SCORES = 3 * 2**16


class Memory:
    """Tensors by name; a new tensor of a name takes the memory of the one before it.

    like: a tensor of the dtype and device that all of them have
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._whole: dict[str, Tensor] = {}
        self._views: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of this name and shape; what had the name before is lost."""
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
    """A limit on the scores of some keys of a piece, which hides them from some rows.

    start, stop: where these keys stand among the keys of each part
    largest: the largest that their scores may be, broadcastable to (parts, rows, stop - start):
        -inf where hidden, else inf
    """

    start: int
    stop: int
    largest: Tensor


class Piece(Protocol):
    """Some rows of one head with their keys, in parts of one size: every part has the same number
    of rows, and the same number of keys of its own."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of parts, rows of each part, keys of each part."""
        ...

    @property
    def first(self) -> int:
        """Its first row."""
        ...

    @property
    def caps(self) -> Sequence[Cap]:
        """Caps that hide some of the keys from some rows."""
        ...

    def runs(self, key_length: int) -> Tensor:
        """The keys of each part as runs of consecutive ones, (parts, runs, 2): the first key of
        each and how many they are.

        key_length: how many keys there are
        """
        ...

    def rows(self, x: Tensor) -> Tensor:
        """The piece's rows of x: (query_length, d) -> (parts, rows, d), a view."""
        ...

    def keys(self, x: Tensor, name: str, memory: Memory) -> Tensor:
        """The piece's keys of x: (key_length, d) -> (parts, keys, d), a view, or a copy in the
        memory of this name."""
        ...

    def add(self, gradient: Tensor, total: Tensor) -> None:
        """Add the gradient of what `keys` returned, (parts, keys, d), to that of x, `total`,
        (key_length, d)."""
        ...

    def add_bias(self, bias: Tensor, scores: Tensor) -> None:
        """Add to the piece's scores, (parts, rows, keys), what a head's bias says: a table of
        distances, (2 · reach + 1,)."""
        ...


#: A function of q and of the caller's table that makes the pieces of every head, or of every sample
#: and head.
Pieces = Callable[[Tensor, "Tensor | None"], Sequence[Sequence[Piece]]]


def cap(visible: Tensor, like: Tensor) -> Tensor:
    """The largest that scores may be: inf where visible, -inf elsewhere.

    The minimum of a score and its cap hides the score whatever it is; adding -inf to a score of inf
    would give NaN.

    visible: bool, of any shape, which the result has too
    like: a tensor of the dtype that the result will have
    """
    return torch.where(visible, torch.inf, -torch.inf).to(like.dtype)


class Kept(list[Any]):
    """Pieces that serve many calls; they equal themselves alone."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def kept(make: Callable[..., list[Any]]) -> Callable[..., Kept]:
    """A function that makes pieces of sizes alone, whose last results serve the next calls.

    make: its arguments are hashable; of the first, a tensor, it reads the dtype alone
    """

    @lru_cache(maxsize=32)
    def keep(dtype: torch.dtype, *sizes: Any) -> Kept:
        with unrecorded(), torch.inference_mode(False):
            return Kept(make(torch.empty(0, dtype=dtype, device="cpu"), *sizes))

    @wraps(make)
    def made(like: Tensor, *sizes: Any) -> Kept:
        return keep(like.dtype, *sizes)

    return made


@dataclass(frozen=True)
class InPieces:
    """A call that is computed by pieces.

    q, k, v: (batch, heads, query_length, head_dim), and two of (batch, kv_heads, key_length, ...)
    pieces: makes the pieces, which hold every row of a head once
    compute: the same call of q, k, v, sink_logits and, if it is given, log_decay in operators that
        autograd can follow, for second derivatives
    key_mask: (batch or 1, key_length) bool, the keys that rows may see; None: no key is hidden
    table: a tensor that `pieces` is called with beside q, if it needs one
    sink_logits: (heads,), one more score of every row, which counts in the row's sum alone
    bias: (heads, 2 · reach + 1), what is added to scores by distance, without a gradient
    log_decay: (batch, heads, key_length), gates by which scores fade, in the place of a bias
    row_bias: (batch or 1, query_length), what is added to every score of a row, without a gradient;
        softmax would not see it
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pieces: Pieces
    compute: Compute
    key_mask: Tensor | None = None
    table: Tensor | None = None
    sink_logits: Tensor | None = None
    bias: Tensor | None = None
    log_decay: Tensor | None = None
    row_bias: Tensor | None = None


class Way(NamedTuple):
    """One way to compute pieces.

    attend: A·v of a call in pieces by an engine that gives the scale and the softcap, (batch,
        heads, query_length, value_dim)
    together: how many parts make a piece, as `parts_at_a_time`
    """

    attend: Callable[[Any, InPieces], Tensor]
    together: Callable[..., int]


def parts_at_a_time(size: int, keys: int, threads: int | None = None) -> int:
    """How many parts make a piece that stays in the cache.

    size, keys: rows and keys of each part
    threads: how many threads share a piece; None: all that torch uses
    """
    return max(1, SCORES // (size * keys)) * (threads or torch.get_num_threads())


@dataclass(frozen=True)
class Slices:
    """A `Piece` of consecutive rows whose keys are consecutive, too, so that both are views.

    first: its first row
    shape: number of parts, rows of each part, keys of each part
    low: the first key of the first part; the keys of each next part begin as many keys later as a
        part has rows
    caps: what hides some of the keys
    origin: where row 0 stands, in the positions of the keys
    """

    first: int
    shape: tuple[int, int, int]
    low: int
    caps: tuple[Cap, ...] = ()
    origin: int = 0

    def rows(self, x: Tensor) -> Tensor:
        parts, size, _ = self.shape
        line, number = x.stride()  # one as_strided, not three views, since pieces are many
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

    def runs(self, key_length: int) -> Tensor:
        parts, size, keys = self.shape
        first = self.low + size * torch.arange(parts, device="cpu")
        return torch.stack([first, torch.full_like(first, keys)], 1)[:, None]

    def add(self, gradient: Tensor, total: Tensor) -> None:
        parts, size, keys = self.shape
        if parts == 1:
            self._span(total).add_(gradient[0])
        elif not gradient.is_contiguous():
            for part, its_gradient in enumerate(gradient):
                total.narrow(0, self.low + part * size, keys).add_(its_gradient)
        else:
            unit, width = gcd(size, keys), total.shape[1]
            index = torch.arange(parts, device="cpu")[:, None] * (size // unit) + torch.arange(
                keys // unit, device="cpu"
            )
            self._span(total).view(-1, unit, width).index_add_(
                0, index.flatten(), gradient.view(-1, unit, width)
            )

    def add_bias(self, bias: Tensor, scores: Tensor) -> None:
        _, size, keys = self.shape
        # The entries of a row begin one before those of the row above it.
        last = len(bias) // 2 + self.low - (self.origin + self.first) - size + 1
        scores.add_(bias.unfold(0, keys, 1)[last : last + size].flip(0)[None])

    def _span(self, x: Tensor) -> Tensor:
        parts, size, keys = self.shape
        return x.narrow(0, self.low, (parts - 1) * size + keys)
