"""What a layer projects besides q, k and v: the inputs along the length that its attention
declares."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from attnzoo.layers.layer import Layer
from attnzoo.spec import Input

#: Where they live: with the attention, as all that a state_dict of torch's lacks.
INPUT_PROJECTIONS = "input_projections"


def add_projections(layer: Layer) -> None:
    """Give the layer's attention a linear layer for each such input."""
    made = nn.ModuleDict()
    like = layer.out_proj.weight
    for one in layer.attention.spec.inputs:
        if one.is_projected:
            width = layer.embed_dim if "queries" in one.names else layer.kdim
            made[one.name] = nn.Linear(
                width, _features(one, layer), device=like.device, dtype=like.dtype
            )
    if made:
        setattr(layer.attention, INPUT_PROJECTIONS, made)


def project_inputs(
    layer: Layer, query: Tensor, key: Tensor, given: Collection[str]
) -> dict[str, Tensor]:
    """The inputs that are projected, but for those that are given.

    layer: whose attention has the projections
    query, key: (batch, length, features), or as batch_first and a missing batch have it
    given: names of inputs
    returns: by name, with the axes that each declares
    """
    projections = layer.attention._modules.get(INPUT_PROJECTIONS)
    if projections is None:
        return {}
    made = {}
    for one in layer.attention.spec.inputs:
        if one.is_projected and one.name not in given:
            source = query if "queries" in one.names else key
            x = projections[one.name](source)  # pyright: ignore[reportIndexIssue]
            if x.dim() == 2:
                x = x[None]
            elif not layer.batch_first:
                x = x.transpose(0, 1)
            x = _with_axes(x, one, layer)
            made[one.name] = x if one.activation is None else one.activation(x)
    return made


def _features(one: Input, layer: Layer) -> int:
    """Numbers of a token."""
    sizes = _sizes(layer)
    features = 1
    for axis in one.names:
        features *= sizes.get(axis, 1)
    return features


def _sizes(layer: Layer) -> dict[str, int]:
    heads, width = layer.num_heads, layer.head_dim
    return {"heads": heads, "kv_heads": heads, "width": width, "value_width": width}


def _with_axes(x: Tensor, one: Input, layer: Layer) -> Tensor:
    """(batch, length, features) -> the axes of the input."""
    sizes = _sizes(layer)
    inner = [axis for axis in one.names if axis in sizes]
    x = x.unflatten(2, [sizes[axis] for axis in inner] or [1])
    if not inner:
        return x.squeeze(2)
    order = ["batch", "length", *inner]
    places = [order.index("length" if axis in ("queries", "keys") else axis) for axis in one.names]
    return x.permute(places)
