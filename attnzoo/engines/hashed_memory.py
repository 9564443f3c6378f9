"""What softmax over hashed keys holds, in bytes, by the backend `chunked`; without masks in the call, and on the CPU, as in `memory`."""

from __future__ import annotations

from dataclasses import dataclass

from attnzoo.engines.engine import Shape
from attnzoo.engines.memory import INDEX_BYTES


@dataclass(frozen=True)
class HashedMemory:
    """Of one call. share_qk: keys are queries, scaled to length 1."""

    shape: Shape
    rounds: int
    share_qk: bool

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
        """Of the chunk of every row and key in every round, and of the rows' positions; what computes a round again holds them."""
        return (self.kv_heads * self.rounds * (self.rows + self.shape.key_length) + self.rows) * INDEX_BYTES

    def kept(self) -> int:
        """Queries, keys and values; the own key and value of every row; the sum over all keys, and its parts' weights in it. Tiles are made again."""
        own = 4 * self.row_bytes * self.shape.head_dim  # with the scaled queries and the numerators
        numbers = (3 + 2 * self.rounds) * self.row_bytes  # weight of the own key, before and after a mask; of each round; the sum
        masks = 2 * self.rows + self.kv_heads * self.rows
        kept = own + numbers + masks + 2 * self.key_bytes + self.chunk_bytes
        if self.share_qk:  # keys before they are scaled, their square, its inverse root; where an own value stands alone
            kept += self.key_bytes + 2 * self.kv_heads * self.shape.key_length * self.shape.sum_bytes + self.kv_heads * self.rows
        return kept
