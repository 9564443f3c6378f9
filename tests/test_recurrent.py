"""Recurrent layers of torch's, the baseline beside attention: counted as their closed form says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attnzoo

pytest.importorskip("fvcore")
# And sigmoids and tangents of a unit.
GATES: dict[type[nn.RNNBase], tuple[int, int]] = {nn.GRU: (3, 3), nn.LSTM: (4, 5), nn.RNN: (1, 1)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}],
    ids=str,
)
@pytest.mark.parametrize("kind", GATES, ids=lambda kind: kind.__name__)
def test_every_token_meets_every_matrix_once(
    kind: Any, options: dict[str, Any], device: str
) -> None:
    layer, x = kind(24, 40, device=device, **options), torch.randn(5, 7, 24, device=device)
    gates, functions = GATES[kind]
    directions, layers = (2 if options.get("bidirectional") else 1), options.get("num_layers", 1)
    wide = (
        sum(40 * ((24 if layer == 0 else 40 * directions) + 40) for layer in range(layers))
        * directions
    )
    found = attnzoo.count_flops(layer, x)
    assert found.macs == 5 * 7 * gates * wide
    assert found.elementwise == 5 * 7 * functions * 40 * layers * directions
    # Torch counts no LSTM, and on the meta device no recurrence.
    if kind is not nn.LSTM and device == "cpu":
        with FlopCounterMode(display=False) as theirs:
            layer(x)
        assert theirs.get_total_flops() == found.flops


def test_relu_has_no_function_to_count() -> None:
    assert (
        attnzoo.count_flops(nn.RNN(8, 8, nonlinearity="relu"), torch.randn(3, 2, 8)).elementwise
        == 0
    )
