"""Sliding-window attention: exact softmax over the neighbours."""

from __future__ import annotations

from attnzoo.attention import Attention, Spec
from attnzoo.engines.sparse import Sparse
from attnzoo.patterns import Window
from attnzoo.registry import register


@register
class SlidingWindow(Attention):
    """Window attention (Beltagy et al. 2020, section 3.1; Child et al. 2019; causal as in Mistral, Jiang et al. 2023, section 2).

        A_ij = exp(s_ij) / Σ_{|i-l| < window} exp(s_il)   if |i - j| < window, else 0

    Cost n·window instead of n², and softmax is exact inside the window. What lies outside is lost in one layer and reached
    only through depth: L layers span L·(window - 1) tokens to each side. Decoding keeps the last `window` keys and no more.

    window: keys on each side, the query's own included; causal, `window` keys in all. scale, dropout: as in standard.
    """

    spec = Spec(
        name="sliding_window",
        title="Sliding-window attention",
        paper="Beltagy et al., Longformer, 2020, arXiv:2004.05150",
        equation="A_ij = exp(q_i·k_j/√d) / Σ_{|i−l|<w} exp(q_i·k_l/√d) where |i−j| < w, else 0",
        complexity="O(n·w) time, O(n) memory",
        family="sparse",
        exact=True,
        dropout=True,
    )

    def __init__(
        self, heads: int, head_dim: int, *, window: int = 256, scale: float | None = None, dropout: float = 0.0, backend: str = "auto"
    ) -> None:
        super().__init__(heads, head_dim, Sparse(Window(window), scale, dropout), backend=backend)
