"""Gated DeltaNet: a state that forgets by a gate, and replaces what it says of a key."""

from __future__ import annotations

from attnzoo.arguments import check_flag, check_scale
from attnzoo.attention import Attention, Input, Spec
from attnzoo.engines.linear.gated.gate_projections import Gate, StepDecay, WriteStrength
from attnzoo.engines.linear.gated.gated_linear import GatedLinear
from attnzoo.engines.linear.gated.tokens import HEAD_GATE, STRENGTH, Rule
from attnzoo.registry import register


@register
class GatedDeltaNet(Attention):
    """Gated DeltaNet (Yang et al. 2024, equation 10), as in Qwen3-Next, Qwen3.5 and OLMo Hybrid.

        S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ,    out_t = s·S_tᵀ q_t,    s = 1/√d

    A token lets the whole state fade to α_t = exp(log_decay_t), then replaces what the state says
    of its key by its value, to the part β_t. Row t of A holds what is left of each earlier value
    after all that was written behind it; entries may be negative, and rows do not sum to 1. What is
    kept of softmax is that a row can find one key among many, as long as the state has room for
    them; what is lost is everything that the gate or a later write has taken. Causal only. Use it
    in models trained with it, best with a softmax layer after every third; not in the place of a
    trained softmax.

    A call may bring log_decay, (batch, kv_heads, key_length), at most 0, and beta, of the same
    shape, from 0 to 2; above 1 a write turns the state's sign along the key, which parity and
    permutations need (Grazzi et al. 2024, arXiv:2411.12537). Without them α is 1 and β is 1.

    l2_norm: whether q and k are divided by their length first, as the paper does
    scale: s, the factor of the rows, 1/sqrt(head_dim) by default
    allow_neg_eigval: whether a layer makes β up to 2, as twice a sigmoid, and not up to 1
    """

    spec = Spec(
        name="gated_deltanet",
        title="Gated DeltaNet",
        paper="Yang et al., Gated Delta Networks, 2024, arXiv:2412.06464",
        equation="S_t = α_t(I − β_t k_t k_tᵀ)S_{t−1} + β_t k_t v_tᵀ, row t is S_tᵀq_t/√d",
        complexity="O(n) time and memory",
        family="kernel",
        exact=False,
        bidirectional=False,
        value_heads=True,
        inputs=(HEAD_GATE, STRENGTH),
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        l2_norm: bool = True,
        scale: float | None = None,
        allow_neg_eigval: bool = False,
        backend: str = "auto",
    ) -> None:
        rule = Rule(
            HEAD_GATE, check_scale(scale), delta=True, l2_norm=check_flag("l2_norm", l2_norm)
        )
        super().__init__(heads, head_dim, GatedLinear(rule), backend=backend)
        self.allow_neg_eigval = check_flag("allow_neg_eigval", allow_neg_eigval)

    def input_projection(self, one: Input, features: int) -> Gate:
        if one is HEAD_GATE:
            return StepDecay(features, self.heads, self.heads)
        return WriteStrength(features, self.heads, allow_neg_eigval=self.allow_neg_eigval)
