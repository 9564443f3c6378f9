"""Long token loops counted without being unrolled.

The linear engine walks over the tokens in chunks: over the keys and then over the queries, or causally over the keys that every
query sees and then over both at once. The first chunk of a walk has no past and the last may be short or need not be remembered; every chunk
between runs the same operators on the same shapes. So with the remainders held fixed the cost of a forward is affine in the
number of chunks of each walk, from two full ones on, and three short forwards give the cost of any long one exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.call import Call
from attnzoo.engines.linear import Linear
from attnzoo.engines.linear_chunks import CAUSAL_CHUNK, CHUNK
from attnzoo.engines.softmax_tiled import Tiled

FOLDED_FROM = 6 * CHUNK  # tokens; below, the whole loop is traced
Count = Callable[..., Counter[str]]


@dataclass(frozen=True)
class _Forward:
    """One forward of an engine, by its sizes."""

    engine: Any
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    padded: bool
    is_causal: bool
    backend: str

    def counted(self, count: Count) -> Counter[str]:
        """Operations by operator. count: of one call of a module."""
        walks = self._walks()
        short = [length if length < 3 * chunk else length % chunk + 2 * chunk for length, chunk in walks]
        at_short = count(_OneForward(self), *self._inputs(*short))
        counted = Counter(at_short)
        for place, (length, chunk) in enumerate(walks):
            if left_out := (length - short[place]) // chunk:
                longer = [*short[:place], short[place] + chunk, *short[place + 1 :]]
                at_next = count(_OneForward(self), *self._inputs(*longer))
                counted.update({name: left_out * (at_next[name] - at_short[name]) for name in at_next})
        return counted

    def _walks(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Tokens and chunk of both walks: queries and keys, or causally the tokens seen side by side and the keys before them."""
        queries, keys = self.q[2], self.k[2]
        if self.is_causal:
            return (min(queries, keys), CAUSAL_CHUNK), (max(0, keys - queries), CHUNK)
        return (queries, CHUNK), (keys, CHUNK)

    def _inputs(self, first: int, second: int) -> list[Tensor]:
        """Tensors whose walks have these lengths."""
        if not self.is_causal:
            return self._tensors(first, second)
        blind = max(0, self.q[2] - self.k[2])  # queries before the first key, which nobody computes
        return self._tensors(first + blind, first + second)

    def _tensors(self, queries: int, keys: int) -> list[Tensor]:
        lengths = (queries, keys, keys)
        shapes = zip((self.q, self.k, self.v), lengths, strict=True)
        tensors = [torch.zeros(*shape[:2], length, shape[3], dtype=self.dtype, device=self.device) for shape, length in shapes]
        return [*tensors, torch.ones(self.k[0], keys, dtype=torch.bool, device=self.device)] if self.padded else tensors


class _SquareForward(_Forward):
    """One forward in tiles of as many queries as keys: with the remainder held fixed its cost is a polynomial of degree 2 in the number
    of blocks, which three short forwards give (Newton's forward differences)."""

    def counted(self, count: Count) -> Counter[str]:
        blocks, rest = divmod(self.q[2], self.engine.block_size)
        at = [count(_OneForward(self), *self._tensors(length, length)) for length in (rest + n * self.engine.block_size for n in (1, 2, 3))]
        steps = blocks - 1
        return Counter(
            {
                name: at[0][name] + steps * (at[1][name] - at[0][name]) + steps * (steps - 1) // 2 * (at[2][name] - 2 * at[1][name] + at[0][name])
                for name in at[2]
            }
        )


class _OneForward(nn.Module):
    def __init__(self, forward: _Forward) -> None:
        super().__init__()
        self.engine, self.is_causal, self.backend = forward.engine, forward.is_causal, forward.backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
        # Past the folding that stands in the engine's place.
        return type(self.engine).forward(self.engine, Call(q, k, v, key_mask, None, self.is_causal), self.backend)[0]


class FoldedLoop(torch.autograd.Function):
    """Stands in the graph for one long forward; `place` says which."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, place: int) -> Tensor:
        return q.new_zeros(*q.shape[:3], v.shape[3])


def _sizes(x: Tensor) -> tuple[int, ...]:
    """As plain integers; while tracing they are tensors."""
    return tuple(int(size) for size in x.shape)


def _kind(engine: Linear | Tiled, backend: str, queries: int, keys: int) -> type[_Forward] | None:
    """How a forward is folded; None where it is traced whole."""
    if backend == "chunked" and max(queries, keys) >= FOLDED_FROM:
        return _Forward
    if backend == "tiled" and queries == keys and isinstance(engine, Tiled) and queries >= 4 * engine.block_size:
        return _SquareForward
    return None


@contextmanager
def folded_loops(module: nn.Module, count: Count) -> Iterator[Callable[[list[Any], list[Any]], Counter[str]]]:
    """Inside, long forwards of linear engines become one operator, `prim::PythonOp.FoldedLoop`, whose handle is given."""
    found: list[_Forward] = []

    def folding(engine: Linear | Tiled) -> Callable[..., tuple[Tensor, str]]:
        def forward(call: Call, backend: str = "auto") -> tuple[Tensor, str]:
            q, k, v = call.q, call.k, call.v
            chosen = engine.choose(call, backend).name
            kind = _kind(engine, chosen, int(q.shape[2]), int(k.shape[2]))
            if kind is None or call.attn_mask is not None:
                return type(engine).forward(engine, call, backend)
            padded = call.key_mask is not None
            found.append(kind(engine, _sizes(q), _sizes(k), _sizes(v), q.dtype, q.device, padded, bool(call.is_causal), chosen))
            return FoldedLoop.apply(q, k, v, len(found) - 1), chosen

        return forward

    def handle(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        (place,) = outputs[0].node().scalar_args()
        return found[place].counted(count)

    engines = [engine for engine in module.modules() if isinstance(engine, Linear | Tiled)]
    for engine in engines:
        engine.forward = folding(engine)
    try:
        yield handle
    finally:
        for engine in engines:
            del engine.forward
