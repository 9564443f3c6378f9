"""What Nyströmformer costs, in closed form."""

from __future__ import annotations

from attnzoo.engines.engine import SOFTMAX_OPERATIONS, Cost, Shape


def landmark_cost(shape: Shape, segments: int, iterations: int, kernel_size: int) -> Cost:
    """The cost of the three softmaxes, the pseudo-inverse and the convolution.

    shape: the sizes of the call
    segments: number of landmarks
    iterations: number of steps of the pseudo-inverse
    kernel_size: of the convolution of v that is added to the output; 0: there is none
    """
    heads = shape.batch_size * shape.heads
    # queries by landmarks, landmarks by keys
    products = 2 * segments * shape.key_length * 2 * shape.head_dim
    matrices = 2 * segments**2 * shape.head_dim + 4 * iterations * segments**3
    macs = heads * (products + matrices + shape.key_length * shape.head_dim * kernel_size)
    scores = heads * (2 * segments * shape.key_length + segments**2)
    means = (
        shape.batch_size * (shape.heads + shape.kv_heads) * segments * shape.head_dim
        if shape.key_length % segments
        else 0
    )
    return Cost(
        macs=macs,
        support_macs=macs,
        elementwise=SOFTMAX_OPERATIONS * scores + heads * segments**2 + means,
        moved_bytes=shape.input_bytes
        + shape.query_bytes
        + shape.heads * kernel_size * shape.dtype.itemsize,
    )
