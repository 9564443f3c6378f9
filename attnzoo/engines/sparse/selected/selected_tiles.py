"""Backend `tiles` of selected blocks, on a CPU: the rows that see a block of keys are gathered, and
one product scores them all, some at a time, in memory that stays in the processor's cache.

What is left of each row beside each of its blocks is merged in the end. The backward pass computes
the weights again, so that autograd keeps q, k, v, the rows and one number for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.differentiable import is_followed, open_gradients
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.softmax.tiles.tile_pieces import Memory
from attnzoo.engines.softmax.tiles.tiles import DTYPES, cannot_work_alone
from attnzoo.engines.sparse.selected.gathered_rows import Layout, Piece, RowTiles
from attnzoo.engines.sparse.selected.grouped_rows import heads_of, rows_of
from attnzoo.engines.sparse.selected.selected_rows import attend_selected
from attnzoo.engines.sparse.selected.selection import Placed, Selection


def why_not(engine: SoftmaxReference, call: Call) -> str | None:
    """Why tiles refuse the call; None when they take it."""
    if call.q.dtype not in DTYPES:
        return f"sums of {call.q.dtype} run in float32, and tiles have one dtype"
    if call.query_length == 1:
        return "one query has no rows to gather"
    return cannot_work_alone(engine, call)


def attend_in_tiles(
    engine: SoftmaxReference, placed: Placed, selection: Selection, block_size: int
) -> Tensor:
    """As `attend_selected`, of a call that `why_not` accepts."""
    call = placed.call
    compute = partial(in_open_operators, engine, placed, selection, block_size)
    layout = Layout(placed, selection, block_size, engine.scale_of(call.q))
    return _Attend.apply(call.q, call.k, call.v, layout, compute)  # pyright: ignore[reportReturnType]


def in_open_operators(
    engine: SoftmaxReference,
    placed: Placed,
    selection: Selection,
    block_size: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    """As `attend_selected` of the call with other q, k and v: operators that autograd follows."""
    call = replace(placed.call, q=q, k=k, v=v)
    return attend_selected(engine, replace(placed, call=call), selection, block_size)


class _Attend(torch.autograd.Function):
    """`attend_in_tiles`, and its gradients from weights that are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        compute: Callable[..., Tensor],
    ) -> Tensor:
        call, lowest = layout.call, torch.finfo(q.dtype).min
        rows, keys, values = rows_of(q, call), k.flatten(0, 1), v.flatten(0, 1)
        out, memory = rows.new_empty(*rows.shape[:2], v.shape[3]), layout.memory(q)
        shares = rows.new_empty(*rows.shape[:2], layout.selection.blocks.shape[3])
        for head, tiles, key_cap in layout.key_heads():
            slots = len(tiles.rows)
            parts = memory("parts", slots + 1, v.shape[3])
            # Of every slot the largest score and weight, from which follows the sum of its weights.
            scores, weights = memory("largest", slots + 1), memory("heaviest", slots + 1)
            parts[slots], scores[slots], weights[slots] = 0.0, lowest, 1.0
            padded = _padded(rows[head], "padded", memory)
            for piece in tiles.pieces(layout.block_size, k.shape[2]):
                largest, heaviest = scores[piece.slots], weights[piece.slots]
                weighed, _ = _weigh(
                    layout, tiles, piece, padded, keys[head], key_cap, memory, largest
                )
                torch.amax(weighed, -1, out=heaviest.view(weighed.shape[:2]))
                if key_cap is not None:
                    heaviest.masked_fill_(heaviest == 0, 1.0)
                its_values = values[head, piece.keys].expand(len(weighed), -1, -1)
                torch.bmm(weighed, its_values, out=parts[piece.slots].view(*weighed.shape[:2], -1))
            log_sums = scores.clamp_(min=lowest)[tiles.place] - weights[tiles.place].log_()
            torch.softmax(log_sums, -1, out=shares[head])
            out[head] = F.embedding_bag(
                tiles.place, parts, mode="sum", per_sample_weights=shares[head]
            )
        result = heads_of(out, call)
        ctx.layout, ctx.compute = layout, compute
        ctx.save_for_backward(q, k, v, result, shares)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, shares = ctx.saved_tensors
        if is_followed(gradients[0]):
            return *open_gradients(ctx.compute, (q, k, v), gradients[0]), None, None
        layout, call = ctx.layout, ctx.layout.call
        memory = layout.memory(q, backward=True)
        rows, sent, results = (rows_of(x, call) for x in (q, gradients[0], out))
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        means = F.pad((sent * results).sum(-1, keepdim=True), (0, 0, 0, 1))
        dq = rows.new_zeros(rows.shape[0], rows.shape[1] + 1, rows.shape[2])
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        for head, tiles, key_cap in layout.key_heads():
            padded = _padded(rows[head], "padded", memory)
            padded_sent = _padded(sent[head], "padded sent", memory)
            share = memory("share", len(tiles.rows) + 1).zero_()
            share[tiles.place] = shares[head]
            largest = memory("largest", len(tiles.rows))
            for piece in tiles.pieces(layout.block_size, k.shape[2]):
                weights, its_rows = _weigh(
                    layout,
                    tiles,
                    piece,
                    padded,
                    keys[head],
                    key_cap,
                    memory,
                    largest[piece.slots],
                )
                sizes, weights = weights.shape, weights.flatten(0, 1)
                weights.mul_(share[piece.slots, None])
                its_sent = _gathered(padded_sent, piece.rows, "sent", memory)
                its_values = values[head, piece.keys].expand(sizes[0], -1, -1)
                slopes = memory("slopes", *sizes)
                torch.bmm(its_sent.view(*sizes[:2], -1), its_values.mT, out=slopes)
                slopes = slopes.flatten(0, 1).sub_(means[head][piece.rows]).mul_(weights)
                dv[head, piece.keys].addmm_(weights.mT, its_sent)
                dk[head, piece.keys].addmm_(slopes.mT, its_rows, alpha=layout.scale)
                its_keys = keys[head, piece.keys].expand(sizes[0], -1, -1)
                part = memory("part", *sizes[:2], q.shape[3])
                slopes = slopes.view(sizes)
                torch.baddbmm(part, slopes, its_keys, beta=0, alpha=layout.scale, out=part)
                dq[head].index_add_(0, piece.rows, part.flatten(0, 1))
        dk, dv = (x.unflatten(0, k.shape[:2]) for x in (dk, dv))
        return heads_of(dq[:, :-1], call), dk, dv, None, None


