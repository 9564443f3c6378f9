"""The feature map of the Taylor series of exp."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.arguments import check_set
from attnzoo.engines.linear.feature_maps import FeatureMap


class TaylorFeatures(FeatureMap):
    """φ(q)·φ(k) = 1 + s + s²/2 for s = q·k/√d: the series of exp(s) to its second order, which is
    at least 1/2 (Mercat 2020, arXiv:2010.14816; the feature map of Based, Arora et al. 2024,
    arXiv:2402.18668).

    The features of x = q·d^-¼ or k·d^-¼ are 1, x_i, x_i·x_j for i < j, and x_i²/√2. The paper has
    d² products, which hold each pair twice.
    """

    has_vjp = True

    def __init__(self, head_dim: int, *, normalize: bool) -> None:
        super().__init__()
        self.normalizer = "row" if normalize else "none"
        first, second = torch.triu_indices(head_dim, head_dim)
        self.first: Tensor
        self.second: Tensor
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("second", second, persistent=False)
        self.head_dim = head_dim

    def reset_parameters(self) -> None:
        """Write the index tables again, as after a module was moved from the meta device."""
        first, second = torch.triu_indices(self.head_dim, self.head_dim)
        self.first.copy_(first)
        self.second.copy_(second)

    def width(self, head_dim: int) -> int:
        return 1 + head_dim + head_dim * (head_dim + 1) // 2

    def query(self, q: Tensor) -> Tensor:
        check_set("the tables of its features", self.first, q)
        pairs = (q[..., self.first] * q[..., self.second]).mul_(self._factors(q))
        return torch.cat([torch.ones_like(q[..., :1]), q * int(q.shape[-1]) ** -0.25, pairs], -1)

    def vjp(
        self, x: Tensor, features: Tensor, d_features: Tensor, d_log_scale: Tensor | None
    ) -> Tensor:
        _, d_scaled, d_pairs = d_features.split([1, x.shape[-1], len(self.first)], -1)
        d_pairs = d_pairs * self._factors(x)
        gradient = d_scaled * int(x.shape[-1]) ** -0.25
        gradient.index_add_(-1, self.first, d_pairs * x[..., self.second])
        return gradient.index_add_(-1, self.second, d_pairs * x[..., self.first])

    def _factors(self, x: Tensor) -> Tensor:
        """What each product of two numbers of x is multiplied by, (pairs,)."""
        return ((self.first == self.second).to(x.dtype) * (0.5**0.5 - 1) + 1) * int(
            x.shape[-1]
        ) ** -0.5
