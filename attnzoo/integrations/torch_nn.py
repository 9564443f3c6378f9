"""torch.nn: `attnzoo.MultiheadAttention` in the place of `nn.MultiheadAttention`, inside torch's Transformer layers or alone."""

from __future__ import annotations

from typing import cast

from torch import nn

from attnzoo.attention import Attention
from attnzoo.integrations.plan import Site
from attnzoo.integrations.replacing import PutBack, replace_modules
from attnzoo.multihead import MultiheadAttention


def handles(model: nn.Module) -> bool:
    """Whether the model has an nn.MultiheadAttention that can be replaced."""
    return bool(find_sites(model))


def find_sites(model: nn.Module) -> list[Site]:
    """Every nn.MultiheadAttention inside the model, but for the cross-attention of torch's decoder layers.

    Raises ValueError when the model itself is one: it has no parent to be replaced in.
    """
    if type(model) is nn.MultiheadAttention:
        raise ValueError("an nn.MultiheadAttention cannot be swapped in place; build an attnzoo.MultiheadAttention and load its state_dict")
    cross = {id(layer.multihead_attn) for layer in model.modules() if isinstance(layer, nn.TransformerDecoderLayer)}
    found = [(path, module) for path, module in model.named_modules() if type(module) is nn.MultiheadAttention and id(module) not in cross]
    return [Site(path, module, module.num_heads, module.head_dim) for path, module in found]


def insert(model: nn.Module, sites: list[Site], attentions: dict[int, Attention]) -> PutBack:
    """Put the attentions in place of the modules at `sites`; the answer undoes it."""
    put_back = replace_modules(
        model, sites, attentions, lambda module, attention: MultiheadAttention.around(cast(nn.MultiheadAttention, module), attention)
    )
    for path, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder):  # its nested tensors are for layers that run torch's own fast path
            put_back.nested[path] = module.use_nested_tensor
            module.use_nested_tensor = False
    return put_back
