"""MoBA: every query sees the blocks of keys whose mean it likes best, and its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnzoo.arguments import check_positive
from attnzoo.attention import Attention, Spec
from attnzoo.eager import is_recorded
from attnzoo.engines.engine import Shape
from attnzoo.engines.native.library import in_rows, operators
from attnzoo.engines.piece_by_piece import at_a_time
from attnzoo.engines.sparse.selected.selected_softmax import SelectedSoftmax
from attnzoo.engines.sparse.selected.selection import (
    Placed,
    Selection,
    Selector,
    block_means,
    highest,
)
from attnzoo.engines.stretch_sums import KEY_SUMS
from attnzoo.registry import register

SCORES = 2**20  # of queries and blocks, held at a time


class BlocksByMean(Selector):
    """The `top_k` blocks of largest q·mean(k), a query's own block always among them.

    Scores are float64, in which products of float32 are exact: decoding and any backend select what
    the forward selects. Of equal scores the earlier block wins.
    """

    takes_own = True

    def __init__(self, block_size: int, top_k: int) -> None:
        self.block_size = self.summed = check_positive("block_size", block_size)
        self.top_k = check_positive("top_k", top_k)

    def width(self, key_blocks: int) -> int:
        return min(self.top_k, key_blocks)

    def sees_all(self, key_length: int) -> bool:
        return key_length <= self.top_k * self.block_size

    def macs(self, shape: Shape) -> int:
        key_blocks = -(-shape.key_length // self.block_size)
        rows = shape.batch_size * shape.heads * shape.query_length
        return rows * key_blocks * shape.head_dim

    def elementwise(self, shape: Shape) -> int:
        key_blocks = -(-shape.key_length // self.block_size)
        return shape.batch_size * shape.kv_heads * key_blocks * shape.head_dim

    @torch.no_grad()
    def select(self, placed: Placed) -> Selection:
        return Selection(torch.cat(list(self._some_rows(placed)), 2))

    def of_one(self, placed: Placed) -> Tensor:
        call, sums = placed.call, placed.call.get(KEY_SUMS.name)
        width = self.width(-(-call.key_length // self.block_size))
        choice = placed.positions, call.is_causal, self.block_size, width
        mask = None if call.key_mask is None else in_rows(call.key_mask)
        q, k = in_rows(call.q), in_rows(call.k)
        return operators().native_best_means(q, k, sums, mask, *choice)

    def _some_rows(self, placed: Placed) -> Iterator[Tensor]:
        """The blocks of some queries after the other, (batch, heads, queries, width)."""
        call, size = placed.call, self.block_size
        means = block_means(placed, size)
        filled = (placed.real_keys(size) > 0)[:, None, None]
        key_blocks, length = int(means.shape[2]), int(call.query_length)
        scores_of_a_row = call.q.shape[0] * call.q.shape[1] * key_blocks
        together = at_a_time(length, scores_of_a_row, SCORES, call.q)
        for start in range(0, length, together):
            some = slice(start, min(start + together, length))
            seen = key_blocks
            if call.is_causal and not is_recorded():  # later blocks are behind all of these
                seen = max(1, min(seen, -(-(call.offset + some.stop) // size)))
            own = (placed.positions[:, some] // size)[:, None, :, None]
            numbers = torch.arange(seen, device=means.device)
            allowed = filled[..., :seen]
            if call.is_causal:
                allowed = allowed & (numbers < own)
            q = call.q[:, :, some].detach().double().unflatten(1, (call.k.shape[1], -1))
            scores = (q @ means[:, :, None, :seen].mT).flatten(1, 2)
            scores = scores.masked_fill(~allowed, -torch.inf)
            yield highest(scores.masked_fill(numbers == own, torch.inf), self.width(key_blocks))


@register
class MoBA(Attention):
    """Mixture of block attention (Lu et al. 2025, section 2.2, equations 4 to 8).

        A_ij = exp(s_ij) / Σ_{l ∈ S(i)} exp(s_il) if j ∈ S(i), else 0
        S(i) = own block of i ∪ the blocks b of largest q_i·mean(k in b), top_k in all

    Keys are cut into blocks, counted from the first real token, and every query and head sees
    `top_k` of them: its own block, in a causal call as far as the query itself, and those whose
    mean key, unscaled, it likes best. Softmax is exact on these keys; what lies in other blocks is
    lost in one layer. Cost n·top_k·block_size, and n²/block_size products to select, instead of n².
    The mean of a block that begins behind a query is never read, and padded keys are in no mean.
    Nothing is learned beside the projections, so that a pretrained model can be run with it.

    The choice is not differentiated: the gradient is that of softmax on the keys selected. Scores
    are compared in float64; of equal ones the earlier block is taken. In a call that is not causal
    (our form) all blocks are candidates. Decoding keeps every key and value.

    Implementations disagree about top_k=1: here, in the paper and in MoonshotAI's plain version it
    is the own block alone; in flash-linear-attention and MoonshotAI's efficient kernel it means
    exact attention, which is `standard`.

    Use it for long contexts that few places decide, in models trained or tuned with it; not where
    every token matters a little, nor with blocks so long that a mean says nothing of them.

    block_size: keys of a block
    top_k: blocks that a query sees, its own counted
    scale: factor of the scores of keys, 1/sqrt(head_dim) by default; those of blocks have none
    """

    spec = Spec(
        name="moba",
        title="MoBA (mixture of block attention)",
        paper="Lu et al., MoBA: Mixture of Block Attention for Long-Context LLMs, 2025, "
        "arXiv:2502.13189",
        equation="A_ij = exp(q_i·k_j/√d) / Σ_{l∈S(i)} exp(q_i·k_l/√d), "
        "j ∈ S(i): own block and those of largest q_i·mean(k)",
        complexity="O(n·(k·B + n/B)) time, O(n·k) memory",
        family="sparse",
        exact=True,
        data_dependent=True,
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        block_size: int = 64,
        top_k: int = 8,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        engine = SelectedSoftmax(BlocksByMean(block_size, top_k), scale)
        super().__init__(heads, head_dim, engine, backend=backend)
