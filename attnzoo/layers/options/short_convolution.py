"""Short causal convolutions: of a layer's queries, keys and values with those of the few tokens
before, which padding and other pieces do not reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.arguments import check_positive
from attnzoo.call import UnsupportedError
from attnzoo.eager import can_look, is_recorded
from attnzoo.engines.state_checks import GOES_BACK, check_crop
from attnzoo.layers.layer import Layer
from attnzoo.sequences.packing import order_of
from attnzoo.sequences.padding import fetched
from attnzoo.spec import Spec

#: Where a layer has it.
SHORT_CONVOLUTION = "short_convolution"


@dataclass(frozen=True)
class LastTokens:
    """What a convolution reads of the tokens behind it.

    tokens: (batch, channels, slots), 0 where there is none, on padding and in earlier pieces
    croppable: how many of them can be taken back; as many more as a convolution reads stay
    """

    tokens: Tensor
    croppable: int

    def crop(self, n: int) -> LastTokens:
        """Without the last n tokens. Raises ValueError on more than can be taken back."""
        check_crop(n, self.croppable)
        kept = self.tokens[..., : self.tokens.shape[-1] - n]
        return LastTokens(kept, self.croppable - n)

    def select(self, rows: Tensor) -> LastTokens:
        """Those of these samples."""
        return replace(self, tokens=self.tokens[rows])


class ShortConvolution(nn.Conv1d):
    """Every channel of q, k and v with those of the last tokens, then SiLU.

        y_t = silu(Σ_j w_j ∘ x_{t - taps + 1 + j}),    j from 0 to taps - 1

    The last tap weighs the token itself. A slot of padding counts as 0 and keeps its place; a token
    reads none of another piece.

    channels: of q, k and v together
    taps: how many tokens it reads, its own included

    Source: Yang et al., Gated Delta Networks, 2024, arXiv:2412.06464, section 3.4; Gu and Dao,
    Mamba, 2023, arXiv:2312.00752, section 3.4.
    """

    def __init__(self, channels: int, taps: int, **factory: Any) -> None:
        super().__init__(channels, channels, taps, groups=channels, bias=False, **factory)

    def forward(
        self,
        parts: Sequence[Tensor],
        key_mask: Tensor | None,
        segments: Tensor | None,
        before: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """parts: q, k and v as one projection makes them, (batch, heads, length, head_dim) each
        key_mask: (batch, length) bool, True = a real token
        segments: (batch, length) integer
        before: (batch, channels, slots), the last tokens of the piece that the first goes on with;
            None: there are none
        returns: the parts, and all that was read, (batch, channels, length)
        """
        x = torch.cat([part.transpose(2, 3).flatten(1, 2) for part in parts], 1)
        if key_mask is not None:
            x = x.masked_fill(~key_mask[:, None], 0.0)

        def run(x: Tensor, ids: Tensor | None) -> Tensor:
            return convolve(x, self.weight, None, before, ids, self._conv_forward)

        out = F.silu(in_pieces(x, segments, run)).to(x.dtype)
        heads = parts[0].shape[1]
        return [
            one.unflatten(1, (heads, -1)).transpose(2, 3) for one in out.chunk(len(parts), 1)
        ], x


def check_short_convolution(taps: Any, spec: Spec) -> None:
    """Raise a ValueError on what is no number of taps and not None, UnsupportedError on a core that
    is never causal."""
    if taps is not None:
        check_positive(SHORT_CONVOLUTION, taps)
        if not spec.causal:
            raise UnsupportedError(
                f"short_convolution={taps} reads earlier tokens, and {spec.name} cannot be causal; "
                "build the layer without it"
            )


def add_short_convolution(layer: Any, taps: int) -> None:
    """Give a layer its convolution."""
    like = layer.out_proj.weight
    channels = len(layer.attention.projected) * layer.embed_dim
    module = ShortConvolution(channels, taps, device=like.device, dtype=like.dtype)
    setattr(layer, SHORT_CONVOLUTION, module)


def convolution_of(layer: Layer) -> ShortConvolution | None:
    """The layer's convolution, if it has one."""
    return layer._modules.get(SHORT_CONVOLUTION)


