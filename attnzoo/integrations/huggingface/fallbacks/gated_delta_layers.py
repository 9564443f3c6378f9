"""The gated delta rules of transformers' models: what each family projects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.conventions.continued import built
from attnzoo.conventions.gated_delta import gated_delta_rule
from attnzoo.engines.exponential import softplus
from attnzoo.integrations.huggingface.fallbacks.recurrent_layer import Projected, RecurrentLayer


class GatedDeltaLayer(RecurrentLayer):
    """A gated delta rule, whose gates are g and beta."""

    variant = "gated_deltanet"

    def build(self) -> None:
        _, (_, width), (heads, _) = self.heads_of()
        built(self.variant, heads, width, l2_norm=True)

    def heads_of(self: Any) -> list[tuple[int, int]]:
        keys = (self.num_k_heads, self.head_k_dim)
        return [keys, keys, (self.num_v_heads, self.head_v_dim)]

    def recur(
        self: Any,
        mixed: list[Tensor],
        gates: tuple[Tensor, ...],
        state: Tensor | None,
        returns_state: bool,
        **pieces: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        return gated_delta_rule(
            *mixed,
            *gates,
            initial_state=state,
            output_final_state=returns_state,
            use_qk_l2norm_in_kernel=True,
            **pieces,
        )


def _log_decay(layer: Any, a: Tensor) -> Tensor:
    """As transformers makes it, in float32 at least: in float16 exp(A_log) might overflow."""
    return -layer.A_log.float().exp() * softplus(a.float() + layer.dt_bias)


class Qwen3NextLayer(GatedDeltaLayer):
    """`Qwen3NextGatedDeltaNet`."""

    def project(self: Any, hidden_states: Tensor) -> Projected:
        q, k, v, z, b, a = self.fix_query_key_value_ordering(
            self.in_proj_qkvz(hidden_states), self.in_proj_ba(hidden_states)
        )
        mixed = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
        return Projected(mixed, (_log_decay(self, a), b.sigmoid()), z)

    def finish(self: Any, rows: Tensor, gate: Tensor) -> Tensor:
        width = rows.shape[-1]
        normed = self.norm(rows.reshape(-1, width), gate.reshape(-1, width))
        return self.out_proj(normed.view(*rows.shape[:2], -1))


class Qwen35Layer(Qwen3NextLayer):
    """`Qwen3_5GatedDeltaNet` and `Qwen3_5MoeGatedDeltaNet`."""

    def project(self: Any, hidden_states: Tensor) -> Projected:
        return Projected(
            self.in_proj_qkv(hidden_states),
            (
                _log_decay(self, self.in_proj_a(hidden_states)),
                self.in_proj_b(hidden_states).sigmoid(),
            ),
            self.in_proj_z(hidden_states).unflatten(-1, (-1, self.head_v_dim)),
        )


class OlmoHybridLayer(GatedDeltaLayer):
    """`OlmoHybridGatedDeltaNet`."""

    def project(self: Any, hidden_states: Tensor) -> Projected:
        beta = self.b_proj(hidden_states).sigmoid()
        return Projected(
            torch.cat([one(hidden_states) for one in (self.q_proj, self.k_proj, self.v_proj)], -1),
            (
                _log_decay(self, self.a_proj(hidden_states)),
                beta * 2 if self.allow_neg_eigval else beta,
            ),
            self.g_proj(hidden_states).unflatten(-1, (-1, self.head_v_dim)),
        )

    def finish(self: Any, rows: Tensor, gate: Tensor) -> Tensor:
        width = rows.shape[-1]
        normed = self.o_norm(rows.reshape(-1, width), gate.reshape(-1, width))
        return self.o_proj(normed.view(*rows.shape[:2], -1))


class KimiLinearLayer(GatedDeltaLayer):
    """`KimiLinearDeltaAttention` and `Glm5NextTextLinearAttention`, whose gates are by channel."""

    variant = "kda"

    def project(self: Any, hidden_states: Tensor) -> Projected:
        return Projected(
            torch.cat([one(hidden_states) for one in (self.q_proj, self.k_proj, self.v_proj)], -1),
            (self.forget_gate(hidden_states), self.b_proj(hidden_states).sigmoid()),
            self.output_gate(hidden_states).unflatten(-1, (-1, self.head_dim)),
        )

    def output_gate(self: Any, hidden_states: Tensor) -> Tensor:
        return self.g_b_proj(self.g_a_proj(hidden_states))

    def heads_of(self: Any) -> list[tuple[int, int]]:
        return [(self.num_heads, self.head_dim)] * 3

    def finish(self: Any, rows: Tensor, gate: Tensor) -> Tensor:
        return self.o_proj(self.o_norm(rows, gate).flatten(2))


class BailingHybridLayer(KimiLinearLayer):
    """`BailingHybridDeltaAttention`."""

    def output_gate(self: Any, hidden_states: Tensor) -> Tensor:
        return self.g_proj(hidden_states)
