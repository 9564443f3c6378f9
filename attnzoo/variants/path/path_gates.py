"""What a layer makes w of PaTH attention with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.engines.linear.gated.gate_projections import Gate

RANK = 32  # as in the paper's code


class UnitKeys(Gate):
    """w = W₂ W₁ x, of rank 32, each head's of length 1. The short convolution that the paper's
    layer has behind it is left out.

    Source: Yang et al., PaTH Attention, 2025, arXiv:2505.16381, section 3, and its code.
    """

    def __init__(self, features: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.low = nn.Linear(features, RANK, bias=False)
        self.out = nn.Linear(RANK, heads * head_dim, bias=False)
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        w = self.out(self.low(x)).unflatten(-1, (-1, self.head_dim))
        return F.normalize(w, dim=-1).flatten(-2)
