"""Softmax with other rows: what is asked of all of them, and what of one alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Situation, close, tensors
from torch import Tensor

import attnzoo
from attnzoo.bench.peak_memory import peak_bytes
from attnzoo.engines.softmax import row_tiles
from attnzoo.engines.softmax.tile_pieces import SCORES

INPUTS: dict[str, dict[str, Any]] = {
    "forgetting": {"log_decay": lambda n: torch.full((1, 1, n), -0.001)},
    "sigmoid": {},
}


@pytest.mark.parametrize("name", INPUTS)
def test_memory_grows_with_the_length(name: str) -> None:
    """Of both passes: twice the length, at most twice the bytes, and far from a number a pair."""

    def peak(length: int) -> int:
        q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in "qkv")
        given: dict[str, Tensor] = {
            one: make(length).requires_grad_() for one, make in INPUTS[name].items()
        }
        attn = attnzoo.build(name, 1, 16)

        def train() -> None:
            attn(q, k, v, is_causal=True, **given).sum().backward()

        train()
        assert attn.last_backend == "tiles"
        return peak_bytes(train)

    # Tiles have as many scores at every length until they have the fewest rows.
    assert SCORES * 2 // 4096 > row_tiles.LEAST_ROWS
    assert peak(4096) < 2.05 * peak(2048) < 2048**2 * 2


def test_sigmoid_with_a_number_is_the_published_one() -> None:
    """apple's: sigmoid(q·k / √d + b), b = -log n; and the sum of a row is free."""
    q, k, v, _ = (x.float() for x in tensors(Situation(70, 70, kv_heads=4)))
    attn = attnzoo.build("sigmoid", 4, 8, bias=-4.25)
    expected = torch.sigmoid(q @ k.mT / 8**0.5 - 4.25)
    close(attn(q, k, v), expected @ v, 1e-5, "rows")
    close(attn.weights(q, k, is_causal=True), expected.tril(), 1e-6, "A")


@pytest.mark.parametrize("bias", [float("nan"), True, "log"])
def test_a_bad_bias_is_refused(bias: Any) -> None:
    with pytest.raises(ValueError, match=f"bias={bias!r} must be a finite number"):
        attnzoo.build("sigmoid", 4, 8, bias=bias)
