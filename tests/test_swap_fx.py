"""torch.fx and TorchScript: the zoo's attention is a leaf of a symbolic trace, as torch's is, and
torch.jit.script is refused in one sentence."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from small import build_small, in_models, layer_masks, small
from test_swap_cross import Detr
from test_swap_modules import encoder, vision
from torch import Tensor, fx, nn

import attnzoo
from attnzoo import UnsupportedError

NAMES = in_models()
X = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A module of the user's own around nn.MultiheadAttention."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(32), nn.MultiheadAttention(32, 4, batch_first=True)
        spec = attnzoo.describe(name).spec
        self.mask = None if spec.bidirectional else layer_masks(spec, 10)["src_mask"]

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attn(y, y, y, attn_mask=self.mask, need_weights=False)[0]


def traced(model: nn.Module, leaves: list[str]) -> fx.GraphModule:
    """The trace, whose calls of attention are those of `leaves`; it survives copies and pickles."""
    before = [
        str(node.target)
        for node in fx.symbolic_trace(copy.deepcopy(model)).graph.nodes
        if node.op == "call_module"
    ]
    graph = fx.symbolic_trace(model)
    assert set(leaves) <= set(before)
    torch.testing.assert_close(
        pickle.loads(pickle.dumps(copy.deepcopy(graph)))(X), graph(X), rtol=0.0, atol=0.0
    )
    return graph


@pytest.mark.parametrize("name", NAMES)
def test_a_swapped_module_of_torchs_is_a_leaf(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(name), Block(name)).eval()
    exact = [str(node) for node in fx.symbolic_trace(model).graph.nodes]
    attnzoo.swap(model, name, **small(name))
    graph = traced(model, ["0.attn", "1.attn"])
    assert [str(node) for node in graph.graph.nodes] == exact and torch.equal(graph(X), model(X))
    graph(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    attnzoo.unswap(model)
    assert [str(node) for node in fx.symbolic_trace(model).graph.nodes] == exact


@pytest.mark.parametrize("name", NAMES)
def test_the_attention_in_timms_is_a_leaf(name: str) -> None:
    if attnzoo.describe(name).spec.bidirectional:
        model = attnzoo.swap(vision(), name, **small(name))
        graph = traced(model, ["0.qkv", "0.attention", "0.proj", "2.attention"])
        assert torch.equal(graph(X), model(X))


@pytest.mark.parametrize("name", NAMES)
def test_the_zoos_own_modules_are_leaves(name: str) -> None:
    spec = attnzoo.describe(name).spec

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = build_small(name, 4, 8)
            self.layer = attnzoo.MultiheadAttention(
                32, 4, batch_first=True, attention=name, attention_options=small(name)
            )

        def forward(self, x: Tensor) -> Tensor:
            heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
            out = self.core(heads, heads, heads, is_causal=spec.forms[0])
            return (
                out.transpose(1, 2).flatten(2)
                + self.layer(x, x, x, is_causal=spec.forms[0], need_weights=False)[0]
            )

    model = Model()
    torch.testing.assert_close(fx.symbolic_trace(model)(X), model(X))
    assert (
        type(model.core).__module__.startswith("attnzoo.")
        and type(model.layer).__module__ == "attnzoo.layers.multihead"
    )


@pytest.mark.parametrize("name", NAMES)
def test_scripting_is_refused_in_one_sentence(name: str) -> None:
    spec = attnzoo.describe(name).spec
    models: list[Any] = [
        build_small(name, 4, 8),
        attnzoo.MultiheadAttention(32, 4, attention=name, attention_options=small(name)),
    ]
    models += [
        attnzoo.swap(make(), name, **small(name))
        for make in (encoder, Detr, vision)
        if spec.bidirectional or make is not vision
    ]
    for model in models:
        with pytest.raises(
            UnsupportedError,
            match=rf"^torch\.jit\.script cannot compile {name}, .*use "
            rf"torch\.export\.export, torch\.compile or",
        ):
            torch.jit.script(model)
        keys = list(model.state_dict())
        assert list(model.state_dict()) == keys
