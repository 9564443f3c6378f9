"""Native sparse attention: block means, the blocks that these select, and a window, by gates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.arguments import check_choice, check_flag, check_positive
from attnzoo.attention import Attention, Input, Spec
from attnzoo.eager import is_recorded
from attnzoo.engines.engine import SOFTMAX_OPERATIONS, Shape
from attnzoo.engines.linear.gated.gate_projections import Gate
from attnzoo.engines.native.library import in_rows, operators
from attnzoo.engines.piece_by_piece import at_a_time
from attnzoo.engines.softmax.reference import masked_softmax
from attnzoo.engines.sparse.patterns.window import Window
from attnzoo.engines.sparse.selected.learned_keys import LearnedKeys
from attnzoo.engines.sparse.selected.pooled_softmax import PooledSoftmax
from attnzoo.engines.sparse.selected.pooling import Pooling
from attnzoo.engines.sparse.selected.selected_softmax import SelectedSoftmax
from attnzoo.engines.sparse.selected.selection import (
    Placed,
    Selection,
    highest,
)
from attnzoo.engines.sparse.selected.three_branches import GATES, BranchSelector, ThreeBranches
from attnzoo.engines.sparse.windows.window_sparse import WindowSparse
from attnzoo.engines.stretch_sums import KEY_SUMS, VALUE_SUMS
from attnzoo.registry import register

IMPORTANCE = ("probabilities", "logits")
KEY_COMPRESSION = ("mean", "mlp")
SCORES = 2**20  # of queries and blocks, held at a time
#: Scores above any sum of shares of a softmax, each of which counts for all strides of its mean.
FIRST, PREVIOUS, OWN = 2.0**60, 2.0**61, 2.0**62
#: Blocks in all of the means have equal sums but for rounding: shares are compared to 30 digits.
DIGITS = 2.0**30


class BlocksByImportance(BranchSelector):
    """The `top_k` blocks that weigh most in the softmax over compressed blocks, together for the
    heads that share keys; a query's own block, the one before it, and the first before all others.
    A compressed block counts once for every stride of it that lies in a block.

    Scores are float64, in which products of float32 are exact, and are compared to 30 binary
    digits. Of equal ones the earlier block wins.

    compressed: the softmax over compressed blocks
    importance, first_block: as `NSA` has them
    """

    def __init__(
        self,
        block_size: int,
        top_k: int,
        compressed: PooledSoftmax,
        importance: str,
        first_block: bool,
    ) -> None:
        self.block_size = block_size
        self.top_k = check_positive("top_k", top_k)
        self.compressed, self.pooling = compressed, compressed.pooling
        if block_size % self.pooling.stride:
            raise ValueError(
                f"block_size={block_size} must be a multiple of "
                f"compressed_stride={self.pooling.stride}, so that blocks begin and end together"
            )
        self.importance = check_choice("importance", importance, IMPORTANCE)
        self.first_block = check_flag("first_block", first_block)

    def width(self, key_blocks: int) -> int:
        return min(self.top_k, key_blocks)

    def sees_all(self, key_length: int) -> bool:
        return key_length <= self.top_k * self.block_size

    def macs(self, shape: Shape) -> int:
        return self._scores(shape) * shape.head_dim + self.compressed.key_macs(shape)

    def elementwise(self, shape: Shape) -> int:
        blocks = self.pooling.blocks(shape.key_length)
        means = shape.batch_size * shape.kv_heads * blocks * shape.head_dim
        rows = self._scores(shape)
        if self.importance == "logits":
            rows //= shape.heads // shape.kv_heads
        return SOFTMAX_OPERATIONS * rows + (means if self.compressed.learned is None else 0)

    def _scores(self, shape: Shape) -> int:
        blocks = self.pooling.blocks(shape.key_length)
        return shape.batch_size * shape.heads * shape.query_length * blocks

    def row_why_not(self) -> str | None:
        if self.compressed.learned is not None:
            return "its blocks have means for keys, and this attention learns them"
        if self.pooling != Pooling(self.block_size, self.block_size):
            return "its means are of the blocks that are selected, and these are of others"
        return None

    def with_row(self, placed: Placed) -> tuple[Tensor, Tensor]:
        call = placed.call
        width = self.width(-(-call.key_length // self.block_size))
        return operators().native_pooled_row(
            *(in_rows(x) for x in (call.q, call.k, call.v)),
            call.get(KEY_SUMS.name),
            call.get(VALUE_SUMS.name),
            None if call.key_mask is None else in_rows(call.key_mask),
            placed.positions,
            self.block_size,
            width,
            self.compressed.scale_of(call.q),
            self.first_block,
            self.importance == "logits",
        )

    @torch.no_grad()
    def select(self, placed: Placed) -> Selection:
        return Selection(torch.cat(list(self._some_rows(placed)), 2))

    def _some_rows(self, placed: Placed) -> Iterator[Tensor]:
        """The blocks of some queries after the other, (batch, kv_heads, queries, width)."""
        call, size, pooling = placed.call, self.block_size, self.pooling
        keys = self.compressed.keys(placed, torch.float64)
        filled = (placed.real_keys(size) > 0)[:, None, None]
        scale = self.compressed.scale_of(call.q)
        key_blocks, pooled, length = int(filled.shape[3]), int(keys.shape[2]), call.query_length
        forced = ((0, FIRST),) if self.first_block else ()
        together = at_a_time(
            int(length), call.q.shape[0] * call.q.shape[1] * pooled, SCORES, call.q
        )
        for start in range(0, int(length), together):
            some = slice(start, min(start + together, int(length)))
            seen, of_means = key_blocks, pooled
            if not is_recorded():  # later blocks are behind all of these
                seen = max(1, min(seen, -(-(call.offset + some.stop) // size)))
                of_means = max(1, min(pooled, seen * (size // pooling.stride)))
            own = (placed.positions[:, some] // size)[:, None, :, None]
            numbers = torch.arange(seen, device=keys.device)
            ended = pooling.ended(Placed(call, placed.positions[:, some]))[..., :of_means]
            q = call.q[:, :, some].detach().double().unflatten(1, (call.k.shape[1], -1))
            scores = (q @ keys[:, :, None, :of_means].mT) * scale
            if self.importance == "logits":
                scores = scores.mean(2, keepdim=True)
            scores = scores.masked_fill(~ended[:, None, None], -torch.inf)
            shares = self._of_blocks(masked_softmax(scores).mean(2), seen)
            for number, score in (*forced, (own - 1, PREVIOUS), (own, OWN)):
                shares = shares.masked_fill(numbers == number, score)
            allowed = (filled[..., :seen] & (numbers < own)) | (numbers == own)
            yield highest(shares.masked_fill(~allowed, -torch.inf), self.width(key_blocks))

    def _of_blocks(self, shares: Tensor, key_blocks: int) -> Tensor:
        """The shares of so many blocks, (..., key_blocks), of those of means, (..., means)."""
        each = self.block_size // self.pooling.stride
        stretches = self.pooling.of_stretches(shares)
        stretches = F.pad(stretches, (0, key_blocks * each - stretches.shape[-1]))
        shares = stretches.unflatten(-1, (key_blocks, each)).sum(-1)
        return (shares * DIGITS).round()


class BranchGate(Gate):
    """sigmoid(W x), a number of each head, as flash-linear-attention's layer makes it."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.out = nn.Linear(features, heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x).sigmoid()


