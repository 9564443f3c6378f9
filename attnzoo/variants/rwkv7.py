"""RWKV-7: a state that fades by channel, and from which more is removed than is written anew."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnzoo.arguments import check_scale
from attnzoo.attention import Attention, Input, Spec
from attnzoo.engines.linear.gated.gate_projections import Gate, LowRankGate
from attnzoo.engines.linear.gated.gated_linear import GatedLinear
from attnzoo.engines.linear.gated.tokens import CHANNEL_GATE, REMOVAL_KEY, REMOVAL_RATE, Rule
from attnzoo.registry import register


@register
class Rwkv7(Attention):
    """RWKV-7's time mixing (Peng et al. 2025, equation 17).

        S_t = Diag(w_t) S_{t−1} − (a_t ∘ κ_t)(S_{t−1}ᵀ κ_t)ᵀ + k_t v_tᵀ,   out_t = s·S_tᵀ q_t

    What the state says of the removal key κ is taken from it at rates a, one for each channel, and
    the value is written at another key. κ reads the state before it fades. The delta rules are
    cases of it: `kda` has κ = k, a = β w for its key less faded, and writes β k. What is kept of
    softmax is that a row can find one key among many, as long as the state has room for them; what
    is lost is everything that a gate or a removal has taken. Causal only. Use it in models trained
    with it; not in the place of a trained softmax. q, w, a and κ are r, w, a and κ̂ of the paper,
    whose bonus and token shift belong to the layer around this.

    A call may bring log_decay (log w, at most 0), removal_key (κ, of length 1 or 0) and
    removal_rate (a, from 0 to 2), each (batch, kv_heads, key_length, head_dim). Without them w is
    1, κ is k divided by its length, and a is 1.

    scale: s, the factor of the rows; None is 1/sqrt(head_dim)
    """

    spec = Spec(
        name="rwkv7",
        title="RWKV-7",
        paper="Peng et al., RWKV-7 Goose, 2025, arXiv:2503.14456",
        equation="S_t = Diag(w_t)S_{t−1} − (a_t∘κ_t)(S_{t−1}ᵀκ_t)ᵀ + k_t v_tᵀ, row t is S_tᵀq_t",
        complexity="O(n) time and memory",
        family="kernel",
        exact=False,
        bidirectional=False,
        value_heads=True,
        inputs=(CHANNEL_GATE, REMOVAL_KEY, REMOVAL_RATE),
    )

    def __init__(
        self, heads: int, head_dim: int, *, scale: float | None = 1.0, backend: str = "auto"
    ) -> None:
        rule = Rule(CHANNEL_GATE, check_scale(scale), removes=True)
        super().__init__(heads, head_dim, GatedLinear(rule), backend=backend)

    def input_projection(self, one: Input, features: int) -> Gate | None:
        if one is REMOVAL_KEY:
            return None
        numbers, rank = self.heads * self.head_dim, low_rank(features)
        if one is REMOVAL_RATE:
            return LowRankGate(features, numbers, rank, torch.sigmoid, start=first_rates)
        return LowRankGate(
            features, numbers, rank, bounded_decay, inner=torch.tanh, start=first_decays
        )


def low_rank(features: int) -> int:
    """The inner width of the layer's gates: 2.5 roots of the model's width, in steps of 32."""
    return max(32, round(2.5 * features**0.5 / 32) * 32)


def bounded_decay(x: Tensor) -> Tensor:
    """log w = −e^(−1/2) sigmoid(x), as the paper's decay."""
    return -math.exp(-0.5) * x.sigmoid()


def first_decays(numbers: int) -> Tensor:
    """What the decays' bias begins as, as in RWKV-LM's first layer, from slow to fast
    channels, without its zigzag over a head."""
    place = torch.linspace(0, 1, numbers)
    return -5.5 + 6 * place


def first_rates(numbers: int) -> Tensor:
    """What the rates' bias begins as, as RWKV-LM has it, without its zigzag."""
    return -0.19 + 0.4 * (torch.linspace(0, 1, numbers) - 0.5)
