"""Engine 3, linear: A_ij = φ(q_i) · φ(k_j), normalised; multiplied through a state of width × value_dim numbers, in linear time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call, UnsupportedError, repeat_heads
from attnzoo.engines import linear_fla
from attnzoo.engines.cache import check_state
from attnzoo.engines.engine import Backend, Cost, Engine, Shape, accumulation_dtype, causal_pairs, never_refuses
from attnzoo.engines.pieces import join
from attnzoo.engines.softmax import causal_mask
from attnzoo.feature_maps import FeatureMap

CAUSAL_CHUNK = 128  # tokens that see each other through a small score matrix
CHUNK = 256  # tokens whose features are held at a time where nobody sees anybody


@dataclass(frozen=True)
class LinearState:
    """The keys and values so far, summed: Σ_j φ(k_j) v_jᵀ and Σ_j φ(k_j), both divided by exp(log_scale).

    sums: (batch, kv_heads, width, value_dim); normalizer: (batch, kv_heads, width); log_scale: (batch, kv_heads), the largest
    log_scale of any key so far. All None before the first token. Accumulated in float32 at least.
    """

    batch_size: int
    kv_heads: int
    max_length: int | None = None
    seen: int = 0
    sums: Tensor | None = None
    normalizer: Tensor | None = None
    log_scale: Tensor | None = None

    def elements(self) -> int:
        """Numbers that the next query can read."""
        return 0 if self.sums is None or self.normalizer is None else self.sums.numel() + self.normalizer.numel()

    def held_bytes(self) -> int:
        """Bytes of the sums, with their scale."""
        return sum(x.nbytes for x in (self.sums, self.normalizer, self.log_scale) if x is not None)

    def select(self, rows: Tensor) -> LinearState:
        """The state of these rows of the batch, (new_batch,) indices; a row may be taken more than once."""
        sums, normalizer, log_scale = (None if x is None else x.index_select(0, rows) for x in (self.sums, self.normalizer, self.log_scale))
        return replace(self, batch_size=rows.numel(), sums=sums, normalizer=normalizer, log_scale=log_scale)

    def check_room(self, call: Call) -> None:
        check_state(call, self.batch_size, self.kv_heads, self.seen, self.max_length)


class Linear(Engine):
    """Kernel attention through a feature map. The map says how A is normalised."""

    def __init__(self, feature_map: FeatureMap) -> None:
        super().__init__()
        self.feature_map = feature_map

    def init_state(self, batch_size: int, kv_heads: int, head_dim: int, max_length: int | None, dtype: torch.dtype, device: Any) -> LinearState:
        return LinearState(batch_size, kv_heads, max_length)

    def step(self, call: Call, state: LinearState, backend: str) -> tuple[Tensor, LinearState, str]:
        if backend == "fla":
            raise UnsupportedError("backend='fla' does not decode token by token; use backend='auto'")
        name = self.choose(call, "chunked" if backend == "auto" else backend).name
        out, state = (_recur if name == "reference" else _scan)(self.feature_map, call, state)
        return out, state, name

    def cost(self, shape: Shape) -> Cost:
        width, d = self.feature_map.width(shape.head_dim), shape.head_dim
        keys = shape.key_length
        queries = min(shape.query_length, keys) if shape.is_causal else shape.query_length
        reading, writing = queries, keys  # tokens that read the state, tokens that are summed into it
        per_head = per_kv_head = 0
        if shape.is_causal:
            chunks = [min(CAUSAL_CHUNK, queries - start) for start in range(0, queries, CAUSAL_CHUNK)]
            local_pairs = sum(size * size for size in chunks)
            per_head += local_pairs * (width + d)
            if self.feature_map.normalizer == "feature":
                per_kv_head += local_pairs * width
            if keys == queries:
                reading -= chunks[0]  # nothing lies behind the first chunk
            writing -= chunks[-1]  # and nobody reads what the last one would add
        features = self.feature_map.macs(d)
        per_head += queries * features + reading * width * (d + 1 if self.feature_map.normalizer == "row" else d)
        per_kv_head += keys * features + writing * width * d
        pairs = causal_pairs(shape.query_length, keys) if shape.is_causal else shape.query_length * keys
        state = shape.batch_size * shape.kv_heads * width * (d + 1)
        return Cost(
            macs=shape.batch_size * (shape.heads * per_head + shape.kv_heads * per_kv_head),
            support_macs=2 * shape.batch_size * shape.heads * d * pairs,
            elementwise=shape.batch_size * _elementwise(self.feature_map, shape),
            moved_bytes=shape.input_bytes + shape.query_bytes + sum(buffer.nbytes for buffer in self.feature_map.buffers()),
            state_elements=state,
            state_bytes=state * shape.sum_bytes,
        )


def _elementwise(feature_map: FeatureMap, shape: Shape) -> int:
    """Exponentials and divisions of the chunked backend for one sample."""
    d, width = shape.head_dim, feature_map.width(shape.head_dim)
    keys = shape.key_length
    queries = min(shape.query_length, keys) if shape.is_causal else shape.query_length
    divisions = {"row": d, "feature": width, "none": 0}[feature_map.normalizer]
    per_head = queries * (feature_map.query_elementwise(d) + divisions)
    per_kv_head = keys * feature_map.key_elementwise(d)
    if feature_map.scales_keys:
        early = keys - queries if shape.is_causal else keys  # keys that are summed before any query of a chunk of its own
        chunks = -(-early // CHUNK)
        per_kv_head += early + max(0, chunks - 1)  # one weight a key, and one factor for what is summed already
        if shape.is_causal:
            scanned = -(-queries // CAUSAL_CHUNK)
            last = queries - (scanned - 1) * CAUSAL_CHUNK
            per_kv_head += (scanned - 1) * CAUSAL_CHUNK**2 + last**2  # weights between the tokens of a chunk
            behind = queries if early else queries - min(queries, CAUSAL_CHUNK)
            per_kv_head += behind  # what the state is worth to a query
            per_kv_head += queries - last + (scanned - 1 if early else max(0, scanned - 2))  # and the sums, all but the last chunk's
    return shape.heads * per_head + shape.kv_heads * per_kv_head


def _reference(engine: Linear, call: Call) -> Tensor:
    """A formed whole, (batch, heads, query_length, key_length)."""
    feature_map, dtype = engine.feature_map, accumulation_dtype(call.q.dtype)
    q_features, _ = feature_map.query(call.q.to(dtype))
    k_features, log_scale = feature_map.key(repeat_heads(call.k, call.group).to(dtype))
    log_weights = _log_weights(log_scale, call.key_mask, k_features)
    mask = causal_mask(call.query_length, call.key_length, call.q.device) if call.is_causal else None
    weights = _decay(log_weights, mask, call)
    if feature_map.normalizer == "feature":
        q_features = _divide(q_features, weights @ k_features)
    attention = (q_features @ k_features.mT) * weights
    if feature_map.normalizer == "row":
        attention = _divide(attention, attention.sum(-1, keepdim=True))
    return (attention @ repeat_heads(call.v, call.group).to(dtype)).to(call.q.dtype)


def _decay(log_weights: Tensor, mask: Tensor | None, call: Call) -> Tensor:
    """exp(log_weight_j - m_i) for visible j, (batch, heads, query_length, key_length), where m_i is the largest log weight that row i sees."""
    rows = log_weights[:, :, None, :].expand(-1, -1, call.query_length, -1)
    if mask is not None:
        rows = rows.masked_fill(~mask, float("-inf"))
    return (rows - _finite(rows.detach().amax(-1, keepdim=True))).exp()


def _finite(stabiliser: Tensor) -> Tensor:
    """-inf (no key yet) becomes the lowest finite number, so that -inf - stabiliser is -inf and not NaN."""
    return stabiliser.clamp(min=torch.finfo(stabiliser.dtype).min)


def _log_weights(log_scale: Tensor | None, key_mask: Tensor | None, k_features: Tensor) -> Tensor:
    """(batch, kv_heads, length): log_scale of visible keys, -inf for padded ones."""
    if log_scale is None:
        log_scale = k_features.new_zeros(k_features.shape[:-1])
    return log_scale if key_mask is None else log_scale.masked_fill(~key_mask[:, None, :], float("-inf"))


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator; 0 where the denominator is 0 (a row with nothing to see), or so small that only underflow can
    have left it, since its reciprocal would overflow in the backward pass."""
    empty = denominator.abs() < torch.finfo(denominator.dtype).tiny ** 0.8
    return (numerator / denominator.masked_fill(empty, 1.0)).masked_fill(empty, 0.0)


