"""What decoding with sums carries, and how its last tokens are taken back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from attnzoo.call import KEYS, Call
from attnzoo.engines.linear.causal.chunks import CAUSAL_CHUNK
from attnzoo.engines.linear.sums import Past
from attnzoo.engines.state_checks import (
    GOES_BACK,
    check_crop,
    check_rows,
    check_state,
    check_values,
)

#: Adds the keys of a call to the sums before them; None: there are none.
Add = Callable[[Call, Past | None], Past]


@dataclass(frozen=True)
class Recent:
    """The last tokens, and the sums before them: what is added again when some of them go.

    before: None where no token came before them. call: keys, values, key_mask and inputs of all but
    the last token, which is never added again; its queries are its keys, since none are read.
    length: tokens behind `before`. croppable: how many of these can be taken back.
    """

    before: Past | None
    call: Call
    length: int
    croppable: int

    @classmethod
    def of(cls, call: Call, before: Past | None, earlier: Recent | None = None) -> Self:
        """call: the tokens behind `before`. They are copied: a caller may write over its own.
        earlier: the last tokens before them."""
        length = call.key_length
        if length == 1 and earlier is not None:  # what is kept of one token is no number
            empty = earlier.call
            if empty.key_length == 0 and empty.v.dtype == call.v.dtype:
                return cls(before, empty, 1, 1)

        def copied(x: Tensor, axes: tuple[str, ...]) -> Tensor:
            if "keys" not in axes:
                return x.clone()
            along = axes.index("keys")
            if length == 1:  # of which nothing is kept
                return x.new_empty([*x.shape[:along], 0, *x.shape[along + 1 :]])
            return x.narrow(along, 0, length - 1).clone()

        k, v = copied(call.k, KEYS), copied(call.v, KEYS)
        mask = call.key_mask
        mask = None if mask is None else mask[:, : length - 1].clone()
        kept = call.over(k, k, v, mask)
        if call.inputs:
            read = [(one, x) for one, x in call.given() if "queries" not in one.names]
            inputs = {one.name: copied(x, one.names) for one, x in read}
            kept = replace(kept, inputs=inputs)
        return cls(before, kept, length, min(length, GOES_BACK))

    def tensors(self) -> list[Tensor]:
        call = self.call
        held = (call.k, call.v, call.key_mask, *call.inputs.values(), *_tensors(self.before))
        return [x for x in held if x is not None]

    def select(self, rows: Tensor) -> Self:
        call = self.call.select(batch=rows)
        call = replace(call, q=call.k)
        return replace(self, before=_selected(self.before, rows), call=call)

    def summed(self, add: Add) -> Past:
        """The sums behind these tokens."""
        left = slice(None, self.length)
        call = self.call.select(queries=left, keys=left)
        return add(replace(call, q=call.k), self.before)


@dataclass(frozen=True)
class LinearState:
    """What decoding carries, accumulated in float32 at least.

    past: None before the first token, and where tokens were taken back: the next step then adds
    those of `recent` that are left to the sums before them. recent: the last call's tokens, of a
    long one the last ones, from a boundary of chunks on. numbers: of a sample's sums. variant:
    whose `init_state` made it, since sums of one shape mean other things to another; None: not told
    """

    batch_size: int
    kv_heads: int
    max_length: int | None = None
    seen: int = 0
    past: Past | None = None
    recent: Recent | None = None
    numbers: int = 0
    variant: str | None = None

    def elements(self) -> int:
        """Numbers that the next query can read."""
        return self.batch_size * self.numbers if self.seen else 0

    def held_bytes(self) -> int:
        """Bytes of the sums, with their scale, and of what is kept for going back."""
        recent = [] if self.recent is None else self.recent.tensors()
        return sum(x.nbytes for x in (*_tensors(self.past), *recent))

    def select(self, rows: Tensor) -> LinearState:
        """The state of these rows of the batch, (new_batch,) indices; a row may be taken more than
        once."""
        check_rows(rows, self.batch_size)
        recent = None if self.recent is None else self.recent.select(rows)
        past = _selected(self.past, rows)
        return replace(self, batch_size=rows.numel(), past=past, recent=recent)

    def check_room(self, call: Call) -> None:
        check_state(call, self.batch_size, self.kv_heads, self.seen, self.max_length)
        check_values(call, None if self.recent is None else self.recent.call.v)

    def crop(self, n: int) -> LinearState:
        """The state without its last n tokens, at most `GOES_BACK` and all of the last call. Raises
        ValueError on more."""
        recent = self.recent
        check_crop(n, 0 if recent is None else recent.croppable)
        if recent is None or not n:
            return self
        seen, left = self.seen - n, recent.length - n
        if not left:
            return replace(self, seen=seen, past=recent.before, recent=None)
        recent = replace(recent, length=left, croppable=recent.croppable - n)
        return replace(self, seen=seen, past=None, recent=recent)

    def summed(self, add: Add) -> Past | None:
        """The sums of all tokens so far."""
        if self.past is not None or self.recent is None:
            return self.past
        return self.recent.summed(add)

    def after(self, call: Call, past: Past, recent: Recent) -> LinearState:
        """The state behind the call's tokens."""
        sizes = (self.batch_size, self.kv_heads, self.max_length)
        numbers, seen = past.sums.numel() // self.batch_size, self.seen + call.key_length
        # What `replace` does, in half the time.
        return LinearState(*sizes, seen, past, recent, numbers, self.variant)


def early_and_late(call: Call) -> list[Call]:
    """The call in two where it is long: its last tokens, which can be taken back, come in the
    second part, and this begins with a chunk."""
    early = max(0, call.key_length - GOES_BACK) // CAUSAL_CHUNK * CAUSAL_CHUNK
    lengths = [early, call.key_length - early]
    return call.split(queries=lengths, keys=lengths) if early else [call]


def _tensors(past: Past | None) -> list[Tensor]:
    return [] if past is None else past.tensors()


def _selected(past: Past | None, rows: Tensor) -> Past | None:
    return None if past is None else past.select(rows)
