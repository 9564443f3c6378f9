"""What fits and how long it takes: the longest sequence under several accounts of memory,
rooflines, and crossover lengths."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from attnzoo.cost.hardware import GPU, Roofline, roofline
from attnzoo.cost.model_sizes import TransformerModel

ELEMENT_BYTES = 2  # bf16 or fp16
STATISTIC_BYTES = 4  # FlashAttention keeps one fp32 log-sum-exp a query
# A parameter in mixed-precision training: bf16 weight and gradient, fp32 weight and Adam's two
# moments
TRAINING_BYTES = 16
LONGEST = 2**40  # tokens past which a length means "no limit"


def attention_bytes(model: TransformerModel, n: int) -> int:
    """Queries, keys, values and the output of one layer."""
    return n * (2 * model.query_width + 2 * model.key_width) * ELEMENT_BYTES


def matrix_bytes(model: TransformerModel, n: int) -> int:
    """The attention matrices of one layer."""
    return model.heads * n * n * ELEMENT_BYTES


def flash_bytes(model: TransformerModel, n: int) -> int:
    """What FlashAttention (Dao et al. 2022, arXiv:2205.14135) keeps of one layer for the backward
    pass: no matrix, one statistic a query."""
    return attention_bytes(model, n) + model.heads * n * STATISTIC_BYTES


def cache_bytes(model: TransformerModel, n: int) -> int:
    """Keys and values of all layers, kept for decoding."""
    return model.layers * 2 * model.key_width * n * ELEMENT_BYTES


def input_bytes(model: TransformerModel, n: int) -> int:
    """One layer's input: all that gradient checkpointing keeps of a layer until its backward pass
    computes the rest again."""
    return n * model.d * ELEMENT_BYTES


def layer_bytes(model: TransformerModel, n: int) -> int:
    """All that one layer keeps for its backward pass with FlashAttention: the inputs of its two
    norms and what they give, attention's tensors, and the feed-forward network's inner values
    before and after the activation."""
    return (
        flash_bytes(model, n)
        + n * (4 * model.d + (3 if model.gated else 2) * model.ffn) * ELEMENT_BYTES
    )


@dataclass(frozen=True)
class Account:
    """One way to count the memory of n tokens.

    name: a column.
    bytes_at: as a function of the model and n.
    """

    name: str
    heading: str
    meaning: str
    bytes_at: Callable[[TransformerModel, int], int]


ACCOUNTS = (
    Account(
        "matrices",
        "matrices",
        "the attention matrices of all layers and nothing else (the article's count)",
        lambda m, n: m.layers * matrix_bytes(m, n),
    ),
    Account(
        "stored",
        "+ q, k, v, out",
        "all that an attention which stores its matrices keeps, all layers (the article's memory "
        "table)",
        lambda m, n: m.layers * (attention_bytes(m, n) + matrix_bytes(m, n)),
    ),
    Account(
        "stored_checkpointed",
        "+ checkpointing",
        "gradient checkpointing (Chen et al. 2016): the input of every layer, and one layer's "
        "tensors at a time",
        lambda m, n: m.layers * input_bytes(m, n) + attention_bytes(m, n) + matrix_bytes(m, n),
    ),
    Account(
        "flash",
        "Flash",
        "FlashAttention: q, k, v, the output and one statistic a query, all layers",
        lambda m, n: m.layers * flash_bytes(m, n),
    ),
    Account(
        "flash_checkpointed",
        "Flash + checkpointing",
        "FlashAttention with gradient checkpointing",
        lambda m, n: m.layers * input_bytes(m, n) + flash_bytes(m, n),
    ),
    Account(
        "training",
        "training",
        "the whole model: 16 bytes a parameter (bf16 weight and gradient, fp32 weight, two Adam "
        "moments), layer inputs, and one whole layer with "
        "FlashAttention at a time; the loss is taken in slices, so that no logits are kept",
        lambda m, n: (
            TRAINING_BYTES * m.parameters + m.layers * input_bytes(m, n) + layer_bytes(m, n)
        ),
    ),
    Account(
        "inference",
        "inference",
        "the whole model: bf16 weights and the keys and values of all layers; the prompt is read "
        "in slices",
        lambda m, n: ELEMENT_BYTES * m.parameters + cache_bytes(m, n),
    ),
)


def longest(bytes_at: Callable[[int], int], budget: float, limit: int = LONGEST) -> int | None:
    """Largest n whose bytes, which must not fall with n, fit the budget; 0 when one token does not;
    None when `limit` tokens do.

    Interpolates, in whole numbers, and halves when that converges slowly, so an affine count takes
    a handful of evaluations.
    """
    budget = math.floor(budget)
    if bytes_at(1) > budget:
        return 0
    if bytes_at(limit) <= budget:
        return None
    low, high, halve = 1, limit, False
    while high - low > 1:
        middle = (low + high) // 2
        if not halve:
            at_low, at_high = bytes_at(low), bytes_at(high)
            middle = low + (high - low) * (budget - at_low) // (at_high - at_low)
            middle = min(max(middle, low + 1), high - 1)
        halve = not halve
        low, high = (middle, high) if bytes_at(middle) <= budget else (low, middle)
    return low


def attention_roofline(model: TransformerModel, n: int, gpu: GPU, is_causal: bool) -> Roofline:
    """Least time of exact attention in every layer, with no matrix written to memory."""
    return roofline(
        attention_macs(model, n, is_causal), model.layers * attention_bytes(model, n), gpu
    )


def attention_macs(model: TransformerModel, n: int, is_causal: bool) -> int:
    """MACs of exact attention in every layer; causal attention skips what it masks."""
    pairs = n * (n + 1) // 2 if is_causal else n * n
    return model.layers * 2 * model.query_width * pairs


def forward_roofline(model: TransformerModel, n: int, gpu: GPU, is_causal: bool) -> Roofline:
    """Least time of one forward of the whole model over n tokens: its weights are read once."""
    macs = n * _token_macs(model) + attention_macs(model, n, is_causal)
    moved = ELEMENT_BYTES * model.parameters + model.layers * (
        attention_bytes(model, n) + 2 * input_bytes(model, n)
    )
    return roofline(macs, moved, gpu)


def decoding_roofline(model: TransformerModel, n: int, gpu: GPU) -> Roofline:
    """Least time of one new token after n: all weights and the whole cache are read."""
    macs = _token_macs(model) + model.layers * 2 * model.query_width * n
    return roofline(macs, ELEMENT_BYTES * model.parameters + cache_bytes(model, n), gpu)


def _token_macs(model: TransformerModel) -> int:
    """MACs of one token in all matrices, the output layer included."""
    return (
        model.layers * (model.projection_parameters + model.ffn_parameters) + model.vocab * model.d
    )


def crossover(
    variant: Callable[[int], float], standard: Callable[[int], float], limit: int = 2**17
) -> int | None:
    """Smallest n from which on the variant costs less: searched down the powers of two from
    `limit`, itself one, and then halved until it is exact. None when the variant does not cost less
    at `limit`."""
    high = limit
    if variant(high) >= standard(high):
        return None
    while high > 1 and variant(high // 2) < standard(high // 2):
        high //= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if variant(middle) < standard(middle) else (middle, high)
    return high
