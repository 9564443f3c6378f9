"""Backends for a few queries whose heads all share one head of keys: equal to the reference, and
taken where they are meant for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import attnzoo
from attnzoo import UnsupportedError
from attnzoo.engines.softmax.split_keys import SHORTEST

HEADS, WIDTH = 6, 8


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def inputs(queries: int, keys: int, batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((HEADS, queries), (1, keys), (1, keys))
    return [torch.randn(batch, *shape, WIDTH).double() for shape in shapes]


def attention(backend: str = "auto", **more: Any) -> attnzoo.Attention:
    return attnzoo.build("standard", heads=HEADS, head_dim=WIDTH, backend=backend, **more)


@pytest.mark.parametrize("queries", [1, 3, 5])
def test_shared_keys_equals_the_reference(queries: int) -> None:
    """Causal and not, with padding, masks of every kind, pieces, and gradients."""
    given = [x.requires_grad_() for x in inputs(queries, 20)]
    padding = torch.ones(2, 20, dtype=torch.bool)
    padding[0, :4] = False
    masks = (torch.rand(2, HEADS, queries, 20) > 0.3, torch.randn(HEADS, 1, 20).double())
    ids = torch.arange(20).expand(2, -1) // 19
    calls: list[dict[str, Any]] = [
        {},
        {"is_causal": True},
        {"is_causal": True, "key_mask": padding},
        {"is_causal": True, "segments": ids},
        *({"attn_mask": mask, "key_mask": padding} for mask in masks),
    ]
    for call in calls:
        attn = attention()
        out, wanted = attn(*given, **call), attention("reference")(*given, **call)
        assert attn.last_backend in ("shared_keys", "sdpa and shared_keys", "shared_keys and sdpa")
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
        upstream = torch.randn_like(out)
        found, expected = (torch.autograd.grad(x, given, upstream) for x in (out, wanted))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("keys", [SHORTEST, SHORTEST + 2])
def test_split_keys_equals_the_reference(keys: int) -> None:
    """Keys that three threads can and cannot share, scores that overflow without a largest one, and
    a step of decoding."""
    for factor in (1.0, 400.0):
        q, k, v = inputs(1, keys, batch=1)
        attn, q = attention(scale=0.3), q * factor
        out, wanted = attn(q, k, v), attention("reference", scale=0.3)(q, k, v)
        assert attn.last_backend == "split_keys"
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    state = attn.init_state(1, kv_heads=1)
    _, state = attn.step(q.expand(-1, -1, keys - 1, -1), k[:, :, :-1], v[:, :, :-1], state)
    out, _ = attn.step(q, k[:, :, -1:], v[:, :, -1:], state)
    assert attn.last_backend == "split_keys"
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("three_threads")
def test_what_is_left_to_others() -> None:
    q, k, v = inputs(1, SHORTEST, batch=1)
    many = torch.ones(1, SHORTEST, dtype=torch.bool)
    refused: list[tuple[str, Any, dict[str, Any], str]] = [
        ("split_keys", (q, k[:, :, :9], v[:, :, :9]), {}, "for 4096 keys or more, got 9"),
        ("split_keys", (q, k, v), {"key_mask": many}, "it has no masks"),
        ("split_keys", (q.requires_grad_(), k, v), {}, "it has no gradient"),
        ("split_keys", (q.bfloat16(), k.bfloat16(), v.bfloat16()), {}, "in float32 or float64"),
        ("split_keys", (q, k, v[..., :3]), {}, "got 3 beside 8"),
        ("split_keys", inputs(2, SHORTEST, 1), {}, "1 samples of 2 queries and 6 heads for 3"),
        ("shared_keys", inputs(6, 9), {}, "got 6 queries of 6 heads that share 1"),
        (
            "shared_keys",
            inputs(1, 9),
            {"sink_logits": torch.zeros(HEADS)},
            "no place for sink_logits, which differs",
        ),
    ]
    for backend, given, call, message in refused:
        with pytest.raises(UnsupportedError, match=message):
            attention(backend)(*given, **call)
