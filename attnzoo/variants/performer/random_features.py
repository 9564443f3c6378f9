"""The random features of FAVOR+, whose products estimate softmax's kernel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.arguments import check_choice, check_scale, check_seed, check_set
from attnzoo.engines.exponential import LN_2, LOG2_E
from attnzoo.engines.linear.feature_maps import FeatureMap, Features
from attnzoo.engines.native.library import in_rows, operators


class RandomFeatures(FeatureMap):
    """FAVOR+ (Choromanski et al. 2021): E_ω[φ(q) · φ(k)] = exp(scale · q·k) for all kinds but
    "relu".

    head_dim: numbers in each query and key
    num_features: m, the number of random directions
    kind: one of the maps below
    orthogonal: whether directions are orthogonal within blocks of head_dim, or independent
    seed: draws the directions
    scale: factor of the scores, positive; None: 1/sqrt(head_dim)

    Its buffer `projection` holds the directions as rows ω ~ N(0, I), (num_features, head_dim). With
    x scaled by scale^½:
      positive       φ(x) = exp(-|x|²/2) · exp(ωx) / √m              (Lemma 1)
      hyperbolic     φ(x) = exp(-|x|²/2) · [exp(ωx), exp(-ωx)] / √2m  (Lemma 1, smaller variance)
      trigonometric  φ(x) = exp(+|x|²/2) · [sin ωx, cos ωx] / √m  (random Fourier features; A may be
                     negative)
      relu           φ(x) = max(ωx, 0) / √m  (Performer-ReLU; no softmax kernel)
    """

    has_vjp = True
    KINDS = ("positive", "hyperbolic", "trigonometric", "relu")

    def __init__(
        self,
        head_dim: int,
        num_features: int,
        kind: str,
        *,
        orthogonal: bool,
        seed: int,
        scale: float | None,
    ) -> None:
        super().__init__()
        self.kind = check_choice("features", kind, self.KINDS)
        self.num_features = num_features
        self.scales_keys = self.scale_has_gradient = kind != "relu"
        self.orthogonal = orthogonal
        given = check_scale(scale)
        self.scale = head_dim**-0.5 if given is None else given
        if self.scale <= 0:
            raise ValueError(f"scale={scale!r} must be positive: the features take its square root")
        self.projection: Tensor
        self.register_buffer(
            "projection", draw_projection(num_features, head_dim, orthogonal=orthogonal, seed=seed)
        )
        self.seed = seed

    def redraw(self, seed: int) -> None:
        """Replace ω by another draw, in place."""
        rows, head_dim = self.projection.shape
        self.projection.copy_(
            draw_projection(rows, head_dim, orthogonal=self.orthogonal, seed=seed)
        )
        self.seed = seed

    def reset_parameters(self) -> None:
        """Draw the directions of the seed again, where they lost their values."""
        self.redraw(self.seed)

    def width(self, head_dim: int) -> int:
        return self.num_features * (2 if self.kind in ("hyperbolic", "trigonometric") else 1)

    def macs(self, head_dim: int) -> int:
        return self.num_features * head_dim

    def query_elementwise(self, head_dim: int) -> int:
        return 0 if self.kind == "relu" else self.width(head_dim)

    def query(self, q: Tensor) -> Tensor:
        return self._features(q)[0]  # without 1/√m too, as every factor of a query

    def key(self, k: Tensor) -> Features:
        features, largest = self._features(k)
        if not self.scales_keys:
            return features, None
        norm = k.square().sum(-1)
        if largest is None:
            return features, norm * (self.scale / 2)
        return features, largest.sub_(math.log(self.width(k.shape[-1])) / 2).sub_(
            norm, alpha=self.scale / 2
        )

    def of_one_token(
        self, q: Tensor, k: Tensor, earlier: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        if self.kind not in ("positive", "hyperbolic"):
            return None
        check_set("the directions of its features", self.projection, q)
        return operators().native_exponential_features(
            in_rows(q),
            in_rows(k),
            self.projection.to(q.dtype).contiguous(),
            self.scale,
            self.kind == "hyperbolic",
            None if earlier is None else earlier.contiguous(),
        )

    def vjp(
        self, x: Tensor, features: Tensor, d_features: Tensor, d_log_scale: Tensor | None
    ) -> Tensor:
        if self.kind == "relu":
            d_projected = d_features.mul_(features > 0).mul_(self.num_features**-0.5)
        elif self.kind == "trigonometric":
            (sine, cosine), (d_sine, d_cosine) = features.chunk(2, -1), d_features.chunk(2, -1)
            d_projected = d_sine * cosine - d_cosine * sine
        else:
            d_projected = d_features.mul_(features)
            if self.kind == "hyperbolic":
                positive, negative = d_projected.chunk(2, -1)
                d_projected = positive - negative
        gradient = d_projected @ self._directions(x.dtype)
        if d_log_scale is not None:
            sign = 1 if self.kind == "trigonometric" else -1
            gradient += x * (d_log_scale * (sign * self.scale))[..., None]
        return gradient

    def _directions(self, dtype: torch.dtype) -> Tensor:
        """ω, scaled so that its products with unscaled vectors are those of ω with scaled ones."""
        return self.projection.to(dtype) * self.scale**0.5

    def _projected(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """factor · √scale · ωx. The smaller of the two is multiplied by the factors."""
        directions, factor = self.projection.to(x.dtype), factor * self.scale**0.5
        if x.numel() < directions.numel():
            return (x * factor) @ directions.mT
        return x @ (directions * factor).mT

    def _features(self, x: Tensor) -> Features:
        """And the largest exponent of each token where it has left the features. Exponents are of
        2, whose power is the fastest on a CPU."""
        check_set("the directions of its features", self.projection, x)
        if self.kind == "relu":
            return F.relu_(self._projected(x, self.num_features**-0.5)), None
        if self.kind == "trigonometric":
            projected = self._projected(x)
            return torch.cat([projected.sin(), projected.cos()], -1).mul_(
                self.num_features**-0.5
            ), None
        projected = self._projected(x, LOG2_E)
        if self.kind == "hyperbolic":
            projected = torch.cat([projected, -projected], -1)
        # The largest exponent of the token leaves the features; what it is does not change φ, so no
        # gradient goes through it.
        largest = projected.detach().amax(-1, keepdim=True)
        return projected.sub_(largest).exp2_(), largest.squeeze(-1).mul_(
            LN_2
        )  # in place: these are the widest tensors


def draw_projection(rows: int, head_dim: int, *, orthogonal: bool, seed: int) -> Tensor:
    """(rows, head_dim) float32 with rows ~ N(0, I); orthogonal: rows of each block of head_dim are
    orthogonal, norms chi-distributed."""
    generator = torch.Generator().manual_seed(check_seed(seed))
    gaussian = torch.randn(rows, head_dim, generator=generator, dtype=torch.float64)
    if not orthogonal:
        return gaussian.float()
    blocks = []
    for start in range(0, rows, head_dim):
        square = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(square)
        # QR leaves the sign of each column to the library; diag(R) > 0 makes q uniform over the
        # orthogonal group.
        blocks.append((q * r.diagonal().sign())[: rows - start])
    return (torch.cat(blocks) * gaussian.norm(dim=1, keepdim=True)).float()
