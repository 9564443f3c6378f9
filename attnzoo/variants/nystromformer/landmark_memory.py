"""What Nyströmformer takes and holds, bytes without masks in the call, and on the CPU, as in
`attnzoo.engines.memory`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from attnzoo.engines import peaks
from attnzoo.engines.engine import SOFTMAX_OPERATIONS, Cost, Shape
from attnzoo.engines.memory import INDEX_BYTES, fused

CHANNELS = 16  # of a vector, with AVX-512
# Of one step of the pseudo-inverse: Z, ¼ Z, B Z, and the three that products with it are made of
SAVED_MATRICES = 6


@dataclass(frozen=True)
class LandmarkMemory:
    """Of one call. kernel_size: of the convolution of v that is added to the output; 0: none."""

    shape: Shape
    segments: int
    iterations: int
    kernel_size: int

    @property
    def convolves(self) -> bool:
        return self.kernel_size > 0

    @property
    def heads(self) -> int:
        return self.shape.batch_size * self.shape.heads

    @property
    def seen_by_landmarks(self) -> Shape:
        return replace(self.shape, query_length=self.segments)

    @property
    def means_bytes(self) -> int:
        """Of the means of queries, and of all heads' means of keys."""
        return self.seen_by_landmarks.query_bytes

    @property
    def wide_means_bytes(self) -> int:
        """The same as sums are made."""
        return self.heads * self.segments * self.shape.head_dim * self.shape.sum_bytes

    @property
    def matrix_bytes(self) -> int:
        """Of segments × segments scores."""
        return self.heads * self.segments**2 * self.shape.sum_bytes

    @property
    def places(self) -> int:
        """Tokens fetched for the means, where segments differ in length; 0 where they do not."""
        length = self.shape.key_length
        return self.segments * -(-length // self.segments) if length % self.segments else 0

    def cost(self) -> Cost:
        """Of the three softmaxes, the pseudo-inverse and the convolution."""
        shape, segments = self.shape, self.segments
        products = (
            2 * segments * shape.key_length * 2 * shape.head_dim
        )  # queries by landmarks, landmarks by keys
        matrices = 2 * segments**2 * shape.head_dim + 4 * self.iterations * segments**3
        macs = self.heads * (
            products + matrices + shape.key_length * shape.head_dim * self.kernel_size
        )
        scores = self.heads * (2 * segments * shape.key_length + segments**2)
        means = (
            shape.batch_size * (shape.heads + shape.kv_heads) * segments * shape.head_dim
            if shape.key_length % segments
            else 0
        )
        return Cost(
            macs=macs,
            support_macs=macs,
            elementwise=SOFTMAX_OPERATIONS * scores + self.heads * segments**2 + means,
            moved_bytes=shape.input_bytes
            + shape.query_bytes
            + shape.heads * self.kernel_size * shape.dtype.itemsize,
            kept_bytes=self.kept(),
            forward_bytes=self.forward(),
            training_bytes=self.training(),
        )

    def kept(self) -> int:
        """q, k, v, the output, and what their softmaxes and the pseudo-inverse hold."""
        kept = self.shape.input_bytes + fused(
            self.shape, self.shape.heads * self.shape.query_length
        )
        kept += (
            fused(self.seen_by_landmarks, self.shape.heads * self.segments) + 3 * self.means_bytes
        )  # of queries, of keys, and values
        if self.shape.sum_bytes > self.shape.dtype.itemsize:
            kept += 3 * self.wide_means_bytes  # of queries and keys, and what landmarks see
        kept += (SAVED_MATRICES * self.iterations + 3) * self.matrix_bytes
        kept += (
            self.heads * self.segments * (1 + self.shape.sum_bytes)
        )  # which rows are empty, and sums of columns
        kept += 2 * self.heads * self.shape.sum_bytes  # the largest of those, twice
        if self.places:
            kept += 2 * (self.places * (INDEX_BYTES + 1) + self.segments * INDEX_BYTES)
        if self.convolves and self.shape.heads > self.shape.kv_heads:
            kept += self.shape.query_bytes  # v with a copy for every head
        return kept

    @property
    def fetched_bytes(self) -> int:
        """Of the queries in segments, where those are fetched."""
        return self.heads * self.places * self.shape.head_dim * self.shape.dtype.itemsize

    @property
    def _wide_bytes(self) -> int:
        """Of all that means are taken of, in half precision, where it is made wider first."""
        if self.shape.sum_bytes == self.shape.dtype.itemsize:
            return 0
        return (
            self.heads
            * (self.places or self.shape.query_length)
            * self.shape.head_dim
            * self.shape.sum_bytes
        )

    @property
    def _blocked_bytes(self) -> int:
        """Of v and of its convolution as oneDNN lays them out, heads filled up to whole vectors; v
        with a copy for every head."""
        if not self.convolves:
            return 0
        vectors = -(-self.shape.heads // CHANNELS) * CHANNELS
        repeated = self.shape.query_bytes if self.shape.heads > self.shape.kv_heads else 0
        return 2 * self.shape.query_bytes // self.shape.heads * vectors + repeated

    def forward(self) -> int:
        """The softmax over landmarks, with the means, what those see, and the pseudo-inverse; or
        the segments, fetched and cleared."""
        queries = self.shape.query_bytes
        attending = (
            4 * self.means_bytes
            + self.matrix_bytes
            + peaks.forward(replace(self.shape, key_length=self.segments))
        )
        inverting = 2 * self.means_bytes + 6 * self.matrix_bytes
        convolving = max(queries + self._blocked_bytes, 3 * queries) if self.convolves else 0
        averaging = (
            max(2 * self.fetched_bytes, self.fetched_bytes + self._wide_bytes) + self.means_bytes
        )
        return max(attending, convolving, averaging, inverting)

    def training(self) -> int:
        """The end of the backward pass: the gradient of the means laid over the queries; or the
        middle of it, at the pseudo-inverse."""
        queries, keys = self.shape.query_bytes, 2 * self.shape.key_bytes
        laid = (
            queries + self.fetched_bytes + self._wide_bytes
            if self.places
            else 2 * max(queries, self._wide_bytes)
        )
        ending = 2 * queries + keys + laid
        inverting = (
            self.kept()
            - self.shape.input_bytes
            + queries
            + 2 * self.means_bytes
            + 4 * self.matrix_bytes
        )
        convolving = 4 * queries + self._blocked_bytes if self.convolves else 0
        return max(ending, inverting, convolving, self.forward())
