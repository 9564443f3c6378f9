"""Differential attention as published second: a λ for every token."""

from __future__ import annotations

from attnzoo.arguments import check_scale
from attnzoo.attention import Attention, Input, Spec
from attnzoo.engines.linear.gated.gate_projections import Gate, WriteStrength
from attnzoo.registry import register
from attnzoo.variants.differential.differential import check_width
from attnzoo.variants.differential.two_maps import SUBTRACTION, TwoMaps


@register
class DifferentialV2(Attention):
    """Differential attention, second version (Ye et al. 2026, Differential Transformer V2).

        A_t = softmax(s·q¹_t k¹) − λ_t softmax(s·q²_t k²),    s = 1/√(d/2),    [q¹, q²] = q

    λ is a number of every row, a sigmoid of its token, in the place of one that is learned, and no
    norm follows. The authors double the heads of queries, of which 2h and 2h + 1 share a key and a
    value: these are q¹ and q² of head h here, and k is given twice, `torch.cat([k, k], -1)`, over
    values half as wide. A layer has a key for each map. Rows sum to 1 − λ, and entries may be
    negative. Causal only, as published: for language models trained with it. Decoding keeps all
    keys and values.

    A call may bring subtraction, (batch, heads, query_length), λ; without it λ is 1/2.

    scale: s, 1/sqrt(head_dim / 2) by default
    """

    spec = Spec(
        name="differential_v2",
        title="Differential attention, V2",
        paper="Ye et al., Differential Transformer V2, 2026",
        equation="A_t = softmax(q¹k¹/√(d/2)) − λ_t softmax(q²k²/√(d/2))",
        complexity="O(n²) time, O(n) memory",
        family="dense",
        exact=False,
        bidirectional=False,
        attn_mask=True,
        inputs=(SUBTRACTION,),
    )

    def __init__(
        self, heads: int, head_dim: int, *, scale: float | None = None, backend: str = "auto"
    ) -> None:
        engine = TwoMaps(check_scale(scale), None)
        super().__init__(heads, check_width(head_dim), engine, backend=backend)

    def input_projection(self, one: Input, features: int) -> Gate:
        return WriteStrength(features, self.heads)