@register
class NSA(Attention):
    """Native sparse attention (Yuan et al. 2025, sections 3.2 and 3.3, equations 5 to 12).

        A = g_c A_compressed + g_s A_selected + g_w A_window

    Compressed: softmax over the means of the blocks that have ended, whose keys share a block's
    weight. Selected: softmax over the keys of `top_k` blocks, those of largest compressed weight,
    averaged over the heads that share keys, which therefore share a choice; the first block, the
    query's own and the one before it are always among them and counted. Window: softmax over the
    nearest `window_size` keys. Each row of each is multiplied by a gate. What is kept of softmax is
    the detail of a few blocks and of the neighbourhood, and an outline of all else. Cost
    n·(top_k·block_size + window_size) and n²/block_size for means. Causal only. Decoding keeps
    every key and value.

    A call may bring compressed_gate, selected_gate and window_gate, (batch, heads, query_length),
    sigmoids in the paper; a branch whose gate is not given weighs a third. A layer projects them.

    By default the means are of the blocks that are selected and do not overlap, as in
    flash-linear-attention; in the paper they are of fewer keys and overlap, and a mean counts for
    every block that it lies in. With key_compression="mlp" the key of a compressed block is the
    paper's learned network of its keys and their places; the values of a block stay their mean,
    where the paper has a second network, of which the output would not be linear in v.
    flash-linear-attention averages probabilities over the heads that share a choice and forces the
    first block; lucidrains' implementation averages logits and forces no first block
    (importance="logits", first_block=False), and has a learned memory slot, which is not here. The
    choice is not differentiated.

    Use it in models trained with it, for long inputs; not in the place of a trained softmax, which
    knows of no gates.

    block_size: keys of a block, counted from the first real token
    top_k: blocks that a query sees in detail, the forced ones counted
    compressed_size: keys of a mean; None: block_size
    compressed_stride: how many keys lie between the beginnings of two of them; None:
        compressed_size, so that they do not overlap
    key_compression: mean, or mlp: W2·relu(W1·[keys + places]), 2·head_dim wide inside
    importance: of a block for the heads that share a choice: the mean of their probabilities, or
        the softmax of the mean of their logits
    first_block: whether the first block is among the forced ones
    window_size: nearest keys, the query's own counted
    scale: factor of the scores, 1/sqrt(head_dim) by default
    """

    spec = Spec(
        name="nsa",
        title="NSA (native sparse attention)",
        paper="Yuan et al., Native Sparse Attention, 2025, arXiv:2502.11089",
        equation="A = g_c·softmax over block means + g_s·softmax over the blocks of largest weight "
        "+ g_w·softmax over a window",
        complexity="O(n·(k·B + w + n/B)) time, O(n·k + n²/B) memory",
        family="sparse",
        exact=False,
        bidirectional=False,
        data_dependent=True,
        inputs=GATES,
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        block_size: int = 64,
        top_k: int = 8,
        compressed_size: int | None = None,
        compressed_stride: int | None = None,
        key_compression: str = "mean",
        importance: str = "probabilities",
        first_block: bool = True,
        window_size: int = 512,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        window = Window(check_positive("window_size", window_size), 1, 0)
        size = check_positive("block_size", block_size)
        size = size if compressed_size is None else compressed_size
        pooling = Pooling(size, size if compressed_stride is None else compressed_stride)
        check_choice("key_compression", key_compression, KEY_COMPRESSION)
        learned = LearnedKeys(pooling, head_dim) if key_compression == "mlp" else None
        compressed = PooledSoftmax(pooling, scale, learned)
        selector = BlocksByImportance(block_size, top_k, compressed, importance, first_block)
        engine = ThreeBranches(
            compressed,
            SelectedSoftmax(selector, scale),
            WindowSparse(window, scale),
        )
        super().__init__(heads, head_dim, engine, backend=backend)

    def oracle_arguments(self, queries: int, keys: int, is_causal: bool) -> dict[str, Any]:
        return {name.split(".")[-1]: x for name, x in self.engine.named_parameters()}

    def input_projection(self, one: Input, features: int) -> Gate:
        return BranchGate(features, self.heads)
