"""Mamba-2: a state that forgets by one number for each token and head."""

from __future__ import annotations

from attnzoo.arguments import check_scale
from attnzoo.attention import Attention, Input, Spec
from attnzoo.engines.linear.gated.gate_projections import Gate, StepDecay
from attnzoo.engines.linear.gated.gated_linear import GatedLinear
from attnzoo.engines.linear.gated.tokens import HEAD_GATE, Rule
from attnzoo.registry import register


@register
class Mamba2(Attention):
    """Mamba-2's state space duality (Dao and Gu 2024, equation 1 with a number for A).

        A_ij = s·q_i·k_j · exp(log_decay_{j+1} + … + log_decay_i) for j ≤ i,    s = 1

    q, k and v are the paper's C, B and x, the last times Δ; log_decay is A·Δ, which is 0 at most.
    Its skip D, the convolution, and what makes Δ belong to the layer around this (`skip=True` and
    `short_convolution=4` of `MultiheadAttention`). With a constant
    log_decay it is `retention` without its scale. What is kept of softmax is a score for every
    pair; what is lost is the normaliser, and all that a token has let fade. Causal only. Use it in
    models trained with it, for long inputs and small states; not to recall many facts word for
    word.

    A call may bring log_decay, (batch, kv_heads, key_length), at most 0; without it nothing fades.

    scale: s, the factor of the rows; None is 1/sqrt(head_dim)
    """

    spec = Spec(
        name="mamba2",
        title="Mamba-2 (SSD)",
        paper="Dao and Gu, Transformers are SSMs, 2024, arXiv:2405.21060",
        equation="A_ij = q_i·k_j exp(Σ log_decay over j+1..i) for j ≤ i",
        complexity="O(n) time and memory",
        family="kernel",
        exact=False,
        bidirectional=False,
        value_heads=True,
        inputs=(HEAD_GATE,),
    )

    def __init__(
        self, heads: int, head_dim: int, *, scale: float | None = 1.0, backend: str = "auto"
    ) -> None:
        rule = Rule(HEAD_GATE, check_scale(scale))
        super().__init__(heads, head_dim, GatedLinear(rule), backend=backend)

    def input_projection(self, one: Input, features: int) -> Gate:
        return StepDecay(features, self.heads, self.heads, weighs_values=True)
