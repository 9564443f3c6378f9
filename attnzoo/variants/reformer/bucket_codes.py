"""What decoding keeps of every key: its bucket and its rank among the keys of that, as one number
for each hash round. A key's rank depends on no later token, so that no key is hashed twice.

    code = bucket · 2^32 + 2^32 - 1 - rank

The exclusive or of a code and bucket · 2^32 is below 2^32 in that bucket alone, and the least of
the last key of it. A padded key is in a bucket of its own.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import only_autograd_looks
from attnzoo.engines.native import library
from attnzoo.engines.native.library import in_rows, operators
from attnzoo.engines.sparse.selected.grouped_rows import ranks
from attnzoo.spec import Input
from attnzoo.variants.reformer.angular_hash import AngularHash

BUCKET = 2**32
NO_BUCKET = 2**62
#: A level is a hash round of a key head.
CODES = Input("bucket_codes", "batch levels keys", "int")


def codes_of_new(hashing: AngularHash, call: Call, before: Tensor | None) -> Tensor:
    """The codes of a call's keys, (batch, kv_heads · num_hashes, key_length) int64.

    before: codes of the keys before the call's; None: there are none
    """
    if call.key_length == 1 and call.key_mask is None and is_compiled_for(call):
        return operators().native_bucket_codes(in_rows(call.k), *hashing.drawn(), before)
    first = hashing(call.k).flatten(1, 2) * BUCKET  # of each key's bucket
    if call.key_mask is not None:
        first = first.masked_fill(~call.key_mask[:, None], NO_BUCKET)
    if call.key_length == 1:
        rank = 0 if before is None else _last_rank(before ^ first) + 1
        return first + (BUCKET - 1 - rank)
    buckets = first if before is None else torch.cat([before // BUCKET * BUCKET, first], 2)
    places = torch.arange(buckets.shape[2], device=first.device)
    ordered, order = (buckets + places).sort(2)
    counted = torch.zeros_like(order).scatter(2, order, ranks(ordered // BUCKET))
    return first + (BUCKET - 1 - counted[:, :, counted.shape[2] - call.key_length :])


def seen_by_one(hashing: AngularHash, size: int, call: Call) -> Tensor:
    """Which keys the one causal query of a call sees in any hash round, (batch, heads, 1,
    key_length) bool: those of its own chunk, in which the last key of its bucket stands, and of the
    one before it.

    size: keys of a chunk
    call: with `CODES` of its keys
    """
    kv_heads = call.k.shape[1]
    codes = call.inputs[CODES.name].unflatten(1, (kv_heads, 1, -1))  # one for a group of heads
    apart = codes ^ (hashing(call.q).unflatten(1, (kv_heads, call.group)) * BUCKET)
    last = _last_rank(apart)
    most = BUCKET - 1 - (last // size - 1).clamp(min=0) * size
    seen = apart <= most.masked_fill(last < 0, -1)
    return reduce(torch.bitwise_or, seen.unbind(3)).flatten(1, 2)[:, :, None]


def seen_natively(hashing: AngularHash, size: int, call: Call, *, shared: bool) -> Tensor:
    """As `seen_by_one` by the compiled operator, (batch, heads, key_length), with the query's own
    key: always, or of shared queries and keys where it sees nothing else."""
    q, codes = in_rows(call.q), call.inputs[CODES.name]
    return operators().native_bucket_keys(q, codes, *hashing.drawn(), size, shared)


def is_compiled_for(call: Call) -> bool:
    """Whether compiled code may hash a call's keys, with the same result."""
    return (
        only_autograd_looks(call.q, call.k)
        and call.k.device.type == "cpu"
        and call.k.dtype in (torch.float32, torch.float64)
        and library.not_compiled() is None
    )


def _last_rank(apart: Tensor) -> Tensor:
    """The rank of the last key of a bucket, (..., 1); -1 where it has none.

    apart: (..., keys), what codes and the bucket differ by
    """
    return (BUCKET - 1 - apart.amin(-1, keepdim=True)).clamp(min=-1)
