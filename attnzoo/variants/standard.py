"""Softmax attention, the exact one that all others are measured against."""

from __future__ import annotations

from attnzoo.attention import Attention, Spec
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS
from attnzoo.engines.softmax.reference import SINK_LOGITS
from attnzoo.engines.softmax.softmax import Softmax
from attnzoo.registry import register


@register
class Standard(Attention):
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1, equation 1).

        A_ij = exp(s_ij) / Σ_l exp(s_il),    s_ij = scale · q_i · k_j

    Every query weighs every visible key: n² scores. The fast backend is torch's SDPA, which never
    stores them. Nothing is lost: every other variant is measured against this one. Use it up to the
    length at which one of them is faster and near enough (`attnzoo compare`); decoding keeps all
    keys and values.

    A call may bring sink_logits, as gpt-oss has them: (heads,), one more score of every row, which
    counts in the row's sum alone, and distance_bias, (heads, 2 · reach + 1), what is added to the
    score of a key by its distance, from `reach` positions before the query to as many after it
    (`attnzoo.distance_biases` makes ALiBi's and T5's).

    scale: factor of the scores, 1/sqrt(head_dim) by default
    dropout: probability that an entry of A is dropped, in training only
    softcap: keeps scores within ±softcap, as softcap · tanh(s / softcap), before anything is added
        to them (Gemma 2, 2024, section 2); None: they are as they are
    """

    spec = Spec(
        name="standard",
        title="Softmax attention",
        paper="Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762",
        equation="A_ij = exp(q_i·k_j/√d) / Σ_l exp(q_i·k_l/√d)",
        complexity="O(n²) time, O(n) memory",
        family="exact",
        exact=True,
        attn_mask=True,
        inputs=(SINK_LOGITS, DISTANCE_BIAS),
        dropout=True,
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> None:
        engine = Softmax(scale, dropout, softcap=softcap)
        super().__init__(heads, head_dim, engine, backend=backend)
