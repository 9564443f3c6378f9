"""Masks with a truth value for every query and key, read as causality, padding and packing."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo import UnsupportedError
from attnzoo.sequences.masks import ReadMask, read_mask, visible_keys

LENGTH = 9
SEGMENTS = {
    "one piece": [[0] * 9, [0] * 9],
    "pieces": [[0, 0, 0, 1, 2, 2, 2, 2, 3], [4, 4, 7, 7, 7, 7, 7, 8, 8]],
}
PADDING = {
    "none": [[1] * 9, [1] * 9],
    "ends": [[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]],
    "between": [[1, 1, 1, 0, 1, 1, 0, 1, 1], [1, 0, 0, 1, 1, 1, 1, 1, 1]],
}


def shown(read: ReadMask, batch_size: int, queries: int, length: int) -> Tensor:
    """(batch, 1, queries, length), what the arguments of a call show."""
    slots, seen = torch.arange(length), torch.ones(batch_size, queries, length, dtype=torch.bool)
    if read.is_causal:
        seen = seen & (slots <= slots[length - queries :, None])
    if read.key_mask is not None:
        seen = seen & read.key_mask[:, None]
    if read.segments is not None:
        seen = seen & (read.segments[:, length - queries :, None] == read.segments[:, None])
    return seen[:, None]


def made(segments: str, padding: str, causal: bool) -> tuple[Tensor, Tensor]:
    mask = torch.tensor(PADDING[padding]).bool()
    read = ReadMask(mask, causal, torch.tensor(SEGMENTS[segments]))
    return shown(read, 2, LENGTH, LENGTH), mask


@pytest.mark.parametrize(
    ("segments", "padding", "causal"), product(SEGMENTS, PADDING, [True, False])
)
def test_what_a_mask_says(segments: str, padding: str, causal: bool) -> None:
    visible, mask = made(segments, padding, causal)
    read = read_mask(visible)
    assert read is not None and read.is_causal == causal
    assert (read.key_mask is None) == (padding == "none")
    assert (read.segments is None) == (segments == "one piece")
    rows = mask[:, None, :, None]
    assert not ((shown(read, 2, LENGTH, LENGTH) != visible) & rows).any()
    junk = visible.clone()
    junk &= rows  # the rows of padding may be any
    again = read_mask(junk)
    assert again is not None and torch.equal(shown(again, 2, LENGTH, LENGTH) & rows, visible & rows)


@pytest.mark.parametrize("causal", [True, False])
def test_every_other_mask_is_something_else(causal: bool) -> None:
    """One entry changed: unless that tells of another piece or of padding, it is not read."""
    visible, _ = made("pieces", "none", causal)
    for row, column in product(range(LENGTH), range(LENGTH)):
        other = visible.clone()
        other[0, 0, row, column] ^= True
        read = read_mask(other)
        if read is not None:
            found = shown(read, 2, LENGTH, LENGTH)
            real = (
                torch.ones(2, LENGTH, dtype=torch.bool) if read.key_mask is None else read.key_mask
            )
            assert not ((found != other) & real[:, None, :, None]).any()


def test_more_keys_than_queries() -> None:
    visible, mask = made("one piece", "ends", True)
    read = read_mask(visible[:, :, -4:])
    assert read is not None and read.is_causal and read.segments is None
    real = mask[:, None, -4:, None]
    assert not ((shown(read, 2, 4, LENGTH) != visible[:, :, -4:]) & real).any()
    assert read_mask(visible[..., :4]) is None  # more queries than keys
    one = read_mask(visible[:, :, -1:])
    assert one is not None and one.segments is None


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_that_the_attention_knows(window: int) -> None:
    visible, _ = made("pieces", "none", True)
    slots = torch.arange(LENGTH)
    near = visible & ((slots[:, None] - slots) < window)
    read = read_mask(near, window)
    assert read is not None
    assert torch.equal(shown(read, 2, LENGTH, LENGTH) & ((slots[:, None] - slots) < window), near)
    if window > 1:
        assert read_mask(near) is None


def test_heads_that_differ_are_not_read() -> None:
    visible, _ = made("pieces", "none", True)
    heads = visible.repeat(1, 3, 1, 1)
    assert read_mask(heads) is not None
    heads[0, 2, 8, 8] = False
    assert read_mask(heads) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_additive_masks(dtype: torch.dtype) -> None:
    visible, _ = made("pieces", "ends", True)
    for low in (torch.finfo(dtype).min, float("-inf")):
        added = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, low)
        found = visible_keys(added)
        assert found is not None and torch.equal(found, visible)
    added[0, 0, 1, 1] = -3.0
    assert visible_keys(added) is None


@pytest.mark.parametrize("name", ["linear", "sliding_window", "bigbird"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_multihead_attention_reads_them(name: str, kind: str) -> None:
    options: Any = {"sliding_window": {"window": 3}, "bigbird": {"block_size": 2}}.get(name, {})
    torch.manual_seed(0)
    layer = attnzoo.MultiheadAttention(
        16, 2, batch_first=True, attention=name, attention_options=options
    ).double()
    x = torch.randn(2, LENGTH, 16, dtype=torch.float64)
    visible, mask = made("pieces", "ends", True)
    hidden: Tensor = ~visible.expand(-1, 2, -1, -1).flatten(0, 1)
    if kind == "float":
        hidden = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    out, weights = layer(x, x, x, attn_mask=hidden)
    wanted, expected = layer(
        x,
        x,
        x,
        is_causal=True,
        attn_mask=nn_causal(LENGTH),
        key_padding_mask=~mask,
        segments=torch.tensor(SEGMENTS["pieces"]),
    )
    torch.testing.assert_close(out[mask], wanted[mask], rtol=0, atol=1e-12)
    torch.testing.assert_close(weights[mask], expected[mask], rtol=0, atol=1e-12)
    hidden = hidden.bool()
    hidden[0, 4, 0] = hidden[0, 4, 3] = False
    with pytest.raises(UnsupportedError, match="more than causality, padding and packing"):
        layer(x, x, x, attn_mask=hidden)


def nn_causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)
