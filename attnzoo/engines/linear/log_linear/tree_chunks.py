"""Log-linear attention in chunks of tokens, in time n log n (Guo et al. 2025, section 3.3).

Inside a chunk, whose length is a power of 2, the levels of its tokens make a matrix that scores
are multiplied by. What lies before it is in a few buckets, whole chunks each, which go through the
chunk one beside the other, and merge behind it as 1 is added to a binary number. Written in
operators that autograd, a compiler and a counter of operations can follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.linear.chunks import CAUSAL_CHUNK
from attnzoo.engines.linear.gated.gated_chunks import Inside, Tokens, chunk_of, filled, spans
from attnzoo.engines.linear.gated.tokens import Rule, prepared
from attnzoo.engines.linear.layout import grouped, ungrouped
from attnzoo.engines.linear.log_linear.tree import level_between, levels_of
from attnzoo.engines.piece_by_piece import join

#: States of buckets, (batch, kv_heads, width, value_dim), by the bit that is their number of
#: tokens.
Buckets = dict[int, Tensor]


def attend(rule: Rule, call: Call, levels: Tensor) -> Tensor:
    """A·v of a call without padding and segments, with as many queries as keys. levels: of
    `tree.given_levels`."""
    buckets: Buckets = {}
    lengths, chunk, start = spans(call), chunk_of(call.key_length), 0

    def rows() -> Iterator[Tensor]:
        nonlocal start
        for length in lengths:
            here = slice(start, start + length)
            span = call.select(queries=here, keys=here)
            last = start + length == call.key_length
            yield _span(rule, span, levels[:, :, here], chunk, start, buckets, remember=not last)
            start += length

    return join(rows(), call.query_length, 2)


def walk(
    rule: Rule, call: Call, levels: Tensor, seen: int, buckets: Buckets
) -> Iterator[tuple[Tensor, int]]:
    """Some rows at a time, and how many tokens they are, behind `seen` tokens in `buckets`, which
    become those behind these rows.

    call: without padding and segments, with as many queries as keys
    levels: of `tree.given_levels`
    """
    start = 0
    for length, chunk in _whole_chunks(seen, call.key_length):
        here = slice(start, start + length)
        span = call.select(queries=here, keys=here)
        rows = _span(rule, span, levels[:, :, here], chunk, seen + start, buckets, remember=True)
        yield rows, length
        start += length


def _whole_chunks(seen: int, length: int) -> Iterator[tuple[int, int]]:
    """How many tokens to take together, and the size of chunks that they fill, each of which begins
    at a multiple of its size."""
    while length:
        chunk = min(CAUSAL_CHUNK, seen & -seen if seen else CAUSAL_CHUNK)
        while chunk > length:
            chunk //= 2
        taken = length // chunk * chunk if chunk == CAUSAL_CHUNK else chunk
        yield taken, chunk
        seen, length = seen + taken, length - taken


def _span(
    rule: Rule,
    call: Call,
    levels: Tensor,
    chunk: int,
    seen: int,
    buckets: Buckets,
    *,
    remember: bool,
) -> Tensor:
    """Rows of a run of chunks. seen: tokens before, a multiple of `chunk`. buckets: of these, which
    become those behind the run, if they are to be remembered."""
    inside = Inside.of(Tokens.of(rule, prepared(rule, call), chunk))
    chunks, kv_heads = inside.values.shape[2], call.k.shape[1]
    levels = filled(levels.to(inside.scores.dtype), chunks * chunk - call.key_length)
    levels = grouped(levels, kv_heads, chunks)
    found = _Solved.of(inside)
    rows = (found.own * _inside_levels(chunk, call.group, levels)) @ inside.values
    wanted = chunks if remember else chunks - 1
    more = inside.handed_on.mT[:, :, :wanted] @ found.writes[:, :, :wanted]
    whole = []
    for number, row in enumerate(rows.unbind(2)):
        if buckets:
            row = row + _read(found.reads[:, :, number], levels[:, :, number], buckets)
        whole.append(row)
        if number < wanted:
            _pass_through(inside, found.erased, number, buckets)
            _add(more[:, :, number], chunk, seen // chunk + number, buckets)
    return ungrouped(torch.stack(whole, 2), call.group)[:, :, : call.key_length]


@dataclass(frozen=True)
class _Solved:
    """What `Inside` comes to where the delta rule is solved; shapes as there.

    own: (rows, length), what each row reads of each token's value
    reads: (rows, width), what it reads of a state before the chunk
    writes: (length, value_dim), what each token writes to an empty state
    erased: (length, width), what each takes of a state before the chunk; None: nothing
    """

    own: Tensor
    reads: Tensor
    writes: Tensor
    erased: Tensor | None

    @classmethod
    def of(cls, inside: Inside) -> _Solved:
        inverse = inside.solved()
        if inverse is None:
            return cls(inside.scores, inside.reads, inside.values, None)
        assert inside.erases is not None
        erased = inverse @ inside.erases
        reads = inside.reads - inside.scores @ erased
        return cls(inside.scores @ inverse, reads, inverse @ inside.values, erased)


def _inside_levels(chunk: int, group: int, levels: Tensor) -> Tensor:
    """By how much each row weighs each token of its chunk, (batch, kv_heads, chunks, group · chunk,
    chunk). levels: (batch, kv_heads, chunks, group · chunk, L)."""
    places = torch.arange(chunk, device=levels.device)
    index = level_between(places, levels_of(chunk)).repeat(group, 1)
    return levels.gather(-1, index.expand(*levels.shape[:4], chunk))


def _read(reads: Tensor, levels: Tensor, buckets: Buckets) -> Tensor:
    """What rows read of the buckets, each times its level, in one product."""
    weighted = [reads * levels[..., bit + 1, None] for bit in buckets]
    return torch.cat(weighted, -1) @ torch.cat(list(buckets.values()), -2)


def _pass_through(inside: Inside, erased: Tensor | None, chunk: int, buckets: Buckets) -> None:
    """What a chunk leaves of the buckets before it."""
    if not buckets:
        return
    states = torch.cat(list(buckets.values()), -1)
    left = states if inside.kept is None else states * inside.kept[:, :, chunk]
    if erased is not None:
        taken = inside.handed_on[:, :, chunk].mT @ (erased[:, :, chunk] @ states)
        left = left - taken
    for bit, state in zip(list(buckets), left.chunk(len(buckets), -1), strict=True):
        buckets[bit] = state


def _add(state: Tensor, size: int, number: int, buckets: Buckets) -> None:
    """Put a bucket of `size` tokens behind `number` others of its size: two of one size merge."""
    bit = size.bit_length() - 1
    while number & 1:
        state = state + buckets.pop(bit)
        number, bit = number >> 1, bit + 1
    buckets[bit] = state
