"""A number added to every score, which depends on the head and on how far the key stands from the
query: ALiBi's slopes, T5's buckets, any table (`attnzoo.distance_biases` makes them).

    s_ij = scale · q_i·k_j + bias[h, reach + (j - i)]

The table has one entry a distance, so that no tensor of query length × key length is needed where
a backend works on parts of A: the bias of a part is a slice of the table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import only_autograd_looks
from attnzoo.spec import Input

DISTANCE_BIAS = Input("distance_bias", "heads distances")
#: Where the keys of a call stand, if not one after the other, in slots of the call: its last key
#: stands at key_length - 1. A decoding state gives it.
KEY_POSITIONS = Input("key_positions", "batch keys", "int")


def bias_between(bias: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The bias of some queries and keys, (heads, ...) in the shape that positions broadcast to.

    bias: (heads, 2 · reach + 1)
    queries, keys: positions, which broadcast with each other. Where they are farther apart than
        the table reaches, as in padding, the bias is that of the farthest
    """
    reach = bias.shape[1] // 2
    return bias[:, (keys - queries).clamp(-reach, reach) + reach]


def add_by_distance(total: Tensor, gradient: Tensor, queries: Tensor, keys: Tensor) -> None:
    """Add the gradient of what `bias_between` gave to that of the table, `total`.

    gradient: (heads, ...) in the shape that positions broadcast to
    """
    reach = total.shape[1] // 2
    distances = (keys - queries).clamp(-reach, reach) + reach
    total.index_add_(1, distances.flatten(), gradient.flatten(1))


def bias_of_rows(bias: Tensor, positions: Tensor, call: Call) -> Tensor:
    """The bias of some rows of every sample with all keys of the call, (batch or 1, heads, rows,
    key_length).

    positions: (batch or 1, rows), where the queries stand
    """
    keys = call.get(KEY_POSITIONS.name)
    if keys is None:
        keys = torch.arange(call.key_length, device=positions.device)[None]
    return bias_between(bias, positions[:, :, None], keys[:, None]).transpose(0, 1)


def bias_of(call: Call) -> Tensor | None:
    """The bias of all queries and keys of a call, (batch or 1, heads, query_length, key_length);
    None where the call has none."""
    bias = call.get(DISTANCE_BIAS.name)
    if bias is None:
        return None
    positions = torch.arange(call.offset, call.key_length, device=bias.device)[None]
    return bias_of_rows(bias, positions, call)


def last_query_first(call: Call) -> Tensor | None:
    """The bias of a call, causality included, with the queries in reverse order: a view of the
    table, (1, heads, query_length, key_length), in which a row begins one entry after the row
    before. None where a kernel must be given a tensor of that size.
    """
    bias, masks = call.get(DISTANCE_BIAS.name), (call.key_mask, call.attn_mask, call.segments)
    if (
        bias is None
        or bias.device.type != "cpu"
        or bias.requires_grad
        or any(mask is not None for mask in masks)
        or KEY_POSITIONS.name in call.inputs
        or call.offset < 0
        or not only_autograd_looks(call.q, call.k, call.v, bias)
    ):
        return None
    reach = bias.shape[1] // 2
    if call.is_causal:
        bias = torch.cat(
            [
                bias[:, : reach + 1],
                bias.new_full((1, 1), float("-inf")).expand(bias.shape[0], reach),
            ],
            1,
        )
    return bias.unfold(1, call.key_length, 1)[None, :, reach - call.key_length + 1 :][
        :, :, : call.query_length
    ]


def every(dilation: int, bias: Tensor) -> Tensor:
    """The table of the distances that are multiples of `dilation`."""
    reach = bias.shape[1] // 2
    return bias[:, reach % dilation :: dilation]


def reaching(bias: Tensor, reach: int) -> Tensor:
    """The table with 0 for distances beyond its own reach, up to `reach`."""
    return F.pad(bias, (max(0, reach - bias.shape[1] // 2),) * 2)


def moved_on(bias: Tensor, by: int) -> Tensor:
    """The table for queries that stand so many positions earlier than a call says."""
    return F.pad(bias, (0, 2 * by))


def check_reach(call: Call, longest: int) -> None:
    """Raise a ValueError on a table whose width is even, or which does not reach `longest`."""
    width = call.inputs[DISTANCE_BIAS.name].shape[1]
    if width % 2 == 0:
        raise ValueError(
            f"distance_bias has {width} distances; give an odd number, 2 · reach + 1: those of "
            "keys reach positions before the query to reach positions after it"
        )
    if width // 2 < longest:
        raise ValueError(
            f"distance_bias reaches {width // 2} positions to each side, and this call has keys "
            f"{longest} positions from a query; give a table of at least {2 * longest + 1} "
            "distances"
        )
