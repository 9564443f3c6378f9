"""A swapped layer as a graph: torch.compile and torch.export say what eager says."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import small_options
from swap_layers import HEADS, LENGTH, NAMES, SIZE, gradients, layer, padding, tokens
from torch import Tensor
from torch._dynamo.exc import UserError
from torch.export import Dim

import attnzoo

#: The backends whose graph does not depend on the length. The others lay out blocks or chunks for one length.
ANY_LENGTH = {"standard": "auto", "linformer": "auto", "linear": "reference", "performer": "reference"}
BATCH_DIM, LENGTH_DIM = Dim("batch_size", min=2, max=64), Dim("length", min=6, max=60)


def agree(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=0.0, atol=2e-5 * max(1.0, float(wanted.abs().max())))


def compiled_is_eager(name: str, backend: str) -> None:
    """Training, with padding, in one graph."""
    torch._dynamo.reset()
    model = layer(name).train()
    out, wanted = gradients(model, (tokens(),), src_key_padding_mask=padding())
    graph: Any = torch.compile(model, fullgraph=True, backend=backend)
    compiled, found = gradients(graph, (tokens(),), src_key_padding_mask=padding())
    agree(compiled[~padding()], out[~padding()])
    assert len(found) == len(wanted)
    for gradient, expected in zip(found, wanted, strict=True):
        agree(gradient, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_swapped_layer_compiles_in_one_graph(name: str) -> None:
    compiled_is_eager(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_inductor_compiles_a_swapped_layer_in_one_graph(name: str) -> None:
    compiled_is_eager(name, "inductor")


def exported(model: torch.nn.Module, *inputs: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, inputs, **options).module()


@pytest.mark.parametrize("name", NAMES)
def test_a_swapped_layer_is_exported_with_a_dynamic_batch(name: str) -> None:
    model = layer(name)
    graph = exported(model, tokens(3), dynamic_shapes={"src": {0: BATCH_DIM}})
    for batch_size in (3, 2, 7):
        agree(graph(tokens(batch_size)), model(tokens(batch_size)))
    with pytest.raises(AssertionError, match=r"Guard failed: src.size\(\)\[1\] == 20"):
        graph(tokens(3, LENGTH + 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_dynamic_length_is_exported_where_no_blocks_are_laid_out(name: str) -> None:
    model = layer(name, backend=ANY_LENGTH.get(name, "auto"))
    shapes = {"src": {0: BATCH_DIM, 1: LENGTH_DIM}}
    if name not in ANY_LENGTH:
        with pytest.raises(UserError, match="specialized it to be a constant"):
            exported(model, tokens(), dynamic_shapes=shapes)
        return
    graph = exported(model, tokens(), dynamic_shapes=shapes)
    for batch_size, length in ((3, LENGTH), (2, 33), (5, 7)):
        agree(graph(tokens(batch_size, length)), model(tokens(batch_size, length)))


class Calls(torch.nn.Module):
    """A MultiheadAttention called with padding, causal where it can be, without weights."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = attnzoo.MultiheadAttention(SIZE, HEADS, batch_first=True, attention=name, attention_options=small_options(name))
        self.is_causal = attnzoo.describe(name).spec.causal

    def forward(self, x: Tensor, ignore: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=ignore, need_weights=False, is_causal=self.is_causal)[0]


@pytest.mark.parametrize("name", attnzoo.names())
def test_multihead_attention_is_exported(name: str) -> None:
    """Static shapes; masks are inputs of the graph."""
    model = Calls(name).eval()
    graph = exported(model, tokens(), padding())
    for ignore in (padding(), padding().roll(1, 0), torch.zeros_like(padding())):
        agree(graph(tokens(), ignore), model(tokens(), ignore))
