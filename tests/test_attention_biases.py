"""Mask objects of torch and xformers, laid out by themselves, against what is made of them here."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import create_block_mask, create_mask

import attnzoo
from attnzoo import UnsupportedError
from attnzoo.sequences.attention_biases import arguments_of


def shown(bias: Any, query_length: int, key_length: int) -> Tensor:
    """(batch, query_length, key_length), the keys that A sees under the arguments."""
    said = arguments_of(bias, query_length, key_length)
    rows = said.batch_size or 1
    window = {} if said.window is None else {"window": said.window}
    attention = attnzoo.build("sliding_window" if window else "standard", 1, 4, **window)
    q, k = torch.zeros(rows, 1, query_length, 4), torch.zeros(rows, 1, key_length, 4)
    if said.key_mask is not None and rows > 1:  # the object's rows are one flattened row
        q, k = (x[:, :, : x.shape[2] // rows] for x in (q, k))
    masks = {"key_mask": said.key_mask, "is_causal": said.is_causal, "segments": said.segments}
    return attention.weights(q, k, **masks)[:, 0] > 0


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (2, 5), (1, 5)])
def test_causal_bias(queries: int, keys: int) -> None:
    assert torch.equal(
        shown(bias := causal_lower_right(queries, keys), queries, keys)[0], bias._materialize()
    )
    if queries == keys:
        bias = causal_upper_left(queries, keys)
        assert torch.equal(shown(bias, queries, keys)[0], bias._materialize())
    else:
        with pytest.raises(UnsupportedError, match="upper-left CausalBias puts query i at key i"):
            arguments_of(causal_upper_left(queries, keys), queries, keys)
    with pytest.raises(ValueError, match=f"of {queries} queries and {keys} keys, and the call has"):
        arguments_of(causal_lower_right(queries, keys), queries + 1, keys)


IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 6]])
MODS: dict[str, Any] = {
    "causal": lambda b, h, i, j: j <= i,
    "packed": lambda b, h, i, j: (IDS[b, i] == IDS[b, j]) & (j <= i),
    "blocks": lambda b, h, i, j: IDS[b, i] == IDS[b, j],
}


@pytest.mark.parametrize("name", MODS)
def test_block_mask(name: str) -> None:
    mod, rows = MODS[name], None if name == "causal" else 2
    mask = create_block_mask(mod, rows, None, 8, 8, device="cpu")
    assert torch.equal(shown(mask, 8, 8), create_mask(mod, rows, None, 8, 8, device="cpu")[:, 0])


def test_a_block_mask_of_another_pattern() -> None:
    mask = create_block_mask(lambda b, h, i, j: (i - j) % 2 == 0, None, None, 8, 8, device="cpu")
    with pytest.raises(UnsupportedError, match="this BlockMask says more"):
        arguments_of(mask, 8, 8)
    with pytest.raises(UnsupportedError, match="Tensor is not a mask object"):
        arguments_of(torch.ones(2), 2, 2)


@pytest.fixture(scope="module")
def biases() -> Any:
    logging.disable(logging.WARNING)  # xformers tells that it has no kernels here
    try:
        pytest.importorskip("xformers", reason="its masks are compared with themselves")
        from xformers.ops.fmha import attn_bias
    finally:
        logging.disable(logging.NOTSET)
    return attn_bias


LENGTHS = [1, 4, 2]
XFORMERS: dict[str, Any] = {
    "lower triangle": lambda of: of.LowerTriangularMask(),
    "from bottom right": lambda of: of.LowerTriangularFromBottomRightMask(),
    "with a window": lambda of: of.LowerTriangularFromBottomRightLocalAttentionMask(_window_size=3),
    "local causal": lambda of: of.LocalAttentionFromBottomRightMask(window_left=2, window_right=0),
    "local": lambda of: of.LocalAttentionFromBottomRightMask(window_left=2, window_right=2),
    "blocks": lambda of: of.BlockDiagonalMask.from_seqlens(LENGTHS),
    "causal blocks": lambda of: of.BlockDiagonalCausalMask.from_seqlens(LENGTHS),
    "blocks from bottom right": lambda of: of.BlockDiagonalMask.from_seqlens(
        LENGTHS
    ).make_causal_from_bottomright(),
    "local blocks": lambda of: of.BlockDiagonalCausalMask.from_seqlens(
        LENGTHS
    ).make_local_attention(2),
    "local blocks from bottom right": lambda of: of.BlockDiagonalMask.from_seqlens(
        LENGTHS
    ).make_local_attention_from_bottomright(2),
}


@pytest.mark.parametrize("name", XFORMERS)
def test_biases_of_xformers(biases: Any, name: str) -> None:
    bias = XFORMERS[name](biases)
    sizes = [(7, 7)] if "block" in name or name == "lower triangle" else [(7, 7), (3, 7), (1, 7)]
    for queries, keys in sizes:
        assert torch.equal(shown(bias, queries, keys)[0], bias.materialize((queries, keys)) == 0)


def test_a_block_of_more_keys_than_queries(biases: Any) -> None:
    one = biases.BlockDiagonalMask.from_seqlens([2], [5]).make_causal_from_bottomright()
    assert torch.equal(shown(one, 2, 5)[0], one.materialize((2, 5)) == 0)


@pytest.mark.parametrize(
    ("causal", "queries", "keys"),
    [
        (False, [1, 1, 1], [3, 2, 4]),
        (False, [2, 2], [4, 2]),
        (True, [1, 1], [3, 1]),
        (True, [2, 2], [4, 4]),
    ],
)
def test_padded_keys(biases: Any, causal: bool, queries: list[int], keys: list[int]) -> None:
    kind = (
        biases.BlockDiagonalCausalWithOffsetPaddedKeysMask
        if causal
        else biases.BlockDiagonalPaddedKeysMask
    )
    bias, rows = kind.from_seqlens(queries, 4, keys), len(keys)
    whole = bias.materialize((sum(queries), 4 * rows)) == 0
    found = shown(bias, sum(queries), 4 * rows)
    assert torch.equal(torch.block_diag(*found).bool(), whole)


REFUSED: list[tuple[Any, tuple[int, int], str]] = [
    (lambda of: of.LowerTriangularMask(), (2, 5), "LowerTriangularMask puts query i at key i"),
    (
        lambda of: of.LocalAttentionFromBottomRightMask(window_left=1, window_right=2),
        (5, 5),
        "1 keys before",
    ),
    (lambda of: of.BlockDiagonalMask.from_seqlens([1, 2], [3, 2]), (3, 5), "other lengths"),
    (lambda of: of.BlockDiagonalMask.from_seqlens([1, 2]), (4, 4), "of 3 queries and 3 keys"),
    (
        lambda of: of.BlockDiagonalPaddedKeysMask.from_seqlens([1, 2], 4, [3, 2]),
        (3, 8),
        "blocks of",
    ),
    (
        lambda of: of.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([2, 2], 4, [3, 2]),
        (4, 8),
        "move the padding ahead",
    ),
    (
        lambda of: of.BlockDiagonalGappyKeysMask.from_seqlens([1, 1], [0, 4, 8], [3, 2]),
        (2, 8),
        "BlockDiagonalGappyKeysMask says more",
    ),
]


@pytest.mark.parametrize(("make", "lengths", "message"), REFUSED, ids=[x[2] for x in REFUSED])
def test_what_the_arguments_cannot_say(
    biases: Any, make: Any, lengths: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        arguments_of(make(biases), *lengths)
