"""Performer: softmax's own kernel, estimated by random features."""

from __future__ import annotations

from typing import Any

import torch

from attnzoo.arguments import check_positive
from attnzoo.attention import Attention, Spec
from attnzoo.engines.linear.linear import Linear
from attnzoo.registry import register
from attnzoo.variants.performer.random_features import RandomFeatures


@register
class Performer(Attention):
    """FAVOR+ (Choromanski et al. 2021, section 2.3, Lemma 1).

        A_ij = φ(q_i)·φ(k_j) / Σ_l φ(q_i)·φ(k_l),    E[φ(q)·φ(k)] = exp(q·k/√d)

    φ projects onto num_features random directions ω and exponentiates; the cost is n·num_features·d
    instead of n²·d. What is kept is softmax in the mean: the estimate is unbiased before
    normalisation. What is lost is its precision: the error grows with exp(|q + k|²). At
    unit-variance queries and keys, head_dim 64 and 256 features the output's relative error is
    about 4, where answering the mean of v errs by 0.8. Use it where norms are small, and measure
    yours first; not in the place of a trained softmax whose scores are large.

    num_features: number of directions; "hyperbolic" and "trigonometric" make two features of each
    features: "positive", "hyperbolic", "trigonometric" or "relu"
    orthogonal: whether directions are orthogonal, which lowers the variance, or independent
    seed: draws the directions, which are kept in state_dict; see `redraw`
    scale: factor of the scores, 1/sqrt(head_dim) by default
    """

    spec = Spec(
        name="performer",
        title="Performer (FAVOR+)",
        paper="Choromanski et al., Rethinking Attention with Performers, 2021, arXiv:2009.14794",
        equation="A_ij = φ(q_i)·φ(k_j) / Σ_l φ(q_i)·φ(k_l), φ(x) = exp(ωx − |x|²/2)/√m",
        complexity="O(n) time and memory",
        family="kernel",
        exact=False,
    )
    engine: Linear

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        num_features: int = 256,
        features: str = "positive",
        orthogonal: bool = True,
        seed: int = 0,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        rows, width = (
            check_positive("num_features", num_features),
            check_positive("head_dim", head_dim),
        )
        feature_map = RandomFeatures(
            width, rows, features, orthogonal=orthogonal, seed=seed, scale=scale
        )
        super().__init__(heads, head_dim, Linear(feature_map), backend=backend)

    def redraw(self, seed: int | None = None) -> None:
        """Draw new directions, in place. seed=None takes one from torch's global generator, so
        torch.manual_seed repeats it."""
        feature_map = self.engine.feature_map
        assert isinstance(feature_map, RandomFeatures)
        feature_map.redraw(int(torch.randint(2**31, ())) if seed is None else seed)

    def oracle_arguments(self, queries: int, keys: int, is_causal: bool) -> dict[str, Any]:
        return {"projection": self.engine.feature_map.projection}
