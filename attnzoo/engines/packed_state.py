"""Decoding packed rows: a state for the samples whose last piece began at the same token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import State
from attnzoo.engines.state_checks import check_rows, check_state
from attnzoo.sequences.packing import Piece, pieces_of


class Steps(Protocol):
    """What an attention does with calls that have no segments."""

    def forward(self, call: Call) -> Tensor:
        """Causal rows of a packed call that nothing stands before."""
        ...

    def step(self, call: Call, state: State) -> tuple[Tensor, State]: ...

    def empty_state(self, call: Call) -> State:
        """A state for tokens like the call's."""
        ...


@dataclass(frozen=True)
class Group:
    """Samples that one state serves, since their last pieces began at the same token."""

    samples: tuple[int, ...]
    state: State


@dataclass(frozen=True)
class PackedState:
    """What decoding carries of packed rows: the last piece of every sample, which the next tokens
    go on with or leave.

    last: the id of each sample's last piece. ended: the ids of those before it.
    """

    groups: tuple[Group, ...]
    last: tuple[int, ...]
    ended: tuple[frozenset[int], ...]
    kv_heads: int
    seen: int
    max_length: int | None

    @property
    def batch_size(self) -> int:
        return len(self.last)

    def elements(self) -> int:
        """Numbers that the next query can read."""
        return sum(group.state.elements() for group in self.groups)

    def held_bytes(self) -> int:
        """Bytes that its tensors take, reserve included."""
        return sum(group.state.held_bytes() for group in self.groups)

    def crop(self, n: int) -> PackedState:
        """The state without its last n tokens, which leaves a token of every last piece: what stood
        before a piece is forgotten. Raises ValueError on more."""
        most = min(group.state.seen for group in self.groups) - 1
        if isinstance(n, int) and n > most:
            raise ValueError(
                f"n={n} must be at most {most}: the last piece of a sample began {most + 1} tokens "
                "ago, and what stood before it is forgotten; keep the state from before, which "
                "stays valid"
            )
        groups = tuple(replace(group, state=group.state.crop(n)) for group in self.groups)
        return replace(self, groups=groups, seen=self.seen - n)

    def check_room(self, call: Call) -> None:
        check_state(call, self.batch_size, self.kv_heads, self.seen, self.max_length)
        for group in self.groups:
            group.state.check_room(call.select(batch=torch.tensor(group.samples)))

    def select(self, rows: Tensor) -> PackedState:
        """The state of these rows of the batch, (new_batch,) indices; a row may be taken more than
        once."""
        check_rows(rows, self.batch_size)
        wanted, groups = rows.tolist(), []
        for group in self.groups:
            places = [place for place, row in enumerate(wanted) if row in group.samples]
            if places:
                own = [group.samples.index(wanted[place]) for place in places]
                state = group.state.select(torch.tensor(own, device=rows.device))
                groups.append(Group(tuple(places), state))
        last = tuple(self.last[row] for row in wanted)
        ended = tuple(self.ended[row] for row in wanted)
        return replace(self, groups=tuple(groups), last=last, ended=ended)


def step_apart(call: Call, state: State, steps: Steps) -> tuple[Tensor, State]:
    """The rows of the call's tokens, each of which sees its own piece, and the state after them.

    call: with segments, or without where its tokens go on with the last piece of each sample.
    raises: ValueError where a piece goes on that another one has ended, and where the state has
        taken tokens whose ids it was not told.
    """
    packed = state if isinstance(state, PackedState) else None
    if call.segments is None:
        assert packed is not None
        call = replace(call, segments=_last_of(packed, call))
    assert call.segments is not None
    last, ended = _after(packed, state, call.segments)
    found = pieces_of(call)
    first = call.segments[:, 0].tolist()
    rows: list[tuple[tuple[int, ...], Tensor]] = []
    groups = []
    for samples, own in _groups(packed, state, call):
        for alike, goes_on in _alike(packed, samples, first, found):
            part = call.select(batch=torch.tensor(alike, device=call.q.device))
            part = replace(part, k=part.q) if call.k is call.q else part
            past = None
            if goes_on:
                places = [samples.index(sample) for sample in alike]
                past = own.select(torch.tensor(places, device=call.q.device))
            out, after = _step(part, found[alike[0]], past, steps)
            rows.append((alike, out))
            groups.append(Group(alike, after))
    order = [sample for samples, _ in rows for sample in samples]
    out = torch.cat([out for _, out in rows])
    if order != sorted(order):
        out = out.index_select(0, torch.tensor(order, device=out.device).argsort())
    return out, PackedState(
        tuple(groups),
        last,
        ended,
        call.k.shape[1],
        state.seen + call.key_length,
        packed.max_length if packed else getattr(state, "max_length", None),
    )


