"""Engine 3, linear: A_ij = φ(q_i) · φ(k_j), normalised; multiplied through a state of width ×
value_dim numbers, in linear time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import Call, UnsupportedError
from attnzoo.engines.engine import Backend, Cost, Shape, StateSizes, never_refuses
from attnzoo.engines.linear import chunks, fla_kernel, gradient, linear_cost
from attnzoo.engines.linear.feature_maps import FeatureMap
from attnzoo.engines.linear.reference import REFERENCE, LinearReference
from attnzoo.engines.linear.sums import Past, absorb, read_all
from attnzoo.engines.piece_by_piece import join
from attnzoo.engines.softmax.cache import check_state


@dataclass(frozen=True)
class LinearState:
    """What decoding carries: `past` is None before the first token, and accumulated in float32 at
    least."""

    batch_size: int
    kv_heads: int
    max_length: int | None = None
    seen: int = 0
    past: Past | None = None

    def elements(self) -> int:
        """Numbers that the next query can read."""
        return 0 if self.past is None else self.past.sums.numel()

    def held_bytes(self) -> int:
        """Bytes of the sums, with their scale."""
        tensors = () if self.past is None else (self.past.sums, self.past.log_scale)
        return sum(x.nbytes for x in tensors if x is not None)

    def select(self, rows: Tensor) -> LinearState:
        """The state of these rows of the batch, (new_batch,) indices; a row may be taken more than
        once."""
        past = self.past
        if past is not None:
            past = Past(
                past.sums.index_select(0, rows),
                None if past.log_scale is None else past.log_scale.index_select(0, rows),
            )
        return replace(self, batch_size=rows.numel(), past=past)

    def check_room(self, call: Call) -> None:
        check_state(call, self.batch_size, self.kv_heads, self.seen, self.max_length)


class Linear(LinearReference):
    """Kernel attention through a feature map.

    Its backends in order: `chunked`, with a backward pass of its own; `open`, the same in operators
    that graphs and transforms can follow; `fla`, flash-linear-attention on CUDA; the reference.

    feature_map: as in `LinearReference`.
    """

    counted_apart = True

    def init_state(self, sizes: StateSizes) -> LinearState:
        return LinearState(sizes.batch_size, sizes.kv_heads, sizes.max_length)

    def forward(
        self, call: Call, backend: str = "auto", state: LinearState | None = None
    ) -> tuple[Tensor, str, Any]:
        if state is None:
            return super().forward(call, backend)
        if backend == "fla":
            raise UnsupportedError("backend='fla' does not decode; use backend='auto'")
        name = self.choose(call, backend).name
        one_by_one = name == "reference" or call.key_length == 1  # one token has no chunk to share
        out, past = (_recur if one_by_one else _scan)(self.feature_map, call, state.past)
        return out, name, replace(state, seen=state.seen + call.key_length, past=past)

    def cost(self, shape: Shape) -> Cost:
        return linear_cost.cost(self.feature_map, shape)


def _chunked(engine: Linear, call: Call) -> Tensor:
    return _behind_blind_rows(gradient.attend, engine, call)


def _chunked_why_not(engine: Linear, call: Call) -> str | None:
    return gradient.why_not(engine.feature_map, call)


def _open(engine: Linear, call: Call) -> Tensor:
    return _behind_blind_rows(gradient.attend_openly, engine, call)


def _behind_blind_rows(
    attend: Callable[[FeatureMap, Call], Tensor], engine: Linear, call: Call
) -> Tensor:
    """A·v by `attend`, which wants at most as many causal queries as keys: the others see none."""
    # Not max(0, -call.offset), which a compiler of symbolic lengths would carry along.
    blind = -call.offset if call.is_causal and call.offset < 0 else 0
    if not blind:
        return attend(engine.feature_map, call)
    out = attend(engine.feature_map, call.select(queries=slice(blind, None)))
    return torch.cat([out.new_zeros(*out.shape[:2], blind, out.shape[3]), out], 2)


def _scan(feature_map: FeatureMap, call: Call, past: Past | None) -> tuple[Tensor, Past | None]:
    """Causal attention of as many queries as keys, behind the past. Returns the rows and the past
    after them."""

    def rows() -> Iterator[Tensor]:
        nonlocal past
        for piece in chunks.causal(feature_map, call, past, remember_last=True):
            past = piece.after
            yield piece.rows

    out = join(rows(), call.key_length, 2)
    return out, past


def _recur(feature_map: FeatureMap, call: Call, past: Past | None) -> tuple[Tensor, Past | None]:
    """As `_scan`, the plain recurrence: each token is added to the past, then its query reads
    it."""
    rows = []
    for token in range(call.key_length):
        here = slice(token, token + 1)
        one = call if call.key_length == 1 else call.select(queries=here, keys=here)
        past = absorb(feature_map, one.k, one.v, one.key_mask, past)
        rows += read_all(feature_map, one, past)
    return torch.cat(rows, 2), past


Linear.backends = (
    Backend("chunked", _chunked, _chunked_why_not),
    Backend("open", _open, never_refuses),
    Backend("fla", fla_kernel.run, fla_kernel.why_not),  # by name only, until it has run on a GPU
    REFERENCE,
)
