"""What a layer makes the gates of forgetting attention with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.linear.gated.gate_projections import Gate


def check_start(gate_bias: Any) -> float:
    """What the bias of a gate begins with, refused where it is no number."""
    if isinstance(gate_bias, bool) or not isinstance(gate_bias, int | float):
        raise ValueError(
            f"gate_bias={gate_bias!r} must be a number: 0 as published, more to begin with gates "
            "that keep more"
        )
    return float(gate_bias)


class ForgetGate(Gate):
    """log_decay = log sigmoid(W x + b),    W ~ N(0, 0.02²), b = start at first

    With 0 every gate begins near 1/2: a head reads the last tokens, and learns to keep more.

    Source: Lin et al., Forgetting Transformer, 2025, arXiv:2503.02130, equation 2, and its code.
    """

    def __init__(self, features: int, heads: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.out = nn.Linear(features, heads)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.constant_(self.out.bias, self.start)

    def forward(self, x: Tensor) -> Tensor:
        x = self.out(x)
        return F.logsigmoid(x.to(accumulation_dtype(x.dtype)))
