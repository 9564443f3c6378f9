"""Feature maps φ with A_ij ∝ φ(q_i) · φ(k_j): functions of one number, and a softmax of each side.
The Taylor series of exp is in taylor_features.py, Performer's features in random_features.py.

A map returns φ of a key in two parts, `features · exp(log_scale)`: features stay in floating range,
log_scale (..., length) holds the factor that may not (None where it is 0). Of a query it returns
features alone: a factor of its own cancels when its row is normalised. No map looks at more than
one token, so none can look ahead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.eager import can_look
from attnzoo.engines.exponential import LOG2_E, exp_
from attnzoo.engines.linear.decay import NO_DECAY, Decay

Features = tuple[Tensor, Tensor | None]
Normalizer = Literal["row", "feature", "none"]


class FeatureMap(nn.Module):
    """φ of queries and keys. `width` stands for the number of features of a token.

    normalizer: how A is normalised. "row": each row by its sum. "feature": each key feature by its
        sum over the visible keys (a softmax along the length). "none": not at all
    scales_keys: whether `key` gives a log_scale
    scale_has_gradient: whether log_scale is part of φ; False where it only keeps numbers in range
    decay: what is left of a key after the tokens that follow it
    has_vjp: whether `vjp` is implemented, and only queries and keys need a gradient
    """

    normalizer: Normalizer = "row"
    scales_keys: bool = False
    scale_has_gradient: bool = False
    decay: Decay = NO_DECAY
    has_vjp: bool = False

    @property
    def weighs_keys(self) -> bool:
        """Whether keys are summed with weights."""
        return self.scales_keys or self.decay.fades

    def for_keys(self, k: Tensor) -> FeatureMap:
        """The map to use when k, (batch, kv_heads, length, head_dim), are all the keys: this one,
        or a cheaper one that gives them the same A."""
        return self

    @property
    def unscaled(self) -> FeatureMap | None:
        """A map without log_scale that gives the same A where its `in_range` is true; None where
        there is none."""
        return None

    def in_range(self, normalizers: Tensor) -> bool:
        """Whether the features that were summed to these normalizers, of any shape, were neither
        too large nor too small to do without a log_scale."""
        raise NotImplementedError

    def width(self, head_dim: int) -> int:
        """Number of features of a vector of head_dim numbers."""
        return head_dim

    def width_of(self, k: Tensor) -> int:
        """Number of features of each of these keys, as the engine gets them."""
        return self.width(k.shape[-1])

    def macs(self, head_dim: int) -> int:
        """Multiply-accumulates for the features of one vector."""
        return 0

    def query_elementwise(self, head_dim: int) -> int:
        """Exponentials and divisions for the features of one query, its log_scale left out."""
        return 0

    def key_elementwise(self, head_dim: int) -> int:
        """As `query_elementwise`, for a key and its log_scale."""
        return self.query_elementwise(head_dim)

    def query(self, q: Tensor) -> Tensor:
        """(..., length, head_dim) -> features (..., length, width); where rows are normalised, each
        token's may lack a positive factor."""
        raise NotImplementedError

    def key(self, k: Tensor) -> Features:
        """(..., length, head_dim) -> features (..., length, width), log_scale (..., length) or
        None."""
        return self.query(k), None

    def of_one_token(
        self, q: Tensor, k: Tensor, earlier: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """The features of one token's queries and keys by compiled code; None where it has none.

        earlier: (batch, kv_heads), the largest log_scale of a key so far; None: there was no key
        returns: features of queries, and of keys times exp(log_scale - largest); what earlier keys
            fade by, (batch, kv_heads, 1), and the largest log_scale now
        """
        return None

    def vjp(
        self, x: Tensor, features: Tensor, d_features: Tensor, d_log_scale: Tensor | None
    ) -> Tensor:
        """Gradient of x, a query or a key, from those of its features (which may be overwritten)
        and of its log_scale (None: it has none): the vector-Jacobian product."""
        raise NotImplementedError

    def query_vjp(self, q: Tensor, features: Tensor, d_features: Tensor) -> Tensor:
        """`vjp` of a query, for a map whose queries have features of another kind."""
        return self.vjp(q, features, d_features, None)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, written as exp(min(x, 0)) + max(x, 0) so that small values keep their digits."""
    return x.clamp(min=0).add_(exp_(x.clamp(max=0)))


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    return F.relu(x).square()


def identity(x: Tensor) -> Tensor:
    """x itself: A_ij ∝ q_i · k_j, which may be negative."""
    return x


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_plus_one,
    "relu": F.relu,
    "squared_relu": squared_relu,
    "identity": identity,
}

# For each function, the gradient of x from x, the features and their gradient. That of elu + 1 is
# exp(x) below 0, where it equals the feature, and 1 above.
_VJP: dict[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    elu_plus_one: lambda x, features, gradient: gradient.mul_(features.clamp(max=1)),
    F.relu: lambda x, features, gradient: gradient.mul_(features > 0),
    squared_relu: lambda x, features, gradient: gradient.mul_(2 * F.relu(x)),
    identity: lambda x, features, gradient: gradient,
}


class Pointwise(FeatureMap):
    """φ(x) = function(x). Costs do not count what a function of the user's own computes.

    function: one of `POINTWISE`, or any callable from (..., head_dim) to (..., width)
    normalize: whether each row of A is divided by its sum
    """

    def __init__(self, function: Callable[[Tensor], Tensor], *, normalize: bool) -> None:
        super().__init__()
        self.function = function
        self.normalizer = "row" if normalize else "none"
        self.has_vjp = function in _VJP  # a callable of the user's own may have parameters
        self.widths: dict[int, int] = {}  # of a callable of the user's own, by head_dim

    def width(self, head_dim: int) -> int:
        if self.function in _VJP:
            return head_dim
        if head_dim not in self.widths:
            like = next(self.parameters(), torch.empty(0))  # the callable may be a module
            try:
                return self.width_of(like.new_zeros(1, head_dim))
            except (RuntimeError, ValueError, TypeError) as error:
                raise ValueError(
                    f"feature_map does not take a {like.dtype} vector of {head_dim} numbers on "
                    f"{like.device}, which "
                    f"would tell its width ({error}); call the attention once with its own inputs "
                    "before asking for costs"
                ) from error
        return self.widths[head_dim]

    def width_of(self, k: Tensor) -> int:
        if self.function in _VJP:
            return k.shape[-1]
        known = self.widths.get(k.shape[-1])
        if known is not None:
            return known
        with torch.no_grad():
            width = self.query(k.new_zeros(1, k.shape[-1])).shape[-1]
        if not torch.compiler.is_compiling():
            self.widths[k.shape[-1]] = width
        return width

    def query_elementwise(self, head_dim: int) -> int:
        return head_dim if self.function is elu_plus_one else 0

    def query(self, q: Tensor) -> Tensor:
        if not isinstance(self.function, nn.Module):
            return self.function(q)
        weight = next(self.parameters(), None)  # a callable that is a module takes its own dtype
        if weight is None or weight.dtype == q.dtype or torch.is_autocast_enabled(q.device.type):
            return self.function(q)
        return self.function(q.to(weight.dtype)).to(q.dtype)

    def vjp(
        self, x: Tensor, features: Tensor, d_features: Tensor, d_log_scale: Tensor | None
    ) -> Tensor:
        return _VJP[self.function](x, features, d_features)


class SoftmaxFeatures(FeatureMap):
    """Efficient Attention (Shen et al. 2018, arXiv:1812.01243, equation 5): a softmax of each query
    over its features, and of each key feature over the visible keys.

    Exponents of a key are taken relative to its largest, so in float32 those more than 87 below
    become 0.
    """

    normalizer = "feature"
    scales_keys = True
    has_vjp = True

    def for_keys(self, k: Tensor) -> FeatureMap:
        if k.is_meta:
            return UNSCALED
        if not can_look(k):
            return self
        smallest, largest = torch.aminmax(k.detach())
        return UNSCALED if smallest.item() >= -EXPONENT and largest.item() <= EXPONENT else self

    @property
    def unscaled(self) -> FeatureMap | None:
        return UNSCALED

    def query_elementwise(self, head_dim: int) -> int:
        return 3 * head_dim  # a softmax: exponential, sum, division

    def key_elementwise(self, head_dim: int) -> int:
        return head_dim

    def query(self, q: Tensor) -> Tensor:
        return q.softmax(-1)

    def key(self, k: Tensor) -> Features:
        largest = k.detach().amax(-1, keepdim=True)
        return exp_(k - largest), largest.squeeze(-1)

    def vjp(
        self, x: Tensor, features: Tensor, d_features: Tensor, d_log_scale: Tensor | None
    ) -> Tensor:
        return d_features.mul_(features)

    def query_vjp(self, q: Tensor, features: Tensor, d_features: Tensor) -> Tensor:
        # The operator that autograd calls.
        return torch.ops.aten._softmax_backward_data(d_features, features, -1, features.dtype)


class _UnscaledSoftmaxFeatures(SoftmaxFeatures):
    """`SoftmaxFeatures` for keys within ±EXPONENT, whose exponentials and sums need no log_scale to
    stay in range."""

    scales_keys = False

    def for_keys(self, k: Tensor) -> FeatureMap:
        return self

    def in_range(self, normalizers: Tensor) -> bool:
        smallest, largest = torch.aminmax(normalizers)
        return smallest.item() >= math.exp(-EXPONENT) and largest.item() <= math.exp(EXPONENT)

    def key(self, k: Tensor) -> Features:
        return (k * LOG2_E).exp2_(), None


# exp(±30), summed over a trillion tokens and divided by another such sum, is within float32.
EXPONENT = 30.0
UNSCALED = _UnscaledSoftmaxFeatures()
