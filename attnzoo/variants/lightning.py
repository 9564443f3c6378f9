"""Lightning attention: linear attention whose heads fade each at a rate of its own."""

from __future__ import annotations

from attnzoo.arguments import check_choice, check_count, check_positive, check_scale
from attnzoo.attention import Attention, Spec
from attnzoo.engines.linear.gated.gated_linear import GatedLinear
from attnzoo.engines.linear.gated.tokens import HEAD_GATE, Rule
from attnzoo.registry import register

SLOPES = ("minimax", "fla")


@register
class Lightning(Attention):
    """Lightning attention (Qin et al. 2024; MiniMax 2025, section 2.2).

        A_ij = s·q_i·k_j · exp(−slope·(i − j)) for j ≤ i,    s = 1

    Retention with another rate for every head and layer, and no factor of the scores. Two sets of
    slopes are in use, of head h from 0 of H in layer l from 0 of L:

        minimax: 2^(−8(h+1)/H) · (1 − l/(L−1) + 1e-5),    as MiniMax's published models
        fla:     8h/H · (1 − l/L),    as flash-linear-attention, whose head 0 never forgets, and
                 which takes 1/√d for s: give scale=None

    MiniMax turns q, k and v by silu before and norms and gates the output: those belong to the
    layer around this. What is kept of softmax is a score for every pair; what is lost is the
    normaliser. Causal only. Use it in models trained with it; not in the place of a trained
    softmax.

    slopes: "minimax" or "fla"
    layer, num_layers: l and L
    scale: s, the factor of the rows; None is 1/sqrt(head_dim)
    """

    spec = Spec(
        name="lightning",
        title="Lightning attention",
        paper="Qin et al., Various Lengths, Constant Speed, 2024, arXiv:2405.17381",
        equation="A_ij = q_i·k_j exp(−slope·(i−j)) for j ≤ i",
        complexity="O(n) time and memory",
        family="kernel",
        exact=False,
        bidirectional=False,
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        slopes: str = "minimax",
        layer: int = 0,
        num_layers: int = 1,
        scale: float | None = 1.0,
        backend: str = "auto",
    ) -> None:
        if check_count("layer", layer) >= check_positive("num_layers", num_layers):
            raise ValueError(
                f"layer={layer} must be below num_layers={num_layers}: layers count from 0"
            )
        heads = check_positive("heads", heads)
        if check_choice("slopes", slopes, SLOPES) == "minimax":
            share = 1 - layer / max(1, num_layers - 1) + 1e-5
            rates = tuple(2.0 ** (-8 * (head + 1) / heads) * share for head in range(heads))
        else:
            share = 1 - layer / num_layers
            rates = tuple(8 * head / heads * share for head in range(heads))
        rule = Rule(HEAD_GATE, check_scale(scale))
        super().__init__(heads, head_dim, GatedLinear(rule, rates), backend=backend)

    def keep_heads(self, first: int, count: int) -> None:
        super().keep_heads(first, count)
        assert isinstance(self.engine, GatedLinear) and self.engine.slopes is not None
        self.engine.slopes = self.engine.slopes[first : first + count]
