"""The linear engine's reference: A written out, quadratic in the length.

    A_ij = φ(q_i)·φ(k_j) · w_ij,    w_ij = exp(log_scale_j) · decay from j to i, 0 for hidden keys

divided by the sum of its row, or of its key feature, where the feature map says so. Every backend
must equal it.
"""

from __future__ import annotations

from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.engines.engine import Backend, Engine, accumulation_dtype, never_refuses
from attnzoo.engines.linear.decay import product
from attnzoo.engines.linear.feature_maps import FeatureMap
from attnzoo.engines.linear.key_weights import finite
from attnzoo.engines.linear.sums import divisor
from attnzoo.engines.softmax.reference import visible


class LinearReference(Engine):
    """Kernel attention through a feature map, without a fast backend.

    feature_map: φ of queries and keys, how A is normalised, and how keys fade.
    """

    def __init__(self, feature_map: FeatureMap) -> None:
        super().__init__()
        self.feature_map = feature_map

    def matrix(self, call: Call) -> Tensor:
        feature_map, dtype = self.feature_map, accumulation_dtype(call.q.dtype)
        q_features = feature_map.query(call.q.to(dtype))
        k_features, log_scale = feature_map.key(repeat_heads(call.k, call.group).to(dtype))
        mask = visible(call)
        weights = product(_written(call, log_scale), feature_map.decay.of_rows(call, dtype))
        if feature_map.normalizer == "feature":
            shown = q_features.new_ones(call.query_length, call.key_length)
            shown = product(shown, weights)
            shown = shown if mask is None else shown.masked_fill(~mask, 0.0)
            q_features = q_features / divisor(shown @ k_features)
        attention = product(q_features @ k_features.mT, weights)
        if mask is not None:
            attention = attention.masked_fill(~mask, 0.0)
        if feature_map.normalizer == "row":
            attention = attention / divisor(attention.sum(-1, keepdim=True))
        return attention


def reference(engine: LinearReference, call: Call) -> Tensor:
    """A·v by A itself, in q's dtype."""
    weights = engine.matrix(call)
    return (weights @ repeat_heads(call.v, call.group).to(weights.dtype)).to(call.q.dtype)


def _written(call: Call, log_scale: Tensor | None) -> Tensor | None:
    """exp(log_scale_j - m_i), (batch, heads, query_length, key_length), where m_i is the largest
    log_scale that row i sees; None where keys have none."""
    if log_scale is None:
        return None
    mask = visible(call)
    rows = log_scale[:, :, None, :].expand(-1, -1, call.query_length, -1)
    if mask is not None:
        rows = rows.masked_fill(~mask, float("-inf"))
    return (rows - finite(rows.detach().amax(-1, keepdim=True))).exp()


REFERENCE = Backend("reference", reference, never_refuses)
LinearReference.backends = (REFERENCE,)
