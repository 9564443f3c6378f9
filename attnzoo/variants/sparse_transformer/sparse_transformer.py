"""The Sparse Transformer's factorized attention: what is near, and what is far in steps."""

from __future__ import annotations

from typing import Literal

from attnzoo.arguments import check_choice
from attnzoo.attention import Attention, Spec
from attnzoo.registry import register
from attnzoo.variants.sparse_transformer.factorized import Factorized
from attnzoo.variants.sparse_transformer.factorized_patterns import (
    Neighbours,
    OwnBlock,
    Strided,
    Summaries,
)


@register
class SparseTransformer(Attention):
    """Factorized attention (Child et al. 2019, sections 4.2 and 4.3).

        A_ij = exp(s_ij) / Σ_{l ∈ S(i)} exp(s_il)   if j ∈ S(i), else 0,    S(i) = S₁(i) ∪ S₂(i)
        strided:  S₁ = {j : |i - j| <= stride},             S₂ = {j : stride divides i - j}
        fixed: S₁ = {j : ⌊j/stride⌋ = ⌊i/stride⌋}, S₂ = {j : j mod stride >= stride - expressivity}

    Softmax is exact on S, a set. Any earlier token is two steps away, through one that S₁ or S₂
    shows; what lies outside S is lost in one layer. Cost n·(stride + n/stride), fixed n·(stride +
    expressivity·n/stride): choose a stride near √n, for which that is about n·√n. It is a number
    and not taken from the length, since else rows would change as the sequence grows. The positions
    are fixed by hand: the paper looked at what full attention had learned (section 4.1) and wrote
    these two patterns down; nothing about them is learned.

    Use strided where data has a period, such as the rows of an image or bars of music, with that
    period as its stride; fixed for text, where the strided one fails (section 4.3); neither where
    one layer must find any token by its content. The paper's form is causal; without is_causal,
    ours drops j <= i and changes nothing else. Decoding keeps every key and reads those in S.

    pattern: "strided" or "fixed"
    stride: in tokens, see S₁ and S₂
    expressivity: how many positions at the end of every block the S₂ of "fixed" shows, at most
        stride; "strided" does not use it
    factors: "merged", every head sees S₁ ∪ S₂; "by_head", heads see S₁ and S₂ in turn, S₁ first
        (section 5.1)
    scale: factor of the scores, 1/sqrt(head_dim) by default
    dropout: probability that an entry of A is dropped, in training only
    """

    spec = Spec(
        name="sparse_transformer",
        title="Sparse Transformer",
        paper="Child et al., Generating Long Sequences with Sparse Transformers, 2019, "
        "arXiv:1904.10509",
        equation="A_ij = exp(q_i·k_j/√d) / Σ_{l∈S(i)} exp(q_i·k_l/√d), j ∈ S(i) = near ∪ every "
        "stride-th, or ∪ each block's last",
        complexity="O(n·√n) time and memory at stride √n",
        family="sparse",
        exact=True,
        dropout=True,
    )
    engine: Factorized

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        pattern: Literal["strided", "fixed"] = "strided",
        stride: int = 128,
        expressivity: int = 8,
        factors: Literal["merged", "by_head"] = "merged",
        scale: float | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        check_choice("pattern", pattern, ("strided", "fixed"))
        check_choice("factors", factors, ("merged", "by_head"))
        near, far = (
            (Neighbours(stride), Strided(stride))
            if pattern == "strided"
            else (OwnBlock(stride), Summaries(stride, expressivity))
        )
        super().__init__(
            heads,
            head_dim,
            Factorized(near, far, factors == "merged", scale, dropout),
            backend=backend,
        )

    def keep_heads(self, first: int, count: int) -> None:
        super().keep_heads(first, count)
        self.engine.keep_heads(first)
