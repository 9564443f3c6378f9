"""How much arithmetic and traffic one pass needs: the closed forms of `Attention.cost`, with what
the levels add."""

from __future__ import annotations

import torch

from attnzoo.attention import Attention
from attnzoo.benchmarking.levels import FEED_FORWARD
from attnzoo.benchmarking.plan import Cell
from attnzoo.registry import build

# MACs of forward+backward over those of forward: every product has two gradients, and nothing is
# computed again.
TRAINING_MACS = 3
# Tensors read or written: q, k, v and out; backward reads them and out's gradient, and writes three
# gradients.
TENSORS = {"forward": 4, "forward+backward": 12}
# Tensors read or written: x, out; backward reads x and out's gradient, and writes x's.
ACTIVATIONS = {"forward": 2, "forward+backward": 5}
WEIGHTS = {"forward": 1, "forward+backward": 3}  # read; read again, and a gradient written


def macs(attention: Attention, cell: Cell) -> int | None:
    """Multiply-accumulates of one pass, as `Row.macs` describes them; None for decoding, which
    moves its state and multiplies little."""
    if cell.phase == "decode":
        return None
    samples = cell.shape.batch_size * cell.segments
    core = attention.cost(samples, cell.piece_length, is_causal=cell.is_causal).kernel_macs
    tokens = cell.shape.batch_size * cell.length
    return (core + tokens * _weights(attention, cell)) * (
        TRAINING_MACS if cell.phase == "forward+backward" else 1
    )


def least_bytes(attention: Attention, cell: Cell) -> int:
    """Bytes that one pass must move: inputs, outputs, weights and decoding state, each once, in the
    dtype of the inputs."""
    shape = cell.shape
    size = torch.empty((), dtype=getattr(torch, cell.dtype)).element_size()
    token = shape.batch_size * shape.heads * shape.head_dim
    if cell.phase == "decode":
        return (
            attention.cost(shape.batch_size, cell.length, is_causal=True).state_elements + 4 * token
        ) * size
    if cell.level == "core":
        return TENSORS[cell.phase] * token * cell.length * size
    return (
        ACTIVATIONS[cell.phase] * token * cell.length
        + WEIGHTS[cell.phase] * _weights(attention, cell)
    ) * size


def exact(cell: Cell) -> Attention:
    """Exact attention of the cell's sizes, for its cost."""
    return build("standard", heads=cell.shape.heads, head_dim=cell.shape.head_dim)


def _weights(attention: Attention, cell: Cell) -> int:
    """Numbers in the matrices around the core, each met once by every token."""
    width = cell.shape.heads * cell.shape.head_dim
    around_core = len(attention.projected) + 1
    return {"core": 0, "multihead": around_core, "layer": around_core + 2 * FEED_FORWARD}[
        cell.level
    ] * width**2
