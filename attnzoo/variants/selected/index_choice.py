"""Which keys an indexer chooses: single ones, or blocks by the best key of each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import can_look, is_recorded
from attnzoo.engines.engine import Shape
from attnzoo.engines.native.library import operators
from attnzoo.engines.piece_by_piece import at_a_time
from attnzoo.engines.sparse.selected.selected_tokens import TokenSelector, visible_of
from attnzoo.engines.sparse.selected.selection import (
    NONE,
    Placed,
    Selection,
    Selector,
    highest,
)
from attnzoo.variants.selected.index_scores import Indexer

SCORES = 2**20  # of an indexer, held at a time
ROUNDED = 2**20  # queries times keys, from which on scores are tried in float32


class TokensByIndex(TokenSelector):
    """The `top_k` keys of largest index score; of equal scores the earlier keys."""

    def __init__(self, indexer: Indexer, top_k: int) -> None:
        self.indexer, self.top_k = indexer, top_k

    def macs(self, shape: Shape) -> int:
        return self.indexer.macs(shape)

    def of_one(self, placed: Placed) -> Tensor:
        return self.indexer.best_of_one(placed, 1, self.top_k)

    @torch.no_grad()
    def shown(self, placed: Placed, rows: slice, length: int) -> Tensor:
        seen = visible_of(placed, rows, length)
        scores = self.indexer.scores(placed, rows, length).masked_fill(~seen, -torch.inf)
        if self.top_k >= length:
            return seen.expand_as(scores)
        least = scores.topk(self.top_k, -1, sorted=False).values.amin(-1, keepdim=True)
        better = ~(scores <= least) & seen  # whatever a NaN is compared with, its row shows it
        equal = (scores == least) & seen
        room = self.top_k - better.sum(-1, keepdim=True)
        if scores.is_meta:  # where torch's cumsum lays out a matrix of the length by the length
            return better | equal
        return better | (equal & (equal.cumsum(-1) <= room))


class BlocksByIndex(Selector):
    """The blocks whose best key has the largest index scores, `top_k` keys in all; of equal scores
    the earlier blocks."""

    def __init__(self, indexer: Indexer, top_k: int, block_size: int) -> None:
        self.indexer, self.block_size, self.blocks = indexer, block_size, top_k // block_size

    def width(self, key_blocks: int) -> int:
        return min(self.blocks, key_blocks)

    def sees_all(self, key_length: int) -> bool:
        return key_length <= self.blocks * self.block_size

    def macs(self, shape: Shape) -> int:
        return self.indexer.macs(shape)

    def elementwise(self, shape: Shape) -> int:
        return 0

    @torch.no_grad()
    def select(self, placed: Placed) -> Selection:
        return Selection(torch.cat(list(self._some_rows(placed)), 2))

    def of_one(self, placed: Placed) -> Tensor:
        return self.indexer.best_of_one(placed, self.block_size, self._width(placed.call))

    def native_why_not(self, call: Call) -> str | None:
        """Why the compiled operator does not choose; None where it does."""
        if any(x is not None and x.dtype == torch.float64 for x in self.indexer.given(call)):
            return "compiled index scores are of float32, got index inputs of torch.float64"
        return None

    @torch.no_grad()
    def select_natively(self, placed: Placed) -> Selection:
        """As `select`, by the compiled operator, of a call that `native_why_not` accepts."""
        call, errors = placed.call, self.indexer.error(placed)[:, 0, :, 0]
        q, k, w = (None if x is None else x.float() for x in self.indexer.given(call))
        blocks, left = operators().native_best_blocks(
            *(x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (q, k)),
            None if w is None else w.contiguous(),
            placed.positions if call.is_causal else None,
            None if call.key_mask is None else call.key_mask.contiguous(),
            errors.contiguous(),
            self.indexer.choosers(call),
            self.block_size,
            self._width(call),
        )
        rows = left.any(0).nonzero()[:, 0]  # whose scores are no numbers
        for some in rows.split(self._rows_together(call)) if rows.numel() else ():
            blocks[:, :, some] = self._exactly(placed, some, int(some[-1]) + 1)
        return Selection(blocks)

    def _some_rows(self, placed: Placed) -> Iterator[Tensor]:
        """The blocks of some queries after the other, (batch, choosers, queries, width)."""
        call, length = placed.call, int(placed.call.query_length)
        together = self._rows_together(call)
        error = self.indexer.error(placed) if self._may_round(call) else None
        for start in range(0, length, together):
            some = slice(start, min(start + together, length))
            if error is None:
                yield self._exactly(placed, some, some.stop)
            else:
                yield self._rounded(placed, some, error[:, :, some])

    def _rows_together(self, call: Call) -> int:
        """Of how many queries scores are held at a time."""
        heads = self.indexer.index_heads or call.q.shape[1]
        scores_of_a_row = call.q.shape[0] * heads * int(call.key_length)
        return at_a_time(int(call.query_length), scores_of_a_row, SCORES, call.q)

    def _width(self, call: Call) -> int:
        return self.width(-(-int(call.key_length) // self.block_size))

    def _seen(self, call: Call, stop: int) -> int:
        """Keys, from the first on, of which queries before `stop` see any."""
        if call.is_causal and not is_recorded():  # later keys are behind all of these
            return max(1, min(int(call.key_length), call.offset + stop))
        return int(call.key_length)

    def _exactly(self, placed: Placed, rows: slice | Tensor, stop: int) -> Tensor:
        """The blocks of some queries, all before `stop`, by scores in float64, (batch, choosers,
        rows, width)."""
        scores = self.indexer.scores(placed, rows, self._seen(placed.call, stop))
        return highest(self._best_of_blocks(scores, placed, rows), self._width(placed.call))

    def _rounded(self, placed: Placed, rows: slice, error: Tensor) -> Tensor:
        """The same by scores in float32, and in float64 wherever these leave open which blocks are
        the first.

        error: of float32 scores, of these rows
        """
        length, width = self._seen(placed.call, rows.stop), self._width(placed.call)
        scores = self.indexer.scores(placed, rows, length, torch.float32)
        best = self._best_of_blocks(scores, placed, rows)
        if best.shape[3] <= width:
            return highest(best, width)
        top, blocks = best.topk(width + 1, -1)
        last, following = top[..., width - 1 : width], top[..., width:]
        # A NaN, of which nothing is told by comparing, leaves it open too.
        is_open = ~((last - following > 2 * error) | (following == -torch.inf))
        blocks = blocks[..., :width].masked_fill(top[..., :width] == -torch.inf, NONE)
        left = is_open.any(3).any(1).any(0).nonzero()[:, 0]
        if left.numel():
            blocks[:, :, left] = self._exactly(placed, rows.start + left, rows.stop)
        return blocks

    def _may_round(self, call: Call) -> bool:
        """Whether scores are tried in float32: on a CPU, which takes twice as long for float64,
        where there are many and Python may look at them."""
        q, k, w = self.indexer.given(call)
        return (
            q.device.type == "cpu"
            and all(x is None or x.dtype != torch.float64 for x in (q, k, w))
            and call.key_length * call.query_length >= ROUNDED
            and torch.get_float32_matmul_precision() == "highest"
            and not is_recorded()
            and can_look(q, k)
        )

    def _best_of_blocks(self, scores: Tensor, placed: Placed, rows: slice | Tensor) -> Tensor:
        """The largest visible score of every block, (batch, choosers, rows, key_blocks)."""
        call, length, size = placed.call, scores.shape[3], self.block_size
        first = 0  # block from which on some keys are hidden
        if call.key_mask is None and not is_recorded():
            start = rows.start if isinstance(rows, slice) else int(rows[0])
            first = max(0, call.offset + start) // size if call.is_causal else length // size
        best = []
        if first:
            best.append(scores[..., : first * size].unflatten(3, (-1, size)).amax(-1))
        if first * size < length:
            hidden = ~visible_of(placed, rows, length, first * size)
            rest = scores[..., first * size :].masked_fill(hidden, -torch.inf)
            rest = F.pad(rest, (0, -length % size), value=-torch.inf)
            best.append(rest.unflatten(3, (-1, size)).amax(-1))
        return torch.cat(best, 3)
