"""A swapped layer as a graph: torch.compile and torch.export say what eager says."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from small import in_models, of_each_engine, of_each_folder, small
from stages import only
from swap_layers import HEADS, LENGTH, SIZE, gradients, layer, masks, padding, tokens
from torch import Tensor
from torch._dynamo.exc import UserError
from torch.export import Dim

import attnzoo

#: The backends whose graph must not depend on the length. Others may lay out blocks or chunks for
#: one length.
ANY_LENGTH = {
    "standard": "auto",
    "linformer": "auto",
    "linear": "reference",
    "performer": "reference",
    "cosformer": "reference",
    "retention": "reference",
}
#: Two of those others.
LAID_OUT = ["bigbird", "sliding_window"]
BATCH_DIM, LENGTH_DIM = Dim("batch_size", min=2, max=64), Dim("length", min=6, max=60)


def agree(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(
        actual, wanted, rtol=0.0, atol=2e-5 * max(1.0, float(wanted.abs().max()))
    )


def compiled_is_eager(name: str, backend: str) -> None:
    """Training, with padding, in one graph."""
    torch._dynamo.reset()
    model = layer(name).train()
    out, wanted = gradients(model, (tokens(),), src_key_padding_mask=padding(), **masks(name))
    graph: Any = torch.compile(model, fullgraph=True, backend=backend)
    compiled, found = gradients(graph, (tokens(),), src_key_padding_mask=padding(), **masks(name))
    agree(compiled[~padding()], out[~padding()])
    assert len(found) == len(wanted)
    for gradient, expected in zip(found, wanted, strict=True):
        agree(gradient, expected)


@pytest.mark.parametrize("name", only(["bigbird"], of_each_engine()))
def test_a_swapped_layer_compiles_in_one_graph(name: str) -> None:
    compiled_is_eager(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", in_models())
def test_inductor_compiles_a_swapped_layer_in_one_graph(name: str) -> None:
    compiled_is_eager(name, "inductor")


def exported(model: torch.nn.Module, *inputs: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, inputs, **options).module()


@pytest.mark.parametrize(
    "name", only(["linear", "sliding_window"], ["standard", "linear", "retention", *LAID_OUT])
)
def test_a_swapped_layer_is_exported_with_a_dynamic_batch(name: str) -> None:
    """As torch's layer; the attention in it is exported for every variant below."""
    model, shapes = layer(name), {"src": {0: BATCH_DIM}, **dict.fromkeys(masks(name))}
    graph = exported(model, tokens(3), kwargs=masks(name), dynamic_shapes=shapes)
    for batch_size in (3, 2, 7):
        agree(graph(tokens(batch_size), **masks(name)), model(tokens(batch_size), **masks(name)))
    with pytest.raises(AssertionError, match=r"Guard failed: src.size\(\)\[1\] == 20"):
        graph(tokens(3, LENGTH + 1), **masks(name))


@pytest.mark.thorough
@pytest.mark.parametrize("name", only(["standard", "linear"], [*ANY_LENGTH, "sliding_window"]))
def test_a_dynamic_length_is_exported_where_no_blocks_are_laid_out(name: str) -> None:
    model = layer(name, backend=ANY_LENGTH.get(name, "auto"))
    known: dict[str, Any] = {"src_mask": {0: LENGTH_DIM, 1: LENGTH_DIM}, "is_causal": None}
    shapes = {"src": {0: BATCH_DIM, 1: LENGTH_DIM}, **{mask: known[mask] for mask in masks(name)}}
    try:
        graph = exported(model, tokens(), kwargs=masks(name), dynamic_shapes=shapes)
    except UserError as error:
        if name in ANY_LENGTH or "specialized it to be a constant" not in str(error):
            raise
        return
    for batch_size, length in ((3, LENGTH), (2, 33), (5, 7)):
        agree(
            graph(tokens(batch_size, length), **masks(name, length)),
            model(tokens(batch_size, length), **masks(name, length)),
        )


class Calls(torch.nn.Module):
    """A MultiheadAttention called with padding, causal where it can be, without weights."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = attnzoo.MultiheadAttention(
            SIZE, HEADS, batch_first=True, attention=name, attention_options=small(name)
        )
        self.is_causal = attnzoo.describe(name).spec.causal

    def forward(self, x: Tensor, ignore: Tensor) -> Tensor:
        return self.attention(
            x, x, x, key_padding_mask=ignore, need_weights=False, is_causal=self.is_causal
        )[0]


@pytest.mark.parametrize("name", only(of_each_folder()[::2], in_models()))
def test_multihead_attention_is_exported_with_a_dynamic_batch(name: str) -> None:
    """Masks are inputs of the graph."""
    model = Calls(name).eval()
    graph = exported(
        model, tokens(), padding(), dynamic_shapes={"x": {0: BATCH_DIM}, "ignore": {0: BATCH_DIM}}
    )
    for ignore in (
        padding(),
        padding().roll(1, 0),
        torch.zeros_like(padding()),
        padding()[:2],
        padding().repeat(2, 1),
    ):
        x = tokens(len(ignore))
        agree(graph(x, ignore), model(x, ignore))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("longformer", {"window": 9, "global_tokens": 2}),
        ("sliding_window", {"window": 9}),
        ("sliding_window", {"window": 9, "dilation": 2, "sinks": 2, "sink_logits": True}),
    ],
    ids=str,
)
def test_whole_blocks_are_exported_with_a_dynamic_batch(name: str, options: dict[str, Any]) -> None:
    model = Calls("standard").eval()
    model.attention = attnzoo.MultiheadAttention(
        SIZE, HEADS, batch_first=True, attention=name, attention_options=options
    ).eval()
    x, ignore = (
        torch.randn(3, 230, SIZE, generator=torch.Generator().manual_seed(1)),
        torch.arange(230) >= torch.tensor([[230], [150], [201]]),
    )
    graph = exported(
        model, x, ignore, dynamic_shapes={"x": {0: BATCH_DIM}, "ignore": {0: BATCH_DIM}}
    )
    for rows in ([0, 1, 2], [2, 0], [1, 1, 0, 2, 2]):
        agree(graph(x[rows], ignore[rows]), model(x[rows], ignore[rows]))
