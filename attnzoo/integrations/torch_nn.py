"""torch.nn: `attnzoo.MultiheadAttention` in the place of `nn.MultiheadAttention`, inside torch's Transformer layers or alone."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.integrations.plan import Site
from attnzoo.integrations.replacing import PutBack, replace_modules
from attnzoo.multihead import MultiheadAttention


class SwappedAttention(MultiheadAttention):
    """`attnzoo.MultiheadAttention` that knows its place in a model, for the errors that only a call can bring: causality, masks."""

    place: str

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As `attnzoo.MultiheadAttention.forward`; what the core cannot do is an UnsupportedError that names the layer."""
        try:
            return super().forward(*args, **kwargs)
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.place}: {error}") from None


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
    places = {id(attention): f"layer {layer} ({sites[layer].path})" for layer, attention in attentions.items()}

    def wrap(module: nn.Module, attention: Attention) -> SwappedAttention:
        swapped = SwappedAttention.around(cast(nn.MultiheadAttention, module), attention)
        swapped.place = places[id(attention)]
        return swapped

    put_back = replace_modules(model, sites, attentions, wrap)
    for path, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder):  # its nested tensors are for layers that run torch's own fast path
            put_back.nested[path] = module.use_nested_tensor
            module.use_nested_tensor = False
    return put_back
