"""What keeps a bad slot from the rows before it, where values cannot be read: its passes over
memory, its gradients, and what it calls bad."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnzoo
from attnzoo.call import Call
from attnzoo.sequences import bad_slots
from attnzoo.sequences.bad_slots import poison, shield_past

NEVER = patch.object(bad_slots, "can_look", lambda *_, **__: False)
LENGTH = 12


def qkv(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, 2, LENGTH, 8, dtype=dtype) for _ in range(3)]


class Passes(TorchDispatchMode):
    """The operators that read or write a tensor of the given number of entries."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.read, self.written = entries, [], []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out, name = func(*args, **(kwargs or {})), func.__name__
        if "detach" not in name:
            whole = [x for x in args if isinstance(x, Tensor) and x.numel() == self.entries]
            self.read += [name] * len(whole)
            if isinstance(out, Tensor) and out.numel() == self.entries:
                self.written.append(name)
        return out


def test_it_passes_over_memory_as_seldom_as_it_can() -> None:
    """On a GPU a pass over k costs about as much as a fifth of exact attention at 1,024 tokens."""
    q, k, v = qkv()
    with NEVER, Passes(k.numel()) as passes:
        call, rows = shield_past(Call(q, k, v, is_causal=True))
        assert rows is not None
        poison(call.v, rows)
    assert sorted(passes.read) == [
        "linalg_vector_norm.default",
        "linalg_vector_norm.default",
        "nan_to_num.default",
        "nan_to_num.default",
        "where.self",
    ]
    assert sorted(passes.written) == ["nan_to_num.default", "nan_to_num.default", "where.self"]


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["standard", "linear", "sliding_window"])
def test_the_gradients_are_those_without_the_bad_token(name: str, bad: float, looks: bool) -> None:
    attn = attnzoo.build(name, heads=2, head_dim=8)
    q, k, v = (x.requires_grad_() for x in qkv())
    spoiled = torch.zeros(LENGTH, dtype=torch.bool)
    spoiled[7] = True
    with torch.no_grad():
        k[:, :, 7, 3], v[0, 1, 7, 0] = bad, bad
    with nullcontext() if looks else NEVER:
        out = attn(q, k, v, is_causal=True)
    assert torch.isfinite(out[:, :, :7]).all() and out[:, :, 7:].isnan().all()
    found = torch.autograd.grad(out[:, :, :7].square().sum(), (q, k, v))
    before = [x.detach()[:, :, :7].requires_grad_() for x in (q, k, v)]
    rows = attn(*before, is_causal=True)
    torch.testing.assert_close(out[:, :, :7], rows, rtol=1e-12, atol=1e-12)
    for x, y in zip(found, torch.autograd.grad(rows.square().sum(), before), strict=True):
        torch.testing.assert_close(x[:, :, :7], y, rtol=1e-11, atol=1e-11)
        assert not x[:, :, 7:].any()


def test_numbers_are_not_bad_because_their_sum_overflows() -> None:
    q, k, v = qkv(torch.float32)
    k, v = torch.zeros_like(k), torch.full_like(v, 3e38)
    with NEVER:
        _, rows = shield_past(Call(q, k, v, is_causal=True))
    assert rows is not None and not rows.any()


@pytest.mark.parametrize("queries", [1, 5, LENGTH, LENGTH + 4])
def test_the_rows_are_those_at_and_behind_the_bad_slot(queries: int) -> None:
    _, k, v = qkv()
    k[1, 0, 7, 0] = math.nan
    q = torch.randn(2, 2, queries, 8, dtype=torch.float64)
    for context in (NEVER, nullcontext()):
        with context:
            call, rows = shield_past(Call(q, k, v, is_causal=True))
        positions = torch.arange(queries) + LENGTH - queries
        assert rows is not None and torch.equal(rows[1], positions >= 7) and not rows[0].any()
        assert torch.isfinite(call.k).all()
