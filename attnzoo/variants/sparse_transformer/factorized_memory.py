"""What factorized attention holds, in bytes, by `factorized_flash`; without masks in the call.

Kept bytes are known to the byte. Peaks are what stands at the busiest moment, in half precision of
numbers widened to the precision of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnzoo.engines import peaks
from attnzoo.engines.engine import Shape, accumulation_dtype
from attnzoo.variants.sparse_transformer.factorized_flash import Share
from attnzoo.variants.sparse_transformer.factorized_layout import Last, Rows

# Bytes a score while what hides it is found: two distances as int64, and what is known of it so far
DRAWN = 20


@dataclass(frozen=True)
class Layout:
    """A call, its rows, and every factor that some head sees."""

    shape: Shape
    rows: Rows
    shares: Sequence[Share]

    @property
    def widens(self) -> bool:
        return self.shape.sum_bytes > self.shape.dtype.itemsize

    @property
    def copies_queries(self) -> bool:
        """Whether queries, and the output, are laid in rows anew."""
        return self.widens or self.rows.ahead > 0 or self.rows.spare > 0

    @property
    def log_sum_bytes(self) -> int:
        return (
            self.shape.batch_size
            * self.shape.heads
            * self.rows.count
            * self.rows.stride
            * self.shape.sum_bytes
        )

    @property
    def query_bytes(self) -> int:
        """Of the queries in rows."""
        return self.log_sum_bytes * self.shape.head_dim

    @property
    def key_bytes(self) -> int:
        """Of the keys in rows."""
        return (
            self.shape.batch_size
            * self.shape.kv_heads
            * self.rows.key_rows
            * self.rows.stride
            * self.shape.head_dim
            * self.shape.sum_bytes
        )

    @property
    def copied_bytes(self) -> int:
        """Of q, k and v in rows, where they are copies."""
        return self.query_bytes * self.copies_queries + 2 * self.key_bytes * (
            self.widens or self.rows.spare > 0
        )

    def kept(self) -> int:
        """q, k, v, the output and the log-sums of its rows."""
        return self.shape.input_bytes + self.shape.query_bytes + self.log_sum_bytes

    def forward(self) -> int:
        """The output in rows, its log-sums, and what a span needs or, at the end, the output
        itself."""
        held = self.copied_bytes + self.query_bytes + self.log_sum_bytes
        return held + max(
            self.shape.query_bytes * self.copies_queries,
            *(self._joining(*one) for one in self._spans()),
        )

    def training(self) -> int:
        """In the backward pass the output and its log-sums, the output and its gradient in rows,
        the gradients of q, k and v in rows."""
        held = (
            self.shape.query_bytes
            + self.log_sum_bytes
            + self.copied_bytes
            + 2 * self.query_bytes * self.copies_queries
        )
        held += self.query_bytes + 2 * self.key_bytes
        narrowed = self.shape.input_bytes * self.widens
        return max(
            self.forward(), held + max(narrowed, *(self._returning(*one) for one in self._spans()))
        )

    def _spans(self) -> set[tuple[Share, Shape, int]]:
        """The spans that differ, each with the sizes of its call, groups as heads, and the scores
        that it hides one by one."""
        found, dtype = set(), accumulation_dtype(self.shape.dtype)
        for share in self.shares:
            for span in share.spans(self.shape.head_dim, is_padded=False):
                groups, rows, keys = share.sizes(span)
                found.add(
                    (
                        share,
                        Shape(1, groups, groups, self.shape.head_dim, rows, keys, dtype=dtype),
                        share.hidden_scores(span),
                    )
                )
        return found

    @staticmethod
    def _hiding(share: Share, call: Shape, hidden: int) -> int:
        """What hides keys, as bool and as numbers, and the keys and values that are fetched."""
        fetched = 2 * call.key_bytes // call.heads if isinstance(share.part, Last) else 0
        return fetched + hidden * (1 + call.dtype.itemsize)

    def _joining(self, share: Share, call: Shape, hidden: int) -> int:
        """What hides keys being found; then rows and log-sums of a span, and the kernel's working
        memory or the four numbers a row that join them."""
        more = peaks.statistic_bytes(call)
        joining = (
            self._hiding(share, call, hidden)
            + call.query_bytes
            + more
            + max(peaks.working_bytes(call), 4 * more)
        )
        return max(DRAWN * hidden, joining)

    def _returning(self, share: Share, call: Shape, hidden: int) -> int:
        """Gradients of a span, and the output's laid as the kernel wants it."""
        relaid = peaks.relaid_bytes(call.query_bytes, call.heads, call.query_length)
        returning = (
            self._hiding(share, call, hidden)
            + call.query_bytes
            + 2 * call.key_bytes
            + relaid
            + peaks.backward_working_bytes(call)
        )
        return max(DRAWN * hidden, returning)
