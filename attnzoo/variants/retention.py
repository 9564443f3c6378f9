"""Retention: linear attention without a normaliser, in which a key fades with its distance."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from attnzoo.arguments import check_positive, check_scale
from attnzoo.attention import Attention, Spec
from attnzoo.engines.linear import Linear
from attnzoo.feature_maps import Pointwise, identity
from attnzoo.registry import register


class Fading(Pointwise):
    """φ(x) = √s · x, and a key is worth γ = 1 - 2^(-5 - h) of itself after every token, in head h of the keys."""

    decays = True

    def __init__(self, scale: float, heads: int) -> None:
        super().__init__(identity, normalize=False)
        self.scale = scale
        self.heads = range(heads)  # of queries, those that are computed here

    def query(self, q: Tensor) -> Tensor:
        return q * self.scale**0.5

    def vjp(self, x: Tensor, features: Tensor, d_features: Tensor, d_log_scale: Tensor | None) -> Tensor:
        return d_features * self.scale**0.5

    def decay(self, like: Tensor) -> Tensor:
        first, kv_heads = self.heads.start * like.shape[1] // len(self.heads), like.shape[1]
        return 1 - 2.0 ** (-5 - torch.arange(first, first + kv_heads, dtype=like.dtype, device=like.device))


@register
class Retention(Attention):
    """Retention (Sun et al. 2023, RetNet, section 2.1, equations 5 to 7).

        A_ij = s · q_i·k_j · γ^(i − j) for j ≤ i,    γ = 1 − 2^(−5 − h),    s = 1/√d

    The matrix, a recurrence S ← γ S + k vᵀ with out = s·Sᵀq, and chunks that mix both are one and the same: it trains in parallel and decodes
    with d² numbers a head. Causal only. What is kept of softmax is a score for every pair; what is lost is the normaliser: rows do not sum to 1,
    and may be negative. The paper divides each head's output by its own size afterwards (group normalisation), turns q and k by their
    positions before (xPos), and gates: those belong to the layer around this.
    Use it to generate long texts; not to look up what stood more than 1/(1 − γ) tokens ago: 32 in the first head, twice as far in each next.

    Query heads that share a head of keys share its γ. scale: s.
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

    def __init__(self, heads: int, head_dim: int, *, scale: float | None = None, backend: str = "auto") -> None:
        given = check_scale(scale)
        if given is not None and given <= 0:
            raise ValueError(f"scale={scale!r} must be positive: queries and keys take its square root each")
        heads, head_dim = check_positive("heads", heads), check_positive("head_dim", head_dim)
        super().__init__(heads, head_dim, Linear(Fading(head_dim**-0.5 if given is None else given, heads)), backend=backend)

    def keep_heads(self, first: int, count: int) -> None:
        """As `Attention.keep_heads`; each head keeps its own γ."""
        super().keep_heads(first, count)
        fading = cast(Fading, cast(Linear, self.engine).feature_map)
        fading.heads = fading.heads[first : first + count]
