"""Packed rows: several pieces one behind the other that must not meet (rule 13). They are cut
apart, run as samples of their own, and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attnzoo.call import Call
from attnzoo.eager import can_look, refuse_later
from attnzoo.sequences.padding import fetched, squared

Run = Callable[[Call], Tensor]
#: Pieces below so many tokens are padded to one length and run together; a longer one is worth a
#: call of its own.
SHORT = 64


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a sample that see each other.

    keys, queries: how many of each it has; fewer queries where those of the call begin inside it.
    masked: padding hides some of its keys.
    """

    keys: int
    queries: int
    masked: bool

    @property
    def is_short(self) -> bool:
        return self.keys < SHORT and self.queries == self.keys


def may_cut(call: Call) -> bool:
    """Whether the pieces can be told here: their lengths are read from the ids."""
    assert call.segments is not None
    masks = () if call.key_mask is None else (call.key_mask,)
    return can_look(call.segments, *masks, may_stall=True)


def apart(call: Call, run: Run) -> Tensor:
    """A·v of a packed call, (batch, heads, query_length, value_dim).

    run: gives it for a call without segments.
    """
    call = _with_whole_mask(call)
    if call.offset < 0:
        return _behind_blind_rows(call, lambda seeing: apart(seeing, run))
    assert call.segments is not None
    if (order := order_of(call.segments)) is not None:
        whole = _ordered(squared(call), order)
        back = order.argsort(1)[:, call.offset :]
        return fetched(apart(whole, run), back)
    plain, found = replace(call, segments=None), pieces_of(call)
    if all(one == found[0] for one in found):
        return _rows(plain, found[0], run)
    samples = plain.split(batch=[1] * len(found))
    return torch.cat([_rows(one, own, run) for one, own in zip(samples, found, strict=True)])


def weights_apart(call: Call, matrix: Run) -> Tensor:
    """A of a packed call, (batch, heads, query_length, key_length), 0 between pieces.

    matrix: gives it for a call without segments.
    """
    call = _with_whole_mask(call)
    if call.offset < 0:
        return _behind_blind_rows(call, lambda seeing: weights_apart(seeing, matrix))
    assert call.segments is not None
    if (order := order_of(call.segments)) is not None:
        back = order.argsort(1)
        found = weights_apart(_ordered(squared(call), order), matrix)
        return fetched(fetched(found, back[:, call.offset :]), back, 3)
    found = call.q.new_zeros(*call.q.shape[:3], call.key_length)
    for sample, pieces in enumerate(pieces_of(call)):
        row = replace(call, segments=None).select(batch=slice(sample, sample + 1))
        for queries, keys in _places(pieces):
            one = row.select(queries=queries, keys=keys)
            same = call.k is call.q and queries == keys
            found[sample, :, queries, keys] = matrix(replace(one, k=one.q) if same else one)[0]
    return found


def refuse_scattered(out: Tensor, segments: Tensor) -> Tensor:
    """`out`, refused where a piece stops and goes on, which only cutting can bring together.

    segments: (batch, length), whose values cannot be read now
    """
    changes = (segments[:, 1:] != segments[:, :-1]).sum(1)
    ordered = segments.sort(1).values
    distinct = (ordered[:, 1:] != ordered[:, :-1]).sum(1)
    return refuse_later(
        out,
        (changes == distinct).all(),
        "segments has a piece that stops and goes on, which a graph or transform cannot have: give "
        "each piece an id of its own and its tokens together",
    )


def pieces_of(call: Call) -> list[list[Piece]]:
    """The pieces of every sample in order, told by ids that change."""
    assert call.segments is not None
    found = []
    for sample, ids in enumerate(call.segments):
        lengths = ids.unique_consecutive(return_counts=True)[1]
        ends = lengths.cumsum(0)
        hidden = [0] * len(lengths)
        if call.key_mask is not None:
            padded = F.pad((~call.key_mask[sample]).cumsum(0), (1, 0))
            hidden = (padded[ends] - padded[ends - lengths]).tolist()
        queries = (ends - call.offset).clamp(min=0).minimum(lengths)
        found.append(
            [
                Piece(keys, rows, hides > 0)
                for keys, rows, hides in zip(
                    lengths.tolist(), queries.tolist(), hidden, strict=True
                )
            ]
        )
    return found


def _with_whole_mask(call: Call) -> Call:
    """The call with an attn_mask of all its axes, so that it is cut as the tokens are."""
    if call.attn_mask is None:
        return call
    whole = call.attn_mask.expand(*call.q.shape[:3], call.key_length)
    return replace(call, attn_mask=whole)