def _chunked(engine: Linear, call: Call) -> Tensor:
    feature_map = engine.feature_map
    state = LinearState(call.k.shape[0], call.k.shape[1])
    if not call.is_causal:
        return _read_all(feature_map, call, _absorb(feature_map, call.k, call.v, call.key_mask, state))
    seen_by_all = max(0, call.offset)
    if seen_by_all:
        early_mask = None if call.key_mask is None else call.key_mask[:, :seen_by_all]
        state = _absorb(feature_map, call.k[:, :, :seen_by_all], call.v[:, :, :seen_by_all], early_mask, state)
    blind = max(0, -call.offset)
    late_mask = None if call.key_mask is None else call.key_mask[:, seen_by_all:]
    square = Call(call.q[:, :, blind:], call.k[:, :, seen_by_all:], call.v[:, :, seen_by_all:], late_mask, None, True)
    out, _ = _scan(feature_map, square, state, last_state=False)
    return torch.cat([out.new_zeros(*out.shape[:2], blind, out.shape[3]), out], 2) if blind else out


def _absorb(feature_map: FeatureMap, k: Tensor, v: Tensor, key_mask: Tensor | None, state: LinearState) -> LinearState:
    """Add keys and values to the state, chunk by chunk, under a running maximum of their log_scale."""
    dtype = accumulation_dtype(k.dtype)
    for start, keys, values in zip(range(0, k.shape[2], CHUNK), k.split(CHUNK, 2), v.split(CHUNK, 2), strict=True):
        k_features, log_scale = feature_map.key(keys.to(dtype))
        mask = None if key_mask is None else key_mask[:, start : start + CHUNK]
        log_weights = None if log_scale is None and mask is None else _log_weights(log_scale, mask, k_features)
        state = _add(feature_map, state, k_features, log_weights, values.to(dtype))
    return state


