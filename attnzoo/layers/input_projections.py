"""What a layer projects besides q, k and v: the inputs along the length that its attention
declares."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from attnzoo.engines.linear.gated.gate_projections import Gate
from attnzoo.layers.layer import Layer
from attnzoo.layers.options.token_shift import Sources
from attnzoo.layers.placement import Placement
from attnzoo.layers.projections import project_apart, project_together
from attnzoo.spec import Input

#: Where they live: with the attention, as all that a state_dict of torch's lacks.
INPUT_PROJECTIONS = "input_projections"
#: The kind of what `Attention.own_projection` makes.
OWN = "own"


def add_projections(layer: Layer) -> None:
    """Give the layer's attention what makes each such input."""
    made = nn.ModuleDict()
    like = layer.out_proj.weight
    for one in layer.attention.spec.inputs:
        if one.is_projected_by(layer.attention.input_sizes):
            width = layer.embed_dim if "queries" in one.names else layer.kdim
            own = layer.attention.input_projection(one, width)
            own = nn.Linear(width, _features(one, layer)) if own is None else own
            made[one.name] = own.to(device=like.device, dtype=like.dtype)
    if made:
        setattr(layer.attention, INPUT_PROJECTIONS, made)


def made_of_hidden_states(layer: Layer) -> list[str]:
    """The inputs that are projected from query or key, and not from projected keys."""
    projections: Any = getattr(layer.attention, INPUT_PROJECTIONS, None) or {}
    return [name for name, one in projections.items() if not getattr(one, "reads_keys", False)]


def add_own_projection(layer: Layer) -> None:
    """Give the layer's attention the packed projection of its inputs that are `like` q, k and v,
    a copy of the layer's own."""
    if layer.attention.own_projection is None or layer.in_proj_weight is None:
        return
    plain = {"weight": layer.in_proj_weight, "bias": layer.in_proj_bias}
    projection = nn.Linear(
        layer.embed_dim, 3 * layer.embed_dim, plain["bias"] is not None, device="meta"
    )
    for name, parameter in plain.items():
        if parameter is not None:
            setattr(projection, name, nn.Parameter(parameter.detach().clone()))
    setattr(layer.attention, layer.attention.own_projection, projection)


def inputs_of(
    layer: Layer,
    sources: Sources,
    k: Tensor,
    given: Mapping[str, Tensor | None],
    pattern: str,
    placed: Placement,
) -> dict[str, Tensor]:
    """What a call of the layer's attention takes beside q, k and v: the inputs that are given, and
    those that are projected.

    k: the layer's keys, (batch, heads, length, head_dim)
    pattern: as `project` takes it
    given: by name; without the axis of samples where query has none
    placed: what the layer does to what it projects, which is done to these inputs too
    returns: by name
    """
    core: Any = layer.attention
    if not core.spec.inputs and not given:
        return {}
    query, key, value = sources.q, sources.k, sources.v
    batched = {one.name for one in core.spec.inputs if "batch" in one.names}
    made = {
        name: x[None] if query.dim() == 2 and name in batched else x
        for name, x in given.items()
        if x is not None
    }
    packed = core.own_projection and getattr(core, core.own_projection, None)
    if packed and core.wants_own_projection(made):
        by = project_apart if isinstance(packed, nn.ModuleDict) else project_together
        q, k, v = by(layer, packed, query, key, value, pattern)
        own = dict(zip("qkv", placed(q, k, v, OWN), strict=True))
        for one in core.spec.inputs:
            if one.like is not None:
                made.setdefault(one.name, own[one.like])
    return {**project_inputs(layer, query, key, k, made, sources.others), **made}


def weighed(
    layer: Layer,
    k: Tensor,
    v: Tensor,
    made: Mapping[str, Tensor],
    given: Mapping[str, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """k and v as the layer's attention gets them: values times the step sizes that a projected
    decay was made of, or keys by the rates of a removal, where the projection says so.

    made: what `inputs_of` returned for the inputs that are given
    """
    projections: Any = getattr(layer.attention, INPUT_PROJECTIONS, None)
    for name, project in () if projections is None else projections.items():
        if given.get(name) is not None:
            continue
        if getattr(project, "weighs_values", False):
            v = project.weighed(v, made[name])
        if getattr(project, "weighs_keys", False):
            k = project.weighed_keys(k, made[name])
    return k, v


def project_inputs(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    k: Tensor,
    given: Collection[str],
    others: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The inputs that are projected, but for those that are given.

    layer: whose attention has the projections
    query, key: (batch, length, features), or as batch_first and a missing batch have it
    k: the keys, (batch, heads, length, head_dim), of which some inputs are made
    given: names of inputs
    others: by name, what is read in the place of query or key
    returns: by name, with the axes that each declares
    """
    projections: Any = getattr(layer.attention, INPUT_PROJECTIONS, None)
    if projections is None:
        return {}
    made, others = {}, others or {}
    for one in layer.attention.spec.inputs:
        if one.is_projected_by(layer.attention.input_sizes) and one.name not in given:
            source = others.get(one.name, query if "queries" in one.names else key)
            project = projections[one.name]
            if getattr(project, "reads_keys", False):
                made[one.name] = project(k)
                continue
            x = project(source)
            if x.dim() == 2:
                x = x[None]
            elif not layer.batch_first:
                x = x.transpose(0, 1)
            x = _with_axes(x, one, layer)
            if one.activation is not None and not isinstance(project, Gate):
                x = one.activation(x)
            made[one.name] = x
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
    sizes = {"heads": heads, "kv_heads": heads, "width": width, "value_width": width}
    return {**sizes, **layer.attention.input_sizes}


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
