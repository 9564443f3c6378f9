"""The softmax engine of Reformer: a query sees the keys that hash to its bucket."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.arguments import check_positive
from attnzoo.call import Call
from attnzoo.engines.engine import (
    Backend,
    Cost,
    Shape,
    causal_pairs,
    never_refuses,
)
from attnzoo.engines.softmax import sdpa
from attnzoo.engines.softmax.cache import KeyValueCache
from attnzoo.engines.softmax.native import one_row
from attnzoo.engines.softmax.reference import reference, visible, weights_of
from attnzoo.engines.softmax.softmax import Softmax, softmax_cost
from attnzoo.engines.sparse.dense import too_large
from attnzoo.engines.sparse.reference import is_short_input
from attnzoo.engines.sparse.selected.grouped_rows import heads_of
from attnzoo.variants.reformer.angular_hash import AngularHash
from attnzoo.variants.reformer.bucket_codes import (
    CODES,
    codes_of_new,
    seen_by_one,
    seen_natively,
)
from attnzoo.variants.reformer.bucket_rows import (
    chunks_of,
    own_is_real,
    positions_of,
    with_unit_keys,
)
from attnzoo.variants.reformer.bucket_tiles import Sizes, attend
from attnzoo.variants.reformer.hash_chunks import (
    near,
)


class BucketSoftmax(Softmax):
    """Query i sees the keys of its bucket in its own and the neighbouring chunks, in any hash
    round, and the key at its own position.

    hashing: gives each query and key its bucket in every hash round
    chunk_size: number of keys in a chunk of a bucket
    share_qk: whether keys are the queries, scaled to length 1; then a query sees its own key only
        if it sees nothing else
    scale: factor of the scores, 1/sqrt(head_dim) by default, or 1 with share_qk
    """

    def __init__(
        self, hashing: AngularHash, chunk_size: int, *, share_qk: bool, scale: float | None
    ) -> None:
        super().__init__(1.0 if share_qk and scale is None else scale)
        self.hashing = hashing
        self.chunk_size, self.share_qk = check_positive("chunk_size", chunk_size), share_qk

    def support(self, call: Call) -> Tensor:
        """Which keys every query sees, (batch, heads, query_length, key_length) bool. Memory is
        quadratic in the length."""
        chunks = chunks_of(self.hashing, self.chunk_size, call)
        distance = positions_of(call)[:, None] - torch.arange(call.key_length, device=call.q.device)
        own = (distance == 0) & own_is_real(call)
        seen = torch.zeros_like(own)
        for of_query, of_key in zip(chunks.queries.unbind(-2), chunks.keys.unbind(-2), strict=True):
            seen = seen | near(of_query, of_key, call.is_causal)
        seen = seen & (distance > 0 if call.is_causal else distance != 0)
        return heads_of(seen | (own & ~seen.any(-1, keepdim=True) if self.share_qk else own), call)

    def with_past(self, call: Call, state: KeyValueCache) -> tuple[Call, KeyValueCache]:
        before = state.inputs.get(CODES.name) if state.kept else None
        codes = codes_of_new(self.hashing, call, before)
        state = state.append(call, {CODES.name: codes})
        whole = call.over(call.q, state.k, state.v, state.key_mask)
        if call.query_length == 1:
            whole = whole.giving(CODES, state.inputs[CODES.name])
        return whole, state.without_excess()

    def matrix(self, call: Call) -> Tensor:
        return weights_of(self, with_unit_keys(call) if self.share_qk else call, self.support(call))

    def cost(self, shape: Shape) -> Cost:
        rows = shape.query_length * (shape.heads // shape.kv_heads)
        sizes = Sizes.of(
            rows, shape.key_length, self.hashing.num_buckets, self.chunk_size, shape.is_causal
        )
        heads, rounds = shape.batch_size * shape.kv_heads, self.hashing.num_hashes
        scores = rounds * sizes.query_tiles * sizes.queries * sizes.seen_tiles * sizes.keys
        is_short = is_short_input(shape.query_length, shape.key_length)
        if is_short:
            scores = rows * shape.key_length
        most = 1 + rounds * self.chunk_size * sizes.seen_tiles
        support = shape.query_length * min(most, shape.key_length)
        if shape.is_causal:
            hidden = (
                causal_pairs(shape.query_length, shape.key_length - most)
                if shape.key_length > most
                else 0
            )
            support = causal_pairs(shape.query_length, shape.key_length) - hidden
        cost = softmax_cost(shape, shape.kv_heads * scores, shape.heads * support, None)
        codes = heads * rounds  # that a token brings to the state, of 8 bytes
        merging = heads * rows * (2 * rounds + shape.head_dim + (0 if self.share_qk else 1))
        return replace(
            cost,
            macs=cost.macs + self.hashing.macs(heads * (rows + shape.key_length)),
            elementwise=(cost.elementwise if is_short else heads * scores + merging)
            + (heads * shape.key_length if self.share_qk else 0),
            moved_bytes=cost.moved_bytes + self.hashing.rotations.nbytes,
            state_elements=cost.state_elements + codes * shape.key_length,
            state_bytes=cost.state_bytes + 8 * codes * shape.key_length,
            state_growth=cost.state_growth + 8 * codes,
        )


def _dense(engine: BucketSoftmax, call: Call) -> Tensor:
    one_row = CODES.name in call.inputs
    support, masks = (_of_one if one_row else BucketSoftmax.support)(engine, call), visible(call)
    seen = support if masks is None else support & masks
    if not engine.share_qk:
        return sdpa.sdpa(engine, call.q, call.k, call.v, seen)
    k = with_unit_keys(call).k
    return sdpa.sdpa(engine, call.q.to(k.dtype), k, call.v.to(k.dtype), seen).to(call.q.dtype)


def _of_one(engine: BucketSoftmax, call: Call) -> Tensor:
    """The support of the one query of a step, which stands at the last key."""
    seen = seen_by_one(engine.hashing, engine.chunk_size, call)
    if not engine.share_qk:
        seen[..., -1] = True
        return seen
    seen[..., -1] = False
    seen[..., -1] = ~seen.any(-1)
    return seen


def _dense_why_not(engine: BucketSoftmax, call: Call) -> str | None:
    if CODES.name in call.inputs:
        return sdpa.cannot(engine, call)
    if not is_short_input(call.query_length, call.key_length):
        return "hashes may hide keys, and a dense mask of them is quadratic in the length"
    return too_large(call) or sdpa.cannot(engine, call)


def _one_row(engine: BucketSoftmax, call: Call) -> Tensor:
    shown = seen_natively(engine.hashing, engine.chunk_size, call, shared=engine.share_qk)
    call = with_unit_keys(call) if engine.share_qk else call
    return one_row.attend(engine, call, shown=shown)


def _one_row_why_not(engine: BucketSoftmax, call: Call) -> str | None:
    if CODES.name not in call.inputs:
        return "it is for a step of decoding, whose keys have been hashed"
    return one_row.why_not(engine, call)


BucketSoftmax.backends = (
    one_row.backend(_one_row, _one_row_why_not),
    Backend("dense", _dense, _dense_why_not),
    Backend("chunked", attend, never_refuses),
    Backend("reference", reference, never_refuses),
)
