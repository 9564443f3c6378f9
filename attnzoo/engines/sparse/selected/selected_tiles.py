"""Backend `tiles` of selected blocks, on a CPU: the rows that see a block of keys are gathered, and
one product scores them all, some at a time, in memory that stays in the processor's cache.

What is left of each row beside each of its blocks is merged in the end. The backward pass computes
the weights again, so that autograd keeps q, k, v, the rows and one number for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.differentiable import is_followed, open_gradients
from attnzoo.engines.exponential import LOG2_E
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.softmax.tile_pieces import SCORES, Memory, cap
from attnzoo.engines.softmax.tiles import DTYPES, cannot_work_alone
from attnzoo.engines.sparse.selected.row_tiles import heads_of, rows_of
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
    compute = partial(_openly, engine, placed, selection, block_size)
    layout = _Layout(placed, selection, block_size, engine.scale_of(call.q))
    return _Attend.apply(call.q, call.k, call.v, layout, compute)  # pyright: ignore[reportReturnType]


def _openly(
    engine: SoftmaxReference,
    placed: Placed,
    selection: Selection,
    block_size: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    """The same in operators that autograd can follow."""
    call = replace(placed.call, q=q, k=k, v=v)
    return attend_selected(engine, replace(placed, call=call), selection, block_size)


@dataclass(frozen=True)
class Piece:
    """Some pairs of a row and a block that it sees, all of one block.

    pairs: their places among all pairs
    rows: (pairs,), ascending
    keys: the keys of the block
    hidden: (pairs, keys) bool, what stands behind a row; None: nothing
    """

    pairs: slice
    rows: Tensor
    keys: slice
    hidden: Tensor | None


@dataclass(frozen=True)
class Pairs:
    """The pairs of a row of one key head and a block that it sees, in order of blocks.

    rows: (pairs,)
    counts: how many each block has
    place: (rows, width), where the pairs of a row stand; the number of pairs where it has fewer
    positions: (rows,), where the rows stand among the keys; None: any sees what is behind it
    """

    rows: Tensor
    counts: list[int]
    place: Tensor
    positions: Tensor | None

    @classmethod
    def of(cls, chosen: Tensor, key_blocks: int, positions: Tensor | None) -> Pairs:
        """chosen: (rows, width), key blocks, negative for none."""
        blocks = torch.where(chosen < 0, key_blocks, chosen).flatten()
        order = blocks.sort(stable=True).indices
        counts = blocks.bincount(minlength=key_blocks)[:key_blocks].tolist()
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        place = place.clamp_(max=sum(counts)).view_as(chosen)
        return cls(order[: sum(counts)] // chosen.shape[1], counts, place, positions)

    def pieces(self, block_size: int, key_length: int) -> Iterator[Piece]:
        """All pairs, so many at a time that their scores stay in cache."""
        most, start = max(1, SCORES * torch.get_num_threads() // block_size), 0
        for block, count in enumerate(self.counts):
            keys = slice(block * block_size, min((block + 1) * block_size, key_length))
            for first in range(start, start + count, most):
                pairs = slice(first, min(first + most, start + count))
                rows = self.rows[pairs]
                yield Piece(pairs, rows, keys, self._hidden(rows, keys))
            start += count

    def _hidden(self, rows: Tensor, keys: slice) -> Tensor | None:
        if self.positions is None or int(self.positions[rows[0]]) >= keys.stop - 1:
            return None
        return self.positions[rows][:, None] < torch.arange(keys.start, keys.stop)


@dataclass(frozen=True)
class _Layout:
    """What a forward and its backward pass walk over.

    scale: the factor of the scores
    """

    placed: Placed
    selection: Selection
    block_size: int
    scale: float

    @property
    def call(self) -> Call:
        return self.placed.call

    def key_heads(self) -> Iterator[tuple[int, Pairs, Tensor | None]]:
        """Every (sample, key head) by its number, its pairs, and a cap of its keys, (key_length,)
        of `tile_pieces.cap`, where some are padded."""
        call, group = self.call, self.call.group
        chosen, width = self.selection.blocks, self.selection.blocks.shape[3]
        key_blocks = -(-call.key_length // self.block_size)
        for sample in range(call.q.shape[0]):
            one = min(sample, self.placed.positions.shape[0] - 1)
            positions = None
            if call.is_causal:
                positions = self.placed.positions[one].repeat_interleave(group)
            mask = None if call.key_mask is None else call.key_mask[sample]
            key_cap = None if mask is None or bool(mask.all()) else cap(mask, call.q)
            for kv_head in range(call.k.shape[1]):
                # Not of all heads at once: repeated for every query, choices are many numbers.
                heads = torch.arange(kv_head * group, (kv_head + 1) * group)
                own = chosen[sample, heads * chosen.shape[1] // call.q.shape[1]]
                if self.selection.choice_of is not None:
                    of_sample = min(sample, self.selection.choice_of.shape[0] - 1)
                    own = own[:, self.selection.choice_of[of_sample]]
                rows = own.transpose(0, 1).reshape(-1, width)
                pairs = Pairs.of(rows, key_blocks, positions)
                yield sample * call.k.shape[1] + kv_head, pairs, key_cap


class _Attend(torch.autograd.Function):
    """`attend_in_tiles`, and its gradients from weights that are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: _Layout,
        compute: Callable[..., Tensor],
    ) -> Tensor:
        call = layout.call
        rows, keys, values = rows_of(q, call), k.flatten(0, 1), v.flatten(0, 1)
        out, memory = rows.new_empty(*rows.shape[:2], v.shape[3]), Memory(q)
        log_sums = rows.new_empty(rows.shape[:2])
        for head, pairs, key_cap in layout.key_heads():
            count = len(pairs.rows)
            parts = memory("parts", count + 1, v.shape[3])
            largest, total = memory("largest", count + 1, 1), memory("total", count + 1, 1)
            parts[count], total[count] = 0.0, 0.0
            largest[count] = torch.finfo(q.dtype).min
            for piece in pairs.pieces(layout.block_size, k.shape[2]):
                scores, _ = _scores(layout, piece, rows[head], keys[head], key_cap, memory)
                most = largest[piece.pairs]
                torch.amax(scores, -1, keepdim=True, out=most)
                scores.sub_(most.clamp_(min=torch.finfo(q.dtype).min)).exp2_()
                torch.sum(scores, -1, keepdim=True, out=total[piece.pairs])
                torch.mm(scores, values[head, piece.keys], out=parts[piece.pairs])
            weights, log_sums[head] = _shares(largest[:, 0][pairs.place], total[:, 0][pairs.place])
            out[head] = F.embedding_bag(pairs.place, parts, mode="sum", per_sample_weights=weights)
        result = heads_of(out, call)
        ctx.layout, ctx.compute = layout, compute
        ctx.save_for_backward(q, k, v, result, log_sums)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums = ctx.saved_tensors
        if is_followed(gradients[0]):
            return *open_gradients(ctx.compute, (q, k, v), gradients[0]), None, None
        layout, call, memory = ctx.layout, ctx.layout.call, Memory(q)
        rows, sent, results = (rows_of(x, call) for x in (q, gradients[0], out))
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        means = (sent * results).sum(-1, keepdim=True)
        dq, dk, dv = torch.zeros_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
        for head, pairs, key_cap in layout.key_heads():
            log_sum = log_sums[head][:, None]
            for piece in pairs.pieces(layout.block_size, k.shape[2]):
                weights, its_rows = _scores(layout, piece, rows[head], keys[head], key_cap, memory)
                weights.sub_(log_sum[piece.rows]).exp2_()
                count, size = weights.shape
                sent_rows = _gathered(sent[head], piece.rows, "sent", memory)
                slopes = memory("slopes", count, size)
                torch.mm(sent_rows, values[head, piece.keys].mT, out=slopes)
                slopes.sub_(means[head][piece.rows]).mul_(weights)
                dv[head, piece.keys].addmm_(weights.mT, sent_rows)
                dk[head, piece.keys].addmm_(slopes.mT, its_rows, alpha=layout.scale)
                part = memory("part", count, q.shape[3])
                torch.addmm(
                    part, slopes, keys[head, piece.keys], beta=0, alpha=layout.scale, out=part
                )
                dq[head].index_add_(0, piece.rows, part)
        dk, dv = (x.unflatten(0, k.shape[:2]) for x in (dk, dv))
        return heads_of(dq, call), dk, dv, None, None


