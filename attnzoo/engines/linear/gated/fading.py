"""What is left, inside chunks of tokens, of keys and of the state before: none fading, by a number
for each token and head, or by one for each channel of the keys.

All tensors begin with (chunks, batch, kv_heads). Only sums of gates that lie between two tokens are
ever raised to a power, so no exponent is above 0, nothing overflows where a gate closes, and a
closed gate, -inf, costs no digits of what follows it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.engines.exponential import exp_
from attnzoo.engines.linear.layout import add_product_, may_overwrite


class Fading:
    """Nothing fades: every factor is 1."""

    def products(self, rows: list[Tensor], k: Tensor) -> list[Tensor]:
        """Σ_c rows_ic k_jc · (what is left of channel c of token j at token i) for j ≤ i; above the
        diagonal 0.

        rows: each (..., rows, length, width), some for every token. k: (..., length, width).
        Returns (..., rows, length, length) for each.
        """
        return [_products(some, k).tril() for some in rows]

    def through_products(
        self, rows: list[Tensor], k: Tensor, gradients: list[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of the rows and of k, from those of `products`, whose entries above the
        diagonal are of no meaning and which are overwritten."""
        return _through(rows, k, [x.tril_() for x in gradients])

    def carried(self, x: Tensor) -> Tensor:
        """x times what is left of the state before the chunk. x: (..., length, width), or some rows
        for every token, (..., rows, length, width)."""
        return x

    def handed_on(self, k: Tensor) -> Tensor:
        """k times what is left of each token behind the chunk. k: (..., length, width)."""
        return k

    @property
    def kept(self) -> Tensor | None:
        """What is left of the state behind the chunk, (..., width or 1, 1); None: all."""
        return None


