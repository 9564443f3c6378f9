"""Gates and delta rules in chunks of tokens, many of which are computed side by side.

Inside a chunk rows weigh what its tokens write through a small matrix of scores; what lies before
the chunk they read from the state. Under the delta rule the writes u solve (1 + N) u = values -
erases · S, a triangular system whose inverse does not depend on the state S (Yang et al. 2024,
arXiv:2406.06484, section 3.2, and arXiv:2412.06464, section 3.3: the WY form). So what does not
depend on S is computed for many chunks together, and a loop solves for the writes of one chunk
after another and hands the state on. Written in operators that autograd, a compiler and a counter
of operations can follow.

Chunks are the first dimension of every tensor here, so that a chunk of all heads is one piece of
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.linear.gated.channel_fading import ChannelFading, fading_of
from attnzoo.engines.linear.gated.fading import Fading
from attnzoo.engines.linear.gated.tokens import Rule, empty_state, prepared
from attnzoo.engines.linear.gated.triangular import unit_inverse
from attnzoo.engines.linear.layout import add_product, add_product_, may_overwrite
from attnzoo.engines.piece_by_piece import at_a_time

#: Tokens of a chunk: half as many as in `chunks`, since a chunk has more products inside and the
#: triangular solve grows with the square.
CHUNK = 32
#: How many numbers may be computed side by side: about what a core's cache holds.
HELD = 2**19


def chunk_of(length: int, most: int = CHUNK) -> int:
    """Tokens of a chunk: a power of 2, for the halves of halves. most: the largest, another."""
    chunk = 1
    while chunk < length and chunk < most:
        chunk *= 2
    return chunk


def spans(call: Call, chunk: int) -> list[int]:
    """How many tokens are computed side by side, in order: whole chunks, but for the last."""
    length = call.key_length
    width = max(call.k.shape[3], call.v.shape[3], chunk) * (call.group + 2)
    numbers = call.k.shape[0] * call.k.shape[1] * chunk * width
    chunks = len(range(0, length, chunk))
    tokens = chunk * at_a_time(chunks, numbers, HELD, call.k)
    return [min(tokens, length - start) for start in range(0, length, tokens)]


def scan(
    rule: Rule, call: Call, state: Tensor | None, *, remember_last: bool = False
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Some rows at a time, (batch, heads, tokens, value_dim), and the state after them.

    call: without segments, with as many queries as keys
    state: (batch, kv_heads, width, value_dim), before the call; None: all 0
    remember_last: whether the state after the last rows is wanted, as decoding wants it
    """
    chunk = chunk_of(call.key_length)
    lengths = spans(call, chunk)
    if state is None:
        state = empty_state(call)
    for place, span in enumerate(call.split(queries=lengths, keys=lengths)):
        remember = remember_last or place < len(lengths) - 1
        inside = Inside.of(Tokens.of(rule, prepared(rule, in_chunks(span, chunk))))
        states = States.of(inside, inside.solved(), state, remember)
        rows = joined(inside.rows(states), call.group)
        state = states.after
        yield rows[:, :, : span.key_length], state if remember else None


@dataclass(frozen=True)
class Tokens:
    """The tokens of chunks, with all tensors beginning with (chunks, batch, kv_heads).

    q: (group, length, width), the heads of a group beside each other
    k, v: (length, width) and (length, value_dim)
    stronger: (length, width), keys times beta; None without delta rule
    beta: (length,); None: 1
    removed, turned: (length, width), what is removed, and the same by its rates; None: nothing
    fading: what is left of a token at later ones
    short: whether keys are known to be no longer than 1
    """

    q: Tensor
    k: Tensor
    v: Tensor
    stronger: Tensor | None
    beta: Tensor | None
    removed: Tensor | None
    turned: Tensor | None
    fading: Fading
    short: bool

    @classmethod
    def of(cls, rule: Rule, call: Call) -> Tokens:
        """call: of `in_chunks`, then as `tokens.prepared` makes it."""
        q, k, v = call.q.unflatten(2, (call.k.shape[2], -1)), call.k, call.v
        log_decay, beta = call.get("log_decay"), call.get("beta")
        beta = beta if rule.delta else None
        stronger = None if not rule.delta else k if beta is None else k * beta[..., None]
        removed = turned = None
        if rule.removes:
            removed = call.inputs["removal_key"]
            turned = removed * call.inputs["removal_rate"]
        fading = fading_of(log_decay, k)
        return cls(q, k, v, stronger, beta, removed, turned, fading, rule.l2_norm)


