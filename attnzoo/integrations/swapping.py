"""`swap` and `unswap`: another attention inside a model that exists."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from attnzoo.attention import Attention
from attnzoo.integrations import timm, torch_nn
from attnzoo.integrations.chosen_layers import Layers, Mix, choose
from attnzoo.integrations.huggingface import interface
from attnzoo.integrations.huggingface.fallbacks.replace_fallbacks import recurrent_layers
from attnzoo.integrations.maps.selective_scan import scans
from attnzoo.integrations.places import build_attentions
from attnzoo.integrations.record import RECORD, Record
from attnzoo.integrations.wrappers import without_wrappers

Model = TypeVar("Model", bound=nn.Module)
#: What swaps in each kind of model, by the name that a saved swap has for the kind.
INTEGRATIONS: dict[str, Any] = {"huggingface": interface, "torch_nn": torch_nn, "timm": timm}


def swap(
    model: Model,
    name: str | Mix,
    layers: Layers | None = None,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Model:
    """Give a model another attention, in place, keeping its weights. Returns the model.

    model: a Hugging Face transformers model whose attention goes through `AttentionInterface`, or
    is BLOOM's, MPT's or Falcon's; one made of nn.MultiheadAttention, in torch's Transformer layers
    or alone; one made of timm's Attention; or a wrapper of one (PEFT, DDP, torch.compile,
    Lightning). A part of a composite model can be swapped alone (`model.get_encoder()`,
    `clip.vision_model`): save, load and unswap that part then.
    name: a name in `attnzoo.names()`, or a mapping from layers to a name or a pair (name, options):
    {"0-3": "sliding_window", "4": ("performer", {"num_features": 64})}. Layers that are not named
    keep exact attention.
    layers: which attention layers, counted from 0 in the order in which they run: 2, "0-3,6", [0,
    2]; or a path in the model, or a pattern of paths: "layers.*.cross_attn"; default: all
    self-attentions.
    example_inputs: keyword arguments of a transformers model's forward, with which it is tried out
    where attnzoo can make up none.
    options: of the attention, for every layer. An option `seed` is the first layer's, later layers
    count up from it; `max_length` is the model's own where it tells one.
    Raises UnsupportedError when the swap would be ignored or would drop part of the model's
    attention (soft-capping, sink logits and a bias by distance where the attention takes none,
    another bias of positions where it takes no attn_mask, packed sequences, a window of its own),
    or when the attention cannot do what the model needs; ValueError on a model without attention,
    on one swapped already, whole or in part, and on layers outside it. The model is then as it was.

    Only self-attention is swapped, unless another is named: torch's decoder layers keep their
    `multihead_attn`, and so does an encoder-decoder of transformers, whose layers count on from its
    encoder's. Which nn.MultiheadAttention of a model of your own is self-attention is found by
    trying the modules around it; where that tells nothing, the swap is refused until it is named. A
    swapped nn.MultiheadAttention does as `attnzoo.MultiheadAttention`: a core that cannot be causal
    refuses the causal call. Modules stay the objects that they are, with their hooks and
    attributes.

    What the attention learns or draws lives in a submodule of each layer: it follows `.to()`,
    trains, and is in `state_dict`. Sequences packed into one row with a mask of ones cannot be told
    from a single sequence.

    A model that drops entries of A while training (torch's layers do by default), and an attention
    that never forms A, go together for evaluation only: the swap warns (UserWarning), and is
    refused while the model is in training mode. Where no layers are named and a model of
    transformers has recurrent ones too (Qwen3-Next, Jamba), it warns which of them it left.
    """
    part = swap_in(model, name, layers, example_inputs, options)
    if layers is None and isinstance(name, str):
        _tell_left(part)
    return model


def swap_in(
    model: nn.Module,
    name: str | Mix,
    layers: Layers | None,
    example_inputs: Mapping[str, Any] | None,
    options: dict[str, Any],
) -> nn.Module:
    """`swap` without a word of what it left. Returns the part whose layers were changed."""
    part, integration = _integration_for(_inside(model))
    tried = _tried_with(integration, example_inputs)
    sites, choices = choose(name, layers, options, integration.find_sites(part, **tried))
    attentions, choices = build_attentions(part, sites, choices)
    undo = integration.insert(part, sites, attentions, **tried)
    kind = next(kind for kind, module in INTEGRATIONS.items() if module is integration)
    vars(part)[RECORD] = Record(kind, sites, choices, attentions, undo)
    return part


def _tell_left(part: nn.Module) -> None:
    """Warn of the layers of a model whose recurrence no attention stands in for."""
    left: dict[str, list[str]] = {}
    for path in [*recurrent_layers(part), *scans(part)] if interface.handles(part) else ():
        left.setdefault(type(part.get_submodule(path)).__name__, []).append(path)
    if left:
        said = " and ".join(
            f"{len(paths)} {kind} ({paths[0]}{' and so on' if len(paths) > 1 else ''})"
            for kind, paths in left.items()
        )
        warnings.warn(
            f"swap changed the softmax layers of {type(part).__name__} and left its recurrent "
            f"layers as they are: {said}; name the layers to change, layers=..., to say that this "
            "is meant",
            stacklevel=3,  # the caller of `swap`
        )


def unswap(model: Model) -> Model:
    """Undo `swap`, in place: the model is what it was, with the weights it has now. Returns the
    model.

    What was put in since stays: trained weights, hooks, attributes, adapters and wrappers of what
    is the model's own.

    model: the one that was swapped, or a wrapper of it or inside it (PEFT's, DDP, torch.compile's,
    Lightning's).
    Raises ValueError when the model is not swapped, and where something that was put in since would
    be lost, naming it: on what the swap added, or on the out_proj of an nn.MultiheadAttention,
    whose weight torch reads without a call. The model is then as it was.
    """
    part, record = swapped_part(model)
    record.undo(part)
    del vars(part)[RECORD]
    return model


def _tried_with(integration: Any, example_inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The inputs to try a model with, for an integration that reads them. Raises ValueError for the
    others."""
    if example_inputs is None:
        return {}
    if integration is not interface:
        raise ValueError(
            "example_inputs are for transformers models; the attention of this one is found "
            "without, leave them out"
        )
    return {"example_inputs": example_inputs}


def _integration_for(model: nn.Module) -> tuple[nn.Module, Any]:
    """The module that swaps in models of this kind, and the model: it, or the transformers model
    that it holds and that has all of its attention.

    Raises ValueError where there is none or more than one, so that a part would stay as it is, and
    on what is swapped already, whole or in part.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model={model!r} is no torch.nn.Module; give the model itself (of a transformers "
            "pipeline: its `.model`)"
        )
    for path, part in model.named_modules():
        if RECORD in vars(part):
            place = (
                f"{path} of this {type(model).__name__}" if path else f"this {type(model).__name__}"
            )
            raise ValueError(
                f"{place} is swapped already; call attnzoo.unswap on it first (a mapping gives "
                "each layer an attention of its own)"
            )
    if interface.handles(model):
        return model, interface
    kinds = [integration for integration in INTEGRATIONS.values() if integration.handles(model)]
    inside = next((path for path, part in model.named_modules() if interface.handles(part)), None)
    if inside is not None:
        part = model.get_submodule(inside)
        if not has_attention_beside(model, part):
            return part, interface
        raise ValueError(
            f"this {type(model).__name__} holds a transformers model; swap that part alone: "
            f"model.get_submodule({inside!r})"
        )
    if len(kinds) > 1:
        raise ValueError(
            f"this {type(model).__name__} has nn.MultiheadAttention and timm's Attention; swap its "
            "parts one by one"
        )
    if kinds:
        return model, kinds[0]
    if any(isinstance(module, Attention) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has attnzoo's attention in it already: unswap the model that "
            "it was swapped in first, or build its "
            "attnzoo.MultiheadAttention with attention=..."
        )
    raise ValueError(
        f"{type(model).__name__} has no attention that attnzoo can swap; give a transformers "
        "model, or one made of nn.MultiheadAttention"
        " or of timm's Attention"
    )


def has_attention_beside(model: nn.Module, part: nn.Module) -> bool:
    """Whether any attention that can be swapped, or is, stands in the model outside of a part of
    it; a transformers model stands for its own."""
    inside = set(part.modules())
    return any(_is_attention(module) for module in model.modules() if module not in inside)


def _is_attention(module: nn.Module) -> bool:
    return (
        isinstance(module, Attention | nn.MultiheadAttention)
        or interface.handles(module)
        or timm.is_attention(module)
    )


def _inside(model: nn.Module) -> nn.Module:
    """The model without wrappers; a LightningModule is one too where all its attention is in one
    model that it holds."""
    model = without_wrappers(model)
    if any(kind.__name__ == "LightningModule" for kind in type(model).__mro__):
        holding = [
            child
            for child in model.children()
            if any(_is_attention(module) for module in child.modules())
        ]
        # No list of blocks.
        runs = len(holding) == 1 and type(holding[0]).forward is not nn.Module.forward
        if runs and (interface.handles(holding[0]) or not _is_attention(holding[0])):
            return _inside(holding[0])
    return model


def part_of(model: nn.Module) -> nn.Module:
    """The model without wrappers, or the one inside it that is swapped or that `swap` would take.
    Raises ValueError where there is none."""
    whole = _inside(model) if isinstance(model, nn.Module) else model
    if isinstance(whole, nn.Module) and (
        interface.handles(whole) or any(_is_attention(one) for one in whole.modules())
    ):
        swapped = [one for one in whole.modules() if RECORD in vars(one)]
        own = any(isinstance(one, Attention) for one in whole.modules())
        return swapped[0] if swapped else whole if own else _integration_for(whole)[0]
    return _integration_for(whole)[0]


def record_of(model: nn.Module) -> Record:
    """What `swap` did to the model, as `swapped_part` finds it."""
    return swapped_part(model)[1]


def swapped_part(model: nn.Module) -> tuple[nn.Module, Record]:
    """The model that was swapped, which may be inside of the one given, and what `swap` did to it.

    Raises ValueError when it is not swapped, or only a part of it is, beside other attentions.
    """
    whole = _inside(model)
    swapped = {path: part for path, part in whole.named_modules() if RECORD in vars(part)}
    if not swapped:
        raise ValueError(
            f"this {type(whole).__name__} is not swapped; call attnzoo.swap(model, name) first"
        )
    path, part = next(iter(swapped.items()))
    if (
        len(swapped) > 1
        or has_attention_beside(whole, part)
        or (part is not whole and interface.handles(whole))
    ):
        raise ValueError(
            f"this {type(whole).__name__} is not swapped, but its part {path} is; give that one: "
            f"model.get_submodule({path!r})"
        )
    return part, vars(part)[RECORD]
