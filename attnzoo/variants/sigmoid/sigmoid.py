"""Sigmoid attention: every key is weighed by itself."""

from __future__ import annotations

from attnzoo.attention import Attention, Spec
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS
from attnzoo.registry import register
from attnzoo.variants.sigmoid.sigmoid_engine import SigmoidEngine


@register
class Sigmoid(Attention):
    """Sigmoid attention (Ramapuram et al. 2024, equations 3 and 4).

        A_ij = σ(scale · q_i·k_j + b_i),    σ(x) = 1 / (1 + e^−x)

    A key's weight depends on no other key, so that rows need no sum, and a tile of A is final at
    once. The bias keeps the sum of a row near softmax's 1 at first: the paper sets it to −log n, n
    the length of the sequence; apple's modules take it as an argument, x-transformers has none.
    Here b_i is −log of how many keys row i sees, which without causality is the paper's; with it,
    it is what keeps a row independent of the tokens behind it and of padding. A number is the same
    for every row: −log of the length trained with, as the paper's causal models have it.

    What is kept of softmax is a positive weight for every pair; what is lost is the competition:
    rows do not sum to 1, and a row may weigh all keys, or none. Use it in models trained with it; a
    trained softmax is another function. Decoding keeps all keys and values.

    A call may bring distance_bias, (heads, 2 · reach + 1), what is added to the score of a key by
    its distance: the paper's language models add ALiBi's.

    bias: b of every row; None: −log of the number of keys that masks let the row see
    scale: factor of the products, 1/sqrt(head_dim) by default
    """

    spec = Spec(
        name="sigmoid",
        title="Sigmoid attention",
        paper="Ramapuram et al., Theory, Analysis, and Best Practices for Sigmoid Self-Attention, "
        "2024, arXiv:2409.04431",
        equation="A_ij = σ(q_i·k_j/√d − log n_i)",
        complexity="O(n²) time, O(n) memory",
        family="dense",
        exact=False,
        attn_mask=True,
        inputs=(DISTANCE_BIAS,),
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        bias: float | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(heads, head_dim, SigmoidEngine(scale, bias), backend=backend)
