"""PaTH attention: softmax attention whose positions are products of the tokens in between."""

from __future__ import annotations

from attnzoo.arguments import check_scale
from attnzoo.attention import Attention, Input, Spec
from attnzoo.engines.linear.gated.gate_projections import Gate, WriteStrength
from attnzoo.engines.linear.gated.tokens import REMOVAL_KEY, STRENGTH
from attnzoo.engines.softmax.decay_bias import LOG_DECAY
from attnzoo.registry import register
from attnzoo.variants.forgetting.forget_gate import ForgetGate, check_start
from attnzoo.variants.path.path_engine import PathEngine
from attnzoo.variants.path.path_gates import UnitKeys


@register
class Path(Attention):
    """PaTH attention (Yang et al. 2025, section 3, equation 2), and PaTH-FoX with gates.

        A_ij = exp(s_ij) / Σ_{l≤i} exp(s_il),    H_t = I − β_t w_t w_tᵀ
        s_ij = scale · q_iᵀ H_i … H_{j+1} k_j + g_{j+1} + … + g_i

    Every token between a query and a key takes from the score what stands along its w, or turns its
    sign: a position that depends on what is read, in the place of a rotation by the distance. The
    gates are not scaled, as in forgetting attention; flash-linear-attention multiplies them by the
    scale, so that its g is log_decay / scale. Nothing of softmax is lost; what is won is that the
    score of a key can follow what happened since, as state tracking asks. Causal only. Use it in
    models trained with it. Decoding keeps keys, values, w, β and the gates.

    A call may bring removal_key, w, (batch, kv_heads, key_length, head_dim), of length 1; beta, β,
    (batch, kv_heads, key_length), from 0 to 2, 1 where it is left out; and log_decay, g, (batch,
    heads, key_length), at most 0. Without them it is `standard`. A layer makes all three: w
    by a product of two linear layers, β as 2 · sigmoid, and the gate of forgetting attention.

    scale: factor of the products, 1/sqrt(head_dim) by default
    gate_bias: what the bias of a layer's gate begins with, see `forgetting`
    """

    spec = Spec(
        name="path",
        title="PaTH attention",
        paper="Yang et al., PaTH Attention: Position Encoding via Accumulating Householder "
        "Transformations, 2025, arXiv:2505.16381",
        equation="A_ij = softmax over j ≤ i of q_iᵀH_i…H_{j+1}k_j/√d, H_t = I − β_t w_t w_tᵀ",
        complexity="O(n²) time, O(n) memory",
        family="dense",
        exact=True,
        bidirectional=False,
        inputs=(REMOVAL_KEY, STRENGTH, LOG_DECAY),
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        scale: float | None = None,
        gate_bias: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(heads, head_dim, PathEngine(check_scale(scale)), backend=backend)
        self.gate_bias = check_start(gate_bias)

    def input_projection(self, one: Input, features: int) -> Gate:
        if one is REMOVAL_KEY:
            return UnitKeys(features, self.heads, self.head_dim)
        if one is STRENGTH:
            return WriteStrength(features, self.heads, allow_neg_eigval=True)
        return ForgetGate(features, self.heads, self.gate_bias)