def _add(feature_map: FeatureMap, state: LinearState, k_features: Tensor, log_weights: Tensor | None, v: Tensor) -> LinearState:
    """The state with one chunk more. log_weights None means that every weight is 1."""
    past, past_normalizer = state.sums, state.normalizer
    largest = None
    if log_weights is not None or state.log_scale is not None:
        if log_weights is None:
            log_weights = k_features.new_zeros(k_features.shape[:-1])
        largest = log_weights.detach().amax(-1)
        if past is not None and past_normalizer is not None:
            before = torch.zeros_like(largest) if state.log_scale is None else state.log_scale
            largest = torch.maximum(largest, before)
            shrink = (before - _finite(largest)).exp()[..., None]
            past, past_normalizer = past * shrink[..., None], past_normalizer * shrink
        k_features = k_features * (log_weights - _finite(largest)[..., None]).exp()[..., None]
    sums = k_features.mT @ v
    normalizer = k_features.sum(-2)
    if past is not None and past_normalizer is not None:
        sums, normalizer = sums + past, normalizer + past_normalizer
    return replace(state, seen=state.seen + v.shape[2], sums=sums, normalizer=normalizer, log_scale=largest)


def _read_all(feature_map: FeatureMap, call: Call, state: LinearState) -> Tensor:
    """Every query reads the whole state."""

    def rows() -> Iterator[Tensor]:
        for queries in call.q.split(CHUNK, 2):
            numerator, denominator = _read(feature_map, _query_features(feature_map, queries, call.group), state)
            yield _normalize(numerator, denominator).flatten(1, 2).to(call.q.dtype)

    return join(rows(), call.query_length, 2)


def _query_features(feature_map: FeatureMap, q: Tensor, group: int) -> Tensor:
    """(batch, kv_heads, group, length, width)."""
    return feature_map.query(q.to(accumulation_dtype(q.dtype)).unflatten(1, (-1, group)))[0]


def _read(feature_map: FeatureMap, q_features: Tensor, state: LinearState) -> tuple[Tensor, Tensor | None]:
    assert state.sums is not None and state.normalizer is not None
    if feature_map.normalizer == "feature":
        q_features = _divide(q_features, state.normalizer[:, :, None, None, :])
    numerator = _share(q_features, state.sums)
    denominator = _share(q_features, state.normalizer[..., None]) if feature_map.normalizer == "row" else None
    return numerator, denominator


def _share(grouped: Tensor, matrix: Tensor) -> Tensor:
    """Rows of all query heads of a group times their one key-value matrix: (b, h, group, n, x) · (b, h, x, y) -> (b, h, group, n, y)."""
    return (grouped.flatten(2, 3) @ matrix).unflatten(2, grouped.shape[2:4])


def _normalize(numerator: Tensor, denominator: Tensor | None) -> Tensor:
    return numerator if denominator is None else _divide(numerator, denominator)


