"""Decoding with a layer: the state of its attention, and the positions of the tokens to come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from attnzoo.call import UnsupportedError
from attnzoo.layers.input_projections import inputs_of, weighed
from attnzoo.layers.layer import Layer
from attnzoo.layers.layer_checks import check_call
from attnzoo.layers.options.output_gate import finished
from attnzoo.layers.options.short_convolution import SHORT_CONVOLUTION, LastTokens
from attnzoo.layers.options.token_shift import GATE, TOKEN_SHIFT, Sources, shifted_sources
from attnzoo.layers.placement import Placement
from attnzoo.layers.positions import positions_of
from attnzoo.layers.projections import project


@dataclass(frozen=True)
class LayerState:
    """What a layer carries from step to step. It is a value, as the state of an attention is.

    core: the state of the layer's attention
    positions: (batch,) of the next token in the piece that goes on; 0 where only padding has come
    last: (batch,) ids of these pieces; None where no ids have come
    convolved: what the short convolution reads of the tokens so far, by kind of projection, and
        what the token shift reads, under its name
    made_by: what options of the layer are in it, by name
    """

    core: Any
    positions: Tensor
    last: Tensor | None = None
    convolved: Mapping[str, LastTokens] = field(default_factory=dict)
    made_by: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seen(self) -> int:
        """Slots taken so far."""
        return self.core.seen

    def crop(self, n: int) -> LayerState:
        """The state without its last n slots, as `state.crop` of the attention has it; with a short
        convolution, at most those of the last call, and 128."""
        convolved = {kind: tokens.crop(n) for kind, tokens in self.convolved.items()}
        positions = (self.positions - n).clamp(min=0)
        return replace(self, core=self.core.crop(n), positions=positions, convolved=convolved)

    def select(self, rows: Tensor) -> LayerState:
        """The state of these rows of the batch, (new_batch,) indices."""
        core = self.core.select(rows)
        last = None if self.last is None else self.last[rows]
        convolved = {kind: tokens.select(rows) for kind, tokens in self.convolved.items()}
        return replace(
            self, core=core, positions=self.positions[rows], last=last, convolved=convolved
        )

    def held_bytes(self) -> int:
        """Bytes that its tensors take."""
        own = [x for x in (self.positions, self.last) if x is not None]
        own += [kept.tokens for kept in self.convolved.values()]
        return self.core.held_bytes() + sum(x.nbytes for x in own)


def first_state(layer: Layer, batch_size: int, max_length: int | None) -> LayerState:
    """The state of a layer that has seen nothing."""
    if layer.bias_k is not None or layer.add_zero_attn:
        raise UnsupportedError(
            "add_bias_kv and add_zero_attn append keys behind the last one, which a state has no "
            "place for; build the layer without them"
        )
    weight = layer.out_proj.weight
    core = layer.attention.init_state(
        batch_size, max_length, dtype=weight.dtype, device=weight.device
    )
    positions = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
    return LayerState(core, positions, made_by=_in_a_state(layer))


def _in_a_state(layer: Layer) -> dict[str, Any]:
    """The options of a layer that change what its state holds."""
    convolution, rotary = (layer._modules.get(name) for name in (SHORT_CONVOLUTION, "rotary"))
    return {
        "short_convolution": None if convolution is None else convolution.kernel_size[0],
        "rotary": rotary is not None,
        "token_shift": TOKEN_SHIFT in layer._modules,
        "qk_norm": layer.qk_norm,
    }


def step_layer(
    layer: Layer,
    x: Tensor,
    state: LayerState,
    key_padding_mask: Tensor | None,
    segments: Tensor | None,
    inputs: Mapping[str, Tensor | None],
) -> tuple[Tensor, LayerState]:
    """The rows of new tokens and the state behind them, see `MultiheadAttention.step`."""
    if not isinstance(state, LayerState):
        raise ValueError(
            f"state is a {type(state).__name__}; give what init_state or the step before returned"
        )
    for name, value in _in_a_state(layer).items():
        if state.made_by.get(name) != value:
            raise ValueError(
                f"state is of a layer with {name}={state.made_by.get(name)!r}, and this one has "
                f"{name}={value!r}; give what its own init_state returned, or the step before"
            )
    check_call(layer, x, x, x, key_padding_mask, None)
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        raise ValueError(
            f"key_padding_mask has dtype {key_padding_mask.dtype}; a step takes a bool one (True = "
            "ignore)"
        )
    samples = 1 if x.dim() == 2 else x.shape[0 if layer.batch_first else 1]
    if samples != len(state.positions):
        raise ValueError(
            f"x has batch size {samples} and the state was made for {len(state.positions)}; give "
            "init_state the batch size of x"
        )
    axes = "l" if x.dim() == 2 else "b l" if layer.batch_first else "l b"
    batch = "1" if x.dim() == 2 else "b"
    pattern = f"{axes} (p h d) -> p {batch} h l d"
    if x.dim() == 2:
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        segments = segments[None] if segments is not None and segments.dim() == 1 else segments
    key_mask = None if key_padding_mask is None else ~key_padding_mask
    before, sources = _goes_on_with(state, segments), Sources(x, x, x)
    if TOKEN_SHIFT in layer._modules:
        sources = shifted_sources(layer, x, axes, key_mask, segments, before)
    q, k, v = project(layer, sources.q, sources.k, sources.v, pattern)
    positions = positions_of(q, k, key_mask, segments).expand(q.shape[0], -1)
    positions, after = _continued(state, positions, key_mask, segments)
    placed = Placement(layer, positions, key_mask, segments, before)
    q, k, v = placed(q, k, v)
    more = inputs_of(layer, sources, k, inputs, pattern, placed)
    unweighed, (k, v) = v, weighed(layer, k, v, more, inputs)
    out, core = layer.attention.step(
        q, k, v, state.core, key_mask=key_mask, segments=segments, **more
    )
    last = state.last if segments is None or not segments.shape[1] else segments[:, -1]
    out = finished(layer, out, (q, k, unweighed), sources.others.get(GATE, x), pattern)
    out = layer.out_proj(rearrange(out, f"{batch} h l d -> {axes} (h d)"))
    convolved = {**placed.after, **sources.after} if q.shape[2] else state.convolved
    return out, replace(state, core=core, positions=after, last=last, convolved=convolved)


def _goes_on_with(state: LayerState, segments: Tensor | None) -> Mapping[str, LastTokens]:
    """What a short convolution or a token shift reads of the tokens before the new ones: nothing
    where these begin a piece."""
    if segments is None or state.last is None or not segments.shape[1]:
        return state.convolved
    begins = (segments[:, 0] != state.last)[:, None, None]
    return {
        kind: replace(kept, tokens=kept.tokens.masked_fill(begins, 0.0))
        for kind, kept in state.convolved.items()
    }


def _continued(
    state: LayerState, positions: Tensor, key_mask: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The positions of new slots, (batch, new), where the piece of the first goes on behind the
    state, and the next ones, (batch,).

    positions: as if nothing stood before them
    """
    length = positions.shape[1]
    if not length:
        return positions, state.positions
    of_first = of_last = torch.ones_like(positions, dtype=torch.bool)
    goes_on = state.positions > 0
    if segments is not None:
        of_first, of_last = segments == segments[:, :1], segments == segments[:, -1:]
        if state.last is not None:
            goes_on = goes_on & (segments[:, 0] == state.last)
    continued = goes_on[:, None] & of_first
    slots = torch.arange(length, device=positions.device)
    positions = torch.where(continued, state.positions[:, None] + slots, positions)
    real = of_last if key_mask is None else of_last & key_mask
    begun = continued[:, -1] | real.any(1)
    return positions, torch.where(begun, positions[:, -1] + 1, 0)
