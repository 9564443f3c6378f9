"""DeepSeek's sparse attention: a light indexer ranks the keys, and softmax sees the best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.arguments import check_flag, check_positive
from attnzoo.attention import Attention, Spec
from attnzoo.call import Call
from attnzoo.eager import can_look, is_recorded
from attnzoo.engines.engine import Cost, Shape, causal_pairs
from attnzoo.engines.piece_by_piece import at_a_time
from attnzoo.engines.softmax.softmax import Softmax
from attnzoo.engines.sparse.selected.selected_softmax import SelectedSoftmax
from attnzoo.engines.sparse.selected.selected_tokens import (
    SelectedTokens,
    TokenSelector,
    visible_of,
)
from attnzoo.engines.sparse.selected.selection import (
    Placed,
    Selection,
    Selector,
    highest,
)
from attnzoo.registry import register
from attnzoo.variants.selected.index_scores import INPUTS, Indexer, with_past

SCORES = 2**20  # of an indexer, held at a time
ROUNDED = 2**20  # queries times keys, from which on scores are tried in float32


class TokensByIndex(TokenSelector):
    """The `top_k` keys of largest index score; of equal scores the earlier keys."""

    def __init__(self, indexer: Indexer, top_k: int) -> None:
        self.indexer, self.top_k = indexer, top_k

    def macs(self, shape: Shape) -> int:
        return self.indexer.macs(shape)

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

    def _some_rows(self, placed: Placed) -> Iterator[Tensor]:
        """The blocks of some queries after the other, (batch, choosers, queries, width)."""
        call, length = placed.call, int(placed.call.query_length)
        heads = self.indexer.index_heads or call.q.shape[1]
        scores_of_a_row = call.q.shape[0] * heads * int(call.key_length)
        together = at_a_time(length, scores_of_a_row, SCORES, call.q)
        width = self.width(-(-int(call.key_length) // self.block_size))
        error = self.indexer.error(placed) if self._may_round(call) else None
        for start in range(0, length, together):
            some, seen = slice(start, min(start + together, length)), int(call.key_length)
            if call.is_causal and not is_recorded():  # later keys are behind all of these
                seen = max(1, min(seen, call.offset + some.stop))
            yield highest(self._best(placed, some, seen, width, error), width)

    def _best(
        self, placed: Placed, rows: slice, length: int, width: int, error: Tensor | None
    ) -> Tensor:
        """The largest visible score of every block, (batch, choosers, rows, key_blocks): in float64
        wherever float32 leaves open which blocks are the first `width`.

        error: of float32 scores, of all rows; None: they are not to be tried
        """
        if error is None:
            return self._best_of_blocks(self.indexer.scores(placed, rows, length), placed, rows)
        scores = self.indexer.scores(placed, rows, length, torch.float32)
        best = self._best_of_blocks(scores, placed, rows)
        if best.shape[3] <= width:
            return best
        top = best.topk(width + 1, -1).values
        last, following = top[..., width - 1 : width], top[..., width:]
        # A NaN, of which nothing is told by comparing, leaves it open too.
        is_open = ~((last - following > 2 * error[:, :, rows]) | (following == -torch.inf))
        left = is_open.any(3).any(1).any(0).nonzero()[:, 0]
        best = best.double()
        if left.numel():
            some = rows.start + left
            exact = self.indexer.scores(placed, some, length)
            best[:, :, left] = self._best_of_blocks(exact, placed, some)
        return best

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
            hidden = ~visible_of(placed, rows, length)[..., first * size :]
            rest = scores[..., first * size :].masked_fill(hidden, -torch.inf)
            rest = F.pad(rest, (0, -length % size), value=-torch.inf)
            best.append(rest.unflatten(3, (-1, size)).amax(-1))
        return torch.cat(best, 3)


class _ByIndexer(Softmax):
    """What both engines of an indexer share: its inputs are checked, and its keys kept."""

    indexer: Indexer

    def completed(self, call: Call) -> Call:
        return self.indexer.checked(call)

    def with_past(self, call: Call, state: Any) -> tuple[Call, Any]:
        return with_past(self.indexer.checked(call), state)

    def cost(self, shape: Shape) -> Cost:
        found, more = super().cost(shape), self.indexer.state_elements(shape)
        skipped = found.skipped_macs
        if shape.is_causal and found.macs > skipped + found.support_macs:
            pairs = shape.query_length * shape.key_length
            each = self.indexer.macs(shape) // pairs  # of what stands behind a query, none is read
            skipped += each * (pairs - causal_pairs(shape.query_length, shape.key_length))
        return replace(
            found,
            skipped_macs=skipped,
            state_elements=found.state_elements + more,
            state_bytes=found.state_bytes + more * shape.dtype.itemsize,
            state_growth=found.state_growth + more // shape.key_length * shape.dtype.itemsize,
        )


class IndexedTokens(_ByIndexer, SelectedTokens):
    """Softmax over the keys that an indexer ranks highest."""

    def __init__(self, indexer: Indexer, top_k: int, scale: float | None) -> None:
        super().__init__(TokensByIndex(indexer, top_k), scale)
        self.indexer = indexer


class IndexedBlocks(_ByIndexer, SelectedSoftmax):
    """Softmax over the blocks that an indexer ranks highest."""

    def __init__(self, indexer: Indexer, top_k: int, block_size: int, scale: float | None) -> None:
        super().__init__(BlocksByIndex(indexer, top_k, block_size), scale)
        self.indexer = indexer


@register
class Indexed(Attention):
    """DeepSeek sparse attention (DeepSeek-AI 2025, DeepSeek-V3.2, section 2.1, equations 1 and 2).

        I_ts = Σ_h w_th · ReLU(q^I_th · k^I_s)
        A_ts = exp(s_ts) / Σ_{l ∈ S(t)} exp(s_tl) if s ∈ S(t), else 0, S(t) = the top_k largest I_t

    A light indexer ranks the visible keys, all heads share its choice, and softmax is exact on it;
    a key that the indexer ranks low is lost in this layer. The indexer has few heads and small
    ones, so that its n² products are cheap. The choice is not differentiated: its inputs get no
    gradient from the output, and the indexer is trained by a loss of its own (`index_loss`).

    A call brings q_index (batch, index_heads, query_length, index_dim), k_index (batch, 1 or more,
    key_length, index_dim), of which consecutive index heads share one, and w_index (batch,
    index_heads, query_length). Only the order of the scores matters: the constants that models
    multiply them with (transformers: 1/√index_dim and 1/√index_heads) change nothing. Rotations and
    norms belong to what makes the inputs; DeepSeek-V3.2's indexer rotates halves, GLM's pairs. A
    `MultiheadAttention` that is told index_heads projects all three. Without them the heads of each
    key head choose by their own products, with weights of 1, which ranks well and saves nothing: a
    bound for what an indexer can find.

    Scores of exactly 0 are common with few index heads (ReLU): of equal scores the earlier key is
    taken, where torch.topk takes any.

    Single keys leave nothing to gather in matrix products: with block_size=1 the time is that of
    exact attention under a mask, and memory is linear. Of larger blocks only the chosen ones are
    multiplied. Decoding keeps every key and value, and index_dim numbers more of every token.

    top_k: keys that a query sees (DeepSeek-V3.2: 2,048)
    block_size: keys are taken in blocks of so many, top_k/block_size of those whose best visible
        key has the largest score; 1: one by one, as in DeepSeek-V3.2
    per_group: the heads of each key head choose for themselves, by an equal share of the index
        heads, as grouped-query models want it; else all heads share one choice
    index_heads: heads of the indexer; None: a call may bring any, or none
    index_dim: width of the indexer's heads; with index_heads head_dim by default
    scale: factor of the scores of keys, 1/sqrt(head_dim) by default
    """

    spec = Spec(
        name="indexed",
        title="Indexed attention (DeepSeek sparse attention)",
        paper="DeepSeek-AI, DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models, "
        "2025, arXiv:2512.02556",
        equation="A_ts = softmax of q_t·k_s/√d over the top_k s of largest Σ_h w_th·ReLU(q_th·k_s)",
        complexity="O(n²) light products, O(n·k) others, O(n·k) memory",
        family="sparse",
        exact=True,
        data_dependent=True,
        inputs=INPUTS,
    )
    engine: IndexedTokens | IndexedBlocks

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        top_k: int = 512,
        block_size: int = 1,
        per_group: bool = False,
        index_heads: int | None = None,
        index_dim: int | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        if check_positive("top_k", top_k) % check_positive("block_size", block_size):
            raise ValueError(
                f"top_k={top_k} is no multiple of block_size={block_size}; give as many keys as "
                "whole blocks have"
            )
        if index_heads is not None:
            check_positive("index_heads", index_heads)
            index_dim = check_positive("index_dim", head_dim if index_dim is None else index_dim)
        elif index_dim is not None:
            raise ValueError(f"index_dim={index_dim} is of no indexer; give index_heads, too")
        indexer = Indexer(index_heads, index_dim, check_flag("per_group", per_group))
        engine = (
            IndexedTokens(indexer, top_k, scale)
            if block_size == 1
            else IndexedBlocks(indexer, top_k, block_size, scale)
        )
        super().__init__(heads, head_dim, engine, backend=backend)
        if index_heads is not None and index_dim is not None:
            self.input_sizes = {
                "index_heads": index_heads,
                "index_key_heads": 1,
                "index_width": index_dim,
            }
