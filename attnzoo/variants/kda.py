"""Kimi Delta Attention: the delta rule on a state whose rows forget each by a gate of its own."""

from __future__ import annotations

import math

from attnzoo.arguments import check_flag, check_scale
from attnzoo.attention import Attention, Input, Spec
from attnzoo.engines.linear.gated.gate_projections import Gate, StepDecay, WriteStrength
from attnzoo.engines.linear.gated.gated_linear import GatedLinear
from attnzoo.engines.linear.gated.tokens import CHANNEL_GATE, STRENGTH, Rule
from attnzoo.registry import register


@register
class KimiDeltaAttention(Attention):
    """Kimi Delta Attention (Kimi Team 2025, equation 1).

        S_t = (I − β_t k_t k_tᵀ) Diag(α_t) S_{t−1} + β_t k_t v_tᵀ,   out_t = s·S_tᵀ q_t,   s = 1/√d

    As `gated_deltanet`, with a gate for each channel of the keys, α_t = exp(log_decay_t), so that
    some of a state is kept long while the rest turns over. What is kept of softmax is that a row
    can find one key among many, as long as the state has room for them; what is lost is everything
    that a gate or a later write has taken. Causal only. Use it in models trained with it, best with
    a softmax layer after every third; not in the place of a trained softmax.

    A call may bring log_decay, (batch, kv_heads, key_length, head_dim), at most 0, and beta,
    (batch, kv_heads, key_length), from 0 to 2. Without them α is 1 and β is 1.

    l2_norm: whether q and k are divided by their length first, as the paper does
    scale: s, the factor of the rows, 1/sqrt(head_dim) by default
    allow_neg_eigval: whether a layer makes β up to 2, as twice a sigmoid, and not up to 1
    lower_bound: of the log_decay that a layer makes, such as -5; None: it has none
    """

    spec = Spec(
        name="kda",
        title="Kimi Delta Attention",
        paper="Kimi Team, Kimi Linear, 2025, arXiv:2510.26692",
        equation="S_t = (I − β_t k_t k_tᵀ)Diag(α_t)S_{t−1} + β_t k_t v_tᵀ, row t is S_tᵀq_t/√d",
        complexity="O(n) time and memory",
        family="kernel",
        exact=False,
        bidirectional=False,
        value_heads=True,
        inputs=(CHANNEL_GATE, STRENGTH),
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        l2_norm: bool = True,
        scale: float | None = None,
        allow_neg_eigval: bool = False,
        lower_bound: float | None = None,
        backend: str = "auto",
    ) -> None:
        rule = Rule(
            CHANNEL_GATE, check_scale(scale), delta=True, l2_norm=check_flag("l2_norm", l2_norm)
        )
        super().__init__(heads, head_dim, GatedLinear(rule), backend=backend)
        self.allow_neg_eigval = check_flag("allow_neg_eigval", allow_neg_eigval)
        if lower_bound is not None and not -math.inf < lower_bound < 0:
            raise ValueError(
                f"lower_bound={lower_bound!r} must be below 0, as a log_decay is; give -5.0, or "
                "None for none"
            )
        self.lower_bound = lower_bound

    def input_projection(self, one: Input, features: int) -> Gate:
        if one is CHANNEL_GATE:
            numbers, rank = self.heads * self.head_dim, self.head_dim
            bound = self.lower_bound
            return StepDecay(features, self.heads, numbers, rank=rank, lower_bound=bound)
        return WriteStrength(features, self.heads, allow_neg_eigval=self.allow_neg_eigval)
