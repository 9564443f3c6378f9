"""Log-linear attention: a state for every power of 2 in the length, each with a weight."""

from __future__ import annotations

from attnzoo.arguments import check_choice, check_positive, check_scale
from attnzoo.attention import Attention, Input, Spec
from attnzoo.engines.linear.gated.gate_projections import Gate, StepDecay, WriteStrength
from attnzoo.engines.linear.gated.tokens import HEAD_GATE, STRENGTH, Rule
from attnzoo.engines.linear.log_linear.tree import LEVELS, levels_of
from attnzoo.engines.linear.log_linear.tree_linear import LogLinear
from attnzoo.registry import register

BASES = ("mamba2", "gated_deltanet")


@register
class LogLinearAttention(Attention):
    """Log-linear attention (Guo et al. 2025, section 3).

        A_ij = levels_i[l(i, j)] · A of `base`_ij,    l(i, j) = number of bits of i xor j

    The tokens before the i-th, from 0, lie in buckets of 1, 2, 4 ... tokens, those of the bits of
    i, the nearest ones in the smallest. Each has a state of its own, which fades and is erased as
    in `base`, and each row weighs them by levels of its own; level 0 is the token itself. What is
    kept of softmax is what `base` keeps, and that a row can turn from the far past to the near, or
    back. What is lost is what a bucket has no room for. Causal only. Use it in models trained with
    it, where the state of `base` is too small; not in the place of a trained softmax.

    A call may bring log_decay, (batch, kv_heads, key_length), at most 0; beta, of the same shape,
    from 0 to 2, how strongly a token writes (in Mamba-2, its Δ); and levels, (batch, heads,
    query_length, L), at least 0, with L at least 1 + log2 of the length, rounded up. Without them
    nothing fades, beta is 1 and so are all levels: it is `base`. Only real tokens count, and a row
    on padding is 0.

    base: "mamba2", or "gated_deltanet", with keys and queries of length 1
    scale: factor of the rows; None is 1/sqrt(head_dim)
    max_length: the most tokens for which a layer projects levels; a call that brings its own may
        be longer
    """

    spec = Spec(
        name="log_linear",
        title="Log-linear attention",
        paper="Guo et al., Log-Linear Attention, 2025, arXiv:2506.04761",
        equation="A_ij = levels_i[bits of i xor j] · A of Mamba-2 or Gated DeltaNet",
        complexity="O(n log n) time, O(n) memory",
        family="kernel",
        exact=False,
        bidirectional=False,
        value_heads=True,
        inputs=(HEAD_GATE, STRENGTH, LEVELS),
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        base: str = "mamba2",
        scale: float | None = 1.0,
        max_length: int = 2**14,
        backend: str = "auto",
    ) -> None:
        delta = check_choice("base", base, BASES) == "gated_deltanet"
        rule = Rule(HEAD_GATE, check_scale(scale), delta=delta, l2_norm=delta)
        super().__init__(heads, head_dim, LogLinear(rule), backend=backend)
        self.input_sizes = {"levels": levels_of(check_positive("max_length", max_length))}

    def input_projection(self, one: Input, features: int) -> Gate | None:
        if one is HEAD_GATE:
            return StepDecay(features, self.heads, self.heads)
        return WriteStrength(features, self.heads) if one is STRENGTH else None
