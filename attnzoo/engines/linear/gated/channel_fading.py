"""What is left, inside chunks of tokens, of keys whose channels fade each by gates of its own.

What is left at token i of token j < i is the product of what is left at a token between of the one,
and at i of that. So products are taken of blocks, first of every two neighbouring tokens, then of
every two neighbouring pairs, and so on up to the chunk: the second block's rows, faded since the
middle, by the first block's keys, faded up to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.engines.exponential import exp_
from attnzoo.engines.linear.gated.fading import (
    Faded,
    Fading,
    HeadFading,
    row_products,
    rows_times,
)
from attnzoo.engines.linear.layout import may_overwrite


class ChannelFading(Fading):
    """By a number for each token and channel. log_decay: (..., length, width). own: whether a row's
    own gate counts; where not, products on the diagonal are of no meaning.
    """

    def __init__(self, log_decay: Tensor, *, own: bool = True) -> None:
        self.own, self.length = own, log_decay.shape[-2]
        self.left = left_of_blocks(log_decay)

    def before_own(self) -> ChannelFading:
        """As rows see it that read before their own token's gate."""
        other = copy(self)
        other.own = False
        return other

    def faded(self, rows: list[Tensor], k: Tensor) -> Faded:
        length, missing = self.length, self._full_length - self.length
        if missing:
            rows, k = [F.pad(x, (0, 0, 0, missing)) for x in rows], F.pad(k, (0, 0, 0, missing))
        products = [_on_diagonal(x, k) for x in rows]
        carried, handed_on = [self._begun(x) for x in rows], k.clone()
        for size, before, behind in self._levels():
            first = halves(handed_on, size)[0]
            corners = [row_products(seconds(x, size), first).movedim(-3, -4) for x in carried]
            products = [_joined(x, y) for x, y in zip(products, corners, strict=True)]
            carried = [scaled(x, 1, before[..., None, :, :, :], size) for x in carried]
            handed_on = scaled(handed_on, 0, behind, size)
        return Faded(
            [x[..., 0, :length, :length] for x in products],
            [x[..., :length, :] for x in carried],
            handed_on[..., :length, :],
            self.left[-1].mT,
        )

    def through(
        self,
        rows: list[Tensor],
        k: Tensor,
        d_products: list[Tensor],
        d_carried: list[Tensor],
        d_handed_on: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        # Back from the whole chunk to its tokens, by the faded rows and keys of every level.
        levels, carried, handed_on = [], [self._begun(x) for x in rows], k.clone()
        for size, before, behind in self._levels():
            before = before[..., None, :, :, :]
            kept = [seconds(x, size).flatten(-3, -2).clone() for x in carried]
            levels.append((size, before, behind, kept, halves(handed_on, size)[0].clone()))
            carried = [scaled(x, 1, before, size) for x in carried]
            handed_on = scaled(handed_on, 0, behind, size)
        d_rows, d_k = [x.clone() for x in d_carried], d_handed_on.clone()
        for size, before, behind, kept, first in reversed(levels):
            d_first = halves(d_k, size)[0].mul_(behind)
            for d_some, d_product, faded in zip(d_rows, d_products, kept, strict=True):
                corner = corners_of(d_product, size)
                d_second = halves(d_some, size)[1]
                d_second.mul_(before).add_(rows_times(corner, first).movedim(-3, -4))
                d_first.add_(corner.flatten(-3, -2).mT @ faded)
        for d_some, some, d_product in zip(d_rows, rows, d_products, strict=True):
            if self.own:
                d_some.mul_(self.left[0][..., None, :, :])
            own = d_product.diagonal(dim1=-2, dim2=-1)[..., None]
            d_some.addcmul_(own, k[..., None, :, :])
            d_k.add_((own * some).sum(-3))
        return d_rows, d_k

    def _levels(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Sizes of blocks from 1 up to half the chunk; and of every two blocks, (..., pairs, 1,
        width), what is left behind the first of what stands before it, and behind the second."""
        for level, left in enumerate(self.left[:-1]):
            first, second = left.unflatten(-2, (-1, 2))[..., None, :].unbind(-3)
            yield 2**level, first, second

    @property
    def _full_length(self) -> int:
        return 2 ** (len(self.left) - 1)

    def _begun(self, rows: Tensor) -> Tensor:
        return rows * self.left[0][..., None, :, :] if self.own else rows.clone()


def left_of_blocks(log_decay: Tensor) -> list[Tensor]:
    """What is left behind blocks of tokens of what stands before them, (..., blocks, width): blocks
    of 1, 2, 4 ... tokens, and last the whole, filled up with open gates to a power of 2.

    log_decay: (..., length, width)
    """
    length, full = log_decay.shape[-2], 1
    while full < length:
        full *= 2
    missing = full - length
    totals = log_decay if not missing else F.pad(log_decay, (0, 0, 0, missing))
    left = [exp_(totals.clone())]
    while totals.shape[-2] > 1:
        totals = totals.unflatten(-2, (-1, 2)).sum(-2)
        left.append(exp_(totals.clone()))
    return left


def halves(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """The first and the second of every two blocks, each (..., pairs, size, width), of x, (...,
    length, width)."""
    return x.unflatten(-2, (-1, 2, size)).unbind(-3)


def seconds(rows: Tensor, size: int) -> Tensor:
    """The second of every two blocks, (..., pairs, rows, size, width), of rows, (..., rows, length,
    width)."""
    return halves(rows, size)[1].movedim(-4, -3)


def corners_of(x: Tensor, size: int) -> Tensor:
    """(..., pairs, rows, size, size) of x, (..., rows, length, length): rows of the second and
    columns of the first of every two blocks."""
    of_rows = x.unflatten(-2, (-1, 2, size))[..., 1, :, :]
    both = of_rows.unflatten(-1, (-1, 2, size))[..., 0, :]
    return both.diagonal(dim1=-4, dim2=-2).movedim(-1, -4)


def scaled(x: Tensor, which: int, factor: Tensor, size: int) -> Tensor:
    """x, (..., length, width), with the first, 0, or the second, 1, of every two blocks multiplied.

    factor: (..., pairs, 1, width)
    """
    if may_overwrite(x):
        halves(x, size)[which].mul_(factor)
        return x
    blocks = list(halves(x, size))
    blocks[which] = blocks[which] * factor
    return torch.stack(blocks, -3).flatten(-4, -2)


def fading_of(log_decay: Tensor | None, k: Tensor) -> Fading:
    """log_decay: (..., length), also with the width of k, (..., length, width), or None."""
    if log_decay is None:
        return Fading()
    return HeadFading(log_decay) if log_decay.dim() < k.dim() else ChannelFading(log_decay)


def _on_diagonal(rows: Tensor, k: Tensor) -> Tensor:
    """Products of each token's rows with its own key, (..., rows, length, 1, 1)."""
    return rows[..., None, :] @ k[..., None, :, :, None]


def _joined(blocks: Tensor, corners: Tensor) -> Tensor:
    """Products of blocks of twice the size.

    blocks: (..., blocks, size, size), of every block
    corners: (..., pairs, size, size), rows of the second with keys of the first of every two
    """
    first, second = blocks.unflatten(-3, (-1, 2)).unbind(-3)
    upper = torch.cat([first, torch.zeros_like(corners)], -1)
    return torch.cat([upper, torch.cat([corners, second], -1)], -2)
