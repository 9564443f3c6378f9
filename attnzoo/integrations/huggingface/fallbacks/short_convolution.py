"""The short causal convolution of recurrent layers, which padding and other pieces do not reach."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    segments: Tensor | None,
) -> Tensor:
    """Every token's channels with those of the tokens just before it.

    x: (batch, channels, length)
    weight: (channels, 1, taps), of which the last weighs the token itself
    before: (batch, channels, taps), the last tokens before x; None: there are none
    segments: (batch, length), the piece that each token belongs to; None: there is one
    returns: as x
    """
    taps, length = weight.shape[-1], x.shape[-1]
    if segments is None:
        lead = F.pad(x, (taps - 1, 0)) if before is None else torch.cat([before[..., 1:], x], -1)
        return F.conv1d(lead, weight, bias, groups=x.shape[1])
    piece = _begun(segments)
    out = x * weight[:, :, -1]
    for back in range(1, min(taps, length)):
        same = (piece[:, back:] == piece[:, :-back])[:, None]
        reached = x[..., :-back].masked_fill(~same, 0.0)
        out = out + F.pad(reached * weight[:, :, -1 - back], (back, 0))
    return out if bias is None else out + bias[:, None]


def remembered(
    x: Tensor, taps: int, before: Tensor | None, counts: Tensor | None, segments: Tensor | None
) -> Tensor:
    """The last tokens of the last piece, (batch, channels, taps), zeros where there are fewer.

    x: (batch, channels, length)
    before: as in `convolve`
    counts: (batch,), how many of the first tokens are no padding; None: all
    segments: as in `convolve`
    """
    whole = F.pad(x, (taps, 0)) if before is None else torch.cat([before, x], -1)
    if counts is None:
        last = whole[..., -taps:]
    else:
        slots = (counts[:, None] + torch.arange(taps, device=x.device))[:, None]
        last = whole.gather(2, slots.expand(-1, x.shape[1], -1))
    if segments is None:
        return last
    piece = F.pad(_begun(segments), (taps, 0))[:, -taps:]
    return last.masked_fill((piece != piece[:, -1:])[:, None], 0.0)


def _begun(segments: Tensor) -> Tensor:
    """How many pieces have begun up to each token, (batch, length)."""
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0)).cumsum(1)
