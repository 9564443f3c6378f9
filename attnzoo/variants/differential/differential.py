"""Differential attention: one softmax less a part of another."""

from __future__ import annotations

from typing import Any

from attnzoo.arguments import check_count, check_positive, check_scale
from attnzoo.attention import Attention, Spec
from attnzoo.registry import register
from attnzoo.variants.differential.two_maps import Lambda, TwoMaps


@register
class Differential(Attention):
    """Differential attention (Ye et al. 2024, Differential Transformer, equations 1 to 3).

        A = softmax(s·q¹k¹) − λ softmax(s·q²k²),    s = 1/√(d/2),    [q¹, q²] = q,    [k¹, k²] = k
        λ = exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) + λ_init,    λ_init = 0.8 − 0.6 e^(−0.3 layer)

    The halves of a head's queries and keys are two maps over the same values, as wide as both: what
    the maps have in common, noise by the paper's reading, is taken off. Rows sum to 1 − λ, and
    entries may be negative. Heads of the paper's code (unilm) are halves of these one behind the
    other; DiffLlama's h and h + H/2 of H are one of these (`attnzoo.conventions.paired_heads`).
    With grouped keys each map has its half of the key head, as in unilm's flash modules; its plain
    module gives both maps the same one. The norm of each head's rows, times 1 − λ_init, belongs to
    the layer around this: `output_norm=True`, whose weight begins there.

    What is kept of softmax is every score; what is lost is that weights are positive. It costs two
    softmaxes. Use it in models trained with it; a trained softmax has one map. Decoding keeps all
    keys and values.

    layer: the number of the layer, from 0
    scale: s, 1/sqrt(head_dim / 2) by default
    """

    spec = Spec(
        name="differential",
        title="Differential attention",
        paper="Ye et al., Differential Transformer, 2024, arXiv:2410.05258",
        equation="A = softmax(q¹k¹/√(d/2)) − λ softmax(q²k²/√(d/2))",
        complexity="O(n²) time, O(n) memory",
        family="dense",
        exact=False,
        attn_mask=True,
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        layer: int = 0,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        learned = Lambda(check_width(head_dim) // 2, check_count("layer", layer))
        engine = TwoMaps(check_scale(scale), learned)
        super().__init__(heads, head_dim, engine, backend=backend)
        self.output_scale = 1 - learned.initial

    def oracle_arguments(self, queries: int, keys: int, is_causal: bool) -> dict[str, Any]:
        assert isinstance(self.engine, TwoMaps) and self.engine.learned is not None
        return {f"lambda_{name}": x for name, x in self.engine.learned.named_parameters()}


def check_width(head_dim: int) -> int:
    """head_dim, refused where it is odd."""
    if check_positive("head_dim", head_dim) % 2:
        raise ValueError(
            f"head_dim={head_dim} must be even: differential attention halves queries and keys"
        )
    return head_dim