def _last_of(packed: PackedState, call: Call) -> Tensor:
    """Ids for tokens that go on with the last pieces, (batch, new_tokens)."""
    last = torch.tensor(packed.last, device=call.q.device)
    return last[:, None].expand(-1, call.key_length)


def _after(
    packed: PackedState | None, state: State, segments: Tensor
) -> tuple[tuple[int, ...], tuple[frozenset[int], ...]]:
    """`last` and `ended` after tokens of these ids."""
    if packed is None and state.seen:
        raise ValueError(
            f"the state has taken {state.seen} tokens without segments, so the pieces that they "
            "belong to are not known; give segments in every step from the first"
        )
    last, ended = [], []
    for sample, ids in enumerate(segments):
        now = ids.unique_consecutive().tolist()
        before = packed.ended[sample] if packed else frozenset()
        if packed and packed.last[sample] != now[0]:
            before |= {packed.last[sample]}
        again = [one for place, one in enumerate(now) if one in before | set(now[:place])]
        if again:
            raise ValueError(
                f"segments goes on with piece {again[0]} in sample {sample} after another one has "
                "begun; a state keeps the last piece alone, so give each piece an id of its own "
                "and its tokens together"
            )
        last.append(now[-1])
        ended.append(before | frozenset(now[:-1]))
    return tuple(last), tuple(ended)


def _groups(
    packed: PackedState | None, state: State, call: Call
) -> Iterator[tuple[tuple[int, ...], State]]:
    if packed is None:
        yield tuple(range(call.q.shape[0])), state
    else:
        for group in packed.groups:
            yield group.samples, group.state


def _alike(
    packed: PackedState | None,
    samples: tuple[int, ...],
    first: list[int],
    found: list[list[Piece]],
) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Of the samples of one state, those that go on with it, or do not, and have the same
    pieces."""
    alike: dict[tuple[bool, tuple[int, ...]], list[int]] = defaultdict(list)
    for sample in samples:
        goes_on = packed is None or packed.last[sample] == first[sample]
        alike[goes_on, tuple(piece.keys for piece in found[sample])].append(sample)
    for (goes_on, _), some in alike.items():
        yield tuple(some), goes_on


def _step(
    call: Call, pieces: list[Piece], past: State | None, steps: Steps
) -> tuple[Tensor, State]:
    """Rows of samples that have the same pieces, and the state of the last piece. past: what the
    first piece goes on with. Pieces between the first and the last need no state."""
    lengths = [piece.keys for piece in pieces]
    begun = lengths[0] if past is not None or len(lengths) == 1 else 0
    last = lengths[-1] if len(lengths) > 1 else 0
    sizes = [begun, call.key_length - begun - last, last]
    head, middle, tail = call.split(queries=sizes, keys=sizes)
    rows, state = [], past
    if begun:
        head = replace(head, segments=None)
        out, state = steps.step(head, steps.empty_state(head) if past is None else past)
        rows.append(out)
    if middle.key_length:
        rows.append(steps.forward(middle))
    if last:
        tail = replace(tail, segments=None)
        out, state = steps.step(tail, steps.empty_state(tail))
        rows.append(out)
    assert state is not None
    return torch.cat(rows, 2), state
