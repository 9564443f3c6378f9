"""What factorized attention holds, in bytes, by the backend `blocks`; without masks in the call, and on the CPU, as in `memory`.

Kept bytes are known to the byte. Peaks are what stands at the busiest moment; what is smaller than a few numbers a query is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnzoo.engines.engine import Shape

POSITIONS = 17  # bytes a score while distances are compared: two as int64, and which keys are seen


@dataclass(frozen=True)
class Share:
    """One factor's part of the scores of each row. width: keys. near_rows: rows of keys that are copied beside every row of queries, 0 where
    the factor copies none. in_columns: its products run down columns. last: keys of each row of keys, where those alone are seen.
    shown: numbers of the mask that says which of its keys are seen. measured: those of them that distances tell."""

    width: int
    near_rows: int
    in_columns: bool
    last: int
    shown: int
    measured: int


@dataclass(frozen=True)
class Layout:
    """Heads that see the same factors. Queries stand in `rows` rows of `stride`, keys in `key_rows`."""

    shape: Shape
    heads: int
    stride: int
    rows: int
    key_rows: int
    shares: tuple[Share, ...]

    @property
    def samples(self) -> int:
        return self.shape.batch_size * self.heads

    @property
    def width(self) -> int:
        return sum(share.width for share in self.shares)

    @property
    def query_bytes(self) -> int:
        """Of the queries in rows, in the precision of sums."""
        return self.samples * self.rows * self.stride * self.shape.head_dim * self.shape.sum_bytes

    @property
    def key_bytes(self) -> int:
        return self.samples * self.key_rows * self.stride * self.shape.head_dim * self.shape.sum_bytes

    def score_bytes(self, width: int) -> int:
        """Of so many scores for each query."""
        return self.samples * self.rows * self.stride * width * self.shape.sum_bytes

    def is_transposed(self) -> bool:
        """Whether columns of queries are copied: they are, where neither is their number 1 nor that of the rows, nor of heads."""
        return self.samples > 1 and self.stride > 1 and self.rows > 1

    def kept_keys(self, share: Share) -> int:
        """Of k as a factor's product holds it, and of v."""
        if share.near_rows:
            return self.samples * self.rows * share.near_rows * self.stride * self.shape.head_dim * self.shape.sum_bytes
        is_view = share.in_columns or self.key_rows == 1 or share.last in (1, self.stride)
        return self.key_bytes if is_view else self.key_bytes * share.last // self.stride

    def kept(self) -> int:
        """Weights before and after empty rows are cleared; q, k and v as the products of each factor hold them; what hides keys."""
        empty = self.samples * self.rows * self.stride
        kept = self.score_bytes(self.width) + empty + sum(share.shown + 2 * self.kept_keys(share) for share in self.shares)
        transposed = [share.in_columns and self.is_transposed() for share in self.shares]
        if not all(transposed):
            kept += self.score_bytes(self.width) + self.query_bytes
        return kept + sum(self.score_bytes(share.width) + self.query_bytes for share, copied in zip(self.shares, transposed, strict=True) if copied)

    def forward(self) -> int:
        """Scores by factor, side by side, as weights, and with empty rows cleared; or the products with v, or distances, where those are larger."""
        scores, inputs = self.score_bytes(self.width), self.query_bytes + 2 * self.key_bytes
        copied = max(self.score_bytes(share.width) * share.in_columns + self.kept_keys(share) for share in self.shares)
        softmax = 4 * scores + self.shares[-1].shown
        measuring = sum(POSITIONS * share.measured for share in self.shares[-1:]) + self.score_bytes(self.width - self.shares[-1].width)
        return inputs + max(softmax, 2 * scores + copied + 2 * self.query_bytes, measuring, POSITIONS * self.shares[0].measured)

    def training(self, out_bytes: int) -> int:
        """The softmax while what hides keys and the factors' keys are held; the last sum of a forward; the softmax's backward pass."""
        scores, shown = self.score_bytes(self.width), sum(share.shown for share in self.shares)
        keys = sum(self.kept_keys(share) for share in self.shares)
        transposed = sum(self.query_bytes for share in self.shares if share.in_columns and self.is_transposed())
        softmax = 4 * scores + self.query_bytes + 2 * self.key_bytes + keys + transposed + shown + self.shares[-1].shown
        summing = self.kept() + scores + 3 * self.query_bytes + 2 * self.key_bytes
        returning = self.kept() + scores + out_bytes + self.query_bytes + keys
        return max(softmax, summing, returning, self.forward())
