"""The zoo's engines counted apart from the module they stand in, and their long token loops without
being unrolled.

An engine that runs many operators is one operator in the module's own trace, and is traced alone:
what tracing costs grows faster than the number of operators, and engines that run the same
operators on the same shapes are traced once.

The linear engine walks over the tokens in chunks: over the keys and then over the queries, or
causally over the keys that every query sees and then over both at once; a gated state walks over
all keys alike. The first chunk of a walk has no past and the last may be short or need not be
remembered; every chunk between runs the same operators on the same shapes. So with the remainders
held fixed the cost of a forward is affine in the number of chunks of each walk, from three full
ones on, and three short forwards give the cost of any long one exactly. So do three of attention in
tiles, and four of a walk over a tree of states, which is affine also in how many of these each
chunk finds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.call import Call
from attnzoo.engines.engine import Engine
from attnzoo.engines.linear.causal.chunks import CAUSAL_CHUNK
from attnzoo.engines.linear.gated.gated_linear import GatedLinear
from attnzoo.engines.linear.linear import Linear
from attnzoo.engines.linear.log_linear.tree_chunks import CHUNK as TREE_CHUNK
from attnzoo.engines.linear.log_linear.tree_cost import buckets_before
from attnzoo.engines.linear.log_linear.tree_linear import LogLinear
from attnzoo.engines.linear.sums import CHUNK

FOLDED_FROM = 6 * CHUNK  # tokens; below, the whole loop is traced
# Backends that run many operators.
APART = ("windows", "columns", "blocks", "ragged", "chunked", "open", "tiled")
Count = Callable[..., Counter[str]]


@dataclass(frozen=True)
class _Forward:
    """One forward of an engine, by its sizes.

    layout: what else decides which operators run on which shapes.
    """

    engine: Engine
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    padded: bool
    is_causal: bool
    backend: str
    layout: Hashable

    @property
    def same(self) -> Hashable:
        """Equal for two forwards whose counts are."""
        return (
            self.layout,
            self.q,
            self.k,
            self.v,
            self.dtype,
            self.padded,
            self.is_causal,
            self.backend,
        )

    def counted(self, count: Count) -> Counter[str]:
        """Operations by operator. count: of one call of a module."""
        side = self.engine.square_tiles
        if side is not None and self.q[2] == self.k[2] >= 4 * side:
            return self._in_square_tiles(count, side)
        if (
            not isinstance(self.engine, Linear | GatedLinear)
            or max(self.q[2], self.k[2]) < FOLDED_FROM
        ):
            return count(_OneForward(self), *self._tensors(self.q[2], self.k[2]))
        if isinstance(self.engine, LogLinear):
            return self._in_tree(count)
        walks = self._walks()
        short = [
            length if length < 4 * chunk else length % chunk + 3 * chunk for length, chunk in walks
        ]
        at_short = count(_OneForward(self), *self._walked(*short))
        counted = Counter(at_short)
        for place, (length, chunk) in enumerate(walks):
            if left_out := (length - short[place]) // chunk:
                longer = [*short[:place], short[place] + chunk, *short[place + 1 :]]
                at_next = count(_OneForward(self), *self._walked(*longer))
                counted.update(
                    {name: left_out * (at_next[name] - at_short[name]) for name in at_next}
                )
        return counted

    def _in_square_tiles(self, count: Count, size: int) -> Counter[str]:
        """With the remainder held fixed the cost is a polynomial of degree 2 in the number of
        blocks: Newton's forward differences."""
        blocks, rest = divmod(self.q[2], size)
        one, two, three = (
            count(_OneForward(self), *self._tensors(length, length))
            for length in (rest + n * size for n in (2, 3, 4))
        )
        steps = blocks - 2  # a walk through one block may be another than through several
        bends = steps * (steps - 1) // 2
        return Counter(
            {
                name: one[name]
                + steps * (two[name] - one[name])
                + bends * (three[name] - 2 * two[name] + one[name])
                for name in three
            }
        )

    def _in_tree(self, count: Count) -> Counter[str]:
        """A chunk that is not the last reads the buckets before it and changes them; the last
        reads them."""
        chunks, rest = divmod(self.k[2], TREE_CHUNK)
        more = int(rest > 0)
        three, four, five, nine = (
            count(_OneForward(self), *self._walked((n - more) * TREE_CHUNK + rest, 0))
            for n in (3, 4, 5, 9)
        )
        chunks += more
        read, changed = buckets_before(chunks) - 2, buckets_before(chunks - 1) - 1
        found = Counter[str]()
        for name in nine:
            step = four[name] - three[name]
            of_change = (nine[name] - five[name] - 4 * step) // 4
            of_read = step - (five[name] - four[name]) + of_change
            of_chunk = step - 2 * of_read - of_change
            found[name] = three[name] + (chunks - 3) * of_chunk + read * of_read
            found[name] += changed * of_change
        return found

    def _walks(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Tokens and chunk of both walks: queries and keys, or causally the tokens seen side by
        side and the keys before them."""
        queries, keys = self.q[2], self.k[2]
        if isinstance(self.engine, GatedLinear):  # before the first query as behind it
            return (keys, CAUSAL_CHUNK), (0, CHUNK)
        if self.is_causal:
            return (min(queries, keys), CAUSAL_CHUNK), (max(0, keys - queries), CHUNK)
        return (queries, CHUNK), (keys, CHUNK)

    def _walked(self, first: int, second: int) -> list[Tensor]:
        """Tensors whose walks have these lengths."""
        if not self.is_causal:
            return self._tensors(first, second)
        blind = max(
            0, self.q[2] - self.k[2]
        )  # queries before the first key, which are not computed
        return self._tensors(first + blind, first + second)

    def _tensors(self, queries: int, keys: int) -> list[Tensor]:
        lengths = (queries, keys, keys)
        shapes = zip((self.q, self.k, self.v), lengths, strict=True)
        tensors = [
            torch.zeros(*shape[:2], length, shape[3], dtype=self.dtype, device=self.device)
            for shape, length in shapes
        ]
        return (
            [*tensors, torch.ones(self.k[0], keys, dtype=torch.bool, device=self.device)]
            if self.padded
            else tensors
        )


class _OneForward(nn.Module):
    def __init__(self, forward: _Forward) -> None:
        super().__init__()
        self.engine, self.is_causal, self.backend = (
            forward.engine,
            forward.is_causal,
            forward.backend,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        # The class's own forward, since the instance's is replaced.
        return type(self.engine).forward(
            self.engine, Call(q, k, v, key_mask, None, self.is_causal), self.backend
        )[0]


class Apart(torch.autograd.Function):
    """Stands in the graph for one forward of an engine; `place` says which."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, place: int) -> Tensor:
        return q.new_zeros(*q.shape[:3], v.shape[3])


def _sizes(x: Tensor) -> tuple[int, ...]:
    """As plain integers; while tracing they are tensors."""
    return tuple(int(size) for size in x.shape)


@contextmanager
def engines_apart(
    module: nn.Module, count: Count
) -> Iterator[Callable[[list[Any], list[Any]], Counter[str]]]:
    """Inside, a forward of an engine that runs many operators is one operator,
    `prim::PythonOp.Apart`, whose handle is given."""
    found: list[_Forward] = []
    known: dict[Hashable, Counter[str]] = {}

    def standing_in(engine: Engine) -> Callable[..., tuple[Tensor, str, Any]]:
        def forward(
            call: Call, backend: str = "auto", state: Any = None
        ) -> tuple[Tensor, str, Any]:
            if state is not None:
                return type(engine).forward(engine, call, backend, state)
            chosen = engine.choose(engine.completed(call), backend).name
            (q, k, v), is_causal = (
                (_sizes(x) for x in (call.q, call.k, call.v)),
                bool(call.is_causal),
            )
            # What a feature map of the user's own calls by its module has a line of its own in the
            # table by module.
            within = max(q[2], k[2]) < FOLDED_FROM and any(
                any(child.children()) for child in engine.children()
            )
            more = any(one.has_length for one, _ in call.given())  # what the module makes besides
            if chosen not in APART or within or more or call.attn_mask is not None:
                return type(engine).forward(engine, call, backend)
            layout = engine.layout(q[1], q[2], k[2], is_causal)
            found.append(
                _Forward(
                    engine,
                    q,
                    k,
                    v,
                    call.q.dtype,
                    call.q.device,
                    call.key_mask is not None,
                    is_causal,
                    chosen,
                    layout,
                )
            )
            return Apart.apply(call.q, call.k, call.v, len(found) - 1), chosen, None

        return forward

    def handle(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        (place,) = outputs[0].node().scalar_args()
        forward = found[place]
        if forward.same not in known:
            known[forward.same] = forward.counted(count)
        return known[forward.same]

    engines = [
        engine for engine in module.modules() if isinstance(engine, Engine) and engine.counted_apart
    ]
    for engine in engines:
        engine.forward = standing_in(engine)
    try:
        yield handle
    finally:
        for engine in engines:
            del engine.forward
