"""Which key blocks every query block sees, in runs of equally many; q, k and v in whole blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnzoo.call import Call
from attnzoo.eager import unrecorded
from attnzoo.engines.sparse.patterns.block_patterns import BlockPattern, block_limit, distinct
from attnzoo.engines.sparse.patterns.grid import Grid, PaddedGrid, grid_of


@dataclass(frozen=True)
class Run:
    """Consecutive query blocks that see equally many key blocks.

    first, end: of these blocks, counted from the first that holds a query
    width: key blocks that each sees
    sees_all: whether they see every key
    tail: whether some of them see the last key block, and it is partly filled
    """

    first: int
    end: int
    width: int
    sees_all: bool
    tail: bool


def runs(pattern: BlockPattern, grid: Grid, filled_blocks: int | None = None) -> list[Run]:
    """The query blocks of a call in runs of equally many key blocks, in order.

    pattern: which key blocks each query block sees
    grid: the sizes of the call
    filled_blocks: blocks up to the last real token; None: up to the last slot
    """
    sizes = (grid.heads, grid.query_length, grid.key_length, grid.is_causal)
    return [Run(*fields) for fields in _constant_runs(pattern, *sizes, filled_blocks)]


def _constant_runs(
    pattern: BlockPattern,
    heads: int,
    query_length: int,
    key_length: int,
    is_causal: bool,
    filled_blocks: int | None,
) -> tuple[tuple, ...]:
    """The fields of every run. A compiled or exported graph takes the answer as a constant: it
    depends on sizes and the seed only."""
    with unrecorded():
        grid = Grid(heads, query_length, key_length, is_causal, "cpu")
        return _fields_of_runs(pattern, grid, filled_blocks)


# What torch.compiler.assume_constant_result sets; calling it here would import the compiler, a
# second, for everyone.
_constant_runs._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@lru_cache(maxsize=256)
def _fields_of_runs(
    pattern: BlockPattern, grid: Grid, filled_blocks: int | None
) -> tuple[tuple, ...]:
    blocks = table_of(pattern, grid, filled_blocks)
    last = grid.num_key_blocks(pattern.block_size) - 1
    # When causal, only the diagonal block meets the ragged end.
    ragged = grid.key_length % pattern.block_size > 0 and not grid.is_causal
    widths = (blocks <= last).sum(-1)[0]
    sees_all = torch.zeros_like(widths, dtype=torch.bool)
    if not grid.is_causal:
        sees_all = pattern.sees_all(_ended(pattern, grid, filled_blocks)).flatten()
    tail = (blocks == last).any(-1).any(0).long() * int(ragged)
    fields = torch.stack([torch.where(sees_all, last + 1, widths), sees_all.long(), tail], 1)
    distinct_fields, lengths = fields.unique_consecutive(dim=0, return_counts=True)
    ends = lengths.cumsum(0)
    rows = zip((ends - lengths).tolist(), ends.tolist(), distinct_fields.tolist(), strict=True)
    return tuple(
        (first, end, width, bool(full), bool(tail)) for first, end, (width, full, tail) in rows
    )


def table_of(pattern: BlockPattern, grid: Grid, filled_blocks: int | None) -> Tensor:
    """`sorted_key_blocks` of samples that end in the same block, (heads or 1, query_blocks, width).

    filled_blocks: as in `runs`
    """
    found = sorted_key_blocks(pattern, _ended(pattern, grid, filled_blocks))
    return found if filled_blocks is None else found[0]


def _ended(pattern: BlockPattern, grid: Grid, filled_blocks: int | None) -> Grid:
    """`grid` with as many filled blocks."""
    if filled_blocks is None:
        return grid
    length = torch.tensor([filled_blocks * pattern.block_size], device=grid.device)
    return PaddedGrid(**vars(grid), length=length)


def sorted_key_blocks(pattern: BlockPattern, grid: Grid) -> Tensor:
    """Distinct key blocks of each query block, in ascending order.

    pattern: which key blocks each query block sees
    grid: the sizes of the call, or of padded samples, each with an end of its own

    Returns (heads or 1, query_blocks, width), of padded samples (batch, heads or 1, query_blocks,
    width). Places without a block hold a number past every block.
    """
    return distinct(pattern.key_blocks(grid), block_limit(grid, pattern.block_size))


@lru_cache(maxsize=256)
def blocks_of_last(pattern: BlockPattern, grid: Grid) -> Tensor | None:
    """The key blocks that the last query sees, (1, heads or 1, width), -1 where there are fewer;
    None: it sees all.

    grid: of one query, the sizes of the call, which end with a block
    """
    with unrecorded(), torch.inference_mode(False):
        if bool(pattern.sees_all(grid).any()):
            return None
        blocks = sorted_key_blocks(pattern, grid)
        count = grid.num_key_blocks(pattern.block_size)
        return blocks.masked_fill(blocks >= count, -1).transpose(0, 1).contiguous()


def count_pairs(pattern: BlockPattern, grid: Grid) -> tuple[int, int]:
    """How many (head, query, key) triples of one sample are computed, and how many are visible.

    pattern: which key blocks each query block sees
    grid: the sizes of the call
    """
    size, computed = pattern.block_size, 0
    for run in runs(pattern, grid):
        keys = grid.key_length if run.sees_all else run.width * size
        computed += grid.heads * (run.end - run.first) * size * keys
    return computed, _count_visible(pattern, grid)


def _count_visible(pattern: BlockPattern, grid: Grid) -> int:
    """Visible (head, query, key) triples of one sample."""
    size, last = pattern.block_size, grid.num_key_blocks(pattern.block_size) - 1
    tail = grid.key_length - last * size
    blocks = sorted_key_blocks(pattern, grid)
    keys = ((blocks < last) * size + (blocks == last) * tail).sum(-1)  # (heads or 1, query_blocks)
    rows = grid.query_blocks(size)
    first = (rows * size).clamp(min=grid.offset)
    end = (rows * size + size).clamp(max=grid.key_length)
    if grid.is_causal:
        # Keys of the diagonal block that the block's last query sees.
        own = (end - rows * size).clamp(min=0)
        behind = keys - torch.where(rows == last, tail, size) * (rows >= 0)
        count = (end - first) * behind + (
            own * (own + 1) - (first - rows * size) * (first - rows * size + 1)
        ) // 2 * (rows >= 0)
    else:
        count = (end - first) * torch.where(pattern.sees_all(grid), grid.key_length, keys)
    return int(count.sum()) * (grid.heads // blocks.shape[0])


@dataclass(frozen=True)
class LaidOut:
    """q, k and v padded to whole blocks.

    q: (batch, heads, query_blocks · size, head_dim)
    k, v: (batch, kv_heads, key_blocks · size, d)
    size: positions of a block
    ahead: empty rows before the first query
    spare: empty slots at the end
    """

    q: Tensor
    k: Tensor
    v: Tensor
    size: int
    ahead: int
    spare: int

    @classmethod
    def of(cls, pattern: BlockPattern, call: Call) -> LaidOut:
        grid, size = grid_of(call), pattern.block_size
        ahead, spare = grid.offset % size, -grid.key_length % size
        k, v = (_pad(x, 0, spare) for x in (call.k, call.v))
        return cls(_pad(call.q, ahead, spare), k, v, size, ahead, spare)

    def first_block(self, call: Call) -> int:
        """The number of the block that holds the first query."""
        return (int(call.key_length) - 1) // self.size + 1 - self.q.shape[2] // self.size

    def rows(self, out: Tensor, call: Call) -> Tensor:
        """The rows of the call's queries, (batch, heads, query_length, value_dim).

        out: (batch, heads, query_blocks · size, value_dim)
        """
        return out[:, :, self.ahead : self.ahead + int(call.query_length)]


def _pad(x: Tensor, before: int, after: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, before, after)) if before or after else x


def positions_in(numbers: Tensor, size: int) -> Tensor:
    """The positions in some blocks, (..., size).

    numbers: (...), of the blocks
    size: positions of a block
    """
    return numbers[..., None] * size + torch.arange(size, device=numbers.device)
