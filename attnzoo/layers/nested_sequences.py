"""Nested tensors in a layer: sequences of several lengths, packed into one row or padded for the
call, and cut again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.layers.layer import Layer


def forward_nested(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: tuple[Any, Any],
    need_weights: bool,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """The layer's forward of a nested tensor, as nn.TransformerEncoder calls its layers in eval
    mode when it was built before they got this layer.

    layer: is called with the sequences padded
    query, key, value: one nested tensor of (length, features)
    masks: key_padding_mask and attn_mask, which must be None
    returns: the output, nested, and A of the padded sequences if need_weights
    raises: ValueError on several tensors, on masks, and without batch_first
    """
    if not (query is key and key is value and layer.batch_first) or any(
        mask is not None for mask in masks
    ):
        raise ValueError(
            "a nested tensor must be query, key and value at once, batch_first, without masks; "
            "pass padded tensors and masks instead"
        )
    lengths = [sequence.shape[0] for sequence in query.unbind()]
    if not any(lengths):  # torch pads no such tensor
        heads = () if average_attn_weights else (layer.num_heads,)
        return query.clone(), torch.zeros(
            len(lengths), *heads, 0, 0, device=query.device
        ) if need_weights else None
    appends = layer.bias_k is not None or layer.add_zero_attn  # keys that no piece has
    one_row = query.layout == torch.jagged and query.is_contiguous() and not appends
    if one_row and not need_weights:
        return _in_one_row(layer, query, lengths, is_causal), None
    padded = query.to_padded_tensor(0.0)
    slots = torch.arange(padded.shape[1], device=padded.device)
    padding = slots >= torch.tensor(lengths, device=padded.device)[:, None]
    out, weights = layer(
        padded, padded, padded, padding, need_weights, None, average_attn_weights, is_causal
    )
    if one_row:
        return _in_one_row(layer, query, lengths, is_causal), weights
    rows = [sequence[:length] for sequence, length in zip(out.unbind(), lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=query.layout) if rows else query, weights


def _in_one_row(layer: Layer, query: Tensor, lengths: list[int], is_causal: bool) -> Tensor:
    """The output of a jagged tensor, whose sequences are the pieces of one packed row; its ragged
    dimension is the query's own."""
    row, device = query.values()[None], query.device
    ids = torch.arange(len(lengths), device=device)
    segments = ids.repeat_interleave(torch.tensor(lengths, device=device))[None]
    out, _ = layer(row, row, row, need_weights=False, is_causal=is_causal, segments=segments)
    offsets = query.offsets()  # pyright: ignore[reportAttributeAccessIssue]
    return torch.nested.nested_tensor_from_jagged(out[0], offsets)
