"""RWKV-7: a state that fades by channel, and from which more is removed than is written anew."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.arguments import check_scale
from attnzoo.attention import Attention, Input, Spec
from attnzoo.engines.linear.gated.gate_projections import Gate, LowRankGate
from attnzoo.engines.linear.gated.gated_linear import GatedLinear
from attnzoo.engines.linear.gated.tokens import CHANNEL_GATE, REMOVAL_KEY, REMOVAL_RATE, Rule
from attnzoo.registry import register

FIRST_SCALE = 0.85  # of removal keys, as in RWKV-LM


@register
class Rwkv7(Attention):
    """RWKV-7's time mixing (Peng et al. 2025, equation 17).

        S_t = Diag(w_t) S_{t−1} − (a_t ∘ κ_t)(S_{t−1}ᵀ κ_t)ᵀ + k_t v_tᵀ,   out_t = s·S_tᵀ q_t

    What the state says of the removal key κ is taken from it at rates a, one for each channel, and
    the value is written at another key. κ reads the state before it fades. The delta rules are
    cases of it: `kda` has κ = k, a = β w for its key less faded, and writes β k. What is kept of
    softmax is that a row can find one key among many, as long as the state has room for them; what
    is lost is everything that a gate or a removal has taken. Causal only. Use it in models trained
    with it; not in the place of a trained softmax. q, w, a and κ are r, w, a and κ̂ of the paper.
    The whole of its layer is `MultiheadAttention` with token_shift=True, bonus=True,
    output_norm="centered", output_gate="low_rank" and bias=False around this.

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

    def input_projection(self, one: Input, features: int) -> Gate:
        numbers, rank = self.heads * self.head_dim, low_rank(features)
        if one is REMOVAL_KEY:
            return RemovalKey(numbers)
        if one is REMOVAL_RATE:
            return RemovalRate(features, numbers, rank)
        return LowRankGate(
            features, numbers, rank, bounded_decay, inner=torch.tanh, start=first_decays
        )


class RemovalKey(Gate):
    """κ: the key times a number of each channel, brought to length 1."""

    reads_keys = True

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(numbers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, FIRST_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """x: keys, (batch, heads, length, head_dim)"""
        return F.normalize(x * self.scale.view(x.shape[1], 1, -1), dim=-1)


class RemovalRate(LowRankGate):
    """a = sigmoid(W₂ W₁ x + b), by which the layer's keys are written less where less is removed:
    k ∘ (1 + (a − 1) ∘ α), a number α of each channel."""

    weighs_keys = True

    def __init__(self, features: int, numbers: int, rank: int) -> None:
        super().__init__(features, numbers, rank, torch.sigmoid, start=first_rates)
        self.strength = nn.Parameter(torch.ones(numbers))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "strength" in self._parameters:  # not yet while the base is built
            nn.init.ones_(self.strength)

    def weighed_keys(self, k: Tensor, rate: Tensor) -> Tensor:
        """k, rate: (batch, heads, length, head_dim)"""
        strength = self.strength.view(k.shape[1], 1, -1)
        return (k * (1 + (rate - 1) * strength)).to(k.dtype)


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
