"""DeltaNet: a state in which a token replaces what stood at its key."""

from __future__ import annotations

from attnzoo.arguments import check_flag, check_scale
from attnzoo.attention import Attention, Input, Spec
from attnzoo.engines.linear.gated.gate_projections import Gate, WriteStrength
from attnzoo.engines.linear.gated.gated_linear import GatedLinear
from attnzoo.engines.linear.gated.tokens import STRENGTH, Rule
from attnzoo.registry import register


@register
class DeltaNet(Attention):
    """DeltaNet (Schlag et al. 2021, equation 24; Yang et al. 2024, arXiv:2406.06484).

        S_t = (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ,    out_t = s·S_tᵀ q_t,    s = 1/√d

    A token replaces what the state says of its key by its value, to the part β_t. Row t of A holds
    what is left of each earlier value after all that was written behind it; entries may be
    negative, and rows do not sum to 1. What is kept of softmax is that a row can find one key among
    many, as long as the state has room for them; nothing is forgotten but by a later write. Causal
    only. Use it in models trained with it, where facts are looked up and changed; where old text
    should fade by itself, `gated_deltanet` does better.

    A call may bring beta, (batch, kv_heads, key_length), from 0 to 2; without it β is 1.

    l2_norm: whether q and k are divided by their length first. Without it keys must be short: of
        β_t |k_t|² above 2 the state grows without bound
    scale: s, the factor of the rows, 1/sqrt(head_dim) by default
    allow_neg_eigval: whether a layer makes β up to 2, as twice a sigmoid, and not up to 1
    """

    spec = Spec(
        name="deltanet",
        title="DeltaNet",
        paper="Schlag et al., Linear Transformers are Fast Weight Programmers, 2021, "
        "arXiv:2102.11174",
        equation="S_t = (I − β_t k_t k_tᵀ)S_{t−1} + β_t k_t v_tᵀ, row t is S_tᵀq_t/√d",
        complexity="O(n) time and memory",
        family="kernel",
        exact=False,
        bidirectional=False,
        value_heads=True,
        inputs=(STRENGTH,),
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
        rule = Rule(None, check_scale(scale), delta=True, l2_norm=check_flag("l2_norm", l2_norm))
        super().__init__(heads, head_dim, GatedLinear(rule), backend=backend)
        self.allow_neg_eigval = check_flag("allow_neg_eigval", allow_neg_eigval)

    def input_projection(self, one: Input, features: int) -> Gate:
        return WriteStrength(features, self.heads, allow_neg_eigval=self.allow_neg_eigval)
