"""Packed rows in layers: `MultiheadAttention`, torch's Transformer layers, jagged tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small import small
from torch import Tensor, nn

import attnzoo
from attnzoo import MultiheadAttention
from attnzoo.registry import spec_of

LENGTHS = (5, 9, 6)
IDS = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
SQUARE = [name for name in attnzoo.names() if spec_of(name).bidirectional]


def layer_of(name: str, **more: Any) -> MultiheadAttention:
    torch.manual_seed(0)
    options = small(name)
    return MultiheadAttention(16, 4, attention=name, attention_options=options, **more).double()


def apart(layer: nn.Module, x: Tensor, dim: int, **how: bool) -> Tensor:
    rows = [layer(one, one, one, need_weights=False, **how)[0] for one in x.split(LENGTHS, dim)]
    return torch.cat(rows, dim)


@pytest.mark.parametrize("name", attnzoo.names())
def test_a_layer_keeps_pieces_apart(name: str) -> None:
    """In every layout, and in the weights."""
    is_causal = not spec_of(name).bidirectional
    for batch_first, shape in ((True, (2, 20, 16)), (False, (20, 2, 16)), (True, (20, 16))):
        layer = layer_of(name, batch_first=batch_first)
        x, dim = torch.randn(shape).double(), int(len(shape) == 3 and batch_first)
        ids = IDS if len(shape) == 2 else IDS.expand(2, -1)
        out, weights = layer(x, x, x, segments=ids, is_causal=is_causal)
        torch.testing.assert_close(out, apart(layer, x, dim, is_causal=is_causal))
        assert bool((weights * (IDS[:, None] != IDS)).eq(0).all())


@pytest.mark.parametrize("name", SQUARE)
def test_a_model_is_told_of_its_pieces(name: str) -> None:
    """In training and in evaluation, where torch would pass its layers by."""
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2
    ).double()
    attnzoo.swap(model, name, **small(name))
    x = torch.randn(2, 20, 16).double()
    for training in (True, False):
        model.train(training)
        wanted = torch.cat([model(one) for one in x.split(LENGTHS, 1)], 1)
        with attnzoo.packed(model, IDS.expand(2, -1)):
            out = model(x)
            copied = copy.deepcopy(model)
        torch.testing.assert_close(copied(x), model(x))
        torch.testing.assert_close(out, wanted)
        assert not torch.allclose(model(x), wanted)


def test_what_no_model_can_be_told() -> None:
    model: nn.Module = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), 1
    )
    with pytest.raises(ValueError, match="has 2 nn"), attnzoo.packed(model, IDS[None]):
        pass
    attnzoo.swap(model, "standard")  # which leaves cross-attention alone
    with pytest.raises(ValueError, match="has 1 nn"), attnzoo.packed(model, IDS[None]):
        pass
    with pytest.raises(ValueError, match="no layer"), attnzoo.packed(nn.Linear(2, 2), IDS[None]):
        pass
    x, memory = torch.randn(1, 20, 16), torch.randn(1, 20, 16)
    layer = MultiheadAttention(16, 4, batch_first=True)
    with attnzoo.packed(layer, IDS[None]), pytest.raises(ValueError, match="cross-attention"):
        layer(x, memory, memory)
    bad: list[Any] = [IDS, IDS[None].float(), [0]]
    for ids in bad:
        with pytest.raises(ValueError, match="give an integer tensor"), attnzoo.packed(layer, ids):
            pass
    bare = nn.ModuleList([layer, attnzoo.build("linear", heads=4, head_dim=4)])
    with pytest.raises(ValueError, match="calls linear without"), attnzoo.packed(bare, IDS[None]):
        pass
    layer = MultiheadAttention(16, 4, add_bias_kv=True, batch_first=True)
    with pytest.raises(ValueError, match="belong to no piece"):
        layer(x, x, x, segments=IDS[None])


@pytest.mark.parametrize("name", attnzoo.names())
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_jagged_tensor_comes_back_as_it_came(name: str, need_weights: bool) -> None:
    """So that it can be added to what went in, as a residual connection does."""
    layer, is_causal = layer_of(name, batch_first=True), not spec_of(name).bidirectional
    rows = [torch.randn(length, 16).double() for length in LENGTHS]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    out, weights = layer(x, x, x, need_weights=need_weights, is_causal=is_causal)
    assert (weights is not None) == need_weights
    for one, found in zip(rows, (x + out).unbind(), strict=True):
        wanted = one + layer(one, one, one, need_weights=False, is_causal=is_causal)[0]
        torch.testing.assert_close(found, wanted)
