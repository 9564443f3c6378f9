"""The lightning attention of MiniMax's models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.conventions.continued import built
from attnzoo.conventions.lightning_attention import lightning_attention
from attnzoo.integrations.huggingface.fallbacks.recurrent_layer import (
    ReplacedLayer,
    refuse_packed_beside,
    told_pieces,
)


class LightningLayer(ReplacedLayer):
    """`MiniMaxLightningAttention`, which has no convolution and a cache of its own."""

    def build(self: Any) -> None:
        built("mamba2", self.num_attention_heads, self.head_dim)

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers' own, but that there is no state beside the output where nothing is
        cached."""
        segments, state = told_pieces(hidden_states, kwargs), None
        if past_key_values is not None:
            held = past_key_values.get_linear_cache(self.layer_idx)
            state = held if isinstance(held, Tensor) else None  # a list: nothing is cached yet
        if hidden_states.shape[1] == 1:
            attention_mask = None  # a single new token is never padding
        mask = None if attention_mask is None else attention_mask.bool()
        refuse_packed_beside(self, segments, mask is not None, state is not None)
        made = self.act_fn(self.qkv_proj(hidden_states))
        made = made.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        q, k, v = made.split(self.head_dim, -1)
        rows, state = lightning_attention(
            q,
            k,
            v,
            self.slope_rate,
            initial_state=state,
            output_final_state=past_key_values is not None,
            key_mask=mask,
            segments=segments,
        )
        if past_key_values is not None:
            past_key_values.set_linear_cache(self.layer_idx, state)
        normed = self.norm(rows.transpose(1, 2).flatten(2))
        return self.out_proj(self.output_gate(hidden_states).sigmoid() * normed), state
