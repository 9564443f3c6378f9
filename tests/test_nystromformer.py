"""Nyströmformer beyond the rules: padded queries, the limit of many landmarks, and a pseudo-inverse
scaled for each matrix."""

from __future__ import annotations

import pytest
import torch
from cases import Situation, close, padding, tensors

import attnzoo


@pytest.mark.parametrize("kind", ["left", "right", "interior"])
def test_padded_queries_reach_no_landmark(kind: str):
    """A padded slot is padded as a query too: NaN there spoils its own row and no other."""
    attn = attnzoo.build("nystromformer", heads=4, head_dim=8, num_landmarks=8)
    q, k, v, _ = (x.float() for x in tensors(Situation(50, 50)))
    mask = padding(kind, 2, 50)
    assert mask is not None
    clean = attn(q, k, v, key_mask=mask)
    out = attn(q.masked_fill(~mask[:, None, :, None], float("nan")), k, v, key_mask=mask)
    real = mask[:, None, :, None].expand_as(out)
    assert torch.equal(out[real], clean[real])


@pytest.mark.parametrize("kind", ["left", "interior"])
def test_padding_anywhere_equals_leaving_the_tokens_out(kind: str):
    attn = attnzoo.build("nystromformer", heads=4, head_dim=8, num_landmarks=8).double()
    q, k, v, _ = tensors(Situation(50, 50, batch=1))
    mask = padding(kind, 1, 50)
    assert mask is not None
    some = mask[0]
    close(
        attn(q, k, v, key_mask=mask)[:, :, some],
        attn(q[:, :, some], k[:, :, some], v[:, :, some]),
        1e-10,
        "real rows",
    )


def test_a_landmark_for_every_token_and_many_steps_is_exact_attention():
    """A⁺ of an invertible A is its inverse, and softmax times inverse times softmax is softmax."""
    q, k, v, _ = tensors(Situation(12, 12, kv_heads=4))
    exact = attnzoo.build("standard", heads=4, head_dim=8).double()(3 * q, 3 * k, v)
    errors = []
    for iterations in (6, 12, 40):
        attn = attnzoo.build(
            "nystromformer", heads=4, head_dim=8, num_landmarks=12, iterations=iterations
        ).double()
        errors.append((attn(3 * q, 3 * k, v) - exact).norm().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-8


def test_no_sample_moves_another():
    """One scale for a whole batch, as in the first published code, would let a sample change its
    neighbours."""
    attn = attnzoo.build(
        "nystromformer", heads=4, head_dim=8, num_landmarks=8, iterations=2
    ).double()
    q, k, v, _ = tensors(Situation(40, 40))
    alone = attn(q[:1], k[:1], v[:1])
    beside = attn(torch.cat([q[:1], 9 * q[1:]]), torch.cat([k[:1], 9 * k[1:]]), v)[:1]
    close(beside, alone, 1e-12, "the first sample beside a sharper one")


def test_bad_options():
    with pytest.raises(ValueError, match="convolution=4 must be odd"):
        attnzoo.build("nystromformer", heads=1, head_dim=4, convolution=4)
    with pytest.raises(ValueError, match="num_landmarks"):
        attnzoo.build("nystromformer", heads=1, head_dim=4, num_landmarks=0)
