"""Gates and delta rules in chunks of tokens, many of which are computed side by side.

Inside a chunk rows weigh what its tokens write through a small matrix of scores; what lies before
the chunk they read from the state. Under the delta rule the writes u solve (1 + N) u = values -
erases · S, a triangular system whose inverse does not depend on the state S (Yang et al. 2024,
arXiv:2406.06484, section 3.2, and arXiv:2412.06464, section 3.3: the WY form). So all products but
two a chunk are done for many chunks together, and a short loop hands the state on. Written in
operators that autograd, a compiler and a counter of operations can follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.linear.chunks import CAUSAL_CHUNK, HELD
from attnzoo.engines.linear.gated.fading import ChannelFading, Fading, fading_of
from attnzoo.engines.linear.gated.tokens import Rule, empty_state, prepared
from attnzoo.engines.linear.gated.triangular import unit_inverse
from attnzoo.engines.linear.layout import (
    add_product,
    add_product_,
    grouped,
    may_overwrite,
    ungrouped,
)
from attnzoo.engines.piece_by_piece import at_a_time


def chunk_of(length: int) -> int:
    """Tokens of a chunk: a power of 2, for the halves of halves."""
    chunk = 1
    while chunk < length and chunk < CAUSAL_CHUNK:
        chunk *= 2
    return chunk


def spans(call: Call) -> list[int]:
    """How many tokens are computed side by side, in order: whole chunks, but for the last."""
    length, chunk = call.key_length, chunk_of(call.key_length)
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
    lengths = spans(call)
    chunk = chunk_of(call.key_length)
    if state is None:
        state = empty_state(call)
    for place, span in enumerate(call.split(queries=lengths, keys=lengths)):
        remember = remember_last or place < len(lengths) - 1
        inside = Inside.of(Tokens.of(rule, prepared(rule, span), chunk))
        states = States.of(inside, inside.solved(), state, remember)
        rows = ungrouped(inside.rows(states), call.group)
        state = states.after
        yield rows[:, :, : span.key_length], state if remember else None


@dataclass(frozen=True)
class Tokens:
    """The tokens of chunks, with all tensors beginning with (batch, kv_heads, chunks).

    q: (group, length, width), the heads of a group beside each other
    k, v: (length, width) and (length, value_dim)
    stronger: (length, width), keys times beta; None without delta rule
    beta: (length,); None: 1
    removed, turned: (length, width), what is removed, and the same by its rates; None: nothing
    fading: what is left of a token at later ones
    """

    q: Tensor
    k: Tensor
    v: Tensor
    stronger: Tensor | None
    beta: Tensor | None
    removed: Tensor | None
    turned: Tensor | None
    fading: Fading

    @classmethod
    def of(cls, rule: Rule, call: Call, chunk: int) -> Tokens:
        """call: as `tokens.prepared` makes it, with as many queries as keys. chunk: tokens of one;
        the last is filled up with tokens that change nothing."""
        chunks = len(range(0, call.key_length, chunk))
        missing = chunks * chunk - call.key_length
        q = grouped(filled(call.q, missing), call.k.shape[1], chunks)

        def laid(x: Tensor) -> Tensor:
            return filled(x, missing).unflatten(2, (chunks, chunk))

        k, v, log_decay, beta = laid(call.k), laid(call.v), call.get("log_decay"), call.get("beta")
        beta = None if beta is None or not rule.delta else laid(beta)
        stronger = None if not rule.delta else k if beta is None else k * beta[..., None]
        removed = turned = None
        if rule.removes:
            removed, rates = (laid(call.inputs[one]) for one in ("removal_key", "removal_rate"))
            turned = removed * rates
        fading = fading_of(None if log_decay is None else laid(log_decay), k)
        q = q.unflatten(3, (call.group, chunk))
        return cls(q, k, v, stronger, beta, removed, turned, fading)


@dataclass(frozen=True)
class Inside:
    """What the tokens of chunks are to each other, whatever the state.

    Each tensor begins with (batch, kv_heads, chunks); the rest of its shape is given here. A chunk
    has `length` tokens, and `rows` is group · length, since a group of heads shares each key. Where
    tokens remove and write apart, `length` is twice that, but in `rows`.

    scores: (rows, length), what each row reads of each token's write
    reads: (rows, width), what it reads of the state before the chunk
    handed_on: (length, width), where in the state behind the chunk each token's write stands
    kept: (width or 1, 1), what is left there of the state before; None: all
    values: (length, value_dim), what each token writes, if there is no delta rule
    erases: (length, width), what it erases of the state before the chunk; None without delta rule
    below: N, (length, length), what it erases of earlier tokens' writes; None without delta rule
    """

    scores: Tensor
    reads: Tensor
    handed_on: Tensor
    kept: Tensor | None
    values: Tensor
    erases: Tensor | None
    below: Tensor | None

    @classmethod
    def of(cls, tokens: Tokens) -> Inside:
        if tokens.removed is not None:
            return cls._removing(tokens)
        q, k, stronger, fading = tokens.q, tokens.k, tokens.stronger, tokens.fading
        erases = below = None
        if stronger is None:
            (scores,) = fading.products([q], k)
        else:
            scores, below = fading.products([q, stronger[..., None, :, :]], k)
            erases, below = fading.carried(stronger), below[:, :, :, 0]
            below = below.tril_(-1) if may_overwrite(below) else below.tril(-1)
        v = tokens.v if tokens.beta is None else tokens.v * tokens.beta[..., None]
        reads, handed_on = fading.carried(q).flatten(3, 4), fading.handed_on(k)
        return cls(scores.flatten(3, 4), reads, handed_on, fading.kept, v, erases, below)

    @classmethod
    def _removing(cls, tokens: Tokens) -> Inside:
        """Where tokens remove at other keys than they write to, each stands twice: first all that
        are written, by v, which solve nothing; then all that are removed, by what the state and
        earlier tokens say of them."""
        q, k, v, removed, turned = tokens.q, tokens.k, tokens.v, tokens.removed, tokens.turned
        fading, length = tokens.fading, k.shape[-2]
        assert removed is not None and turned is not None and isinstance(fading, ChannelFading)
        before, both = fading.before_own(), torch.stack([k, turned])
        (scores,) = fading.products([q], both)
        (below,) = before.products([removed[..., None, :, :]], both)
        below = torch.cat(below[..., 0, :, :].tril(-1).unbind(), -1)
        return cls(
            torch.cat(scores.unbind(), -1).flatten(3, 4),
            fading.carried(q).flatten(3, 4),
            torch.cat(fading.handed_on(both).unbind(), -2),
            fading.kept,
            F.pad(v, (0, 0, 0, length)),
            F.pad(before.carried(removed), (0, 0, length, 0)),
            F.pad(below, (0, 0, length, 0)),
        )

    def detached(self) -> Inside:
        """The same numbers, which autograd does not follow."""
        return Inside(*(None if x is None else x.detach() for x in vars(self).values()))

    def solved(self) -> Tensor | None:
        """(1 + N)⁻¹; None without delta rule."""
        return None if self.below is None else unit_inverse(self.below)

    def rows(self, states: States) -> Tensor:
        """(batch, kv_heads, chunks, rows, value_dim)."""
        rows = self.scores @ states.writes
        if may_overwrite(rows, states.before):
            return add_product_(rows, self.reads, states.before)
        return add_product(rows, self.reads, states.before)


@dataclass(frozen=True)
class States:
    """The states between chunks, and what the tokens write to them.

    before: (batch, kv_heads, chunks, width, value_dim), the state before each chunk
    writes: (batch, kv_heads, chunks, length, value_dim)
    erased: (batch, kv_heads, chunks, length, width), what of the state before a chunk each write
        takes away; None without delta rule
    after: (batch, kv_heads, width, value_dim), after the last chunk, or before it where no more is
        wanted
    """

    before: Tensor
    writes: Tensor
    erased: Tensor | None
    after: Tensor

    @classmethod
    def of(cls, inside: Inside, inverse: Tensor | None, state: Tensor, remember: bool) -> States:
        """inverse: of `Inside.solved`. state: before the first chunk. remember: whether the state
        after the last is wanted."""
        chunks = inside.values.shape[2]
        wanted = chunks if remember else chunks - 1
        if inverse is None:
            more = inside.handed_on.mT[:, :, :wanted] @ inside.values[:, :, :wanted]
            before, after = [state], state
            for chunk in range(wanted):
                after = _faded(after, inside.kept, chunk) + more[:, :, chunk]
                before.append(after)
            return cls(_stacked(before[:chunks]), inside.values, None, after)
        assert inside.erases is not None
        writes, erased = inverse @ inside.values, inverse @ inside.erases
        if may_overwrite(writes, erased, state):
            before = _write_all(inside, writes, erased, state, wanted)
            after = before[:, :, wanted].clone()  # not to keep all of them alive
            return cls(before[:, :, :chunks], writes, erased, after)
        before, after, found = [state], state, []
        for chunk in range(chunks):
            found.append(add_product(writes[:, :, chunk], erased[:, :, chunk], after, -1))
            if chunk < wanted:
                faded = _faded(after, inside.kept, chunk)
                after = add_product(faded, inside.handed_on.mT[:, :, chunk], found[-1])
                before.append(after)
        return cls(_stacked(before[:chunks]), _stacked(found), erased, after)


def _write_all(
    inside: Inside, writes: Tensor, erased: Tensor, state: Tensor, wanted: int
) -> Tensor:
    """The states before each chunk, and after the last where they are wanted, (batch, kv_heads,
    chunks or one more, width, value_dim). writes: what would be written to an empty state, which is
    overwritten by what is."""
    chunks = writes.shape[2]
    states = state.new_empty(*state.shape[:2], max(chunks, wanted + 1), *state.shape[2:])
    states[:, :, 0] = state
    handed_on = inside.handed_on.mT
    for chunk in range(chunks):
        here = states[:, :, chunk]
        add_product_(writes[:, :, chunk], erased[:, :, chunk], here, -1)
        if chunk < wanted:
            after = states[:, :, chunk + 1]
            after.copy_(here if inside.kept is None else here * inside.kept[:, :, chunk])
            add_product_(after, handed_on[:, :, chunk], writes[:, :, chunk])
    return states


def _stacked(of_chunks: list[Tensor]) -> Tensor:
    return torch.stack(of_chunks, 2)


def _faded(state: Tensor, kept: Tensor | None, chunk: int) -> Tensor:
    return state if kept is None else state * kept[:, :, chunk]


def filled(x: Tensor, tokens: int) -> Tensor:
    """x with zeros for so many more tokens, (batch, heads, length, ...)."""
    return F.pad(x, (0, 0) * (x.dim() - 3) + (0, tokens)) if tokens else x
