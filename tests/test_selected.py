"""Attention whose keys the data select, beyond the rules: ties, who shares a choice, what is never
formed."""

from __future__ import annotations

import pytest
import torch
from cases import Situation, close, preferring, tensors
from torch import Tensor

import attnzoo
from attnzoo.attention import Attention
from attnzoo.engines.sparse.selected.selection import NONE, highest
from attnzoo.oracles import moba

BACKENDS = ["tiles", "selected", "reference"]


def build(**options) -> Attention:
    return attnzoo.build("moba", heads=4, head_dim=8, **options).double()


def support(attn: Attention, q: Tensor, k: Tensor, **masks) -> Tensor:
    return attn.weights(q, k, **masks) != 0


def test_blocks_for_all_keys_are_exact_attention() -> None:
    q, k, v, _ = tensors(Situation(63, 63))
    exact, attn = attnzoo.build("standard", heads=4, head_dim=8), build(block_size=9, top_k=7)
    for is_causal in (False, True):
        close(attn(q, k, v, is_causal=is_causal), exact(q, k, v, is_causal=is_causal), 1e-12, "all")
        assert attn.last_backend == "dense"


def test_one_block_is_the_own_one() -> None:
    q, k, _, _ = tensors(Situation(23, 23))
    own = torch.arange(23) // 5
    seen = (own[:, None] == own).expand(2, 4, -1, -1)
    attn = build(block_size=5, top_k=1)
    assert torch.equal(support(attn, q, k), seen)
    assert torch.equal(support(attn, q, k, is_causal=True), seen.tril())


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_scores_the_earlier_block_is_seen(backend: str) -> None:
    """Keys that are all alike, and queries of zeros: every past block scores the same."""
    q, k, v, _ = tensors(Situation(40, 40, kv_heads=4))
    k = k[:, :, :1].expand_as(k).contiguous()
    q[:, 1] = 0
    attn = preferring(build(block_size=4, top_k=3), backend)
    out, weights = moba(q, k, v, block_size=4, top_k=3, is_causal=True)
    close(attn(q, k, v, is_causal=True), out, 1e-12, "output")
    own = torch.arange(40) // 4
    seen = (own < 2) | (own == own[:, None])
    assert torch.equal(weights != 0, seen.tril().expand_as(weights))


def test_highest_takes_the_first_of_equal_and_nothing_below() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0], [-torch.inf, 2.0, -torch.inf, -torch.inf]])
    assert highest(scores, 2).tolist() == [[1, 2], [1, NONE]]
    assert [sorted(row) for row in highest(scores, 6).tolist()] == [
        [NONE, NONE, 0, 1, 2, 3],
        [NONE] * 5 + [1],
    ]


def test_a_later_key_changes_no_choice() -> None:
    """A key that every query likes, appended in the block of the last rows, is in no mean that an
    earlier block's row has read; and its block's own rows see it only from itself on."""
    q, k, _, _ = tensors(Situation(40, 40, kv_heads=4))
    before = support(build(block_size=8, top_k=2), q, k, is_causal=True)
    k[:, :, 38] = 1e6
    after = support(build(block_size=8, top_k=2), q, k, is_causal=True)
    assert torch.equal(before[:, :, :38], after[:, :, :38])


def test_each_head_of_a_group_chooses_for_itself() -> None:
    q, k, _, _ = tensors(Situation(64, 64, kv_heads=1))
    seen = support(build(block_size=4, top_k=3), q, k, is_causal=True)
    assert all(not torch.equal(seen[:, 0], seen[:, head]) for head in (1, 2, 3))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block_size": 0}, "block_size=0 must be a whole number of at least 1"),
        ({"top_k": 2.5}, "top_k=2.5 must be a whole number of at least 1"),
    ],
)
def test_bad_options(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(**options)
