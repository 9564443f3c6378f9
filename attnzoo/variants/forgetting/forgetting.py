"""Forgetting attention: softmax attention whose keys fade by gates."""

from __future__ import annotations

from attnzoo.attention import Attention, Input, Spec
from attnzoo.engines.linear.gated.gate_projections import Gate
from attnzoo.engines.softmax.decay_bias import LOG_DECAY
from attnzoo.registry import register
from attnzoo.variants.forgetting.fading_softmax import FadingSoftmax
from attnzoo.variants.forgetting.forget_gate import ForgetGate, check_start


@register
class Forgetting(Attention):
    """Forgetting attention (Lin et al. 2025, Forgetting Transformer, section 3, equation 4).

        A_ij = exp(s_ij) / Σ_{l≤i} exp(s_il),    s_ij = scale · q_i·k_j + g_{j+1} + … + g_i

    g_t = log_decay_t is the logarithm of a gate that token t closes on all before it; a row's own
    token has not faded. The gates are not scaled (flash-linear-attention and x-transformers agree).
    Nothing of softmax is lost where the gates are 0; where they are not, a key loses weight with
    what is read behind it, so that positions need no embedding, and keys that have faded below
    rounding are not read: with gates that stay below 0 the cost grows with the length alone. Causal
    only. Use it in models trained with it; a trained softmax has no gates. Decoding keeps all keys
    and values, and the gates.

    A call may bring log_decay, (batch, heads, key_length), at most 0; -inf, and anything below
    -1e5, closes all that stands before. Without it nothing fades, and it is `standard`.

    scale: factor of the products, 1/sqrt(head_dim) by default
    gate_bias: what the bias of a layer's gate begins with: 0 as in the paper's code, where half is
        kept at every token; 4 keeps 98%
    """

    spec = Spec(
        name="forgetting",
        title="Forgetting attention (FoX)",
        paper="Lin et al., Forgetting Transformer: Softmax Attention with a Forget Gate, 2025, "
        "arXiv:2503.02130",
        equation="A_ij = softmax over j ≤ i of q_i·k_j/√d + Σ log_decay over j+1..i",
        complexity="O(n²) time, O(n·m) where gates leave m tokens, O(n) memory",
        family="dense",
        exact=True,
        bidirectional=False,
        inputs=(LOG_DECAY,),
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        scale: float | None = None,
        gate_bias: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(heads, head_dim, FadingSoftmax(scale), backend=backend)
        self.gate_bias = check_start(gate_bias)

    def input_projection(self, one: Input, features: int) -> Gate:
        return ForgetGate(features, self.heads, self.gate_bias)
