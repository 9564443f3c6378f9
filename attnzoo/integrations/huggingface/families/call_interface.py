"""What the attentions of this folder have in common: they call the attention interface, with a
bias by distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def call_interface(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any
) -> tuple[Tensor, Tensor | None]:
    """The output of the attention that the model's config names, (batch, length, heads ·
    head_dim), and A where it is asked for.

    query, key, value: (batch, heads, length, head_dim)
    how: dropout, scaling, position_bias and what else an attention function takes
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    out, weights = attend(module, query, key, value, mask, **how)
    return out.flatten(2), weights


def positions_of(module: Any, past: int | Tensor, length: int, key_length: int) -> int:
    """How many positions a bias by distance is for: those in which the keys and queries of a call
    stand, but for keys that no query sees.

    module: which knows how many are seen at most
    past: tokens that came before; a tensor where a cache of fixed size counts them
    length: new tokens
    key_length: keys of the call, which a bounded state has fewer of than came before
    """
    count = key_length if isinstance(past, Tensor) else max(key_length, past + length)
    return count if module.most_positions is None else min(count, module.most_positions)


def with_cached(
    module: Any, cache: Any, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, int]:
    """The keys and values behind those that the model's cache has of the layer, and how many
    positions a bias by distance is for.

    module: the attention, which has a layer_idx
    cache: transformers' own, which takes the new keys and values; None: no token came before
    query, key, value: of the new tokens, (batch, heads, length, head_dim)
    """
    past = 0
    if cache is not None:
        past = cache.get_seq_length(module.layer_idx)  # before it takes the new ones
        key, value = cache.update(key, value, module.layer_idx)
    return key, value, positions_of(module, past, query.shape[2], key.shape[2])


def slopes_by_distance(slopes: Tensor, positions: int, like: Tensor) -> Tensor:
    """ALiBi's bias of these slopes, (heads, 2 · positions - 1), where and as precise as `like`."""
    # Not `alibi` of distance_biases: a trace counts positions by a tensor.
    distances = torch.arange(1 - positions, positions, device=like.device).abs()
    return (-slopes.to(like.device, torch.float32)[:, None] * distances).to(like.dtype)
