"""What the attentions of this folder have in common: they call the attention interface, with a
bias by distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def call_interface(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any
) -> Tensor:
    """The output of the attention that the model's config names, (batch, length, heads ·
    head_dim).

    query, key, value: (batch, heads, length, head_dim)
    how: dropout, scaling, position_bias and what else an attention function takes
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    return attend(module, query, key, value, mask, **how)[0].flatten(2)


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


def seen_by(cache: Any, layer: int | None) -> int | Tensor:
    """Tokens that a model's cache has of a layer; 0 without a cache."""
    return 0 if cache is None else cache.get_seq_length(layer)


def slopes_by_distance(slopes: Tensor, positions: int, like: Tensor) -> Tensor:
    """ALiBi's bias of these slopes, (heads, 2 · positions - 1), where and as precise as `like`."""
    # Not `alibi` of distance_biases: a trace counts positions by a tensor.
    distances = torch.arange(1 - positions, positions, device=like.device).abs()
    return (-slopes.to(like.device, torch.float32)[:, None] * distances).to(like.dtype)
