"""The Mamba-2 layers of transformers' models."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attnzoo.conventions.continued import built
from attnzoo.conventions.mamba2_scan import mamba2_chunk_scan
from attnzoo.integrations.huggingface.fallbacks.recurrent_layer import Projected, RecurrentLayer


class Mamba2Layer(RecurrentLayer):
    """`Mamba2Mixer`, and those of Bamba, Granite, Nemotron-H and Zamba2, whose gate is dt."""

    def build(self: Any) -> None:
        built("mamba2", self.num_heads, self.ssm_state_size)

    def project(self: Any, hidden_states: Tensor) -> Projected:
        return self._split(self.in_proj(hidden_states))

    def _split(self: Any, projected: Tensor) -> Projected:
        widths = [self.intermediate_size, self.conv_dim, self.num_heads]
        gate, mixed, dt = projected.split(widths, -1)
        return Projected(mixed, (dt,), gate)

    def heads_of(self: Any) -> list[tuple[int, int]]:
        keys = (self.n_groups, self.ssm_state_size)
        return [(self.num_heads, self.head_dim), keys, keys]

    def recur(
        self: Any,
        mixed: list[Tensor],
        gates: tuple[Tensor, ...],
        state: Tensor | None,
        returns_state: bool,
        **pieces: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        values, keys, queries = mixed
        (dt,) = gates
        return mamba2_chunk_scan(
            values,
            dt,
            -self.A_log.float().exp(),
            keys,
            queries,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.time_step_limit,
            initial_states=state,
            return_final_states=returns_state,
            **pieces,
        )

    def finish(self: Any, rows: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(self.norm(rows.flatten(2), gate).to(gate.dtype))


class FalconH1Layer(Mamba2Layer):
    """`FalconH1Mixer`, which scales what it projects and may leave out the norm."""

    def project(self: Any, hidden_states: Tensor) -> Projected:
        return self._split(self.in_proj(hidden_states * self.ssm_in_multiplier) * self.mup_vector)

    def finish(self: Any, rows: Tensor, gate: Tensor) -> Tensor:
        if self.mamba_rms_norm:
            return super().finish(rows, gate)
        return self.out_proj((rows.flatten(2) * F.silu(gate)).to(gate.dtype))