def _padded(rows: Tensor, name: str, memory: Memory) -> Tensor:
    """The rows and one of zeros behind them, in the memory of this name."""
    padded = memory(name, rows.shape[0] + 1, rows.shape[1])
    padded[:-1] = rows
    padded[-1] = 0.0
    return padded


def _weigh(
    layout: Layout,
    tiles: RowTiles,
    piece: Piece,
    rows: Tensor,
    keys: Tensor,
    key_cap: Tensor | None,
    memory: Memory,
    largest: Tensor,
) -> tuple[Tensor, Tensor]:
    """Softmax of the scores of a piece over its block alone, (tiles, size, keys), 0 where a row
    sees no key, and its rows, (tiles · size, head_dim), in the memories named "scores" and "rows".

    rows: (rows + 1, head_dim), of the key head
    keys: (key_length, head_dim)
    largest: (tiles · size,), where the largest score of every row is written
    """
    gathered, keys = _gathered(rows, piece.rows, "rows", memory), keys[piece.keys]
    count = len(gathered) // tiles.size
    scores = memory("scores", count, tiles.size, len(keys))
    torch.baddbmm(
        scores,
        gathered.view(count, tiles.size, -1),
        keys.expand(count, -1, -1).mT,
        beta=0,
        alpha=layout.scale,
        out=scores,
    )
    if piece.hidden is not None:
        scores.flatten(0, 1)[: len(piece.hidden)].masked_fill_(piece.hidden, -torch.inf)
    if key_cap is not None:
        torch.minimum(scores, key_cap[piece.keys], out=scores)
    torch.amax(scores, -1, out=largest.view(scores.shape[:2]))
    # Not powers of 2: torch's softmax is one pass, and in it no row's numbers depend on where among
    # others it stands.
    torch.softmax(scores, -1, out=scores)
    if key_cap is not None:
        scores.masked_fill_((largest == -torch.inf).view(*scores.shape[:2], 1), 0.0)
    return scores, gathered


def _gathered(x: Tensor, rows: Tensor, name: str, memory: Memory) -> Tensor:
    found = memory(name, len(rows), x.shape[1])
    return torch.index_select(x, 0, rows, out=found)