class HeadFading(Fading):
    """By a number for each token and head. log_decay: (..., length)."""

    def __init__(self, log_decay: Tensor) -> None:
        left = faded(log_decay)
        self.left = left.tril_() if may_overwrite(left) else left.tril()
        self.since_start = exp_(log_decay.cumsum(-1))

    def products(self, rows: list[Tensor], k: Tensor) -> list[Tensor]:
        return [times(_products(some, k), self.left[..., None, :, :]) for some in rows]

    def through_products(
        self, rows: list[Tensor], k: Tensor, gradients: list[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        return _through(rows, k, [x.mul_(self.left[..., None, :, :]) for x in gradients])

    def carried(self, x: Tensor) -> Tensor:
        return x * _for_rows(self.since_start[..., None], x)

    def handed_on(self, k: Tensor) -> Tensor:
        return k * self.left[..., -1, :, None]

    @property
    def kept(self) -> Tensor:
        return self.since_start[..., -1:, None]


class ChannelFading(Fading):
    """By a number for each token and channel. log_decay: (..., length, width). own: whether a row's
    own gate counts; where not, products on the diagonal are of no meaning.

    What is left at token i of token j < i is the product of what is left at a token between of the
    one, and at i of that. So the products are taken by halves of the chunk, halves of these, and so
    on: the second half's rows, faded since the middle, by the first half's keys, faded up to it.
    """

    def __init__(self, log_decay: Tensor, *, own: bool = True) -> None:
        self.log_decay, self.own = log_decay, own
        self.since_start = exp_((log_decay if own else earlier(log_decay)).cumsum(-2))

    def before_own(self) -> ChannelFading:
        """As rows see it that read before their own token's gate."""
        return ChannelFading(self.log_decay, own=False)

    def products(self, rows: list[Tensor], k: Tensor) -> list[Tensor]:
        counts = [some.shape[-3] for some in rows]
        together = torch.cat(rows, -3) if len(rows) > 1 else rows[0]
        return list(_by_halves(together, k, self.log_decay, self.own).split(counts, -3))

    def through_products(
        self, rows: list[Tensor], k: Tensor, gradients: list[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        counts = [some.shape[-3] for some in rows]
        together, gradient = torch.cat(rows, -3), torch.cat(gradients, -3)
        d_rows, d_k = _through_halves(together, k, self.log_decay, gradient)
        return list(d_rows.split(counts, -3)), d_k

    def carried(self, x: Tensor) -> Tensor:
        return x * _for_rows(self.since_start, x)

    def handed_on(self, k: Tensor) -> Tensor:
        return k * until_end(self.log_decay)

    @property
    def kept(self) -> Tensor:
        return self.since_start[..., -1, :, None]


def fading_of(log_decay: Tensor | None, k: Tensor) -> Fading:
    """log_decay: (..., length), also with the width of k, (..., length, width), or None."""
    if log_decay is None:
        return Fading()
    return HeadFading(log_decay) if log_decay.dim() < k.dim() else ChannelFading(log_decay)


def faded(log_decay: Tensor) -> Tensor:
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


def _for_rows(factor: Tensor, x: Tensor) -> Tensor:
    """The factor, (..., length, width or 1), with a dimension for the rows that x may have."""
    return factor if factor.dim() == x.dim() else factor[..., None, :, :]


def _products(rows: Tensor, k: Tensor) -> Tensor:
    """rows kᵀ of every chunk, the rows of all heads of a group in one product."""
    return (rows.flatten(-3, -2) @ k.mT).unflatten(-2, rows.shape[-3:-1])


def _by_halves(rows: Tensor, k: Tensor, log_decay: Tensor, own: bool = True) -> Tensor:
    length = k.shape[-2]
    if length == 1:
        return _products(rows, k)
    if length % 2:  # of a length that is no power of 2, the last token
        rows, k, log_decay = (F.pad(x, (0, 0, 0, 1)) for x in (rows, k, log_decay))
        return _by_halves(rows, k, log_decay, own)[..., :-1, :-1]
    halves = (2, length // 2)
    rows = rows.unflatten(-2, halves).movedim(-3, -4)  # (..., 2, rows, half, width)
    k, log_decay = k.unflatten(-2, halves), log_decay.unflatten(-2, halves)
    first_k, first_gates = k[..., 0, :, :], log_decay[..., 0, :, :]
    gates = log_decay[..., 1, :, :]
    since_middle = exp_((gates if own else earlier(gates)).cumsum(-2))[..., None, :, :]
    corner = _products(rows[..., 1, :, :, :] * since_middle, first_k * until_end(first_gates))
    inner = _by_halves(rows, k, log_decay, own)
    first, second = inner[..., 0, :, :, :], inner[..., 1, :, :, :]
    upper = torch.cat([first, torch.zeros_like(corner)], -1)
    return torch.cat([upper, torch.cat([corner, second], -1)], -2)


def _through(rows: list[Tensor], k: Tensor, gradients: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Gradients of rows and k from those of `_products`."""
    d_rows = [_rows_times(gradient, k) for gradient in gradients]
    first, *others = zip(gradients, rows, strict=True)
    d_k = first[0].flatten(-3, -2).mT @ first[1].flatten(-3, -2)
    for gradient, some in others:
        d_k = add_product_(d_k, gradient.flatten(-3, -2).mT, some.flatten(-3, -2))
    return d_rows, d_k


def _rows_times(gradient: Tensor, k: Tensor) -> Tensor:
    return (gradient.flatten(-3, -2) @ k).unflatten(-2, gradient.shape[-3:-1])


def _through_halves(
    rows: Tensor, k: Tensor, log_decay: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and k from that of `_by_halves`, half by half as there."""
    length = k.shape[-2]
    if length == 1:
        return _rows_times(gradient, k), (gradient * rows).sum(-3)
    half = length // 2
    rows = rows.unflatten(-2, (2, half)).movedim(-3, -4)
    k, log_decay = k.unflatten(-2, (2, half)), log_decay.unflatten(-2, (2, half))
    inner = gradient.unflatten(-2, (2, half)).unflatten(-1, (2, half))
    corner = inner[..., 1, :, 0, :]
    inner = inner.diagonal(dim1=-4, dim2=-2).movedim(-1, -4)  # (..., 2, rows, half, half)
    d_rows, d_k = _through_halves(rows, k, log_decay, inner)
    left = until_end(log_decay[..., 0, :, :])
    since_middle = exp_(log_decay[..., 1, :, :].cumsum(-2))[..., None, :, :]
    faded_rows, faded_k = rows[..., 1, :, :, :] * since_middle, k[..., 0, :, :] * left
    d_rows[..., 1, :, :, :] += _rows_times(corner, faded_k) * since_middle
    d_k[..., 0, :, :] += corner.flatten(-3, -2).mT @ faded_rows.flatten(-3, -2) * left
    return d_rows.movedim(-4, -3).flatten(-3, -2), d_k.flatten(-3, -2)


def earlier(log_decay: Tensor) -> Tensor:
    """The gate of the token before each, 0 for the first. log_decay: (..., length, width)."""
    return F.pad(log_decay[..., :-1, :], (0, 0, 1, 0))


def until_end(log_decay: Tensor) -> Tensor:
    """What is left of each token behind the last one, of the shape of log_decay, (..., length,
    width)."""
    later = F.pad(log_decay[..., 1:, :], (0, 0, 0, 1))
    return exp_(later.flip(-2).cumsum(-2).flip(-2))
