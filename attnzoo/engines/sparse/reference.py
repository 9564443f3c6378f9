"""The sparse engine's reference: softmax over the keys that a pattern shows, as a dense mask.

    A_ij = exp(s_ij) / Σ_{l ∈ S(i)} exp(s_il) if j ∈ S(i), else 0,    s_ij = scale · q_i·k_j

S(i) are the keys that the pattern shows to query i and that the masks leave visible: a set, so a
key that two rules name counts once. Every backend must equal this. Memory is quadratic in the
length.
"""

from __future__ import annotations

from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.softmax.reference import SoftmaxReference, visible, weights_of
from attnzoo.engines.sparse.patterns.grid import Grid
from attnzoo.engines.sparse.patterns.pattern import Pattern

#: Queries and keys, each, up to which one call of SDPA under a dense mask takes less time than
#: skipping hidden keys. Measured by `benchmarks/short_inputs.py`.
SHORT = 512


def is_short_input(query_length: int, key_length: int) -> bool:
    """Whether a dense mask is small enough to be the fastest way, whatever it hides."""
    return query_length * key_length <= SHORT**2


class SparseReference(SoftmaxReference):
    """Softmax attention on the support that a pattern draws, without a fast backend.

    pattern: which keys each query sees; the masks of a call hide some of them
    scale: factor of the scores, 1/sqrt(head_dim) by default
    dropout: probability that an entry of A is dropped, in training only
    softcap: keeps scores within ±softcap; None: they are as they are
    """

    def __init__(
        self,
        pattern: Pattern,
        scale: float | None = None,
        dropout: float = 0.0,
        *,
        softcap: float | None = None,
    ) -> None:
        super().__init__(scale, dropout, softcap=softcap)
        self.pattern = pattern

    def is_short(self, grid: Grid) -> bool:
        """Whether exact attention under a dense mask of the pattern takes less time than what skips
        hidden keys, for a call of these sizes."""
        return is_short_input(grid.query_length, grid.key_length)

    def support(self, call: Call) -> Tensor:
        """Which keys a query sees before the call's masks and causality hide some, as
        `Pattern.support` does."""
        return self.pattern.support(call)

    def matrix(self, call: Call) -> Tensor:
        support, mask = self.support(call), visible(call)
        return weights_of(self, call, support if mask is None else support & mask)