def _scan(feature_map: FeatureMap, call: Call, state: LinearState, *, last_state: bool = True) -> tuple[Tensor, LinearState]:
    """Causal attention of as many queries as keys, behind the state. Returns the rows and the state after them.

    Inside a chunk row i weighs key j by exp(log_scale_j - m_i) under its own running maximum m_i, so no later key, however
    large, can push an earlier row out of range (rule 5).
    """
    dtype = accumulation_dtype(call.q.dtype)

    def rows() -> Iterator[Tensor]:
        nonlocal state
        starts = range(0, call.key_length, CAUSAL_CHUNK)
        # split, not slices: the gradient of a slice is as long as the sequence, and there would be one for every chunk.
        for start, queries, keys, values in zip(starts, *(x.split(CAUSAL_CHUNK, 2) for x in (call.q, call.k, call.v)), strict=True):
            q_features = _query_features(feature_map, queries, call.group)
            k_features, log_scale = feature_map.key(keys.to(dtype))
            v = values.to(dtype)
            mask = None if call.key_mask is None else call.key_mask[:, start : start + CAUSAL_CHUNK]
            log_weights = None if log_scale is None and mask is None else _log_weights(log_scale, mask, k_features)
            before = state
            if last_state or start + CAUSAL_CHUNK < call.key_length:
                state = _add(feature_map, state, k_features, log_weights, v)
            yield _chunk_rows(feature_map, q_features, k_features, log_weights, v, before).flatten(1, 2).to(call.q.dtype)

    out = join(rows(), call.key_length, 2)
    return out, state


def _recur(feature_map: FeatureMap, call: Call, state: LinearState) -> tuple[Tensor, LinearState]:
    """As `_scan`, the plain recurrence: each token is added to the state, then its query reads the state."""
    rows = []
    for token in range(call.key_length):
        one = slice(token, token + 1)
        mask = None if call.key_mask is None else call.key_mask[:, one]
        state = _absorb(feature_map, call.k[:, :, one], call.v[:, :, one], mask, state)
        rows.append(_read_all(feature_map, replace(call, q=call.q[:, :, one]), state))
    return torch.cat(rows, 2), state


def _chunk_rows(feature_map: FeatureMap, q_features: Tensor, k_features: Tensor, log_weights: Tensor | None, v: Tensor, state: LinearState) -> Tensor:
    """Rows of one chunk: its own keys through a masked score matrix, earlier ones through the state."""
    length = v.shape[2]
    past = state.sums is not None
    weights, carry = _chunk_weights(log_weights, state, length, k_features)
    if feature_map.normalizer == "feature":
        normalizer = (weights @ k_features)[:, :, None]
        if past:
            assert state.normalizer is not None
            normalizer = normalizer + carry * state.normalizer[:, :, None, None, :]
        q_features = _divide(q_features, normalizer)
    scores = _share(q_features, k_features.mT) * weights[:, :, None]
    numerator = _share(scores, v)
    denominator = scores.sum(-1, keepdim=True) if feature_map.normalizer == "row" else None
    if past:
        assert state.sums is not None and state.normalizer is not None
        numerator = numerator + carry * _share(q_features, state.sums)
        if denominator is not None:
            denominator = denominator + carry * _share(q_features, state.normalizer[..., None])
    return _normalize(numerator, denominator)


def _chunk_weights(log_weights: Tensor | None, state: LinearState, length: int, like: Tensor) -> tuple[Tensor, Tensor | float]:
    """exp(log_weight_j - m_i) for j <= i, (batch or 1, kv_heads or 1, length, length), and what the state is worth to row i."""
    mask = causal_mask(length, length, like.device)
    if log_weights is None and state.log_scale is None:
        return mask.to(like.dtype)[None, None], 1.0
    if log_weights is None:
        log_weights = like.new_zeros(like.shape[:-1])
    running = log_weights.detach().cummax(-1).values
    before = None
    if state.sums is not None:
        before = running.new_zeros(running.shape[:2]) if state.log_scale is None else state.log_scale
        running = torch.maximum(running, before[..., None])
    running = _finite(running)
    rows = (log_weights[..., None, :] - running[..., None]).masked_fill(~mask, float("-inf"))
    carry = 1.0 if before is None else (before[..., None] - running).exp()[:, :, None, :, None]
    return rows.exp(), carry


Linear.backends = (
    Backend("chunked", _chunked, never_refuses),
    Backend("fla", linear_fla.run, linear_fla.why_not),  # by name only, until it has run on a GPU
    Backend("reference", _reference, never_refuses),
)
