"""Keys and values kept for decoding: one buffer that grows, shifts out what no query can reach, and
survives branching and going back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import StateSizes
from attnzoo.engines.state_checks import (
    GOES_BACK,
    check_crop,
    check_rows,
    check_state,
    check_values,
)
from attnzoo.engines.stretch_sums import StretchSums, sums_of

NOTHING: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(eq=False)
class _Buffer:
    """Storage that several states may share: a slot may be written while no other state that is
    still alive reads it.

    inputs: what the attention reads of every key beside k and v, by name, (batch, heads, slots,
        ...)
    recorded: autograd may have saved it, so that no slot may be written.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    recorded: bool = False
    readers: WeakSet[KeyValueCache] = field(default_factory=WeakSet, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in vars(self).items() if name != "readers"}

    def __setstate__(self, held: dict[str, Any]) -> None:
        vars(self).update(held, readers=WeakSet())


@dataclass(frozen=True, eq=False)
class KeyValueCache:
    """The visible past of a causal softmax: slots start..end of `buffer`.

    reach: how far back a query can see (None: to the beginning); older slots are dropped, so a
    window's cache is bounded.
    seen: tokens taken so far. A cache is a value: `append` and `crop` return a new one, and the old
    one stays valid, since a second continuation copies where another cache reads the slots to come.
    sums: of stretches of its keys and values, where the attention reads these
    """

    buffer: _Buffer
    start: int
    end: int
    seen: int
    max_length: int | None
    reach: int | None
    sums: StretchSums | None = None

    def __post_init__(self) -> None:
        self.buffer.readers.add(self)

    def __setstate__(self, held: dict[str, Any]) -> None:
        vars(self).update(held)
        self.__post_init__()

    @classmethod
    def empty(cls, sizes: StateSizes, reach: int | None) -> KeyValueCache:
        room = _room(1, sizes.max_length, reach)
        shape = (sizes.batch_size, sizes.kv_heads, room)
        width = sizes.head_dim if sizes.value_dim is None else sizes.value_dim
        k = torch.zeros(*shape, sizes.head_dim, dtype=sizes.dtype, device=sizes.device)
        v = k.new_zeros(*shape, width)
        return cls(_Buffer(k, v, None), 0, 0, 0, sizes.max_length, reach)

    @property
    def k(self) -> Tensor:
        return self.buffer.k.narrow(2, self.start, self.end - self.start)

    @property
    def v(self) -> Tensor:
        return self.buffer.v.narrow(2, self.start, self.end - self.start)

    @property
    def key_mask(self) -> Tensor | None:
        return None if self.buffer.mask is None else self.buffer.mask[:, self.start : self.end]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What is kept of every key beside k and v."""
        held = self.buffer.inputs
        return {name: x.narrow(2, self.start, self.kept) for name, x in held.items()}

    @property
    def batch_size(self) -> int:
        return self.buffer.k.shape[0]

    @property
    def kept(self) -> int:
        """Tokens whose keys and values are here."""
        return self.end - self.start

    @property
    def dropped(self) -> bool:
        """Whether keys and values are gone that some query could read after going back."""
        return self.kept < self.seen

    @property
    def croppable(self) -> int:
        """How many tokens can be taken back."""
        return self.kept - self.reach if self.dropped and self.reach is not None else self.seen

    def elements(self) -> int:
        """Numbers that the last query could read, which are as many as the next one can."""
        read = self.kept if self.reach is None else min(self.kept, self.reach + 1)
        k, v = self.buffer.k, self.buffer.v
        of_inputs = sum(x[:, :, :read].numel() for x in self.buffer.inputs.values())
        return k.shape[0] * k.shape[1] * read * (k.shape[3] + v.shape[3]) + of_inputs

    def held_bytes(self) -> int:
        """Bytes of the buffer, with what it holds in reserve and for going back."""
        held = (self.buffer.k, self.buffer.v, self.buffer.mask, *self.buffer.inputs.values())
        of_sums = 0 if self.sums is None else self.sums.nbytes()
        return of_sums + sum(x.nbytes for x in held if x is not None)

    def with_sums(self, size: int, *, of_values: bool) -> KeyValueCache:
        """The cache with the sums of its stretches of so many tokens; as it is where samples may
        begin elsewhere, as padded ones do, and where gradients are asked for."""
        if self.buffer.mask is not None or self.dropped or self.buffer.recorded:
            return self
        found = sums_of(self.k, self.v if of_values else None, size, self.sums)
        return self if found is self.sums else replace(self, sums=found)

    def select(self, rows: Tensor) -> KeyValueCache:
        """The cache of these rows of the batch, (new_batch,) indices; a row may be taken more than
        once. Raises ValueError on rows that it does not have."""
        check_rows(rows, self.batch_size)
        old = self.buffer
        mask = None if old.mask is None else old.mask.index_select(0, rows)
        inputs = {name: x.index_select(0, rows) for name, x in old.inputs.items()}
        buffer = _Buffer(old.k.index_select(0, rows), old.v.index_select(0, rows), mask, inputs)
        sums = None if self.sums is None else self.sums.select(rows)
        return replace(self, buffer=buffer, sums=sums)

    def crop(self, n: int) -> KeyValueCache:
        """The cache without its last n tokens: of the last call, at most `GOES_BACK` of it, or any
        where nothing has been dropped. Raises ValueError on more."""
        check_crop(n, self.croppable)
        sums = None if self.sums is None else self.sums.of_first(self.kept - n)
        return replace(self, end=self.end - n, seen=self.seen - n, sums=sums) if n else self

    def check_room(self, call: Call) -> None:
        check_state(call, self.batch_size, self.buffer.k.shape[1], self.seen, self.max_length)
        check_values(call, self.buffer.v if self.seen else None)

    def append(self, call: Call, inputs: Mapping[str, Tensor] = NOTHING) -> KeyValueCache:
        """The cache with the call's keys and values behind it.

        inputs: what is to be kept of them besides, (batch, heads, new_tokens, ...), of the same
            names in every call
        """
        new, held = call.k.shape[2], self.buffer
        if torch.is_grad_enabled():
            read = (call.q, call.k, call.v, held.k, held.v)
            read += (*inputs.values(), *held.inputs.values())
            if any(x.requires_grad for x in read):
                return self.within_reach()._joined(call, inputs)
        start = self.start
        if self.reach is not None and self.kept > self.reach:
            start = self.end - self.reach
        state = self
        if self._must_move(start, call, inputs):
            state = self.within_reach()._moved(call, inputs)
            start = 0
        buffer, end, stop = state.buffer, state.end, state.end + new
        buffer.k.narrow(2, end, new).copy_(call.k)
        buffer.v.narrow(2, end, new).copy_(call.v)
        if buffer.mask is not None:
            buffer.mask[:, end:stop] = True if call.key_mask is None else call.key_mask
        for name, x in inputs.items():
            buffer.inputs[name].narrow(2, end, new).copy_(x)
        # What `replace` does, in a third of the time.
        seen, limits = self.seen + new, (self.max_length, self.reach)
        return KeyValueCache(buffer, start, stop, seen, *limits, self.sums)

    def without_excess(self) -> KeyValueCache:
        """The cache without what a long last call has brought beyond that which the next query and
        `crop` ask for."""
        if self.reach is None or self.kept <= self.reach + GOES_BACK:
            return self
        state = self.within_reach(GOES_BACK)
        if not state._oversized(state.kept):
            return state
        k, v, mask = state.k, state.v, state.key_mask
        mask = None if mask is None else mask.clone()
        inputs = {name: x.clone() for name, x in state.inputs.items()}
        buffer = _Buffer(k.clone(), v.clone(), mask, inputs, self.buffer.recorded)
        return replace(state, buffer=buffer, start=0, end=state.kept)

    def within_reach(self, more: int = 0) -> KeyValueCache:
        """The cache of what the next query can reach, and of so many tokens more."""
        if self.reach is None or self.kept <= self.reach + more:
            return self
        return replace(self, start=self.end - self.reach - more)

    def _oversized(self, tokens: int) -> bool:
        """Whether the buffer is a long prefill's, of which a window shows so many tokens."""
        return self.buffer.k.shape[2] > 2 * _room(tokens, self.max_length, self.reach)

    def _must_move(self, start: int, call: Call, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the buffer cannot take the call's tokens behind its slots from `start` on."""
        buffer, end = self.buffer, self.end
        slots, stop = buffer.k.shape[2], end + call.k.shape[2]
        if buffer.recorded or stop > slots or self._oversized(stop - start):
            return True
        if call.key_mask is not None and buffer.mask is None:
            return True
        for other in buffer.readers:  # a branch
            if other.end > end:
                return True
        return (
            buffer.k.dtype != call.k.dtype
            or buffer.k.device != call.k.device
            or buffer.k.shape[3] != call.k.shape[3]
            or buffer.v.shape[3] != call.v.shape[3]
            or any(
                name not in buffer.inputs or buffer.inputs[name].dtype != x.dtype
                for name, x in inputs.items()
            )
        )

    def _moved(self, call: Call, inputs: Mapping[str, Tensor]) -> KeyValueCache:
        """The cache in a buffer of its own that has room for the call's tokens."""
        kept = self.kept
        room = _room(kept + call.k.shape[2], self.max_length, self.reach)
        k = call.k.new_zeros(*call.k.shape[:2], room, call.k.shape[3])
        v = call.v.new_zeros(*call.v.shape[:2], room, call.v.shape[3])
        if kept:
            k[:, :, :kept], v[:, :, :kept] = self.k, self.v
        mask = None
        if self.buffer.mask is not None or call.key_mask is not None:
            mask = torch.ones(k.shape[0], room, dtype=torch.bool, device=k.device)
            if self.key_mask is not None:
                mask[:, :kept] = self.key_mask
        old, more = self.inputs, {}
        for name, x in inputs.items():
            more[name] = x.new_zeros(*x.shape[:2], room, *x.shape[3:])
            if kept:
                more[name][:, :, :kept] = old[name]
        return replace(self, buffer=_Buffer(k, v, mask, more), start=0, end=kept)

    def _joined(self, call: Call, inputs: Mapping[str, Tensor]) -> KeyValueCache:
        """As `append`, by concatenation, so that autograd can follow."""
        past = self.end > self.start
        # Copies: the caller may change its own afterwards.
        k = torch.cat([self.k, call.k], 2) if past else call.k.clone()
        v = torch.cat([self.v, call.v], 2) if past else call.v.clone()
        mask = None
        if self.buffer.mask is not None or call.key_mask is not None:
            ones = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
            old = ones[:, : self.kept] if self.key_mask is None else self.key_mask
            mask = torch.cat(
                [old, ones[:, : call.k.shape[2]] if call.key_mask is None else call.key_mask], 1
            )
        old, length = self.inputs, k.shape[2]
        more = {
            name: torch.cat([old[name], x], 2) if past else x.clone() for name, x in inputs.items()
        }
        return replace(
            self,
            buffer=_Buffer(k, v, mask, more, recorded=True),
            start=0,
            end=length,
            seen=self.seen + call.k.shape[2],
        )


def _room(tokens: int, max_length: int | None, reach: int | None) -> int:
    """Slots to allocate for so many tokens: twice what is needed, so that moves are rare, and no
    more than can ever be used."""
    if reach is not None:
        return tokens + max(reach, 64)
    if max_length is not None:
        return max_length
    return max(64, 2 * tokens)
