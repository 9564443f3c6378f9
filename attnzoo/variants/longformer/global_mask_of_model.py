"""Global tokens of a whole model: a mask that its attentions are told of beside the call, which has
no argument for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attnzoo.variants.longformer.longformer import Longformer


@contextmanager
def global_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Inside, every attention of the model that has global tokens takes `mask` as its global_mask,
    where its call brings none.

    mask: (batch, length) bool, True = a global token. Slots behind its end are not global, so that
    a text may be continued. A backward pass that computes layers again (gradient checkpointing)
    must run inside too. Raises ValueError on a model that has no such attention, and on a mask of
    another kind.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
        found = (
            f"{mask.dtype} of shape {tuple(mask.shape)}"
            if isinstance(mask, Tensor)
            else type(mask).__name__
        )
        raise ValueError(
            f"mask is {found}; give a bool tensor of shape (batch, length), True = a global token"
        )
    attentions = [module for module in model.modules() if isinstance(module, Longformer)]
    if not attentions:
        raise ValueError(
            f"{type(model).__name__} has no attention with global tokens; swap one in first: "
            "attnzoo.swap(model, 'longformer')"
        )
    before = [attention.global_mask for attention in attentions]
    for attention in attentions:
        attention.global_mask = mask
    try:
        yield
    finally:
        for attention, its_own in zip(attentions, before, strict=True):
            attention.global_mask = its_own
