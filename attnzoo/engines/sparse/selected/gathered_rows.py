"""The rows of a call gathered beside the blocks of keys that they see: what `selected_tiles` walks
over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.softmax.tiles.tile_pieces import SCORES, Memory, cap
from attnzoo.engines.sparse.selected.selected_rows import Sizes
from attnzoo.engines.sparse.selected.selection import Placed, Selection


@dataclass(frozen=True)
class Piece:
    """Some tiles of rows that see one block of keys.

    slots: where they stand among all slots
    rows: (tiles · size,), ascending, the number of rows in empty slots
    keys: the keys of the block
    hidden: (rows of the first tiles, keys) bool, what stands behind a row; None: nothing behind any
    """

    slots: slice
    rows: Tensor
    keys: slice
    hidden: Tensor | None


@dataclass(frozen=True)
class RowTiles:
    """The rows of one key head in tiles of one size, all those of a tile beside one block of keys.

    Every product has the sizes of one tile, so that its numbers depend on no other row.

    size: rows of a tile
    rows: (slots,), the number of rows where a slot is empty
    counts: tiles of every block, in whose order they stand
    place: (rows, width), the slots of a row; the number of slots where it has fewer
    positions: (rows + 1,), where the rows stand among the keys; None: any sees what is behind it
    """

    size: int
    rows: Tensor
    counts: list[int]
    place: Tensor
    positions: Tensor | None

    @classmethod
    def of(cls, chosen: Tensor, sizes: Sizes, positions: Tensor | None) -> RowTiles:
        """chosen: (rows, width), key blocks, negative for none."""
        key_blocks = sizes.key_blocks
        (count, width), size, slots = chosen.shape, sizes.rows, sizes.tiles * sizes.rows
        blocks, order = torch.where(chosen < 0, key_blocks, chosen).flatten().sort(stable=True)
        ends = torch.searchsorted(blocks, torch.arange(key_blocks, device="cpu"), right=True)
        begins = F.pad(ends, (1, 0))
        counts = (ends - begins[:-1] + size - 1) // size
        first = F.pad(counts.cumsum(0), (1, 0)) * size  # slot of every block
        slot = torch.arange(len(order), device="cpu") + (first - begins)[blocks]
        slot.masked_fill_(blocks == key_blocks, slots)
        rows = torch.full((slots + 1,), count, device="cpu").scatter_(0, slot, order // width)[:-1]
        place = torch.empty_like(slot).scatter_(0, order, slot).view_as(chosen)
        return cls(size, rows, [int(some) for some in counts], place, positions)

    def pieces(self, block_size: int, key_length: int) -> Iterator[Piece]:
        """All tiles, so many at a time that their scores stay in cache."""
        most, start = most_rows(self.size, block_size), 0
        for block, count in enumerate(self.counts):
            keys = slice(block * block_size, min((block + 1) * block_size, key_length))
            end, ahead = start + count * self.size, self.positions is not None
            for first in range(start, end, most):
                slots = slice(first, min(first + most, end))
                rows = self.rows[slots]
                hidden = self._hidden(rows, keys) if ahead else None
                ahead = hidden is not None and len(hidden) == len(rows)
                yield Piece(slots, rows, keys, hidden)
            start = end

    def _hidden(self, rows: Tensor, keys: slice) -> Tensor | None:
        """As in `Piece`, of these rows; they stand in order, so that the first ones are those
        before the last key."""
        assert self.positions is not None
        positions = self.positions[rows]
        count = int(torch.searchsorted(positions, keys.stop - 1))
        if not count:
            return None
        some = positions[: -(-count // self.size) * self.size]
        return some[:, None] < torch.arange(keys.start, keys.stop, device="cpu")


def most_rows(size: int, block_size: int) -> int:
    """Rows, in tiles of this size, that are scored at a time."""
    return max(1, SCORES * torch.get_num_threads() // (block_size * size)) * size


@dataclass(frozen=True)
class Layout:
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

    @property
    def sizes(self) -> Sizes:
        return Sizes.of_call(self.call, self.selection.blocks.shape[3], self.block_size)

    def key_heads(self) -> Iterator[tuple[int, RowTiles, Tensor | None]]:
        """Every (sample, key head) by its number, its tiles, and a cap of its keys, (key_length,)
        of `tile_pieces.cap`, where some are padded."""
        call, sizes = self.call, self.sizes
        for sample in range(call.q.shape[0]):
            positions = None
            if call.is_causal:
                own = _of_sample(self.placed.positions, sample).repeat_interleave(call.group)
                positions = F.pad(own, (0, 1), value=call.key_length)
            mask = None if call.key_mask is None else call.key_mask[sample]
            key_cap = None if mask is None or bool(mask.all()) else cap(mask, call.q)
            for kv_head in range(call.k.shape[1]):
                tiles = RowTiles.of(self._chosen(sample, kv_head), sizes, positions)
                yield sample * call.k.shape[1] + kv_head, tiles, key_cap

    def _chosen(self, sample: int, kv_head: int) -> Tensor:
        """The blocks of the rows of a key head, (rows, width). Not of all heads at once: repeated
        for every query, choices are many numbers."""
        call, (blocks, choice_of) = self.call, (self.selection.blocks, self.selection.choice_of)
        heads = torch.arange(kv_head * call.group, (kv_head + 1) * call.group, device="cpu")
        own = blocks[sample, heads * blocks.shape[1] // call.q.shape[1]]
        if choice_of is not None:
            own = own[:, _of_sample(choice_of, sample)]
        return own.transpose(0, 1).reshape(-1, blocks.shape[3])

    def memory(self, x: Tensor, *, backward: bool = False) -> Memory:
        """Memory for the scores and rows of a piece, as much as the longest piece can take."""
        call, sizes, memory = self.call, self.sizes, Memory(x)
        most = min(sizes.tiles * sizes.rows, most_rows(sizes.rows, self.block_size))
        of_keys, of_rows = min(self.block_size, call.key_length), call.q.shape[3]
        memory("scores", most * of_keys)
        memory("rows", most * of_rows)
        if backward:
            memory("slopes", most * of_keys)
            memory("part", most * of_rows)
            memory("sent", most * call.v.shape[3])
        return memory


def _of_sample(x: Tensor, sample: int) -> Tensor:
    """x, (batch or 1, ...), of one sample."""
    return x[sample if x.shape[0] > 1 else 0]
