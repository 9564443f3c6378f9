"""Reformer: softmax over the keys that hash to the query's bucket."""

from __future__ import annotations

import torch

from attnzoo.arguments import check_positive
from attnzoo.attention import Attention, Spec
from attnzoo.call import Call, UnsupportedError
from attnzoo.engines.softmax_hashed import Hashed
from attnzoo.hashing import AngularHash
from attnzoo.registry import register


@register
class Reformer(Attention):
    """Reformer, LSH attention (Kitaev et al. 2020, section 2, equations 2 to 6).

        A_ij = exp(s_ij) / Σ_{l ∈ P(i)} exp(s_il)   if j ∈ P(i), else 0,    P(i) = {i} ∪ ∪_r {j : h_r(k_j) = h_r(q_i), chunk_r(j) near chunk_r(i)}
    """

    spec = Spec(
        name="reformer",
        title="Reformer (LSH attention)",
        paper="Kitaev et al., Reformer: The Efficient Transformer, 2020, arXiv:2001.04451",
        equation="A_ij = exp(q_i·k_j/√d) / Σ_{l∈P(i)} exp(q_i·k_l/√d), j ∈ P(i): same bucket in some hash round, near in it",
        complexity="O(n·(r·c + log n)) time, O(n·c) memory",
        family="sparse",
        exact=True,
        data_dependent=True,
    )
    engine: Hashed

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        num_buckets: int = 32,
        num_hashes: int = 4,
        chunk_size: int = 64,
        share_qk: bool = False,
        seed: int = 0,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        hashing = AngularHash(check_positive("head_dim", head_dim), num_buckets, num_hashes, seed)
        super().__init__(heads, head_dim, Hashed(hashing, chunk_size, share_qk=share_qk, scale=scale), backend=backend)

    def refuse(self, call: Call) -> None:
        super().refuse(call)
        if self.engine.share_qk and call.k is not call.q:
            raise UnsupportedError(
                "reformer with share_qk=True has one projection for queries and keys: pass the same tensor as q and k, or build it with share_qk=False"
            )

    def redraw(self, seed: int | None = None) -> None:
        """Draw new rotations, in place. seed=None takes one from torch's global generator, so torch.manual_seed repeats it."""
        self.engine.hashing.redraw(int(torch.randint(2**31, ())) if seed is None else seed)
