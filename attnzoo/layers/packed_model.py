"""Packed rows in a whole model: the ids that its layers are told of beside the call, for which
torch's Transformer layers have no argument."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from attnzoo.attention import Attention
from attnzoo.layers.layer import Layer


@contextmanager
def packed(model: nn.Module, segments: Tensor) -> Iterator[None]:
    """Inside, every `attnzoo.MultiheadAttention` and `attnzoo.LatentAttention` of the model keeps
    the pieces of packed rows apart, where its call brings no segments.

    model: whose layers attend to the tokens themselves, as an encoder's and a decoder-only model's
    segments: (batch, length) integer, the piece that a token belongs to
    raises: ValueError on a model without such a layer or with torch's own, and on segments of
        another kind. A layer that attends to other tokens than its queries raises when it is
        called.

    A backward pass that computes layers again (gradient checkpointing) must run inside too. One
    thread at a time may run the model so; a copy of the model is told of nothing.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    if not isinstance(segments, Tensor) or segments.is_floating_point() or segments.dim() != 2:
        found = (
            f"{segments.dtype} of shape {tuple(segments.shape)}"
            if isinstance(segments, Tensor)
            else type(segments).__name__
        )
        raise ValueError(f"segments is {found}; give an integer tensor of shape (batch, length)")
    layers: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention) or hasattr(type(module), "segments")
    ]
    listening = [layer for layer in layers if hasattr(layer, "segments")]
    cores = {id(part) for layer in listening for part in layer.attention.modules()}
    bare = [one for one in model.modules() if isinstance(one, Attention) and id(one) not in cores]
    if bare:
        raise ValueError(
            f"{type(model).__name__} calls {bare[0].spec.name} without an "
            "attnzoo.MultiheadAttention around it, which the ids do not reach: give it segments "
            "in its own call"
        )
    deaf = sum(not hasattr(layer, "segments") for layer in layers)
    if deaf or not layers:
        found = f"{deaf} nn.MultiheadAttention that would mix the pieces" if deaf else "no layer"
        raise ValueError(
            f"{type(model).__name__} has {found}, and only attnzoo.MultiheadAttention keeps them "
            "apart; swap all of them in first: attnzoo.swap(model, 'standard'), with layers= for "
            "cross-attention"
        )
    before = [vars(layer).get("segments") for layer in layers]
    for layer in layers:
        layer.segments = segments
    try:
        yield
    finally:
        for layer, its_own in zip(layers, before, strict=True):
            if its_own is None:
                del layer.segments
            else:
                layer.segments = its_own


def segments_of(layer: Layer, query: Tensor, key: Tensor, segments: Tensor | None) -> Tensor | None:
    """The segments of a layer's call, (batch, length): its own, or those that the model is told of.

    raises: ValueError where the layer appends keys, which belong to no piece, and where the model's
        ids are not those of the keys
    """
    if segments is None and layer.segments is not None:
        if query is not key:
            raise ValueError(
                "attnzoo.packed tells of a model's own tokens, and here queries and keys are "
                "others (cross-attention): pass segments to this layer instead"
            )
        segments = layer.segments
    if segments is None:
        return None
    if layer.bias_k is not None or layer.add_zero_attn:
        raise ValueError(
            "add_bias_kv and add_zero_attn append keys that belong to no piece; build the layer "
            "without them, or call it without segments"
        )
    if isinstance(segments, Tensor) and query.dim() == 2 and segments.dim() == 1:
        return segments[None]
    return segments
