"""Sliding-window attention: exact softmax over the neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from attnzoo.arguments import check_positive
from attnzoo.attention import Attention, Spec
from attnzoo.call import Call, UnsupportedError
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS
from attnzoo.engines.softmax.reference import SINK_LOGITS
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.windows.window_sparse import WindowSparse
from attnzoo.registry import register


@register
class SlidingWindow(Attention):
    """Window attention (Beltagy et al. 2020, section 3.1; Child et al. 2019; causal as in Mistral,
    Jiang et al. 2023, section 2).

        A_ij = exp(s_ij) / Σ_{|i-l| < window} exp(s_il)   if |i - j| < window, else 0

    Cost n·window instead of n². What is kept is softmax itself, inside the window; what lies
    outside is lost in one layer and reached only through depth: L layers span L·(window - 1) tokens
    to each side. Use it where what matters is near, as in most layers of language models; not as
    the only attention where a far token must be found. Decoding keeps the last `window` keys and no
    more.

    A softmax must put its weight somewhere, and models learn to put what they do not need on the
    first tokens; a window that drops these breaks such a model (Xiao et al. 2023, StreamingLLM,
    arXiv:2309.17453, section 3). `sinks` and `sink_logits` are two ways out.

    window: keys on each side, the query's own included; in a causal call, `window` keys in all
    dilation: distances are multiples of it, so that as many keys come from `dilation` times as far,
        and what lies between is lost; one number, or one for each head. Beltagy et al. (section
        3.1) use it in higher layers and a few heads, never in all, since neighbours are the most
        useful. Decoding then keeps the last (window - 1)·dilation + 1 keys
    sinks: how many first tokens every later row sees, too, each once, whatever the dilation;
        decoding keeps them besides the last `window` keys. 4 suffice for pretrained models (Xiao et
        al., section 3.2)
    sink_logits: whether to learn one logit z for each head, A_ij = exp(s_ij) / (exp(z) + Σ_l
        exp(s_il)), so that rows of A sum to less than 1, as in gpt-oss (2025). It starts at z = 0,
        which is Miller's softmax off by one (2023). Best for models trained with it; a call may
        bring logits of its own instead (`sink_logits` of forward)
    scale: factor of the scores, 1/sqrt(head_dim) by default
    dropout: probability that an entry of A is dropped, in training only
    softcap: keeps scores within ±softcap, see `standard`
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
        inputs=(SINK_LOGITS, DISTANCE_BIAS),
    )
    engine: WindowSparse

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        window: int = 256,
        dilation: int | Sequence[int] = 1,
        sinks: int = 0,
        sink_logits: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> None:
        pattern = Window(
            window, tuple(dilation) if isinstance(dilation, Sequence) else dilation, sinks
        )
        engine = WindowSparse(
            pattern,
            scale,
            dropout,
            sink_logits=check_positive("heads", heads) if sink_logits else 0,
            softcap=softcap,
        )
        super().__init__(heads, head_dim, engine, backend=backend)
        pattern.heads_by_dilation(heads)  # raises where there are not as many

    def refuse(self, call: Call) -> None:
        super().refuse(call)
        if "sink_logits" in call.inputs and self.engine.sink_logits is not None:
            raise UnsupportedError(
                "the call brings sink_logits and this attention learns its own: build it with "
                "sink_logits=False"
            )

    def keep_heads(self, first: int, count: int) -> None:
        super().keep_heads(first, count)
        assert isinstance(self.engine.pattern, Window)
        self.engine.pattern = self.engine.pattern.of_heads(first, count)
        logits = self.engine.sink_logits
        if logits is not None:
            self.engine.sink_logits = nn.Parameter(
                logits.detach()[first : first + count].clone(), logits.requires_grad
            )

    def oracle_arguments(self, queries: int, keys: int, is_causal: bool) -> dict[str, Any]:
        logits = self.engine.sink_logits
        return {} if logits is None else {"sink_logits": logits}
