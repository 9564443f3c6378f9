"""A Transformer layer of torch's with a swapped attention, and what it is called with."""

from __future__ import annotations

from typing import Any

import torch
from small import layer_masks, small
from torch import nn

import attnzoo

SIZE, HEADS, LENGTH = 16, 4, 20
NAMES = attnzoo.names()


def layer(name: str | None, **options: Any) -> nn.Module:
    """The same numbers every time; name=None leaves torch's own attention."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(SIZE, HEADS, 24, 0.0, batch_first=True)).eval()
    with torch.no_grad():
        # Scores that tell keys apart.
        dict(model.named_parameters())["0.self_attn.in_proj_weight"].mul_(3)
    if name is not None:
        attnzoo.swap(model, name, **small(name), **options)
    return model[0]


def gradients(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], **masks: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output for tokens, and the gradients of a fixed sum of it for the tokens and the
    parameters."""
    x = inputs[0].clone().requires_grad_()
    out = model(x, **masks)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    leaves = [x, *model.parameters()]
    return out.detach(), list(torch.autograd.grad((out * upstream).sum(), leaves))


def tokens(batch_size: int = 3, length: int = LENGTH) -> torch.Tensor:
    return torch.randn(batch_size, length, SIZE, generator=torch.Generator().manual_seed(1))


def masks(name: str, length: int = LENGTH) -> dict[str, Any]:
    """What a layer with this attention is called with beside tokens and padding."""
    return layer_masks(attnzoo.describe(name).spec, length)


def padding(batch_size: int = 3, length: int = LENGTH) -> torch.Tensor:
    """True = ignore: the last five tokens of the first row."""
    ignore = torch.zeros(batch_size, length, dtype=torch.bool)
    ignore[0, -5:] = True
    return ignore
