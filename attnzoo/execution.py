"""How an attention carries out a checked call: padded slots are cleared, a bad slot is kept from
the rows before it, packed rows are cut into their pieces, and a call of nothing gives nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from attnzoo.call import Call, UnsupportedError
from attnzoo.engines.engine import Engine, State, StateSizes
from attnzoo.engines.packed_state import PackedState, step_apart
from attnzoo.sequences.bad_slots import clear_padding, poison, shield, shield_past
from attnzoo.sequences.packing import (
    apart,
    may_cut,
    order_of,
    refuse_scattered,
    weights_apart,
)
from attnzoo.spec import Spec
from attnzoo.spec_checks import check_decodes


class Core(Protocol):
    """What is asked of an attention here; `attnzoo.attention.Attention` says what each means."""

    spec: ClassVar[Spec]
    engine: Engine
    backend: str
    last_backend: str | None

    @property
    def packs(self) -> bool: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def place(self, call: Call, seen: int) -> Call: ...

    def value_width(self, call: Call) -> int: ...

    def matrix(self, call: Call) -> Tensor: ...

    def attend(self, call: Call, backend: str, state: Any = None) -> tuple[Tensor, str, Any]: ...


def run(core: Core, call: Call) -> Tensor:
    """A·v. `core.last_backend` becomes the backend that ran, or several with "and" between."""
    if 0 in (call.q.shape[0], call.query_length, call.key_length, core.value_width(call)):
        return _of_nothing(core, call)
    if call.segments is None:
        return _run(core, call)
    if not may_cut(call):
        _check_packs(core)
        return refuse_scattered(_run(core, call), call.segments)
    if _takes_uncut(core) and order_of(call.segments) is None:
        return _run(core, call)
    ran: set[str | None] = set()

    def piece(part: Call) -> Tensor:
        out = _run(core, part)
        ran.add(core.last_backend)
        return out

    out = apart(call, piece)
    core.last_backend = " and ".join(sorted(name for name in ran if name))
    return out


def _run(core: Core, call: Call) -> Tensor:
    """A·v of a call that is not cut."""
    reads_padding = not _skips_padding(core, call)
    call, poisoned = shield(call, core.engine.check_inputs, reads_padding=reads_padding)
    out, core.last_backend, _ = core.attend(core.place(call, 0), core.backend)
    return out if poisoned is None else poison(out, poisoned)


def _skips_padding(core: Core, call: Call) -> bool:
    """Whether nothing will read what stands in the padded slots of a call."""
    if call.key_mask is None or not core.packs:
        return False
    return core.engine.skips_padding(call, core.backend)


def weights(core: Core, call: Call) -> Tensor:
    """A, in q's dtype."""
    core.last_backend = "reference"
    if 0 in (*call.q.shape[:3], call.key_length):
        return call.q.new_zeros(*call.q.shape[:3], call.key_length)
    if call.segments is None:
        return _weights(core, call)
    if not may_cut(call):
        _check_packs(core)
        return refuse_scattered(_weights(core, call), call.segments)
    return weights_apart(call, partial(_weights, core))


def _weights(core: Core, call: Call) -> Tensor:
    """A of a call that is not cut."""
    call, poisoned = shield(call, core.engine.check_inputs, reads_padding=True)
    found = core.matrix(core.place(call, 0)).to(call.q.dtype)
    return found if poisoned is None else poison(found, poisoned)


def step(core: Core, call: Call, state: State) -> tuple[Tensor, State]:
    """Rows of the call's tokens behind the state, and the state after them."""
    if 0 in call.q.shape[:3:2]:
        return _of_nothing(core, call), state
    if call.segments is None and not isinstance(state, PackedState):
        return _step(core, call, state)
    if call.segments is not None and not may_cut(call):
        raise UnsupportedError(
            "a step with segments reads their values to tell where a piece begins, which a graph "
            "or transform cannot; step outside of it, or cut the row into its pieces"
        )
    steps = Steps(core)
    out, after = step_apart(call, state, steps)
    core.last_backend = " and ".join(sorted(steps.ran))
    return out, after


def first_state(core: Core, sizes: StateSizes) -> Any:
    """An empty state, which tells whose it is where its kind serves several variants."""
    state = core.engine.init_state(sizes)
    return replace(state, variant=core.spec.name) if hasattr(state, "variant") else state


def check_state(core: Core, state: object) -> None:
    """Raise where the variant does not decode, or the state is of another kind than its own."""
    check_decodes(core.spec)
    own = core.engine.state_type
    if own is None or isinstance(state, (own, PackedState)):
        maker = getattr(state, "variant", None)
        if maker in (None, core.spec.name):
            return
        raise ValueError(
            f"state was made by {maker}, and {core.spec.name} reads another meaning from its sums: "
            "give what its own init_state gives, or the step before"
        )
    raise ValueError(
        f"state is a {type(state).__name__}; {core.spec.name} decodes with the {own.__name__} that "
        "its init_state gives, or the step before"
    )


class Steps:
    """What `step_apart` asks of an attention."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.ran: set[str] = set()

    def forward(self, call: Call) -> Tensor:
        out = run(self.core, call)
        self.ran |= set((self.core.last_backend or "").split(" and "))
        return out

    def step(self, call: Call, state: State) -> tuple[Tensor, State]:
        out, after = _step(self.core, call, state)
        self.ran.add(self.core.last_backend or "")
        return out, after

    def empty_state(self, call: Call) -> State:
        batch_size, kv_heads, _, head_dim = call.k.shape
        like, value_dim = call.k, call.v.shape[3]
        sizes = StateSizes(batch_size, kv_heads, head_dim, None, like.dtype, like.device, value_dim)
        return self.core.engine.init_state(sizes)


def _step(core: Core, call: Call, state: State) -> tuple[Tensor, State]:
    """As `step`, of a call without segments."""
    call = clear_padding(call)
    core.engine.check_inputs(call)
    many = call.query_length > 1
    shielded, poisoned = shield_past(call, may_stall=True) if many else (call, None)
    placed = core.place(shielded, state.seen)
    out, core.last_backend, after = core.attend(placed, core.backend, state)
    if poisoned is None:
        return out, after
    # The rows came from a past without the bad token; the tokens to come must meet it.
    placed = core.place(call, state.seen)
    return poison(out, poisoned), core.attend(placed, core.backend, state)[2]


def _check_packs(core: Core) -> None:
    """Raise UnsupportedError where an attention does to tokens what knows no segments."""
    if not core.packs:
        raise UnsupportedError(
            f"{core.spec.name} keeps the pieces of packed rows apart by cutting them, for which it "
            "reads segments; in a graph or transform, where it cannot, use standard, or give the "
            "pieces as samples with key_mask"
        )


def _takes_uncut(core: Core) -> bool:
    """Whether the backend that is asked for by name takes packed rows as they are."""
    return any(one.uncut for one in core.engine.backends if one.name == core.backend)


def _of_nothing(core: Core, call: Call) -> Tensor:
    """Rows of zeros for a call without samples, queries or keys, whose gradients are zeros too."""
    core.last_backend = "reference"
    given = (call.q, call.k, call.v, *call.inputs.values(), *core.parameters())
    empty = (x.flatten()[:0].sum() for x in given)
    return call.q.new_zeros(*call.q.shape[:3], core.value_width(call)) + sum(
        x.to(call.q.dtype) for x in empty
    )
