"""transformers' caches of latent attention as states of a `LatentAttention`, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call, UnsupportedError
from attnzoo.conventions.latent_cache import Order, from_cache, to_cache
from attnzoo.engines.softmax.cache import KeyValueCache
from attnzoo.layers.decoding import LayerState
from attnzoo.layers.latent.latent_attention import LatentAttention


def latent_state(
    layer: LatentAttention,
    keys: Tensor,
    values: Tensor,
    key_mask: Tensor | None = None,
    *,
    order: Order = "deepseek_v3",
) -> LayerState:
    """The state of a layer that goes on behind a cache of transformers'.

    layer: with the weights of the layer whose cache it is, see `latent_layer`
    keys, values: of `cache.layers[i]`, (batch, 1, length, rank) and (batch, 1, length, rope_width)
    key_mask: (batch, length) bool, True = a real token; padding stands ahead
    order: of turned pairs, see `conventions.latent_cache`
    """
    state = layer.init_state(keys.shape[0])
    if not isinstance(state.core, KeyValueCache):
        raise _no_cache(layer)
    kept = from_cache(keys, values, interleaved=_interleaved(layer), order=order)
    if key_mask is not None:
        kept = kept.masked_fill(~key_mask[:, None, :, None], 0.0)
    core = state.core.append(Call(kept, kept, kept[..., :0], key_mask))
    length = keys.shape[2]
    positions = torch.full_like(state.positions, length) if key_mask is None else key_mask.sum(1)
    return replace(state, core=core.without_excess(), positions=positions)


def cached(
    layer: LatentAttention, state: LayerState, *, order: Order = "deepseek_v3"
) -> tuple[Tensor, Tensor]:
    """What transformers' cache holds of the tokens of a state: `latent_state`'s keys and values."""
    core: Any = state.core
    if not isinstance(core, KeyValueCache) or not layer.attention.absorbs:
        raise _no_cache(layer)
    width = layer.attention.rope_width
    return to_cache(core.k, width, interleaved=_interleaved(layer), order=order)


def _interleaved(layer: LatentAttention) -> bool:
    rotary: Any = layer._modules.get("rotary")
    return rotary is not None and rotary.interleaved


def _no_cache(layer: LatentAttention) -> UnsupportedError:
    return UnsupportedError(
        f"a layer of {layer.attention.spec.name} decodes with a state that is no cache of one row "
        "of latents; give one of attention='standard' without segments"
    )