@dataclass(frozen=True)
class Inside:
    """What the tokens of chunks are to each other, whatever the state.

    Each tensor begins with (chunks, batch, kv_heads); the rest of its shape is given here. A chunk
    has `length` tokens, and `rows` is group · length, since a group of heads shares each key. Where
    tokens remove and write apart, `length` is twice that, but in `rows`.

    scores: (rows, length), what each row reads of each token's write
    reads: (rows, width), what it reads of the state before the chunk
    handed_on: (length, width), where in the state behind the chunk each token's write stands
    kept: (width or 1, 1), what is left there of the state before; None: all
    values: (length, value_dim), what each token writes, if there is no delta rule
    erases: (length, width), what it erases of the state before the chunk; None without delta rule
    below: N, (length, length), what it erases of earlier tokens' writes; None without delta rule
    short: whether keys are known to be no longer than 1, so that no write grows beyond its values
    removes: whether tokens remove and write apart
    """

    scores: Tensor
    reads: Tensor
    handed_on: Tensor
    kept: Tensor | None
    values: Tensor
    erases: Tensor | None
    below: Tensor | None
    short: bool = False
    removes: bool = False

    @classmethod
    def of(cls, tokens: Tokens) -> Inside:
        if tokens.removed is not None:
            return cls._removing(tokens)
        stronger, erases, below = tokens.stronger, None, None
        rows = [tokens.q] if stronger is None else [tokens.q, stronger[..., None, :, :]]
        products, carried, handed_on, kept = tokens.fading.faded(rows, tokens.k)
        if stronger is not None:
            erases, below = carried[1][:, :, :, 0], products[1][:, :, :, 0]
            below = below.tril_(-1) if may_overwrite(below) else below.tril(-1)
        v = tokens.v if tokens.beta is None else tokens.v * tokens.beta[..., None]
        scores, reads = products[0].flatten(3, 4), carried[0].flatten(3, 4)
        return cls(scores, reads, handed_on, kept, v, erases, below, tokens.short)

    @classmethod
    def _removing(cls, tokens: Tokens) -> Inside:
        """Where tokens remove at other keys than they write to, each stands twice: first all that
        are written, by v, which solve nothing; then all that are removed, by what the state and
        earlier tokens say of them."""
        q, k, v, removed, turned = tokens.q, tokens.k, tokens.v, tokens.removed, tokens.turned
        fading, length = tokens.fading, k.shape[-2]
        assert removed is not None and turned is not None and isinstance(fading, ChannelFading)
        both = torch.stack([k, turned])
        (scores,), (reads,), handed_on, kept = fading.faded([q], both)
        (below,), (erases,), *_ = fading.before_own().faded([removed[..., None, :, :]], both)
        below = torch.cat(below[..., 0, :, :].tril(-1).unbind(), -1)
        return cls(
            torch.cat(scores.unbind(), -1).flatten(3, 4),
            reads.flatten(3, 4),
            torch.cat(handed_on.unbind(), -2),
            kept,
            F.pad(v, (0, 0, 0, length)),
            F.pad(erases[..., 0, :, :], (0, 0, length, 0)),
            F.pad(below, (0, 0, length, 0)),
            removes=True,
        )

    def detached(self) -> Inside:
        """The same numbers, which autograd does not follow."""
        own = {name: x.detach() for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **own)

    def solved(self) -> Tensor | None:
        """(1 + N)⁻¹; None without delta rule."""
        return None if self.below is None else unit_inverse(self.below)

    def rows(self, states: States) -> Tensor:
        """(chunks, batch, kv_heads, rows, value_dim)."""
        writes, spoiled = states.writes, None
        if self.below is not None and not self.short:
            # A write that overflows must not reach earlier rows, whose scores of it are 0; its own
            # row and those behind it are NaN.
            spoiled = ~writes.isfinite().all(-1)
            writes = writes.nan_to_num()
        rows = self._read(writes, states)
        return rows if spoiled is None else rows.masked_fill(self._behind(spoiled), torch.nan)

    def _behind(self, spoiled: Tensor) -> Tensor:
        """The rows from the first spoiled write of their chunk on, (chunks, batch, kv_heads, rows,
        1). spoiled: (chunks, batch, kv_heads, length)."""
        group_rows, length = self.scores.shape[-2:]
        if self.removes:  # a token's write, and behind all of these its removal
            spoiled = spoiled.unflatten(-1, (2, -1)).any(-2)
            length = length // 2
        behind = spoiled.cumsum(-1) > 0
        return behind.repeat(1, 1, 1, group_rows // length)[..., None]

    def _read(self, writes: Tensor, states: States) -> Tensor:
        rows = self.scores @ writes
        if may_overwrite(rows, states.before):
            return add_product_(rows, self.reads, states.before)
        return add_product(rows, self.reads, states.before)


@dataclass(frozen=True)
class States:
    """The states between chunks, and what the tokens write to them.

    before: (chunks, batch, kv_heads, width, value_dim), the state before each chunk
    writes: (chunks, batch, kv_heads, length, value_dim)
    after: (batch, kv_heads, width, value_dim), after the last chunk, or before it where no more is
        wanted
    """

    before: Tensor
    writes: Tensor
    after: Tensor

    @classmethod
    def of(cls, inside: Inside, inverse: Tensor | None, state: Tensor, remember: bool) -> States:
        """inverse: of `Inside.solved`. state: before the first chunk. remember: whether the state
        after the last is wanted."""
        chunks = inside.values.shape[0]
        wanted = chunks if remember else chunks - 1
        if may_overwrite(inside.values, inside.handed_on, state):
            return cls._in_place(inside, inverse, state, wanted)
        before, found = [state], []
        for chunk in range(chunks):
            here, writes = before[-1], inside.values[chunk]
            if inverse is not None:
                assert inside.erases is not None
                writes = inverse[chunk] @ add_product(writes, inside.erases[chunk], here, -1)
            found.append(writes)
            if chunk < wanted:
                faded = here if inside.kept is None else here * inside.kept[chunk]
                before.append(add_product(faded, inside.handed_on[chunk].mT, writes))
        return cls(torch.stack(before[:chunks]), torch.stack(found), before[-1])

    @classmethod
    def _in_place(
        cls, inside: Inside, inverse: Tensor | None, state: Tensor, wanted: int
    ) -> States:
        """The same, every state and write computed where it is to stand."""
        chunks = inside.values.shape[0]
        before = state.new_empty(max(chunks, wanted + 1), *state.shape)
        before[0] = state
        found = inside.values if inverse is None else torch.empty_like(inside.values)
        handed_on, kept = of_chunks(inside.handed_on.mT), of_chunks(inside.kept)
        values, erases, solved = (of_chunks(x) for x in (inside.values, inside.erases, inverse))
        states, writes = of_chunks(before), of_chunks(found)
        left = torch.empty_like(writes[0])
        for chunk in range(chunks):
            here = states[chunk]
            if solved:
                torch.baddbmm(values[chunk], erases[chunk], here, alpha=-1, out=left)
                torch.bmm(solved[chunk], left, out=writes[chunk])
            if chunk < wanted:
                after = states[chunk + 1]
                torch.mul(here, kept[chunk], out=after) if kept else after.copy_(here)
                after.baddbmm_(handed_on[chunk], writes[chunk])
        return cls(before[:chunks], found, before[wanted].clone())  # not to keep them all alive


def of_chunks(x: Tensor | None) -> tuple[Tensor, ...]:
    """Each chunk of x, (chunks, batch, kv_heads, ...), as (batch · kv_heads, ...); none of None."""
    return () if x is None else x.flatten(1, 2).unbind()


def in_chunks(call: Call, chunk: int) -> Call:
    """The call with its tensors cut into chunks, (chunks, batch, heads, chunk, ...)."""
    inputs = {name: cut(x, chunk) for name, x in call.inputs.items()}
    q, k, v = (cut(x, chunk) for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v, inputs=inputs, key_mask=None)


def cut(x: Tensor, chunk: int) -> Tensor:
    """(chunks, batch, heads, chunk, ...) of x, (batch, heads, length, ...), in one piece. What is
    missing in the last chunk is 0, a token that changes nothing."""
    missing = -x.shape[2] % chunk
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing))
    return x.unflatten(2, (-1, chunk)).movedim(2, 0).contiguous()


def joined(rows: Tensor, group: int) -> Tensor:
    """(batch, heads, length, y) of rows of chunks, (chunks, batch, kv_heads, group · chunk, y)."""
    return rows.unflatten(3, (group, -1)).movedim(0, 3).flatten(3, 4).flatten(1, 2)


def put(x: Tensor, whole: Tensor) -> None:
    """Write x, cut as by `cut`, to its place, (batch, heads, length, ...)."""
    length, chunk = whole.shape[2], x.shape[3]
    if length % chunk == 0:
        whole.unflatten(2, (-1, chunk)).movedim(2, 0).copy_(x)
    else:
        whole.copy_(x.movedim(0, 2).flatten(2, 3)[:, :, :length])
