"""`swap` and `unswap`: another attention inside a model that exists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from torch import nn

from attnzoo.attention import Attention
from attnzoo.integrations import huggingface, timm, torch_nn
from attnzoo.integrations.plan import Choice, Layers, Mix, Site, build_attentions, choose

Model = TypeVar("Model", bound=nn.Module)
RECORD = "_attnzoo_swap"


class Undo(Protocol):
    """What an integration needs to take its attentions out again."""

    def __call__(self, model: nn.Module) -> None: ...


class Record:
    """What `swap` did to a model: kept on it, so that it can be undone, saved and shown.

    integration: the module that did it. sites: every attention layer found, as (path, heads, head_dim). choices: by layer, with settled
    options. attentions: the modules by layer.
    """

    def __init__(self, integration: str, sites: list[Site], choices: dict[int, Choice], attentions: dict[int, Attention], undo: Undo) -> None:
        self.integration = integration
        self.sites = [(site.path, site.heads, site.head_dim) for site in sites]
        self.choices = choices
        self.attentions = attentions
        self.undo = undo


INTEGRATIONS = (huggingface, torch_nn, timm)


def swap(
    model: Model,
    name: str | Mix,
    layers: Layers | None = None,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Model:
    """Give a model another attention, in place, keeping its weights. Returns the model.

    model: a Hugging Face transformers model whose attention goes through `AttentionInterface`; one made of nn.MultiheadAttention, in
    torch's Transformer layers or alone (where `attnzoo.MultiheadAttention` takes its place: a core that cannot be causal then refuses the
    causal call); or one made of timm's Attention. Only self-attention is swapped: torch's decoder layers keep their `multihead_attn`, and
    so does an encoder-decoder of transformers, whose layers count on from its encoder's. A part of a composite model can be swapped alone
    (`model.get_encoder()`, `clip.vision_model`): save, load and unswap that part then.
    name: a name in `attnzoo.names()`, or a mapping from layers to a name or a pair (name, options): {"0-3": "sliding_window",
    "4": ("performer", {"num_features": 64})}. layers: which attention layers, counted from 0 in the order in which they run: 2,
    "0-3,6", [0, 2]; default: all. options: of the attention, for every layer; an option `seed` is the first layer's, later layers count
    up from it; `max_length` is the model's own where it tells one. Layers that are not named keep
    exact attention.
    example_inputs: keyword arguments of a transformers model's forward, with which it is tried out
    where attnzoo can make up none.

    What the attention learns or draws lives in a submodule of each layer: it follows `.to()`, trains, and is in `state_dict`. Sequences
    packed into one row with a mask of ones cannot be told from a single sequence.

    A model that drops entries of A while training (torch's layers do by default), and an attention that never forms A, go together for
    evaluation only: the swap warns (UserWarning), and is refused while the model is in training mode.

    Raises UnsupportedError when the swap would be ignored or would drop part of the model's attention (soft-capping, sink logits where
    the attention takes none, packed sequences, a window of its own, a bias of positions where the attention takes no attn_mask), or when
    the attention cannot do what the model needs; ValueError on a model without attention, on one swapped already, whole or in part, and on
    layers outside it. The model is then as it was.
    """
    integration = _integration_for(model)
    tried = _tried_with(integration, example_inputs)
    sites = integration.find_sites(model, **tried)
    choices = choose(name, layers, options, len(sites))
    attentions, choices = build_attentions(sites, choices)
    undo = integration.insert(model, sites, attentions, **tried)
    vars(model)[RECORD] = Record(integration.__name__.rpartition(".")[2], sites, choices, attentions, undo)  # a wrapper's setattr may pass it on
    return model


def unswap(model: Model) -> Model:
    """Undo `swap`, in place: the model is what it was, with the weights it has now. Returns the model.

    model: the one that was swapped, or a wrapper that hands its attributes on (PEFT's, torch.compile's). Raises ValueError when the model
    is not swapped.
    """
    record = record_of(model)
    swapped = next(part for part in model.modules() if vars(part).get(RECORD) is record)
    record.undo(swapped)
    del vars(swapped)[RECORD]
    return model


def _tried_with(integration: Any, example_inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The inputs to try a model with, for an integration that reads them. Raises ValueError for the
    others."""
    if example_inputs is None:
        return {}
    if integration is not huggingface:
        raise ValueError("example_inputs are for transformers models; the attention of this one is found without, leave them out")
    return {"example_inputs": example_inputs}


def _integration_for(model: nn.Module) -> Any:
    """The module that swaps in models of this kind. Raises ValueError where there is none or more than one, so that a part would stay as it is,
    and on what is swapped already, whole or in part."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} is no torch.nn.Module; give the model itself (of a transformers pipeline: its `.model`)")
    for path, part in model.named_modules():
        if hasattr(part, RECORD):
            place = f"{path} of this {type(model).__name__}" if path else f"this {type(model).__name__}"
            raise ValueError(f"{place} is swapped already; call attnzoo.unswap on it first (a mapping gives each layer an attention of its own)")
    if huggingface.handles(model):
        return huggingface
    kinds = [integration for integration in INTEGRATIONS if integration.handles(model)]
    inside = next((path for path, part in model.named_modules() if huggingface.handles(part)), None)
    if inside is not None:
        raise ValueError(f"this {type(model).__name__} holds a transformers model; swap that part alone: model.get_submodule({inside!r})")
    if len(kinds) > 1:
        raise ValueError(f"this {type(model).__name__} has nn.MultiheadAttention and timm's Attention; swap its parts one by one")
    if kinds:
        return kinds[0]
    if any(isinstance(module, Attention) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has attnzoo's attention in it already: unswap the model that it was swapped in first, or build its "
            "attnzoo.MultiheadAttention with attention=..."
        )
    raise ValueError(
        f"{type(model).__name__} has no attention that attnzoo can swap; give a transformers model, or one made of nn.MultiheadAttention"
        " or of timm's Attention"
    )


def record_of(model: nn.Module) -> Record:
    """What `swap` did to the model. Raises ValueError when it is not swapped, or only a part of it is."""
    record = getattr(model, RECORD, None)
    if record is not None:
        return record
    parts = model.named_modules() if isinstance(model, nn.Module) else ()
    swapped = next((path for path, part in parts if hasattr(part, RECORD)), None)
    if swapped is not None:
        raise ValueError(f"this {type(model).__name__} is not swapped, but its part {swapped} is; give that one: model.get_submodule({swapped!r})")
    raise ValueError(f"this {type(model).__name__} is not swapped; call attnzoo.swap(model, name) first")
