"""Engine 3, linear: A_ij = φ(q_i) · φ(k_j), normalised; multiplied through a state of width ×
value_dim numbers, in linear time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call, UnsupportedError, repeat_heads
from attnzoo.engines.engine import Backend, Cost, Engine, Shape, accumulation_dtype, never_refuses
from attnzoo.engines.joining import join
from attnzoo.engines.linear import chunks, fla_kernel, gradient, linear_cost
from attnzoo.engines.linear.chunks import Past, divisor, finite
from attnzoo.engines.linear.feature_maps import FeatureMap
from attnzoo.engines.softmax.cache import check_state
from attnzoo.engines.softmax.softmax import causal_mask, visible


@dataclass(frozen=True)
class LinearState:
    """What decoding carries: `past` is None before the first token, and accumulated in float32 at
    least."""

    batch_size: int
    kv_heads: int
    max_length: int | None = None
    seen: int = 0
    past: Past | None = None

    def elements(self) -> int:
        """Numbers that the next query can read."""
        return 0 if self.past is None else self.past.sums.numel()

    def held_bytes(self) -> int:
        """Bytes of the sums, with their scale."""
        tensors = () if self.past is None else (self.past.sums, self.past.log_scale)
        return sum(x.nbytes for x in tensors if x is not None)

    def select(self, rows: Tensor) -> LinearState:
        """The state of these rows of the batch, (new_batch,) indices; a row may be taken more than
        once."""
        past = self.past
        if past is not None:
            past = Past(
                past.sums.index_select(0, rows),
                None if past.log_scale is None else past.log_scale.index_select(0, rows),
            )
        return replace(self, batch_size=rows.numel(), past=past)

    def check_room(self, call: Call) -> None:
        check_state(call, self.batch_size, self.kv_heads, self.seen, self.max_length)


class Linear(Engine):
    """Kernel attention through a feature map. The map says how A is normalised."""

    def __init__(self, feature_map: FeatureMap) -> None:
        super().__init__()
        self.feature_map = feature_map

    def matrix(self, call: Call) -> Tensor:
        feature_map, dtype = self.feature_map, accumulation_dtype(call.q.dtype)
        q_features = feature_map.query(call.q.to(dtype))
        k_features, log_scale = feature_map.key(repeat_heads(call.k, call.group).to(dtype))
        if log_scale is None and not feature_map.fades and feature_map.normalizer != "feature":
            attention = q_features @ k_features.mT
            mask = visible(call)
            if mask is not None:
                attention = attention.masked_fill(~mask, 0.0)
            if feature_map.normalizer == "none":
                return attention
            return attention / divisor(attention.sum(-1, keepdim=True))
        weights = _relative(_log_weights(log_scale, call.key_mask, k_features), call)
        if feature_map.fades:
            gamma = feature_map.decay(call.k.to(dtype)).repeat_interleave(call.group)
            count = chunks.counted(call.key_length, call.key_mask, call.q.device)
            of_queries = F.pad(count, (max(0, -call.offset), 0))[..., -call.query_length :]
            since = (of_queries[..., :, None] - count[..., None, :]).clamp(min=0)
            weights = weights * gamma[:, None, None] ** since
        if feature_map.normalizer == "feature":
            q_features = q_features / divisor(weights @ k_features)
        attention = (q_features @ k_features.mT) * weights
        if feature_map.normalizer == "row":
            attention = attention / divisor(attention.sum(-1, keepdim=True))
        return attention

    def init_state(
        self,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        max_length: int | None,
        dtype: torch.dtype,
        device: Any,
    ) -> LinearState:
        return LinearState(batch_size, kv_heads, max_length)

    def step(self, call: Call, state: LinearState, backend: str) -> tuple[Tensor, LinearState, str]:
        if backend == "fla":
            raise UnsupportedError(
                "backend='fla' does not decode token by token; use backend='auto'"
            )
        name = self.choose(call, "chunked" if backend == "auto" else backend).name
        plainly = name == "reference" or call.key_length == 1  # one token has no chunk to share
        out, past = (_recur if plainly else _scan)(self.feature_map, call, state.past)
        return out, replace(state, seen=state.seen + call.key_length, past=past), name

    def cost(self, shape: Shape) -> Cost:
        return linear_cost.cost(self.feature_map, shape)


def _reference(engine: Linear, call: Call) -> Tensor:
    """A·v by A itself."""
    weights = engine.matrix(call)
    return (weights @ repeat_heads(call.v, call.group).to(weights.dtype)).to(call.q.dtype)


def _relative(log_weights: Tensor, call: Call) -> Tensor:
    """exp(log_weight_j - m_i) for visible j, (batch, heads, query_length, key_length), where m_i is
    the largest log weight that row i sees."""
    rows = log_weights[:, :, None, :].expand(-1, -1, call.query_length, -1)
    if call.is_causal:
        rows = rows.masked_fill(
            ~causal_mask(call.query_length, call.key_length, call.q.device), float("-inf")
        )
    return (rows - finite(rows.detach().amax(-1, keepdim=True))).exp()


def _log_weights(log_scale: Tensor | None, key_mask: Tensor | None, k_features: Tensor) -> Tensor:
    """(batch, kv_heads, length): log_scale of visible keys, -inf for padded ones."""
    if log_scale is None:
        log_scale = k_features.new_zeros(k_features.shape[:-1])
    return (
        log_scale
        if key_mask is None
        else log_scale.masked_fill(~key_mask[:, None, :], float("-inf"))
    )


def _chunked(engine: Linear, call: Call) -> Tensor:
    if not call.is_causal:
        return gradient.attend(engine.feature_map, call)
    blind = (
        -call.offset if call.offset < 0 else 0
    )  # not max, which a compiler of symbolic lengths would carry along
    seeing = call.select(queries=slice(blind, None)) if blind else call
    out = gradient.attend(engine.feature_map, seeing)
    return torch.cat([out.new_zeros(*out.shape[:2], blind, out.shape[3]), out], 2) if blind else out


def _scan(feature_map: FeatureMap, call: Call, past: Past | None) -> tuple[Tensor, Past | None]:
    """Causal attention of as many queries as keys, behind the past. Returns the rows and the past
    after them."""

    def rows() -> Iterator[Tensor]:
        nonlocal past
        for piece in chunks.causal(feature_map, call, past, remember_last=True):
            past = piece.after
            yield piece.rows

    out = join(rows(), call.key_length, 2)
    return out, past


def _recur(feature_map: FeatureMap, call: Call, past: Past | None) -> tuple[Tensor, Past | None]:
    """As `_scan`, the plain recurrence: each token is added to the past, then its query reads
    it."""
    rows = []
    for token in range(call.key_length):
        here = slice(token, token + 1)
        one = call if call.key_length == 1 else call.select(queries=here, keys=here)
        past = chunks.absorb(feature_map, one.k, one.v, one.key_mask, past)
        rows += [piece.rows for piece in chunks.read_all(feature_map, one, past)]
    return torch.cat(rows, 2), past


Linear.backends = (
    Backend("chunked", _chunked, never_refuses),
    Backend("fla", fla_kernel.run, fla_kernel.why_not),  # by name only, until it has run on a GPU
    Backend("reference", _reference, never_refuses),
)