def check_one_sequence(what: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise UnsupportedError where an option that reads earlier tokens, such as
    "token_shift=True", gets several sequences."""
    one = query is key and key is value
    if not one and (not is_recorded() or query.shape != key.shape):
        # in a graph one tensor may come in as three
        raise UnsupportedError(
            f"{what} reads the tokens before each query and key, so all must be one sequence: pass "
            "one tensor as query, key and value, or build the layer without it"
        )


def check_causal(what: str, is_causal: bool) -> None:
    """Raise UnsupportedError where an option that reads earlier tokens gets a call that is not
    causal."""
    if not is_causal:
        raise UnsupportedError(
            f"{what} is causal, and this call is not: pass is_causal=True, with no attn_mask but "
            "the causal one, or build the layer without it"
        )


def check_convolved_call(
    layer: Layer, query: Tensor, key: Tensor, value: Tensor, is_causal: bool
) -> None:
    """Raise UnsupportedError on a call that a layer's convolution cannot be part of."""
    module = convolution_of(layer)
    if module is not None:
        what = f"{SHORT_CONVOLUTION}={module.kernel_size[0]}"
        check_one_sequence(what, query, key, value)
        check_causal(what, is_causal)


def in_pieces(
    x: Tensor, segments: Tensor | None, run: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """What `run` makes of x and segments in which the tokens of a piece stand together.

    x: (batch, channels, length)
    segments: (batch, length) integer; None: there is one piece
    returns: as x
    """
    order = None
    if segments is not None and can_look(segments, may_stall=True):
        order = order_of(segments)
    if segments is None or order is None:
        return run(x, segments)
    out = run(fetched(x, order), fetched(segments, order, 1))
    return fetched(out, order.argsort(1))


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    segments: Tensor | None,
    depthwise: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
) -> Tensor:
    """Every token's channels with those of the tokens just before it.

    x: (batch, channels, length)
    weight: (channels, 1, taps), of which the last weighs the token itself
    before: (batch, channels, slots), the last tokens before x, of the piece of its first; None:
        there are none
    segments: (batch, length), the piece that each token belongs to, whose tokens stand together;
        None: there is one
    depthwise: the convolution of x, the weight and the bias
    returns: as x
    """
    taps, length = weight.shape[-1], x.shape[-1]
    if not length:
        return x * weight[:, :, -1]
    lead = F.pad(x, (taps - 1, 0)) if before is None else torch.cat([before, x], -1)
    lead = lead[..., lead.shape[-1] - length - taps + 1 :]
    if segments is None:
        if depthwise is None:
            return F.conv1d(lead, weight, bias, groups=x.shape[1])
        return depthwise(lead, weight, bias)
    piece = F.pad(_begun(segments), (taps - 1, 0))
    out = x * weight[:, :, -1]
    for back in range(1, taps):
        earlier = slice(taps - 1 - back, taps - 1 - back + length)
        same = (piece[:, earlier] == piece[:, taps - 1 :])[:, None]
        out = out + lead[..., earlier].masked_fill(~same, 0.0) * weight[:, :, -1 - back]
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


def last_tokens(
    x: Tensor, taps: int, before: LastTokens | None, segments: Tensor | None
) -> LastTokens:
    """What the tokens to come read, and as many more as can be taken back.

    x, segments: of the new tokens, as in `convolve`
    before: of those before x, in the piece of its first
    """
    croppable = min(x.shape[-1], GOES_BACK)
    earlier = None if before is None else before.tokens
    last = remembered(x, taps - 1 + croppable, earlier, None, segments)
    return LastTokens(last.clone(), croppable)


def _begun(segments: Tensor) -> Tensor:
    """How many pieces have begun up to each token, (batch, length)."""
    return F.pad(segments[:, 1:] != segments[:, :-1], (1, 0)).cumsum(1)
