"""Kernel attention: a feature map instead of the exponential, and the product taken in the cheap
order."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from attnzoo.arguments import nearest
from attnzoo.attention import Attention, Spec
from attnzoo.engines.linear.feature_maps import (
    POINTWISE,
    FeatureMap,
    Pointwise,
    SoftmaxFeatures,
)
from attnzoo.engines.linear.linear import Linear
from attnzoo.engines.linear.taylor_features import TaylorFeatures
from attnzoo.registry import register


@register
class LinearAttention(Attention):
    """Linear attention (Katharopoulos et al. 2020, equations 5 and 7 with φ(x) = elu(x) + 1).

        A_ij = φ(q_i)·φ(k_j) / Σ_l φ(q_i)·φ(k_l)

    φ(Q) (φ(K)ᵀ V) costs n·d² instead of n²·d, and the causal form is a recurrent network whose
    state is Σ φ(k_j) v_jᵀ. What is kept of softmax is that A is not negative and that its rows sum
    to 1; what is lost is sharpness: A has rank d at most, so no row can single out one key among
    many. Use it in models trained with it, where the time and memory of a generated token must not
    grow; not in the place of a trained softmax, and not alone where many facts must be recalled:
    mix in exact layers.

    feature_map: φ, one of these:
        - "elu" (elu(x) + 1), "relu", "squared_relu" or "identity"
        - a callable from (..., head_dim) to (..., width)
        - "taylor": A_ij ∝ 1 + s + s²/2 with s = q_i·k_j/√d, the series of softmax's exponential to
          its second order (Arora et al. 2024, Based). Its d²/2 features let a row tell more keys
          apart, and cost as much more: it is meant for heads of 16 numbers
        - "softmax": Efficient Attention (Shen et al. 2018, equation 5), A = softmax_features(q) ·
          softmax_length(k)ᵀ, in whose causal row i the second softmax is taken over the keys up to
          i. In float32, a feature that in every key lies over 87 below the key's largest is lost
    normalize: whether each row is divided by its sum. A map with negative features (identity) can
        bring that sum to 0: use False there
    """

    spec = Spec(
        name="linear",
        title="Linear attention",
        paper="Katharopoulos et al., Transformers are RNNs, 2020, arXiv:2006.16236",
        equation="A_ij = φ(q_i)·φ(k_j) / Σ_l φ(q_i)·φ(k_l)",
        complexity="O(n) time and memory",
        family="kernel",
        exact=False,
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        feature_map: str | Callable[[Tensor], Tensor] = "elu",
        normalize: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            heads, head_dim, Linear(_named(feature_map, head_dim, normalize)), backend=backend
        )


def _named(
    feature_map: str | Callable[[Tensor], Tensor], head_dim: int, normalize: bool
) -> FeatureMap:
    if feature_map == "softmax":
        if not normalize:
            raise ValueError(
                "normalize=False cannot go with feature_map='softmax', which is itself a "
                "normalisation; leave it True"
            )
        return SoftmaxFeatures()
    if feature_map == "taylor":
        return TaylorFeatures(head_dim, normalize=normalize)
    if callable(feature_map):
        return Pointwise(feature_map, normalize=normalize)
    if feature_map not in POINTWISE:
        known = [*POINTWISE, "taylor", "softmax"]
        raise ValueError(
            f"feature_map={feature_map!r} is unknown{nearest(feature_map, known)}; choose one of "
            f"{', '.join(known)}, or give a callable"
        )
    return Pointwise(POINTWISE[feature_map], normalize=normalize)