def _places(pieces: list[Piece]) -> Iterator[tuple[slice, slice]]:
    """Where the queries and the keys of every piece stand; pieces without queries have no rows."""
    query, key = 0, 0
    for piece in pieces:
        if piece.queries:
            yield slice(query, query + piece.queries), slice(key, key + piece.keys)
        query, key = query + piece.queries, key + piece.keys


def _behind_blind_rows(call: Call, of: Run) -> Tensor:
    """Rows of a causal call with more queries than keys: the first stand before every key."""
    found = of(call.select(queries=slice(-call.offset, None)))
    return F.pad(found, (0, 0, -call.offset, 0))


def order_of(segments: Tensor) -> Tensor | None:
    """What brings the tokens of every piece together, (batch, key_length); None where they stand
    together. segments: (batch, key_length) integer, whose values can be read."""
    together = all(len(ids.unique_consecutive()) == len(ids.unique()) for ids in segments)
    return None if together else torch.argsort(segments, dim=1, stable=True)


def _ordered(call: Call, order: Tensor) -> Call:
    """The square call with its tokens in this order, (batch, length)."""
    ordered = call.mapped(dict.fromkeys(("queries", "keys"), lambda x, dim: fetched(x, order, dim)))
    return _with_one_tensor(call, ordered)


def _with_one_tensor(call: Call, changed: Call) -> Call:
    """The changed call, in which k is q where they were one tensor."""
    return replace(changed, k=changed.q) if call.k is call.q else changed


def _rows(call: Call, pieces: list[Piece], run: Run) -> Tensor:
    """A·v of samples that have the same pieces: neighbours of one length, and short neighbours, run
    together."""
    together = call.attn_mask is None and not any(
        {"queries", "keys"} <= set(one.names) for one, _ in call.given()
    )
    groups: list[list[Piece]] = []
    for _, same in groupby(pieces, lambda one: "short" if one.is_short else one):
        found = list(same)
        groups += [found] if together else [[one] for one in found]
    parts = [call]  # split would copy the gradients of one part, too
    if len(groups) > 1:
        parts = call.split(
            queries=[sum(one.queries for one in group) for group in groups],
            keys=[sum(one.keys for one in group) for group in groups],
        )
    out = [
        _group(part, group, run)
        for part, group in zip(parts, groups, strict=True)
        if part.query_length
    ]
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def _group(call: Call, pieces: list[Piece], run: Run) -> Tensor:
    """A·v of neighbouring pieces that run together."""
    if not any(piece.masked for piece in pieces):
        call = replace(call, key_mask=None)
    if len(pieces) == 1:
        return run(call)
    if len(set(pieces)) == 1:
        return _unfolded(run(_folded(call, len(pieces))), len(pieces))
    return _padded(call, [piece.keys for piece in pieces], run)


def _folded(call: Call, count: int) -> Call:
    """The call of `count` pieces of one length as samples, views where there was one sample."""

    def of(x: Tensor, axes: tuple[str, ...]) -> Tensor:
        for dim, axis in enumerate(axes):
            if axis in ("queries", "keys"):
                return x.unflatten(dim, (count, -1)).movedim(dim, 1).flatten(0, 1)
        return x.repeat_interleave(count, 0) if "batch" in axes else x

    return _with_one_tensor(call, call.of_each(of))


def _unfolded(out: Tensor, count: int) -> Tensor:
    """(batch · count, heads, length, d) -> (batch, heads, count · length, d)."""
    return out.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)


def _padded(call: Call, lengths: list[int], run: Run) -> Tensor:
    """A·v of neighbouring pieces of these lengths, padded behind to one length."""

    def of(x: Tensor, axes: tuple[str, ...]) -> Tensor:
        for dim, axis in enumerate(axes):
            if axis in ("queries", "keys"):
                parts = x.movedim(dim, 0).split(lengths)
                laid = pad_sequence(list(parts), batch_first=True)  # (pieces, length, batch, ...)
                return laid.movedim(2, 0).flatten(0, 1).movedim(1, dim)
        return x.repeat_interleave(len(lengths), 0) if "batch" in axes else x

    if call.key_mask is None:
        ones = torch.ones(call.k.shape[0], call.key_length, dtype=torch.bool, device=call.k.device)
        call = replace(call, key_mask=ones)
    out = run(_with_one_tensor(call, call.of_each(of)))
    rows = out.unflatten(0, (-1, len(lengths))).unbind(1)
    return torch.cat([x[:, :, :length] for x, length in zip(rows, lengths, strict=True)], 2)
