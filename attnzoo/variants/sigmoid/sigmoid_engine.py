"""The engine of sigmoid attention: scores as softmax has them, and each weighed by itself.

    A_ij = σ(scale · q_i·k_j + bias_ij + b_i)

What masks hide weighs 0, and so a row that sees nothing is 0.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attnzoo.call import Call, repeat_heads
from attnzoo.eager import is_recorded
from attnzoo.engines.engine import Backend, Cost, Shape, accumulation_dtype, never_refuses
from attnzoo.engines.piece_by_piece import join
from attnzoo.engines.softmax import rows
from attnzoo.engines.softmax.distance_bias import DISTANCE_BIAS
from attnzoo.engines.softmax.native import one_row
from attnzoo.engines.softmax.reference import additive, visible
from attnzoo.engines.softmax.sdpa import FEW_ROWS
from attnzoo.engines.softmax.softmax import Softmax
from attnzoo.engines.softmax.tiles import row_tiles, tiles


class SigmoidEngine(Softmax):
    """Sigmoid attention.

    scale: factor of the products, 1/sqrt(head_dim) by default
    bias: b of every row; None: −log of the number of keys that the row sees

    Its backends in order: `native_row`, one query in C++, where that has been compiled; `tiles` on
    a CPU, a few rows at a time in cache; `rows`, a few rows at a time in operators that graphs and
    transforms can follow; the reference.
    """

    def __init__(self, scale: float | None = None, bias: float | None = None) -> None:
        super().__init__(scale)
        if bias is not None and (
            not isinstance(bias, int | float) or isinstance(bias, bool) or not math.isfinite(bias)
        ):
            raise ValueError(
                f"bias={bias!r} must be a finite number, such as -log of the length trained with, "
                "or None for -log of the number of keys that a row sees"
            )
        self.bias = bias

    def weigh_(self, scores: Tensor) -> None:
        torch.sigmoid(scores, out=scores)

    def through_weights_(self, slopes: Tensor, weights: Tensor) -> None:
        torch.ops.aten.sigmoid_backward.grad_input(slopes, weights, grad_input=slopes)

    def matrix(self, call: Call) -> Tensor:
        dtype = accumulation_dtype(call.q.dtype)
        q, k = call.q.to(dtype), repeat_heads(call.k, call.group).to(dtype)
        scores = (q @ k.mT) * self.scale_of(call.q) + self.bias_of_rows(call, dtype)[..., None]
        bias, mask = additive(call), visible(call)
        if bias is not None:
            scores = scores + bias.to(dtype)
        weights = scores.sigmoid()
        return weights if mask is None else weights.masked_fill(~mask, 0.0)

    def bias_of_rows(self, call: Call, dtype: torch.dtype) -> Tensor:
        """b of every row, broadcastable to (batch, heads, query_length)."""
        if self.bias is not None:
            return call.q.new_tensor(self.bias, dtype=dtype)[None, None, None]
        plain = call.key_mask is None and call.attn_mask is None and call.segments is None
        if plain and call.query_length == 1 and not is_recorded():
            return call.q.new_full((1, 1, 1), -math.log(max(1, call.key_length)), dtype=dtype)
        counts = torch.arange(call.key_length + 1, device=call.q.device).clamp(min=1)
        return -counts.to(dtype).log()[seen_keys(call)]  # one table, whatever is padded

    def cost(self, shape: Shape) -> Cost:
        found = super().cost(shape)
        scores = shape.batch_size * shape.heads * shape.query_length * shape.key_length
        of_counts = shape.key_length + 1 if self.bias is None else 0
        return replace(found, elementwise=scores + of_counts)


def seen_keys(call: Call) -> Tensor:
    """How many keys the masks let every row see, broadcastable to (batch, heads, query_length)."""
    mask = call.attn_mask
    if mask is not None or call.segments is not None:
        shown = visible(call)
        if mask is not None and mask.is_floating_point():
            open_ = mask > -torch.inf
            shown = open_ if shown is None else shown & open_
        assert shown is not None
        return shown.expand(*shown.shape[:-1], call.key_length).sum(-1)
    positions = torch.arange(call.query_length, device=call.q.device) + call.offset
    if call.key_mask is None:
        last = positions if call.is_causal else torch.full_like(positions, call.key_length - 1)
        return (last + 1).clamp(min=0)[None, None]
    real = call.key_mask.cumsum(-1)
    if not call.is_causal:
        return real[:, None, -1:]
    seen = real[:, positions.clamp(min=0)].masked_fill(positions < 0, 0)
    return seen[:, None]


def attend(engine: SigmoidEngine, call: Call) -> Tensor:
    """A·v, (batch, heads, query_length, value_dim), by A itself, in q's dtype."""
    weights = engine.matrix(call)
    return (weights @ repeat_heads(call.v, call.group).to(weights.dtype)).to(call.q.dtype)


def _in_rows(engine: SigmoidEngine, call: Call) -> Tensor:
    return join((attend(engine, part) for part in rows.parts(call)), call.query_length, 2)


def _in_tiles(engine: SigmoidEngine, call: Call) -> Tensor:
    dtype, bias = accumulation_dtype(call.q.dtype), call.get(DISTANCE_BIAS.name)
    of_rows = engine.bias_of_rows(call, dtype)[:, 0].expand(-1, call.query_length).contiguous()
    openly = partial(attend, engine)
    return row_tiles.attend(engine, call, openly, bias=bias, row_bias=of_rows)


def _tiles_why_not(engine: SigmoidEngine, call: Call) -> str | None:
    if call.query_length <= FEW_ROWS < call.key_length:
        return f"{call.query_length} queries make no tile: leave them to rows"
    if call.attn_mask is not None:
        return "an attn_mask would have to be cut into tiles: leave it to rows"
    bias = call.get(DISTANCE_BIAS.name)
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        return "a learned distance_bias gets no gradient from tiles"
    return tiles.cannot_work_alone(engine, call)


def _one_row(engine: SigmoidEngine, call: Call) -> Tensor:
    return one_row.attend(engine, call, is_sigmoid=True, row_bias=engine.bias)


SigmoidEngine.backends = (
    one_row.backend(_one_row),
    Backend("tiles", _in_tiles, _tiles_why_not),
    Backend("rows", _in_rows, rows.why_not),
    Backend("reference", attend, never_refuses, packs=True),
)
