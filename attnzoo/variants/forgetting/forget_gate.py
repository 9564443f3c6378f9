"""What a layer makes the gates of forgetting attention with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.linear.gated.gate_projections import Gate


class ForgetGate(Gate):
    """log_decay = log sigmoid(W x + b),    W ~ N(0, 0.02²), b = 0 at first

    Every gate begins near 1/2: a head reads the last tokens, and learns to keep more.

    Source: Lin et al., Forgetting Transformer, 2025, arXiv:2503.02130, equation 2, and its code.
    """

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.out = nn.Linear(features, heads)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.out(x)
        return F.logsigmoid(x.to(accumulation_dtype(x.dtype)))
