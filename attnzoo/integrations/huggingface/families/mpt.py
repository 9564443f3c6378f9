"""MPT's attention: ALiBi, and queries, keys and values that may be clipped."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.integrations.huggingface.families.call_interface import (
    call_interface,
    slopes_by_distance,
    with_cached,
)
from attnzoo.layers.distance_biases import alibi_slopes


class MptInterfaceAttention:
    """`MptAttention` of transformers whose scores are the interface's."""

    is_causal = True
    most_positions: int | None = None

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_bias: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers' own. position_bias: by position, of which the slopes by distance take
        the place."""
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = (
            x.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for x in mixed.chunk(3, 2)
        )
        key, value, positions = with_cached(self, past_key_values, query, key, value)
        out, weights = call_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_dropout_p if self.training else 0.0,
            scaling=self.softmax_scale,
            position_bias=slopes_by_distance(alibi_slopes(self.n_heads), positions, query),
        )
        return self.out_proj(out), weights
