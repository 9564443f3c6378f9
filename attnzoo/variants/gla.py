"""Gated linear attention: a state whose rows forget each by a gate of its own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attnzoo.arguments import check_scale
from attnzoo.attention import Attention, Input, Spec
from attnzoo.engines.linear.gated.gate_projections import Gate, LowRankGate
from attnzoo.engines.linear.gated.gated_linear import GatedLinear
from attnzoo.engines.linear.gated.tokens import CHANNEL_GATE, Rule
from attnzoo.registry import register

#: Of the paper's layer: the inner width of the gate's projection, and the root of its sigmoid.
RANK, ROOT = 16, 16.0


@register
class GatedLinearAttention(Attention):
    """Gated linear attention (Yang et al. 2023, equation 3).

        S_t = Diag(α_t) S_{t−1} + k_t v_tᵀ,    out_t = s·S_tᵀ q_t,    s = 1/√d

    Each channel of the keys fades to its own part α_t = exp(log_decay_t). A_ij = s·Σ_c q_ic k_jc ·
    (what is left at i of channel c of token j) for j ≤ i; entries may be negative, and rows do not
    sum to 1. What is kept of softmax is a score for every pair; what is lost is the normaliser, and
    all that a gate has let fade. Causal only. Use it in models trained with it; not in the place of
    a trained softmax.

    A call may bring log_decay, (batch, kv_heads, key_length, head_dim), at most 0; without it
    nothing fades.

    scale: s, the factor of the rows, 1/sqrt(head_dim) by default
    """

    spec = Spec(
        name="gla",
        title="Gated linear attention",
        paper="Yang et al., Gated Linear Attention Transformers, 2023, arXiv:2312.06635",
        equation="S_t = Diag(α_t)S_{t−1} + k_t v_tᵀ, row t is S_tᵀq_t/√d",
        complexity="O(n) time and memory",
        family="kernel",
        exact=False,
        bidirectional=False,
        value_heads=True,
        inputs=(CHANNEL_GATE,),
    )

    def __init__(
        self, heads: int, head_dim: int, *, scale: float | None = None, backend: str = "auto"
    ) -> None:
        rule = Rule(CHANNEL_GATE, check_scale(scale))
        super().__init__(heads, head_dim, GatedLinear(rule), backend=backend)

    def input_projection(self, one: Input, features: int) -> Gate:
        return LowRankGate(features, self.heads * self.head_dim, RANK, slow_decay)


def slow_decay(x: Tensor) -> Tensor:
    """log α of the paper's layer, whose α is the 16th root of a sigmoid."""
    return F.logsigmoid(x) / ROOT
