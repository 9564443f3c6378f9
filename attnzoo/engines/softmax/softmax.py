"""Engine 1, softmax: exact attention over every key that the masks allow."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from attnzoo.call import KEYS, QUERIES, Call
from attnzoo.engines.engine import (
    SOFTMAX_OPERATIONS,
    Backend,
    Cost,
    Shape,
    StateSizes,
    causal_pairs,
)
from attnzoo.engines.softmax import (
    rows,
    sdpa,
    shared_keys,
    split_keys,
    varlen,
    xformers_kernel,
)
from attnzoo.engines.softmax.cache import KeyValueCache
from attnzoo.engines.softmax.reference import REFERENCE, SoftmaxReference
from attnzoo.engines.tried_on_gpu import never_ran
from attnzoo.spec import Input


class Softmax(SoftmaxReference):
    """Exact softmax attention, its cost, and decoding with a cache of keys and values.

    scale: factor of the scores, 1/sqrt(head_dim) by default
    dropout: probability that an entry of A is dropped, in training only
    softcap: keeps scores within ±softcap; None: they are as they are

    Its backends in order: `split_keys` and `shared_keys`, for one query and for fewer queries than
    heads that all share one head of keys; `sdpa`, torch's; `xformers` on CUDA; `varlen` on CUDA,
    which takes packed rows uncut; `rows`, a few rows at a time, for what these have no place for;
    the reference.
    """

    backends = (
        Backend("split_keys", split_keys.attend, split_keys.why_not),
        Backend("shared_keys", shared_keys.attend, shared_keys.why_not, packs=True),
        Backend("sdpa", sdpa.attend, sdpa.why_not, packs=True),
        Backend("xformers", xformers_kernel.attend, xformers_kernel.why_not),
        Backend("varlen", varlen.attend, varlen.why_not, packs=True, uncut=True, untried=never_ran),
        Backend("rows", rows.attend, rows.why_not),
        replace(REFERENCE, packs=True),
    )

    #: Inputs along the keys that later queries read again, with the keys third among their axes.
    remembered: tuple[Input, ...] = ()

    @property
    def state_type(self) -> type | None:
        return KeyValueCache

    def init_state(self, sizes: StateSizes) -> KeyValueCache:
        return KeyValueCache.empty(sizes, None)

    def with_past(self, call: Call, state: KeyValueCache) -> tuple[Call, KeyValueCache]:
        """The call over the keys of the state and its own, and the state after it."""
        remembered = {one.name: _given(one, call, state) for one in self.remembered}
        state = state.append(call, remembered)
        whole = call.over(call.q, state.k, state.v, state.key_mask)
        held = state.inputs if self.remembered else {}
        for one in self.remembered:
            whole = whole.giving(one, held[one.name])
        return whole, state.without_excess()

    def cost(self, shape: Shape) -> Cost:
        pairs = shape.query_length * shape.key_length
        support = causal_pairs(shape.query_length, shape.key_length) if shape.is_causal else pairs
        cost = softmax_cost(shape, shape.heads * pairs, shape.heads * support, None)
        cost = replace(cost, skipped_macs=cost.macs - cost.support_macs)
        return self.with_softcap(cost, shape)


def _given(one: Input, call: Call, state: KeyValueCache) -> Tensor:
    """The input of the call's tokens, or what padding holds where the call does not have it."""
    x = call.get(one.name)
    if x is not None:
        return x
    sizes: dict[str, int] = dict(zip(QUERIES, call.q.shape, strict=True))
    sizes |= dict(zip(KEYS, call.k.shape, strict=True))
    like = state.inputs.get(one.name, call.q)
    return like.new_full([sizes[axis] for axis in one.names], one.padded or 0.0)


def softmax_cost(shape: Shape, pairs: int, support: int, reach: int | None) -> Cost:
    """Cost of a softmax over some (head, query, key) scores.

    shape: the sizes of the call
    pairs: how many scores of one sample are computed
    support: how many of them are visible
    reach: how many keys decoding must keep, at most; None: all
    """
    per_pair = 2 * shape.batch_size * shape.head_dim
    remembered = shape.key_length if reach is None else min(reach, shape.key_length)
    a_token = 2 * shape.batch_size * shape.kv_heads * shape.head_dim  # numbers of its key and value
    return Cost(
        macs=pairs * per_pair,
        support_macs=support * per_pair,
        elementwise=SOFTMAX_OPERATIONS * shape.batch_size * pairs,
        moved_bytes=shape.input_bytes + shape.query_bytes,
        state_elements=a_token * remembered,
        state_bytes=a_token * remembered * shape.dtype.itemsize,
        state_growth=0
        if reach is not None and shape.key_length >= reach
        else a_token * shape.dtype.itemsize,
    )
