"""Falcon's attention: rotary, or ALiBi scaled as the products are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.integrations.huggingface.families.call_interface import (
    call_interface,
    slopes_by_distance,
    with_cached,
)
from attnzoo.layers.distance_biases import alibi_slopes


class FalconInterfaceAttention:
    """`FalconAttention` of transformers whose scores are the interface's."""

    most_positions: int | None = None

    def forward(
        self: Any,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers' own. alibi: by position, of which the slopes by distance take the
        place; they are rounded to bfloat16 as the model has them."""
        from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

        fused = self._split_heads(self.query_key_value(hidden_states))
        query, key, value = (x.transpose(1, 2) for x in fused)
        if alibi is None and position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value, positions = with_cached(self, layer_past, query, key, value)
        bias = None
        if alibi is not None:
            slopes = alibi_slopes(self.num_heads).to(torch.bfloat16).float() * self.inv_norm_factor
            bias = slopes_by_distance(slopes, positions, query)
        out, weights = call_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout.p if self.training and alibi is not None else 0.0,
            scaling=self.inv_norm_factor,
            position_bias=bias,
            position_ids=position_ids,
            output_attentions=output_attentions,
        )
        return self.dense(out), weights
