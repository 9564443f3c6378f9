"""What the three engines share: a list of backends that can say why they refuse, a state for
decoding, and a cost."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from attnzoo.call import Call, UnsupportedError


@dataclass(frozen=True)
class Backend:
    """One way to multiply by A.

    name: what a call asks for it by
    run: computes A·v, (batch, heads, query_length, value_dim)
    why_not: looks at static facts only (device, dtype, shape, grad) and returns why the backend
        refuses a call, or None
    packs: whether it keeps the pieces of a packed row apart where nobody may read their ids, in a
        graph or transform; elsewhere they are cut apart before
    uncut: whether it takes packed rows uncut outside of graphs, too, when it is asked for by name
    untried: why backend="auto" passes over it for a call that it takes when asked for by name,
        since no such call has been seen to run right on the device that it is for; None where it
        has
    skips_padding: whether it reads nothing of a call's padded slots, which need not be cleared then
    """

    name: str
    run: Callable[[Any, Call], Tensor]
    why_not: Callable[[Any, Call], str | None]
    packs: bool = False
    uncut: bool = False
    untried: Callable[[Any, Call], str | None] = lambda engine, call: None
    skips_padding: Callable[[Any, Call], bool] = lambda engine, call: False

    def reason(self, engine: Any, call: Call, *, by_name: bool) -> str | None:
        """Why it does not compute the call; None when it does.

        by_name: whether it is asked for by name, or has its turn among others
        """
        if call.segments is not None and not self.packs:
            return (
                "it cannot keep the pieces of a packed row apart in a graph or transform, where "
                "their ids cannot be read: use standard there, or give the pieces as samples with "
                "key_mask"
            )
        reason = self.why_not(engine, call)
        return reason if reason is not None or by_name else self.untried(engine, call)


@dataclass(frozen=True)
class Shape:
    """The sizes that a cost depends on. Lengths in tokens."""

    batch_size: int
    heads: int
    kv_heads: int
    head_dim: int
    query_length: int
    key_length: int
    is_causal: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def sum_bytes(self) -> int:
        """Bytes of a number that sums accumulate in."""
        return accumulation_dtype(self.dtype).itemsize

    @property
    def query_bytes(self) -> int:
        """Bytes of q, and of the output."""
        return (
            self.batch_size * self.heads * self.query_length * self.head_dim * self.dtype.itemsize
        )

    @property
    def key_bytes(self) -> int:
        """Bytes of k, and of v."""
        return (
            self.batch_size * self.kv_heads * self.key_length * self.head_dim * self.dtype.itemsize
        )

    @property
    def input_bytes(self) -> int:
        """Bytes of q, k and v."""
        return self.query_bytes + 2 * self.key_bytes


@dataclass(frozen=True)
class Cost:
    """What one forward costs, without key_mask and attn_mask; its memory is found by
    `attnzoo.memory`. One MAC is one multiply-accumulate;
    flops = 2 · macs.

    macs: what the fast backend executes, counted as torch and fvcore count it (SDPA with is_causal
    counts in full). It is the same on every machine: of the compiled backend `native`, which leaves
    out keys that none of a few rows sees, it has what `tiles` executes.
    skipped_macs: of macs, those of the half that a causal mask hides and that a kernel like
    FlashAttention passes over; 0 where scores are laid out.
    support_macs: what A's support alone needs (a causal A of length n has n(n+1)/2 pairs).
    elementwise: operations of softmax (3 a score), exponentials and divisions that the fast backend
    executes, as `count_flops` counts them.
    parameters: learned numbers; buffers, such as Performer's directions, are not among them.
    moved_bytes: the least that must move: q, k, v, the parameters used (in the inputs' dtype) and
    directions read once, the output written once.
    state_elements: numbers that decoding carries for the whole batch after key_length tokens; 0
    when the variant does not decode.
    state_bytes: their size; the sums of a linear state are float32 at least. What a buffer holds in
    reserve is not counted.
    state_growth: bytes by which one token more makes the state grow; 0 once it is bounded.
    """

    macs: int
    support_macs: int
    skipped_macs: int = 0
    elementwise: int = 0
    parameters: int = 0
    moved_bytes: int = 0
    state_elements: int = 0
    state_bytes: int = 0
    state_growth: int = 0

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def kernel_macs(self) -> int:
        """What a good kernel executes: macs without those it skips."""
        return self.macs - self.skipped_macs

    def without_state(self) -> Cost:
        """The same of a variant that does not decode."""
        return replace(self, state_elements=0, state_bytes=0, state_growth=0)


@dataclass(frozen=True)
class StateSizes:
    """What an empty decoding state is made for: the keys and values to come.

    max_length: tokens that it will take; None: any number.
    value_dim: width of the values; None: head_dim.
    """

    batch_size: int
    kv_heads: int
    head_dim: int
    max_length: int | None
    dtype: torch.dtype
    device: Any
    value_dim: int | None = None


class State(Protocol):
    """What a decoding state can tell and do besides being stepped. It is a value: `step`, `select`
    and `crop` return another one."""

    @property
    def batch_size(self) -> int: ...

    @property
    def seen(self) -> int:
        """Tokens taken so far."""
        ...

    def elements(self) -> int:
        """Numbers that the next query can read; what is kept for `crop` alone is not counted."""
        ...

    def held_bytes(self) -> int:
        """Bytes that its tensors take, with what is held in reserve and for `crop`."""
        ...

    def check_room(self, call: Call) -> None:
        """Raise a ValueError when the call's tokens do not fit."""
        ...

    def select(self, rows: Tensor) -> State:
        """The state of these rows of the batch, (new_batch,) indices; a row may be taken more than
        once. Raises ValueError on rows that it does not have."""
        ...

    def crop(self, n: int) -> State:
        """The state without its last n tokens: stepping on from it equals the run without them.

        n: from 0 to the length of the last call that had tokens, at most 128 where the state is
            bounded; more where nothing has been dropped, as in a cache of every key. Tokens that
            are taken back in several times count together.
        Raises ValueError on another n.
        """
        ...


class Engine(nn.Module):
    """Multiplies by A without the caller knowing how. `backends` is ordered by preference and ends
    with the reference."""

    backends: ClassVar[tuple[Backend, ...]]
    #: Whether a forward is long to trace and has no modules inside that do work of their own.
    counted_apart: bool = False
    square_tiles: int | None = None  # side of the tiles of scores that a loop walks over, if any

    @property
    def state_type(self) -> type | None:
        """The type of `init_state`'s states, if it is to be checked; None: any is taken."""
        return None

    @property
    def reach(self) -> int | None:
        """How many keys back a causal query can see, itself included; None: to the first."""
        return None

    def backend_names(self) -> list[str]:
        return [backend.name for backend in self.backends]

    def choose(self, call: Call, requested: str) -> Backend:
        """The first backend that does not refuse, or the requested one; a backend asked for by name
        never falls back."""
        reason = None
        for backend in self.backends:
            if requested in ("auto", backend.name):
                reason = backend.reason(self, call, by_name=requested != "auto")
                if reason is None:
                    return backend
        if reason is None:
            raise ValueError(
                f"backend={requested!r} is unknown here; choose 'auto' or one of "
                f"{self.backend_names()}"
            )
        if requested == "auto":
            raise UnsupportedError(f"no backend takes this call: {reason}")
        raise UnsupportedError(
            f"backend={requested!r} refuses this call: {reason}; use backend='auto' or change the "
            "call"
        )

    def forward(
        self, call: Call, backend: str = "auto", state: Any = None
    ) -> tuple[Tensor, str, Any]:
        """A·v, (batch, heads, query_length, value_dim) in q's dtype, the name of the backend that
        ran, and the state after the call.

        state: what decoding has seen so far, before the call's keys; None: nothing, and no state
            is made.
        """
        if state is None:
            call = self.completed(call)
        else:
            call, state = self.with_past(call, state)
        chosen = self.choose(call, backend)
        return chosen.run(self, call), chosen.name, state

    def skips_padding(self, call: Call, requested: str) -> bool:
        """Whether nothing will read the padded slots of k and v of a call, not yet completed."""
        return self.choose(call, requested).skips_padding(self, call)

    def weights(self, call: Call) -> Tensor:
        """A itself, without dropout, (batch, heads, query_length, key_length) in the precision of
        sums."""
        call = self.completed(call)
        if call.segments is not None:
            self.choose(call, "reference")
        return self.matrix(call)

    def check_inputs(self, call: Call) -> None:
        """Raise a ValueError where an input lies outside of its range; padded slots are clear."""

    def completed(self, call: Call) -> Call:
        """The call with what the engine itself adds to it."""
        return call

    def with_past(self, call: Call, state: Any) -> tuple[Call, Any]:
        """The completed call over the keys of the state and its own, and the state after it."""
        raise NotImplementedError

    def matrix(self, call: Call) -> Tensor:
        """As `weights`, of a call that is complete: the reference, which every backend must
        equal."""
        raise NotImplementedError

    def init_state(self, sizes: StateSizes) -> Any:
        """An empty state for decoding."""
        raise NotImplementedError

    def layout(self, heads: int, queries: int, keys: int, is_causal: bool) -> Hashable:
        """What decides, beside these sizes, which operators run on which shapes: equal for two
        engines that run the same."""
        return id(self)

    def cost(self, shape: Shape) -> Cost:
        raise NotImplementedError


def never_refuses(engine: Engine, call: Call) -> str | None:
    """`why_not` of a reference backend."""
    return None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums run in float32 at least (rule 10)."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


SOFTMAX_OPERATIONS = 3  # a score: exponential, sum, division
SOFTCAP_OPERATIONS = 2  # a score: division, tanh; its factor is a product with a constant


def causal_pairs(query_length: int, key_length: int) -> int:
    """Number of (query, key) pairs with key at or before query, aligned bottom-right."""
    offset = key_length - query_length
    first = max(0, -offset)  # rows before it see nothing
    rows = query_length - first
    return rows * (offset + first + 1) + rows * (rows - 1) // 2