def _scores(
    layout: _Layout,
    piece: Piece,
    rows: Tensor,
    keys: Tensor,
    key_cap: Tensor | None,
    memory: Memory,
) -> tuple[Tensor, Tensor]:
    """Scores of a piece in powers of 2, (pairs, keys), -inf where hidden, and its rows, (pairs,
    head_dim), in the memories named "scores" and "rows".

    rows, keys: of the key head, (rows or key_length, head_dim)
    """
    gathered = _gathered(rows, piece.rows, "rows", memory)
    scores = memory("scores", len(gathered), piece.keys.stop - piece.keys.start)
    factor = layout.scale * LOG2_E
    torch.addmm(scores, gathered, keys[piece.keys].mT, beta=0, alpha=factor, out=scores)
    if piece.hidden is not None:
        scores.masked_fill_(piece.hidden, -torch.inf)
    if key_cap is not None:
        torch.minimum(scores, key_cap[piece.keys], out=scores)
    return scores, gathered


def _gathered(x: Tensor, rows: Tensor, name: str, memory: Memory) -> Tensor:
    found = memory(name, len(rows), x.shape[1])
    return torch.index_select(x, 0, rows, out=found)


def _shares(largest: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """What every part of a row counts in it, (rows, width), and the logarithm of the sum of the
    row's weights to base 2, (rows,); both 0 where the row sees nothing."""
    most = largest.amax(-1, keepdim=True)
    weights = (largest - most).exp2_()
    whole = (weights * total).sum(-1, keepdim=True)
    blind = whole == 0
    log_sums = torch.where(blind, 0.0, most + whole.log2())[:, 0]
    return weights / whole.masked_fill(blind, 1.0), log_sums
