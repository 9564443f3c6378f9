"""XAttention: blocks of keys scored by sums along antidiagonals, as many as hold most of the
mass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.arguments import check_positive, check_scale
from attnzoo.attention import Attention, Spec
from attnzoo.engines.engine import SOFTMAX_OPERATIONS, Shape
from attnzoo.engines.piece_by_piece import at_a_time
from attnzoo.engines.softmax.reference import masked_softmax
from attnzoo.engines.sparse.selected.selected_softmax import SelectedSoftmax
from attnzoo.engines.sparse.selected.selection import (
    NONE,
    Placed,
    Selection,
    Selector,
    in_blocks,
)
from attnzoo.registry import register
from attnzoo.sequences.padding import fetched

SCORES = 2**18  # of antidiagonals, held at a time


class BlocksByAntidiagonals(Selector):
    """The first block, the query's own, and of the others the heaviest until `threshold` of the
    estimated mass is seen, `max_blocks` at most. Equal masses go to the earlier block."""

    takes_own = True

    def __init__(
        self, block_size: int, stride: int, threshold: float, max_blocks: int, scale: float | None
    ) -> None:
        self.block_size, self.stride = block_size, stride
        self.threshold, self.max_blocks, self.scale = threshold, max_blocks, scale

    def width(self, key_blocks: int) -> int:
        return min(self.max_blocks, key_blocks)

    def sees_all(self, key_length: int) -> bool:
        return key_length <= self.block_size

    def _tiles(self, shape: Shape) -> int:
        """Squares of stride by stride, of all heads."""
        return shape.batch_size * shape.heads * (-(-shape.key_length // self.stride)) ** 2

    def macs(self, shape: Shape) -> int:
        return self._tiles(shape) * self.stride * shape.head_dim

    def elementwise(self, shape: Shape) -> int:
        return SOFTMAX_OPERATIONS * self._tiles(shape)

    @torch.no_grad()
    def select(self, placed: Placed) -> Selection:
        call, size, stride = placed.call, self.block_size, self.stride
        mass, unit = self._mass(placed), stride if call.is_causal else size
        filled = (placed.real_keys(size) > 0)[:, None, None]
        numbers = torch.arange(filled.shape[3], device=mass.device)
        own = (torch.arange(mass.shape[2], device=mass.device) * unit // size)[:, None]
        allowed = filled & (numbers <= own) if call.is_causal else filled.expand_as(mass[:, :1])
        blocks = self._heaviest(mass, (numbers == 0) | (numbers == own), allowed)
        return Selection(blocks, placed.positions.clamp(min=0) // unit)

    def _heaviest(self, mass: Tensor, forced: Tensor, allowed: Tensor) -> Tensor:
        """Blocks of every choice, (batch, heads, choices, width).

        mass: (batch, heads, choices, key_blocks)
        forced, allowed: broadcastable to it
        """
        mass = mass.masked_fill(~allowed, 0.0)
        rank = mass.masked_fill(~allowed, -torch.inf).masked_fill(forced, torch.inf)
        width = self.width(int(mass.shape[3]))
        if torch.compiler.is_exporting():
            order = rank.topk(width, -1).indices  # ONNX breaks ties so by itself
        else:
            order = rank.sort(dim=-1, descending=True, stable=True).indices[..., :width]
        some = mass.gather(3, order)
        before, total = some.cumsum(-1) - some, mass.sum(-1, keepdim=True)
        worth = allowed.expand_as(mass).gather(3, order) & (before < self.threshold * total)
        taken = worth | forced.expand_as(mass).gather(3, order)
        return order.masked_fill(~taken, NONE)

    def _mass(self, placed: Placed) -> Tensor:
        """The mass that each block is estimated to have, (batch, heads, choices, key_blocks)
        float64: causal for every `stride` queries, by the `block_size` before them; else for every
        block of queries."""
        call, size, stride = placed.call, self.block_size, self.stride
        length, each = int(call.key_length), size // stride
        q, k, real = call.q.detach().double(), call.k.detach().double(), call.key_mask
        if real is None:
            real = torch.ones(1, length, dtype=torch.bool, device=q.device)
        else:  # the queries stand as the keys do
            slots = torch.arange(length, device=q.device) - placed.positions[:, :1]
            q = fetched(q, slots.expand(q.shape[0], -1) % length)
            q = q.masked_fill(~real[:, None, :, None], 0.0)
        q = in_blocks(q, 2, stride).flip(3).flatten(3)
        k = in_blocks(k, 2, stride).flatten(3)
        real = in_blocks(real, 1, stride).any(2)
        tiles, kv_heads = int(q.shape[2]), int(k.shape[1])
        scale = int(call.q.shape[3]) ** -0.5 if self.scale is None else self.scale
        numbers, found = torch.arange(tiles, device=q.device), []
        together = at_a_time(tiles, q.shape[0] * q.shape[1] * tiles, SCORES, call.q)
        for start in range(0, tiles, together):
            rows = slice(start, min(start + together, tiles))
            some = q[:, :, rows].unflatten(1, (kv_heads, -1))
            scores = (some @ k[:, :, None].mT).flatten(1, 2) * (scale / stride)
            seen = real[:, None, None]
            if call.is_causal:
                seen = seen & (numbers <= numbers[rows, None])
            weights = masked_softmax(scores.masked_fill(~seen, -torch.inf))
            weights = weights.masked_fill(~real[:, None, rows, None], 0.0).nan_to_num(0.0)
            found.append(in_blocks(weights, 3, each).sum(4))
        mass = torch.cat(found, 2)
        if not call.is_causal:
            return in_blocks(mass, 2, each).sum(3)
        before = F.pad(mass, (0, 0, each, 0))[:, :, : tiles + each - 1]  # of rows before each
        return before.unfold(2, each, 1).sum(-1)


@register
class XAttention(Attention):
    """XAttention (Xu et al. 2025, section 2, algorithm 1, equation 1).

        A_ij = exp(s_ij) / Σ_{l ∈ S(i)} exp(s_il) if j ∈ S(i), else 0
        S(i) = the fewest blocks whose estimated mass is at least `threshold`, the first and the own
            block among them

    The estimate sums scores along the antidiagonals of squares of `stride` queries and keys, which
    every row and column of a square crosses once, and takes softmax over the squares: n²/stride
    products instead of n². No parameter is learned: it is made for the prompts of trained models
    with exact attention. What lies in other blocks is lost, and so is a key that stands alone in
    its square, since its score is one of `stride` that are averaged.

    The paper chooses for a block of queries by all queries of that block, so that a row depends on
    later queries. Here a causal choice is made for every `stride` queries by the `block_size`
    queries before them, and changing a token changes no earlier row; the first of a sequence see
    their own block and the first one alone. A call that is not causal has the paper's choice. A
    choice reads other queries than the row's own, so that there must be as many queries as keys,
    and it does not decode; the paper, too, is for prompts.

    block_size: queries and keys of a block, a multiple of stride
    stride: side of a square
    threshold: share of the estimated mass that the selected blocks have at least, above 0, at most
        1 (paper: 0.9)
    max_blocks: the most blocks that a row sees, at least 2; the paper has no such bound, without
        which memory and time may grow as the square of the length
    scale: factor of the scores, 1/sqrt(head_dim) by default
    """

    spec = Spec(
        name="xattention",
        title="XAttention (antidiagonal scores)",
        paper="Xu et al., XAttention: Block Sparse Attention with Antidiagonal Scoring, 2025, "
        "arXiv:2503.16428",
        equation="A_ij = exp(q_i·k_j/√d) / Σ_{l∈S(i)} exp(q_i·k_l/√d), "
        "j ∈ S(i): fewest blocks that hold most of the mass along antidiagonals",
        complexity="O(n·(m·B + n/s)) time, O(n·m) memory",
        family="sparse",
        exact=True,
        cross=False,
        decodes=False,
        data_dependent=True,
    )

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        block_size: int = 128,
        stride: int = 8,
        threshold: float = 0.9,
        max_blocks: int = 8,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        if check_positive("block_size", block_size) % check_positive("stride", stride):
            raise ValueError(
                f"block_size={block_size} is no multiple of stride={stride}; give one that is"
            )
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold!r} must be a number above 0, at most 1")
        if check_positive("max_blocks", max_blocks) < 2:
            raise ValueError(
                f"max_blocks={max_blocks} leaves no place for the first block and the query's own; "
                "give 2 or more"
            )
        selector = BlocksByAntidiagonals(
            block_size, stride, threshold, max_blocks, check_scale(scale)
        )
        super().__init__(heads, head_dim, SelectedSoftmax(selector, scale), backend=backend)
