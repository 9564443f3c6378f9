"""What a layer makes gates with, as the papers have and initialise it: of hidden states, (...,
features), the numbers of a token, (..., numbers), head by head."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.exponential import softplus

#: Ranges that the papers draw from: A, and Δ with its least.
DECAY_RATES, STEP_SIZES, LEAST_STEP = (1.0, 16.0), (1e-3, 1e-1), 1e-4


class Gate(nn.Module):
    """Base of what makes an input of hidden states.

    out: its last linear layer; other parameters of its own are of heads or of their channels
    """

    out: nn.Linear

    def keep_heads(self, first: int, count: int, heads: int) -> None:
        """Keep its own parameters of some of the heads, in place; those of `out` stay."""
        for name, parameter in list(self.named_parameters(recurse=False)):
            kept = parameter.detach().unflatten(0, (heads, -1))[first : first + count].flatten()
            setattr(self, name, nn.Parameter(kept.clone()))


class WriteStrength(Gate):
    """β = sigmoid(W x), doubled where negative eigenvalues are allowed.

    Source: Yang et al., Gated Delta Networks, 2024, arXiv:2412.06464, section 3.4; doubled, Grazzi
    et al., 2024, arXiv:2411.12537.
    """

    def __init__(self, features: int, heads: int, *, allow_neg_eigval: bool = False) -> None:
        super().__init__()
        self.out = nn.Linear(features, heads, bias=False)
        self.most = 2.0 if allow_neg_eigval else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x).sigmoid() * self.most


class StepDecay(Gate):
    """log_decay = −e^A_log · Δ,    Δ = softplus(W x + dt_bias)

    A_log is a number of a head, dt_bias of each number that is made. A begins between 1 and 16 and
    Δ, log-uniformly, between 0.001 and 0.1.

    numbers: heads, or heads · head_dim
    rank: W is the product of two matrices of this inner width; None: it is one
    lower_bound: log_decay = lower_bound · sigmoid(e^A_log · (W x + dt_bias)) instead, and A begins
        as 1
    weighs_values: the layer multiplies v by Δ

    Source: Dao and Gu, Transformers are SSMs, 2024, arXiv:2405.21060, and its code; with a rank,
    Kimi Team, Kimi Linear, 2025, arXiv:2510.26692.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        numbers: int,
        *,
        rank: int | None = None,
        lower_bound: float | None = None,
        weighs_values: bool = False,
    ) -> None:
        super().__init__()
        self.lower_bound, self.weighs_values = lower_bound, weighs_values
        self.low = None if rank is None else nn.Linear(features, rank, bias=False)
        self.out = nn.Linear(rank or features, numbers, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(numbers))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.lower_bound is None:
            self.A_log.uniform_(*DECAY_RATES).log_()
        else:
            self.A_log.zero_()
        least, most = (math.log(x) for x in STEP_SIZES)
        step = self.dt_bias.uniform_(least, most).exp().clamp(min=LEAST_STEP)
        self.dt_bias.copy_(step + (-(-step).expm1()).log())  # softplus gives the step again

    def forward(self, x: Tensor) -> Tensor:
        x = self.out(x if self.low is None else self.low(x))
        dtype = accumulation_dtype(x.dtype)
        x = x.to(dtype) + self.dt_bias.to(dtype)
        rate = self._rate(x)
        if self.lower_bound is not None:
            return self.lower_bound * (rate * x).sigmoid()
        return -rate * softplus(x)

    def weighed(self, v: Tensor, log_decay: Tensor) -> Tensor:
        """v, (batch, heads, length, value_dim), times Δ. log_decay: (batch, heads, length)."""
        steps = log_decay / -self.A_log.to(log_decay.dtype).exp()[:, None]
        return (v * steps[..., None]).to(v.dtype)

    def _rate(self, x: Tensor) -> Tensor:
        """e^A_log of every number of x."""
        rate = self.A_log.to(x.dtype).exp()
        return rate.repeat_interleave(x.shape[-1] // rate.shape[0])


class LowRankGate(Gate):
    """activation(W₂ inner(W₁ x) + b), by an inner width of `rank`.

    inner: None is the identity
    start: what b begins as, and W₁ then as 0; None: torch's own start
    """

    def __init__(
        self,
        features: int,
        numbers: int,
        rank: int,
        activation: Callable[[Tensor], Tensor],
        *,
        inner: Callable[[Tensor], Tensor] | None = None,
        start: Callable[[int], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.low = nn.Linear(features, rank, bias=False)
        self.out = nn.Linear(rank, numbers)
        self.activation, self.inner, self.start = activation, inner, start
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Only where it does not begin as torch's linear layers."""
        if self.start is not None:
            self.low.weight.zero_()
            nn.init.orthogonal_(self.out.weight, gain=0.1)
            self.out.bias.copy_(self.start(len(self.out.bias)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.low(x)
        return self.activation(self.out(x if self.inner is None else self.inner(x)))
