"""Retention: linear attention without a normaliser, in which a key fades with its distance."""

from __future__ import annotations

from torch import Tensor

from attnzoo.arguments import check_positive, check_scale
from attnzoo.attention import Attention, Spec
from attnzoo.engines.linear.decay import ConstantDecay
from attnzoo.engines.linear.feature_maps import Pointwise, identity
from attnzoo.engines.linear.linear import Linear
from attnzoo.registry import register


class ScaledIdentity(Pointwise):
    """φ(x) = √s · x, and a constant decay.

    scale: s, which must be positive
    decay: what is left of a key after the tokens that follow it
    """

    def __init__(self, scale: float, decay: ConstantDecay) -> None:
        super().__init__(identity, normalize=False)
        self.scale, self.decay = scale, decay

    def query(self, q: Tensor) -> Tensor:
        return q * self.scale**0.5

    def vjp(
        self, x: Tensor, features: Tensor, d_features: Tensor, d_log_scale: Tensor | None
    ) -> Tensor:
        return d_features * self.scale**0.5


@register
class Retention(Attention):
    """Retention (Sun et al. 2023, RetNet, section 2.1, equations 5 to 7).

        A_ij = s · q_i·k_j · γ^(i − j) for j ≤ i,    γ = 1 − 2^(−5 − h),    s = 1/√d

    The matrix, the recurrence S ← γ S + k vᵀ with out = s·Sᵀq, and chunks that mix both give the
    same rows: it trains in parallel and decodes with d² numbers a head. h counts the heads of the
    keys from 0; queries that share one share its γ. What is kept of softmax is a score for every
    pair; what is lost is the normaliser: rows do not sum to 1, and entries may be negative. The
    paper turns q and k by their positions before (xPos), normalises each head's output afterwards,
    and gates it: those belong to the layer around this. Causal only. Use it to read and write long
    text with a small state; not to look up what stood much more than 1/(1 − γ) tokens ago, which is
    32 in the first head and twice as far in each next one.

    scale: s, the factor of the scores, 1/sqrt(head_dim) by default
    """

    spec = Spec(
        name="retention",
        title="Retention (RetNet)",
        paper="Sun et al., Retentive Network: A Successor to Transformer, 2023, arXiv:2307.08621",
        equation="A_ij = q_i·k_j γ^(i−j)/√d for j ≤ i",
        complexity="O(n) time and memory",
        family="kernel",
        exact=False,
        bidirectional=False,
    )

    def __init__(
        self, heads: int, head_dim: int, *, scale: float | None = None, backend: str = "auto"
    ) -> None:
        given, default = check_scale(scale), check_positive("head_dim", head_dim) ** -0.5
        if given is not None and given <= 0:
            raise ValueError(
                f"scale={scale!r} must be positive: queries and keys take its square root each"
            )
        decay = ConstantDecay(0, check_positive("heads", heads))
        feature_map = ScaledIdentity(default if given is None else given, decay)
        super().__init__(heads, head_dim, Linear(feature_map), backend=backend)
        self.decay = decay

    def keep_heads(self, first: int, count: int) -> None:
        super().keep_heads(first, count)
        self.decay.first, self.decay.count = self.decay.first + first, count
