"""What softmax over hashed keys holds, in bytes, by the backend `chunked`; without masks in the
call, and on the CPU, as in `memory`."""

from __future__ import annotations

from dataclasses import dataclass

from attnzoo.engines.engine import Shape
from attnzoo.engines.memory import INDEX_BYTES


@dataclass(frozen=True)
class HashedMemory:
    """Of one call. share_qk: keys are queries, scaled to length 1. tiles: of a key head, computed
    at a time;
    slots: rows that they have room for; width: keys that each of them sees. joined: rows of all
    tiles, where they are not computed at once."""

    shape: Shape
    rounds: int
    share_qk: bool
    slots: int
    tiles: int
    width: int
    joined: int = 0

    @property
    def rows(self) -> int:
        """Queries of the heads that share a key head."""
        return self.shape.query_length * self.shape.heads // self.shape.kv_heads

    @property
    def kv_heads(self) -> int:
        return self.shape.batch_size * self.shape.kv_heads

    @property
    def row_bytes(self) -> int:
        """Of one number a row."""
        return self.kv_heads * self.rows * self.shape.sum_bytes

    @property
    def key_bytes(self) -> int:
        """Of k as sums are made."""
        return self.kv_heads * self.shape.key_length * self.shape.head_dim * self.shape.sum_bytes

    @property
    def chunk_bytes(self) -> int:
        """Of the chunk of every row and key in every round, and of the rows' positions; what
        computes a round again holds them."""
        return (
            self.kv_heads * self.rounds * (self.rows + self.shape.key_length) + self.rows
        ) * INDEX_BYTES

    def kept(self) -> int:
        """Queries, keys and values; the own key and value of every row; the sum over all keys, and
        its parts' weights in it. Tiles are made again."""
        own = 4 * self.row_bytes * self.shape.head_dim  # with the scaled queries and the numerators
        numbers = (
            3 + 2 * self.rounds
        ) * self.row_bytes  # weight of the own key, before and after a mask; of each round; the sum
        masks = 2 * self.rows + self.kv_heads * self.rows
        kept = own + numbers + masks + 2 * self.key_bytes + self.chunk_bytes
        # Keys before they are scaled, their square, its inverse root; where an own value stands
        # alone
        if self.share_qk:
            kept += (
                self.key_bytes
                + 2 * self.kv_heads * self.shape.key_length * self.shape.sum_bytes
                + self.kv_heads * self.rows
            )
        return kept

    @property
    def pairs(self) -> int:
        """Scores of a round."""
        return self.kv_heads * self.slots * self.width

    @property
    def slot_bytes(self) -> int:
        """Of a vector for every slot."""
        return self.kv_heads * self.slots * self.shape.head_dim * self.shape.sum_bytes

    @property
    def fetched_bytes(self) -> int:
        """Of keys, or values, beside every tile."""
        return self.kv_heads * self.tiles * self.width * self.shape.head_dim * self.shape.sum_bytes

    @property
    def _converted_bytes(self) -> int:
        """Of k and v where they are not used as they come."""
        return (
            2 * self.key_bytes
            if self.shape.sum_bytes > self.shape.dtype.itemsize
            else self.key_bytes * self.share_qk
        )

    def forward(self) -> int:
        """One round: distances as int64, masks, scores, weights and values; beside the rows'
        queries, their own values and what rounds have found."""
        found = (
            3 * self.row_bytes * self.shape.head_dim
            + 3 * self.row_bytes
            + self.chunk_bytes
            + self._converted_bytes
        )
        weighing = 2 * self.pairs * self.shape.sum_bytes + self.fetched_bytes + self.slot_bytes
        comparing = self.pairs * (INDEX_BYTES + 2)  # chunks instead of scores
        results = self.kv_heads * self.joined * (self.shape.head_dim + 2) * self.shape.sum_bytes
        return (
            found
            + results
            + max(results, self.pairs * (INDEX_BYTES + 2) + max(weighing, comparing))
        )

    def training(self) -> int:
        """One round made again, held by autograd, and gradients of all that has length."""
        given = (
            0
            if self.shape.sum_bytes > self.shape.dtype.itemsize
            else self.shape.key_bytes * (1 if self.share_qk else 2)
        )
        held = (
            self.kept() - given + self.shape.query_bytes + 4 * self.row_bytes * self.shape.head_dim
        )
        round_bytes = (
            self.pairs * (INDEX_BYTES + 3 + 2 * self.shape.sum_bytes)
            + 2 * self.fetched_bytes
            + 2 * self.slot_bytes
        )
        return held + round_bytes
