"""A recurrent layer of transformers with this library's engine under it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import UnsupportedError
from attnzoo.layers.options.short_convolution import convolve, remembered
from attnzoo.sequences.segments import from_cu_seqlens, from_seq_idx


@dataclass(frozen=True)
class Projected:
    """What a layer makes of its hidden states; all tensors begin with (batch, length).

    mixed: (channels,), what the convolution reads: all that `heads_of` lists
    gates: what else the recurrence reads
    gate: of the output
    """

    mixed: Tensor
    gates: tuple[Tensor, ...]
    gate: Tensor


@dataclass(frozen=True)
class RealTokens:
    """The real tokens of padded rows, moved to the front in their order.

    order: (batch, length), the slot that each place takes from
    mask: (batch, length) bool, which places hold a token
    """

    order: Tensor
    mask: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> RealTokens:
        """mask: (batch, length), not 0 = a token."""
        real = mask.bool()
        order = (~real).long().argsort(dim=1, stable=True)
        return cls(order, real.gather(1, order))

    @classmethod
    def in_call(cls, hidden_states: Tensor, mask: Tensor | None) -> RealTokens | None:
        """Of a forward; None where it moves no token. A single new token is never padding: the mask
        of transformers says the same."""
        return None if mask is None or hidden_states.shape[1] == 1 else cls.of(mask)

    def gathered(self, x: Tensor) -> Tensor:
        """(batch, length, width) with the tokens in front and zeros behind them."""
        moved = torch.take_along_dim(x, self.order[..., None], 1)
        return moved.masked_fill(~self.mask[..., None], 0.0)

    def scattered(self, x: Tensor) -> Tensor:
        """What `gathered` came from, with zeros in padded slots."""
        kept = x.masked_fill(~self.mask[..., None], 0.0)
        return torch.take_along_dim(kept, self.order.argsort(1)[..., None], 1)

    def spread(self, weights: Tensor) -> Tensor:
        """A of the gathered tokens, (batch, heads, length, length), with every row and column where
        its token stands, and 0 in padded slots."""
        back = self.order.argsort(1)
        rows = torch.take_along_dim(weights, back[:, None, :, None], 2)
        both = torch.take_along_dim(rows, back[:, None, None], 3)
        real = self.mask.gather(1, back)
        return both.masked_fill(~(real[:, None, :, None] & real[:, None, None]), 0.0)


def real_tokens(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RealTokens | None:
    """The tokens that a layer moves together in a forward with these arguments; None where it moves
    none, as no layer does that is not a `RecurrentLayer`."""
    if not isinstance(layer, RecurrentLayer):
        return None
    names = ("hidden_states", "cache_params", "attention_mask")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return RealTokens.in_call(given["hidden_states"], given.get("attention_mask"))


class ReplacedLayer:
    """A layer of another class than transformers gave it."""

    def build(self) -> None:
        """Build the attention that its rows are made by, for a compiler to find."""
        raise NotImplementedError


class RecurrentLayer(ReplacedLayer):
    """A gated state behind a short convolution. A family says what it projects, how the state goes
    on, and how the output is normed, gated and projected."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As transformers' own. Padding is absent, packed rows are kept apart, and a cached state
        goes on by any number of tokens."""
        segments = told_pieces(hidden_states, kwargs)
        real = RealTokens.in_call(hidden_states, attention_mask)
        if real is not None:
            hidden_states = real.gathered(hidden_states)
        refuse_packed_beside(self, segments, real is not None, self._continues(cache_params))
        made = self.project(hidden_states)
        mixed = self._convolved(made.mixed, cache_params, real, segments)
        state = None
        if cache_params is not None:
            state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
        rows, state = self.recur(
            mixed,
            made.gates,
            state,
            cache_params is not None,
            key_mask=None if real is None else real.mask,
            segments=segments,
        )
        if cache_params is not None:
            cache_params.update_recurrent_state(state, self.layer_idx)
        out = self.finish(rows, made.gate)
        return out if real is None else real.scattered(out)

    def project(self: Any, hidden_states: Tensor) -> Projected:
        raise NotImplementedError

    def heads_of(self: Any) -> list[tuple[int, int]]:
        """Count and width of the heads that come out of the convolution, in order."""
        raise NotImplementedError

    def recur(
        self: Any,
        mixed: list[Tensor],
        gates: tuple[Tensor, ...],
        state: Tensor | None,
        returns_state: bool,
        **pieces: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows, (batch, length, heads, value_dim), and the state after them.

        mixed: what `heads_of` lists, (batch, length, heads, width)
        gates: of `project`
        state: before, as transformers lays it out
        pieces: key_mask and segments, of the conventions
        """
        raise NotImplementedError

    def finish(self: Any, rows: Tensor, gate: Tensor) -> Tensor:
        """Rows and the gate as hidden states."""
        raise NotImplementedError

    def _continues(self: Any, cache: Any) -> bool:
        return cache is not None and cache.get_conv_state(self.layer_idx, state_idx=0) is not None

    def _convolved(
        self: Any, mixed: Tensor, cache: Any, real: RealTokens | None, segments: Tensor | None
    ) -> list[Tensor]:
        """What `heads_of` lists, (batch, length, heads, width)."""
        from transformers.activations import ACT2FN

        x, before, weight = mixed.transpose(1, 2), None, self.conv1d.weight
        if cache is not None:
            before = cache.get_conv_state(self.layer_idx, state_idx=0)
        out = convolve(x.to(weight.dtype), weight, self.conv1d.bias, before, segments)
        if cache is not None:
            taps, counts = self.conv_kernel_size, None if real is None else real.mask.sum(1)
            if cache.is_recording_past(self.layer_idx):
                last = x  # which `crop` cuts
            else:
                last = remembered(x, taps, before, counts, segments)
            cache.update_conv_state(last, self.layer_idx, conv_kernel_size=taps)
        out = ACT2FN[self.activation](out).to(mixed.dtype).transpose(1, 2)
        heads = self.heads_of()
        parts = out.split([count * width for count, width in heads], -1)
        return [
            part.unflatten(-1, (count, width))
            for part, (count, width) in zip(parts, heads, strict=True)
        ]


def refuse_packed_beside(
    layer: Any, segments: Tensor | None, padded: bool, continues: bool
) -> None:
    """Raise UnsupportedError on packed rows with padding or with tokens cached before them."""
    if segments is not None and (padded or continues):
        raise UnsupportedError(
            f"{type(layer).__name__} was given packed rows beside "
            f"{'attention_mask' if padded else 'cached tokens'}; give packed rows whole, without "
            "attention_mask and with no tokens cached before them"
        )


def told_pieces(hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The segments of packed rows, (batch, length), as the model was told of them."""
    ends, numbers = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
    batch_size, length = hidden_states.shape[:2]
    if numbers is not None:
        return from_seq_idx(numbers, batch_size)
    if ends is None:
        return None
    if batch_size != 1:
        raise UnsupportedError(
            f"cu_seq_lens_q came with {batch_size} rows; it tells of one flattened row, so give "
            "tensors of (1, total length)"
        )
    return from_cu_seqlens(ends, length)
