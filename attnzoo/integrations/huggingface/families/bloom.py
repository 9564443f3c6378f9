"""BLOOM's attention: ALiBi, and the residual added inside."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attnzoo.integrations.huggingface.families.call_interface import (
    call_interface,
    slopes_by_distance,
    with_cached,
)
from attnzoo.layers.distance_biases import alibi_slopes


class BloomInterfaceAttention:
    """`BloomAttention` of transformers whose scores are the interface's."""

    is_causal = True
    most_positions: int | None = None

    def forward(
        self: Any,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers' own. alibi: by position, of which the slopes by distance take the
        place."""
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        key, value, positions = with_cached(self, layer_past, query, key, value)
        out, weights = call_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout.p if self.training else 0.0,
            scaling=self.inv_norm_factor,
            position_bias=slopes_by_distance(alibi_slopes(self.num_heads), positions, query),
            output_attentions=output_attentions,
        )
        out = F.dropout(self.dense(out), self.hidden_dropout, self.training)
        return out + residual, weights
