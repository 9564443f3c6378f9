"""An attention layer of transformers, which takes hidden states, called with q, k and v."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.conventions.dialects.dialect import Asked, NotExpressible, Sizes

#: What makes q, k and v of hidden states, as layers call it, and what takes the rows.
PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
)
OUTPUTS = ("o_proj", "out_proj", "out_lin", "dense")


class Instead(nn.Module):
    """In the place of a projection: gives `answer`; None: what it is given."""

    def __init__(self, answer: Tensor | None = None) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        return x if self.answer is None else self.answer


def layer_rows(layer: Any, given: Asked, mask: Tensor) -> Tensor:
    """The rows of a layer whose projections give q, k and v, with nothing turned by positions.

    mask: (batch, 1, query_length, key_length), added to the scores
    returns: (batch, heads, length, head_dim)
    """
    batch, _, length, width = given.q.shape
    if length != given.k.shape[2]:
        raise NotExpressible("a layer has as many queries as keys")
    taken = inspect.signature(layer.forward).parameters
    told: dict[str, Any] = {"attention_mask": mask}
    if "position_embeddings" in taken:
        cos = given.q.new_ones(batch, length, width)
        told["position_embeddings"] = (cos, torch.zeros_like(cos))
    answers: dict[str, Tensor | None] = dict(zip(_projections(layer), _flat(given), strict=True))
    answers |= {name: None for name in OUTPUTS if isinstance(getattr(layer, name, None), nn.Module)}
    hidden = given.q.new_zeros(batch, length, layer.config.hidden_size)
    with _replaced(layer, {name: Instead(answer) for name, answer in answers.items()}):
        answer = layer(hidden, **told)
    rows = answer[0] if isinstance(answer, tuple) else answer
    return rows.unflatten(-1, (-1, width)).transpose(1, 2)


def layer_sizes(layer: Any) -> Sizes:
    """(heads, kv_heads, head_dim) of a layer. Raises ValueError on what is none."""
    config = getattr(layer, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if config is None or heads is None or not _projections(layer):
        names = "; ".join(", ".join(group) for group in PROJECTIONS)
        raise ValueError(
            "transformers_layer takes an attention layer of transformers that has a config and "
            f"projections of its own ({names}); got {type(layer).__name__}: give the module that "
            "holds them, such as model.model.layers[0].self_attn, or its attention function in "
            "the dialect transformers"
        )
    widths = (getattr(layer, name, None) for name in ("head_dim", "attention_head_size"))
    own = next((width for width in widths if width is not None), config.hidden_size // heads)
    return heads, getattr(config, "num_key_value_heads", None) or heads, own


def _projections(layer: Any) -> tuple[str, ...]:
    """The names of the layer's own; none where it has none."""
    for names in PROJECTIONS:
        if all(isinstance(getattr(layer, name, None), nn.Module) for name in names):
            return names
    return ()


def _flat(given: Asked) -> Iterator[Tensor]:
    return (x.transpose(1, 2).flatten(2) for x in (given.q, given.k, given.v))


@contextmanager
def _replaced(layer: nn.Module, instead: dict[str, nn.Module]) -> Iterator[None]:
    """With other modules under these names, and afterwards its own."""
    own = {name: getattr(layer, name) for name in instead}
    try:
        for name, module in instead.items():
            setattr(layer, name, module)
        yield
    finally:
        for name, module in own.items():
            setattr(layer, name, module)
