"""torch.nn: `attnzoo.MultiheadAttention` in the place of `nn.MultiheadAttention`, inside torch's Transformer layers or alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.integrations.plan import Site
from attnzoo.integrations.replacing import PutBack, replace_modules
from attnzoo.multihead import MultiheadAttention

#: What nn.MultiheadAttention is made of.
PARTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj")


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
    """Whether the model has an nn.MultiheadAttention of torch's, the cross-attention of torch's decoder layers apart."""
    return any(True for _ in _attentions(model))


def find_sites(model: nn.Module) -> list[Site]:
    """Every nn.MultiheadAttention inside the model, but for the cross-attention of torch's decoder layers.

    Raises ValueError when the model itself is one: it has no parent to be replaced in; UnsupportedError on one that does more than torch's.
    """
    found = list(_attentions(model))
    if any(module is model for _, module in found):
        raise ValueError("an nn.MultiheadAttention cannot be swapped in place; build an attnzoo.MultiheadAttention and load its state_dict")
    for path, module in found:
        _refuse_other_attention(path, module)
    told = getattr(model, "seq_length", None)  # of torchvision's vision transformers, whose images have one size
    longest = told if isinstance(told, int) else None
    return [Site(path, module, module.num_heads, module.head_dim, dropout=module.dropout, max_length=longest) for path, module in found]


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.MultiheadAttention]]:
    cross = {id(layer.multihead_attn) for layer in model.modules() if isinstance(layer, nn.TransformerDecoderLayer)}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiheadAttention) and id(module) not in cross:
            yield path, module


def _refuse_other_attention(path: str, module: nn.MultiheadAttention) -> None:
    """Raise UnsupportedError on a subclass with a forward of its own, and on parts (a parametrization, a pruned weight) that torch's has not."""
    parts = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False), *module.named_children())]
    extra = [name for name in parts if name not in PARTS]
    if type(module).forward is not nn.MultiheadAttention.forward:
        extra.append("a forward of its own")
    if extra:
        raise UnsupportedError(
            f"{path} is a {type(module).__name__} with {' and '.join(extra)}, which a swapped attention would drop; "
            "swap the model's other parts one by one"
        )


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
