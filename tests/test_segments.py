"""What other libraries say of packed rows, as segments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnzoo.sequences.segments import from_cu_seqlens, from_position_ids, from_seq_idx, joined


def ids(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ends_of_pieces(dtype: torch.dtype) -> None:
    ends = ids(0, 3, 4, 4, 6).to(dtype)  # the third piece has no token
    assert from_cu_seqlens(ends).tolist() == [[0, 0, 0, 1, 3, 3]]
    assert from_cu_seqlens(ends, 6).tolist() == [[0, 0, 0, 1, 3, 3]]
    assert from_cu_seqlens(ends, 8).tolist() == [[0, 0, 0, 1, 3, 3, 4, 4]]
    assert from_cu_seqlens(ids(0)).shape == (1, 0)
    assert from_cu_seqlens(ids(0), 2).tolist() == [[0, 0]]


def test_positions_that_start_again() -> None:
    rows = torch.tensor([[0, 1, 2, 0, 1, 0], [4, 5, 7, 8, 9, 10], [0, 0, 0, 1, 2, 1]])
    expected = [[0, 0, 0, 1, 1, 2], [0] * 6, [0, 1, 2, 2, 2, 3]]
    assert from_position_ids(rows).tolist() == expected
    assert from_position_ids(rows, rows >= 0).tolist() == expected


@pytest.mark.parametrize("fill", [0, 1, 7])
def test_positions_of_padding_say_nothing(fill: int) -> None:
    """Padding ahead, between and behind; the row of padding alone is one piece."""
    mask = torch.tensor(
        [[0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0], [0] * 6]
    ).bool()
    one = (mask.cumsum(1) - 1).masked_fill(~mask, fill)
    assert not from_position_ids(one, mask).any()
    packed = torch.tensor([[9, 9, 0, 1, 0, 1], [0, 1, 9, 9, 0, 1], [0, 0, 1, 0, 9, 9], [9] * 6])
    found = from_position_ids(packed.where(mask, fill), mask)
    assert [row[seen].tolist() for row, seen in zip(found, mask, strict=True)] == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [0, 1, 1, 2],
        [],
    ]


def test_numbers_of_pieces() -> None:
    assert from_seq_idx(ids(0, 0, 1)).tolist() == [[0, 0, 1]]
    assert from_seq_idx(ids(0, 0, 1), 2).tolist() == [[0, 0, 1]] * 2
    rows = torch.tensor([[0, 1], [2, 2]], dtype=torch.int32)
    assert from_seq_idx(rows, 2) is rows


NOT_READ: Any = [0, 2]
BAD = [
    (lambda: from_cu_seqlens(ids(1, 3)), "cu_seqlens begins with 1; it must begin with 0"),
    (lambda: from_cu_seqlens(ids(0, 3, 2)), "cu_seqlens goes down from 3 to 2"),
    (lambda: from_cu_seqlens(ids(0, 3), 2), "cu_seqlens ends at 3 and the row has 2 tokens"),
    (lambda: from_cu_seqlens(ids()), "cu_seqlens .* dtype torch.float32"),
    (lambda: from_cu_seqlens(ids().long()), "cu_seqlens is empty"),
    (lambda: from_cu_seqlens(ids(0, 2)[None]), r"cu_seqlens has shape \(1, 2\)"),
    (lambda: from_cu_seqlens(ids(0, 2).float()), r"torch.float32.*use cu_seqlens.long\(\)"),
    (lambda: from_cu_seqlens(NOT_READ), "cu_seqlens is a list; give an integer tensor"),
    (lambda: from_position_ids(ids(0, 1)), r"position_ids has shape \(2,\)"),
    (lambda: from_position_ids(ids(0, 1)[None].double()), "dtype torch.float64"),
    (lambda: from_position_ids(ids(0, 1)[None], ids(1)[None] > 0), r"key_mask has shape \(1, 1\)"),
    (lambda: from_seq_idx(ids(0, 1) > 0), "seq_idx has dtype torch.bool"),
    (lambda: from_seq_idx(torch.zeros(3, 2).long(), 2), "the tokens of 2 rows"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_what_cannot_be_read(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_tokens_meet_where_both_say_so() -> None:
    """Whatever the ids: negative ones, and small dtypes."""
    first = torch.tensor([[0, 0, 2, 2, 2, -2]], dtype=torch.int8)
    second = torch.tensor([[1, 1, 1, -1, 127, 127]], dtype=torch.int8)
    both = joined(first, second)
    assert both is not None
    same = (both[0, :, None] == both[0]).tolist()
    assert same == [
        [bool(first[0, i] == first[0, j] and second[0, i] == second[0, j]) for j in range(6)]
        for i in range(6)
    ]
