"""What is left, inside chunks of tokens, of keys and of the state before: none fading, by a number
for each token and head, or by one for each channel of the keys.

All tensors begin with (chunks, batch, kv_heads). Only sums of gates that lie between two tokens are
ever raised to a power, so no exponent is above 0, nothing overflows where a gate closes, and a
closed gate, -inf, costs no digits of what follows it. That of channels is in `channel_fading.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from attnzoo.engines.exponential import exp_
from attnzoo.engines.linear.layout import add_product_, may_overwrite


class Faded(NamedTuple):
    """Rows and keys of chunks, faded.

    products: for each of some rows, Σ_c row_ic k_jc · (what is left of channel c of token j at
        token i) for j ≤ i and 0 above the diagonal, (..., rows, length, length)
    carried: each of the rows times what is left of the state before the chunk, (..., rows, length,
        width)
    handed_on: k times what is left of each token behind the chunk, (..., length, width)
    kept: what is left of the state behind the chunk, (..., width or 1, 1); None: all
    """

    products: list[Tensor]
    carried: list[Tensor]
    handed_on: Tensor
    kept: Tensor | None


class Fading:
    """Nothing fades: every factor is 1."""

    def faded(self, rows: list[Tensor], k: Tensor) -> Faded:
        """rows: each (..., rows, length, width), some for every token. k: (..., length, width)."""
        return Faded([row_products(some, k).tril() for some in rows], rows, k, None)

    def through(
        self,
        rows: list[Tensor],
        k: Tensor,
        d_products: list[Tensor],
        d_carried: list[Tensor],
        d_handed_on: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of the rows and of k.

        rows, k: as `faded` takes them
        d_products, d_carried, d_handed_on: gradients of what it returns; the first are overwritten,
            and what they have above the diagonal is of no meaning
        """
        d_rows, d_k = _through(rows, k, [x.tril_() for x in d_products])
        for x, carried in zip(d_rows, d_carried, strict=True):
            x.add_(carried)
        return d_rows, d_k.add_(d_handed_on)


class HeadFading(Fading):
    """By a number for each token and head. log_decay: (..., length)."""

    def __init__(self, log_decay: Tensor) -> None:
        left = left_between(log_decay)
        self.left = left.tril_() if may_overwrite(left) else left.tril()
        self.since_start = exp_(log_decay.cumsum(-1))

    def faded(self, rows: list[Tensor], k: Tensor) -> Faded:
        between, since = self.left[..., None, :, :], self.since_start[..., None, :, None]
        products = [times(row_products(some, k), between) for some in rows]
        carried = [some * since for some in rows]
        return Faded(products, carried, k * self._until_end, self.since_start[..., -1:, None])

    def through(
        self,
        rows: list[Tensor],
        k: Tensor,
        d_products: list[Tensor],
        d_carried: list[Tensor],
        d_handed_on: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        between, since = self.left[..., None, :, :], self.since_start[..., None, :, None]
        d_rows, d_k = _through(rows, k, [x.mul_(between) for x in d_products])
        for x, carried in zip(d_rows, d_carried, strict=True):
            x.addcmul_(carried, since)
        return d_rows, d_k.addcmul_(d_handed_on, self._until_end)

    @property
    def _until_end(self) -> Tensor:
        return self.left[..., -1, :, None]


def left_between(log_decay: Tensor) -> Tensor:
    """exp(Σ log_decay over tokens j+1 to i) for every i and j ≤ i, and 1 above the diagonal.

    log_decay: (..., length), -inf where everything is forgotten. Returns (..., length, length). The
    sums are of their own terms alone: differences of sums from the start would lose the digits of
    what came after a gate that closed.
    """
    length = log_decay.shape[-1]
    steps = log_decay[..., :, None].expand(*log_decay.shape, length)
    return exp_(steps.tril(-1).cumsum(-2))


def times(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor, in the place of x where that may be."""
    return x.mul_(factor) if may_overwrite(x, factor) else x * factor


def row_products(rows: Tensor, k: Tensor) -> Tensor:
    """rows kᵀ of every chunk, the rows of all heads of a group in one product."""
    return (rows.flatten(-3, -2) @ k.mT).unflatten(-2, rows.shape[-3:-1])


def _through(rows: list[Tensor], k: Tensor, gradients: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Gradients of rows and k from those of `_products`."""
    d_rows = [rows_times(gradient, k) for gradient in gradients]
    first, *others = zip(gradients, rows, strict=True)
    d_k = first[0].flatten(-3, -2).mT @ first[1].flatten(-3, -2)
    for gradient, some in others:
        d_k = add_product_(d_k, gradient.flatten(-3, -2).mT, some.flatten(-3, -2))
    return d_rows, d_k


def rows_times(gradient: Tensor, k: Tensor) -> Tensor:
    return (gradient.flatten(-3, -2) @ k).unflatten(-2, gradient.shape[-3:-1])
