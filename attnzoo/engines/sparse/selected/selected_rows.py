"""Backend `selected`: the queries that see a block of keys are laid out in tiles beside it, each
tile is one product, and the parts of every row are merged by their sums.

All of it is plain operators whose sizes do not depend on what is selected, so that graphs,
transforms and any number of derivatives go through it. Memory is linear in the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnzoo.call import Call
from attnzoo.eager import only_autograd_looks
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.exponential import LOG2_E
from attnzoo.engines.piece_by_piece import at_a_time
from attnzoo.engines.softmax.reference import SoftmaxReference
from attnzoo.engines.sparse.selected.grouped_rows import (
    NOWHERE,
    PartialSoftmax,
    heads_of,
    lay_out,
    most_tiles,
    rows_of,
    select,
    take,
)
from attnzoo.engines.sparse.selected.selection import Placed, Selection, in_blocks

LARGEST = 64  # rows of a tile: so many are multiplied nearly as fast as more
SCORES = 2**22  # of tiles, held at a time


@dataclass(frozen=True)
class Sizes:
    """How many tiles are laid out, whatever is selected.

    rows: of a tile
    tiles: how many of them each key head has
    key_blocks: how many blocks of keys there are
    """

    rows: int
    tiles: int
    key_blocks: int

    @classmethod
    def of(cls, pairs: int, key_blocks: int) -> Sizes:
        """pairs: the most of a row and a block that it sees, of a key head."""
        # A quarter of what a block has on average: tiles that are partly empty are then few.
        each = min(LARGEST, max(1, pairs // (4 * key_blocks)))
        return cls(each, most_tiles(pairs, key_blocks, each), key_blocks)

    @classmethod
    def of_call(cls, call: Call, width: int, block_size: int) -> Sizes:
        """width: the most blocks that a row sees."""
        lengths = int(call.query_length), int(call.key_length)
        pairs = most_pairs(*lengths, width, block_size, is_causal=call.is_causal)
        return cls.of(int(call.group) * pairs, -(-lengths[1] // block_size))


def most_pairs(
    query_length: int, key_length: int, width: int, block_size: int, *, is_causal: bool
) -> int:
    """The most pairs of a query and a block that it sees. The first causal queries have fewer
    blocks before them than `width`."""
    if not is_causal:
        return query_length * width
    offset = key_length - query_length

    def of_first(length: int) -> int:
        blocks, rest = divmod(length, block_size)
        filling = min(blocks, width)
        whole = filling * (filling + 1) // 2 + (blocks - filling) * width
        return block_size * whole + rest * min(blocks + 1, width)

    return of_first(key_length) - of_first(max(0, offset))


@dataclass(frozen=True)
class Beside:
    """Rows and keys that stand in the tiles.

    rows: (heads, tiles, size), the number of rows where a slot is empty
    blocks: (heads, tiles), any where a tile is empty
    """

    rows: Tensor
    blocks: Tensor

    def split(self, tiles: int) -> list[Beside]:
        """So many tiles at a time."""
        parts = zip(self.rows.split(tiles, 1), self.blocks.split(tiles, 1), strict=True)
        return [Beside(*part) for part in parts]


def attend_selected(
    engine: SoftmaxReference,
    placed: Placed,
    selection: Selection,
    block_size: int,
) -> Tensor:
    """A·v, (batch, heads, query_length, value_dim) in q's dtype.

    engine: gives the scale
    selection: the key blocks that each query sees
    block_size: keys of a block
    """
    call = placed.call
    dtype = accumulation_dtype(call.q.dtype)
    q = rows_of(call.q, call).to(dtype) * (engine.scale_of(call.q) * LOG2_E)
    k, v = (in_blocks(x.flatten(0, 1).to(dtype), 1, block_size) for x in (call.k, call.v))
    chosen = rows_of(selection.of_heads(call.q.shape[1]), call)
    width, rows = int(chosen.shape[2]), int(chosen.shape[1])
    sizes = Sizes.of_call(call, width, block_size)
    laid = lay_out(torch.where(chosen < 0, NOWHERE, chosen).flatten(1), sizes.rows, sizes.tiles)
    beside = Beside(laid.at // width, laid.group.clamp(max=k.shape[1] - 1))
    weigh = partial(_weigh, placed=placed)
    scores_of_a_tile = k.shape[0] * sizes.rows * block_size
    together = at_a_time(sizes.tiles, scores_of_a_tile, SCORES, q)
    if torch.is_grad_enabled() and only_autograd_looks(q, k, v):  # keeps no scores
        weigh = partial(checkpoint, weigh, use_reentrant=False, preserve_rng_state=False)
    parts = [weigh(q, k, v, some) for some in beside.split(together)]
    whole = parts[0] if len(parts) == 1 else [torch.cat(x, 1) for x in zip(*parts, strict=True)]
    slots = laid.slot.unflatten(1, (rows, width))
    found = PartialSoftmax(*(x.flatten(1, 2) for x in whole)).at(slots)
    return heads_of(_merged(found), call).to(call.q.dtype)


def _weigh(
    q: Tensor, k: Tensor, v: Tensor, beside: Beside, *, placed: Placed
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest score, sum of weights and numerators of the rows of some tiles, (heads, tiles, size,
    1 or d).

    q: (heads, rows, head_dim), scaled
    k, v: (heads, key_blocks, block_size, d)
    """
    call, blocks = placed.call, beside.blocks
    kv_heads, size = call.k.shape[1], k.shape[2]
    slots = torch.arange(size, device=k.device)
    keys = (blocks[..., None] * size + slots)[:, :, None]  # where they stand
    seen = keys < call.key_length
    if call.key_mask is not None:
        real = in_blocks(call.key_mask, 1, size).repeat_interleave(kv_heads, 0)
        seen = select(real, blocks)[:, :, None]
    if call.is_causal:
        positions = placed.positions.repeat_interleave(call.group, 1)
        positions = positions[:, None].expand(call.q.shape[0], kv_heads, -1).flatten(0, 1)
        seen = seen & (keys <= take(positions[..., None], beside.rows, -1))
    scores = take(q, beside.rows) @ select(k, blocks).mT
    found = PartialSoftmax.of(scores.masked_fill(~seen, float("-inf")), select(v, blocks))
    return found.largest, found.total, found.out


def _merged(parts: PartialSoftmax) -> Tensor:
    """The rows, (heads, rows, value_dim), of their parts over each of their blocks, (heads, rows,
    width, ...); 0 where a row has seen no key."""
    weights = (parts.largest - parts.largest.amax(2, keepdim=True)).exp2()
    total = (weights * parts.total).sum(2, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1.0)
    return (weights * parts.out).sum(2)
