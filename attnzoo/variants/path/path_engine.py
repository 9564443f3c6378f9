"""The engine of PaTH attention: softmax of scores that pass through the tokens in between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.engines.engine import (
    SOFTMAX_OPERATIONS,
    Backend,
    Cost,
    Shape,
    StateSizes,
    accumulation_dtype,
    never_refuses,
)
from attnzoo.engines.linear.gated.tokens import REMOVAL_KEY, STRENGTH, check_gates
from attnzoo.engines.softmax.cache import KeyValueCache
from attnzoo.engines.softmax.decay_bias import LOG_DECAY
from attnzoo.engines.softmax.reference import REFERENCE, additive, masked_softmax, visible
from attnzoo.engines.softmax.softmax import Softmax
from attnzoo.variants.path import path_rows, path_step
from attnzoo.variants.path.householder import CHUNK, chunk_of, products_of_all
from attnzoo.variants.path.path_state import PathState, turned, with_last


class PathEngine(Softmax):
    """Softmax attention whose scores pass through Householder-like matrices, causal only.

    Its backends in order: `chunked`, a chunk of rows at a time, which autograd computes again; the
    reference.
    """

    counted_apart = True
    square_tiles = CHUNK
    remembered = (REMOVAL_KEY, STRENGTH, LOG_DECAY)
    backends = (
        Backend("chunked", path_rows.attend, never_refuses, packs=True),
        replace(REFERENCE, packs=True),
    )

    @property
    def state_type(self) -> type | None:
        return PathState

    def init_state(self, sizes: StateSizes) -> Any:
        return PathState(KeyValueCache.empty(sizes, None))

    def check_inputs(self, call: Call) -> None:
        check_gates(call)

    def completed(self, call: Call) -> Call:
        return path_rows.whole(call)

    def forward(
        self, call: Call, backend: str = "auto", state: PathState | None = None
    ) -> tuple[Tensor, str, Any]:
        if state is None:
            return super().forward(call, backend)
        whole, cache = self.with_past(self.completed(call), state.cache)
        chosen = self.choose(whole, backend)
        if chosen.name == "reference":
            return chosen.run(self, whole), chosen.name, PathState(cache)
        if call.query_length > 1:
            rows = path_rows.attend(self, whole, state.far)
            return rows, chosen.name, PathState(cache, turned(cache, state.far))
        keys = with_last(cache, state.keys)
        return path_step.attend(self, whole, keys), chosen.name, PathState(cache, keys)

    def matrix(self, call: Call) -> Tensor:
        if call.offset < 0:
            seeing = self.matrix(call.select(queries=slice(-call.offset, None)))
            return F.pad(seeing, (0, 0, -call.offset, 0))
        dtype, group = accumulation_dtype(call.q.dtype), call.group
        q, k = call.q.to(dtype), repeat_heads(call.k, group).to(dtype)
        w, beta = (call.get(one.name) for one in (REMOVAL_KEY, STRENGTH))
        if w is None or beta is None:
            products = q @ k.mT
        else:
            w, beta = (repeat_heads(x, group).to(dtype) for x in (w, beta))
            products = products_of_all(F.pad(q, (0, 0, call.offset, 0)), k, w, beta)
            products = products[:, :, call.offset :]
        bias, mask = additive(call), visible(call)
        scores = products * self.scale_of(call.q)
        scores = scores if bias is None else scores + bias.to(dtype)
        return masked_softmax(scores if mask is None else scores.masked_fill(~mask, float("-inf")))

    def cost(self, shape: Shape) -> Cost:
        found, d, group = super().cost(shape), shape.head_dim, shape.heads // shape.kv_heads
        size = chunk_of(shape.key_length)
        chunks = -(-shape.key_length // size)
        first = max(0, shape.key_length - shape.query_length) // size
        later = chunks - 1  # chunks that something stands before
        products = size * size * d * (2 + 2 * group) + size**3 * (1 + group)
        products += size * (size * size - 1) // 3
        turns = later * size * size * d * (2 + group) + max(0, later - 1) * size * d * d
        earlier = _sum(first, chunks)  # chunks before each chunk of rows, all told
        through = earlier - (chunks - first) + (first == 0)
        scores = group * size * size * (earlier + chunks - first)
        of_rows = through * group * size * d * d + group * size * size * d * earlier + scores * d
        heads, item = shape.batch_size * shape.kv_heads, shape.dtype.itemsize
        a_token = heads * (d + 1) + shape.batch_size * shape.heads
        return replace(
            found,
            macs=heads * (chunks * products + turns + of_rows),
            skipped_macs=0,
            elementwise=SOFTMAX_OPERATIONS * heads * scores,
            moved_bytes=found.moved_bytes + a_token * shape.key_length * item,
            state_elements=found.state_elements + a_token * shape.key_length,
            state_bytes=found.state_bytes + a_token * shape.key_length * item,
            state_growth=found.state_growth + a_token * item,
        )


def _sum(first: int, end: int) -> int:
    """first + (first + 1) + … + (end - 1)."""
    return (end * (end - 1) - first * (first - 1)) // 2
