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
from attnzoo.engines.linear.gated.gated_chunks import (
    Inside,
    Tokens,
    chunk_of,
    cut,
    in_chunks,
    joined,
    spans,
)
from attnzoo.engines.linear.gated.tokens import Rule, prepared
from attnzoo.engines.linear.log_linear.tree import LEVELS, level_between, levels_of
from attnzoo.engines.piece_by_piece import join

#: Tokens of a chunk. Buckets are read and merged chunk by chunk, so larger ones are faster than in
#: `gated_chunks`.
CHUNK = 64

#: States of buckets, (batch, kv_heads, width, value_dim), by the bit that is their number of
#: tokens.
Buckets = dict[int, Tensor]


def attend(rule: Rule, call: Call) -> Tensor:
    """A·v of a call without padding and segments, with as many queries as keys and with levels."""
    buckets: Buckets = {}
    chunk = chunk_of(call.key_length, CHUNK)
    lengths = spans(call, chunk)

    def rows() -> Iterator[Tensor]:
        seen = 0
        for place, span in enumerate(call.split(queries=lengths, keys=lengths)):
            remember = place < len(lengths) - 1
            yield _span(rule, span, chunk, seen, buckets, remember=remember)
            seen += lengths[place]

    return join(rows(), call.query_length, 2)


def walk(rule: Rule, call: Call, seen: int, buckets: Buckets) -> Iterator[tuple[Tensor, int]]:
    """Some rows at a time, and how many tokens they are, behind `seen` tokens in `buckets`, which
    become those behind these rows. call: as in `attend`."""
    start = 0
    for length, chunk in _whole_chunks(seen, call.key_length):
        here = slice(start, start + length)
        span = call.select(queries=here, keys=here)
        yield _span(rule, span, chunk, seen + start, buckets, remember=True), length
        start += length


def _whole_chunks(seen: int, length: int) -> Iterator[tuple[int, int]]:
    """How many tokens to take together, and the size of chunks that they fill, each of which begins
    at a multiple of its size."""
    while length:
        chunk = min(CHUNK, seen & -seen if seen else CHUNK)
        while chunk > length:
            chunk //= 2
        taken = length // chunk * chunk if chunk == CHUNK else chunk
        yield taken, chunk
        seen, length = seen + taken, length - taken


def _span(
    rule: Rule,
    call: Call,
    chunk: int,
    seen: int,
    buckets: Buckets,
    *,
    remember: bool,
) -> Tensor:
    """Rows of a run of chunks. seen: tokens before, a multiple of `chunk`. buckets: of these, which
    become those behind the run, if they are to be remembered."""
    inside = Inside.of(Tokens.of(rule, prepared(rule, in_chunks(call, chunk))))
    chunks, group = inside.values.shape[0], call.group
    levels = cut(call.inputs[LEVELS.name].to(inside.scores.dtype), chunk)
    levels = levels.unflatten(2, (-1, group)).flatten(3, 4)
    inverse = inside.solved()
    own = inside.scores if inverse is None else inside.scores @ inverse
    rows = (own * _inside_levels(chunk, group, levels)) @ inside.values
    wanted = chunks if remember else chunks - 1
    if buckets or wanted:
        passing = _Passing.of(inside, inverse, wanted)
        whole = []
        for number, row in enumerate(rows.unbind()):
            if buckets:
                row = row + passing.read(number, levels[number], buckets)
            whole.append(row)
            if number < wanted:
                passing.leave(number, buckets)
                _add(passing.more[number], chunk, seen // chunk + number, buckets)
        rows = torch.stack(whole)
    return joined(rows, group)[:, :, : call.key_length]


def _inside_levels(chunk: int, group: int, levels: Tensor) -> Tensor:
    """By how much each row weighs each token of its chunk, (chunks, batch, kv_heads, group · chunk,
    chunk). levels: (chunks, batch, kv_heads, group · chunk, L)."""
    places = torch.arange(chunk, device=levels.device)
    index = level_between(places, levels_of(chunk)).repeat(group, 1)
    return levels.gather(-1, index.expand(*levels.shape[:4], chunk))


@dataclass(frozen=True)
class _Passing:
    """What chunks read of the states before them, and what they make of these.

    reads: (chunks, batch, kv_heads, rows, width), what each row reads of such a state
    kept: (..., width or 1, 1), by how much it fades; None: not
    erased: (..., length, width), what each token takes of it; None: nothing
    handed_on: (..., length, width), where in the state behind the chunk each token's write stands
    more: (..., width, value_dim), the state that a chunk would make of an empty one
    """

    reads: Tensor
    kept: Tensor | None
    erased: Tensor | None
    handed_on: Tensor
    more: Tensor

    @classmethod
    def of(cls, inside: Inside, inverse: Tensor | None, wanted: int) -> _Passing:
        """inverse: of `Inside.solved`. wanted: how many chunks have one behind them."""
        reads, erased, writes = inside.reads, None, inside.values
        if inverse is not None:
            assert inside.erases is not None
            erased, writes = inverse @ inside.erases, inverse @ writes
            reads = reads - inside.scores @ erased
        more = inside.handed_on.mT[:wanted] @ writes[:wanted]
        return cls(reads, inside.kept, erased, inside.handed_on, more)

    def read(self, chunk: int, levels: Tensor, buckets: Buckets) -> Tensor:
        """What the rows of a chunk read of the buckets, each times its level, in one product."""
        reads = self.reads[chunk]
        weighted = [reads * levels[..., bit + 1, None] for bit in buckets]
        return torch.cat(weighted, -1) @ torch.cat(list(buckets.values()), -2)

    def leave(self, chunk: int, buckets: Buckets) -> None:
        """Let the chunk change the buckets before it."""
        if not buckets:
            return
        states = torch.cat(list(buckets.values()), -1)
        left = states if self.kept is None else states * self.kept[chunk]
        if self.erased is not None:
            taken = self.handed_on[chunk].mT @ (self.erased[chunk] @ states)
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
