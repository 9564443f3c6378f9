"""FlashAttention: softmax attention itself, computed so that A is never stored."""

from __future__ import annotations

from attnzoo.attention import Attention, Spec
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS
from attnzoo.registry import register
from attnzoo.variants.flash.flash_algorithm import FlashAlgorithm


@register
class Flash(Attention):
    """FlashAttention (Dao et al. 2022, algorithm 1; in the order of loops of FlashAttention-2, Dao
    2023, algorithms 1 and 2).

        m ← max(m, max_j s_ij), ℓ ← ℓ·exp(m_old − m) + Σ_j exp(s_ij − m), o ← o·exp(m_old − m) + Σ_j
            exp(s_ij − m) v_j, out = o / ℓ

    One tile of keys after another; a row needs only its running maximum m, sum ℓ and output o. The
    backward pass recomputes the scores of a tile from q, k and L = m + log ℓ. Nothing of softmax is
    lost, and the MACs are exact attention's, save those of tiles that causality hides; what is won
    is memory, O(n) instead of O(n²). Use it to read the algorithm and to check a kernel against,
    for here it is plain torch; not to compute: torch's SDPA, which `standard` calls, is the same
    algorithm as a kernel, and faster.

    block_size: number of queries, and of keys, of a tile; one of fewer queries has more keys
    scale: factor of the scores, 1/sqrt(head_dim) by default
    softcap: keeps scores within ±softcap, see `standard`
    """

    spec = Spec(
        name="flash",
        title="FlashAttention, written out",
        paper="Dao et al., FlashAttention: Fast and Memory-Efficient Exact Attention with "
        "IO-Awareness, 2022, arXiv:2205.14135",
        equation="A_ij = exp(q_i·k_j/√d) / Σ_l exp(q_i·k_l/√d), tile by tile",
        complexity="O(n²) time, O(n) memory",
        family="exact",
        exact=True,
        attn_mask=True,
        inputs=(DISTANCE_BIAS,),
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        block_size: int = 128,
        scale: float | None = None,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> None:
        engine = FlashAlgorithm(scale, block_size, softcap=softcap)
        super().__init__(heads, head_dim, engine, backend=backend)
