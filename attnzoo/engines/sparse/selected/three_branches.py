"""Softmax over blocks as wholes, over the blocks that these select, and over a window, each row of
each times a gate: the engine of native sparse attention."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import Backend, Cost, Shape, StateSizes, never_refuses
from attnzoo.engines.softmax.cache import KeyValueCache
from attnzoo.engines.softmax.native import one_row
from attnzoo.engines.sparse.selected.pooled_softmax import PooledSoftmax
from attnzoo.engines.sparse.selected.selected_softmax import SelectedSoftmax, with_sums
from attnzoo.engines.sparse.selected.selection import Placed, Selector
from attnzoo.engines.sparse.windows.window_sparse import WindowSparse
from attnzoo.engines.stretch_sums import KEY_SUMS, VALUE_SUMS
from attnzoo.engines.weighted import Branch, Weighted
from attnzoo.spec import Input

AXES = "batch heads queries"
#: How much of each branch a row gets.
COMPRESSED_GATE = Input("compressed_gate", AXES)
SELECTED_GATE = Input("selected_gate", AXES)
WINDOW_GATE = Input("window_gate", AXES)
GATES = (COMPRESSED_GATE, SELECTED_GATE, WINDOW_GATE)
ABSENT = 1 / 3  # what a branch weighs whose gate a call does not bring


class BranchSelector(Selector):
    """Selects blocks by what a row weighs of the blocks as wholes."""

    @abstractmethod
    def row_why_not(self) -> str | None:
        """Why compiled code does not do that; None where it does."""

    @abstractmethod
    def with_row(self, placed: Placed) -> tuple[Tensor, Tensor]:
        """By compiled code, of the one query of a call: its row over the blocks as wholes, (batch,
        heads, 1, value_dim), and the blocks that it sees, (batch, kv_heads, width)."""


class ThreeBranches(Weighted):
    """The sum of three attentions to the same queries, keys and values. Decoding keeps keys and
    values once.

    Its backends in order: `native_row`, one query in C++, where that has been compiled; `branches`,
    each branch by the backend that it chooses; the reference.
    """

    def __init__(
        self, compressed: PooledSoftmax, selected: SelectedSoftmax, window: WindowSparse
    ) -> None:
        super().__init__()
        self.compressed, self.selected, self.window = compressed, selected, window
        assert isinstance(selected.selector, BranchSelector)
        self.selector = selected.selector

    @property
    def engines(self) -> tuple[PooledSoftmax, SelectedSoftmax, WindowSparse]:
        return self.compressed, self.selected, self.window

    def branches(self, call: Call) -> Sequence[Branch]:
        kept = [one for one in (KEY_SUMS, VALUE_SUMS) if one.name in call.inputs]
        sums = {one.name: call.inputs[one.name] for one in kept}
        plain = replace(call, inputs=sums, declared=tuple(kept))
        gates = [call.get(gate.name) for gate in GATES]
        factors = [call.q.new_tensor(ABSENT) if x is None else x[..., None] for x in gates]
        return [
            Branch(engine, plain, factor)
            for engine, factor in zip(self.engines, factors, strict=True)
        ]

    @property
    def state_type(self) -> type | None:
        return KeyValueCache

    def init_state(self, sizes: StateSizes) -> KeyValueCache:
        return KeyValueCache.empty(sizes, None)

    def with_past(self, call: Call, state: KeyValueCache) -> tuple[Call, KeyValueCache]:
        state = state.append(call)
        whole = call.over(call.q, state.k, state.v, state.key_mask)
        whole = replace(whole, inputs=dict(call.inputs))
        return with_sums(whole, state, self.compressed.pooling.stride, of_values=True)

    def cost(self, shape: Shape) -> Cost:
        """The sum of the branches', with their inputs and a state of keys and values once."""
        each = [engine.cost(shape) for engine in self.engines]
        gates = len(GATES) * shape.batch_size * shape.heads * shape.query_length
        a_token = 2 * shape.batch_size * shape.kv_heads * shape.head_dim
        learned = sum(one.parameters for one in each)
        return Cost(
            macs=sum(one.macs for one in each),
            support_macs=sum(one.support_macs for one in each),
            skipped_macs=sum(one.skipped_macs for one in each),
            elementwise=sum(one.elementwise for one in each),
            parameters=learned,
            moved_bytes=shape.input_bytes
            + shape.query_bytes
            + (gates + learned) * shape.dtype.itemsize,
            state_elements=a_token * shape.key_length,
            state_bytes=a_token * shape.key_length * shape.dtype.itemsize,
            state_growth=a_token * shape.dtype.itemsize,
        )


def _each_by_its_own(engine: ThreeBranches, call: Call) -> Tensor:
    first, *others = engine.branches(call)
    total = first.weighed(first.engine(first.call)[0])
    for one in others:  # one at a time: each is as large as the output
        total = total + one.weighed(one.engine(one.call)[0])
    return total.to(call.q.dtype)


def _reference(engine: ThreeBranches, call: Call) -> Tensor:
    weights = engine.matrix(call)
    v = call.v.repeat_interleave(call.group, 1).to(weights.dtype)
    return (weights @ v).to(call.q.dtype)


def _one_row(engine: ThreeBranches, call: Call) -> Tensor:
    placed, size = Placed.of(call), engine.selector.block_size
    compressed, blocks = engine.selector.with_row(placed)
    parts = (
        compressed,
        one_row.attend(engine.selected, placed.call, blocks=blocks, block_size=size),
        one_row.attend(engine.window, _near(call, engine.window.pattern.window)),
    )
    total = None
    for gate, rows in zip(GATES, parts, strict=True):
        factor = call.get(gate.name)
        weighed = rows * (ABSENT if factor is None else factor[..., None])
        total = weighed if total is None else total + weighed
    assert total is not None
    return total.to(call.q.dtype)


def _near(call: Call, window: int) -> Call:
    """The call with its last keys alone."""
    length = call.key_length
    if length <= window:
        return call
    mask = None if call.key_mask is None else call.key_mask[:, -window:]
    k, v = (x.narrow(2, length - window, window) for x in (call.k, call.v))
    return call.over(call.q, k, v, mask)


def _one_row_why_not(engine: ThreeBranches, call: Call) -> str | None:
    return engine.selector.row_why_not() or one_row.why_not(engine.window, call)


ThreeBranches.backends = (
    one_row.backend(_one_row, _one_row_why_not),
    Backend("branches", _each_by_its_own, never_refuses),
    Backend("reference", _reference, never_refuses),
)
