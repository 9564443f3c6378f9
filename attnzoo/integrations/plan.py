"""Which layer gets which attention: the places found in a model, the choice for each, and the attentions built for them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.registry import build, find, options_of, spec_of

#: name of an attention, or (name, options), for a range of layers: {"0-3": "sliding_window", 4: ("performer", {"num_features": 64})}.
Mix = Mapping[Any, Any]
Layers = int | str | Iterable[int]


@dataclass(frozen=True)
class Site:
    """One self-attention of a model.

    path: of `module` in the model. is_causal: None where only the call tells. window: keys its own sliding window shows, itself
    included (None: all). has_bias: it adds a bias of positions to its scores. has_sink_logits: it has one more score
    a head, which counts in the sum of every row. dropout: of the entries of A while training.
    max_length: of the sequences that it reads, where the model tells.
    """

    path: str
    module: nn.Module
    heads: int
    head_dim: int
    is_causal: bool | None = None
    window: int | None = None
    has_bias: bool = False
    has_sink_logits: bool = False
    dropout: float = 0.0
    max_length: int | None = None


@dataclass(frozen=True)
class Choice:
    """An attention by name, with its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


def choose(name: str | Mix, layers: Layers | None, options: dict[str, Any], count: int) -> dict[int, Choice]:
    """The choice for each layer of a model with `count` attention layers; a layer that is not named keeps its own attention.

    Raises ValueError on a layer that the model does not have, one named twice, a malformed mapping,
    and options in the place of layers.
    """
    if isinstance(name, str):
        if isinstance(layers, Mapping):
            raise ValueError(f"layers={layers!r} is a mapping; give options by name: attnzoo.swap(model, {name!r}, {_by_name(layers)})")
        chosen = range(count) if layers is None else _parse("layers=", layers, count)
        return {layer: Choice(name, dict(options)) for layer in chosen}
    if not isinstance(name, Mapping) or not name:
        raise ValueError(f"name={name!r} must be the name of an attention, or a mapping such as {{'0-3': 'sliding_window', '4': 'standard'}}")
    if layers is not None:
        raise ValueError("layers goes with one name; a mapping names its layers itself")
    choices: dict[int, Choice] = {}
    for key, value in name.items():
        for layer in _parse("the mapping's key ", key, count):
            if layer in choices:
                raise ValueError(f"layer {layer} is named twice in {dict(name)!r}; name it once")
            choices[layer] = _choice(value, options)
    return dict(sorted(choices.items()))


def build_attentions(sites: list[Site], choices: dict[int, Choice]) -> tuple[dict[int, Attention], dict[int, Choice]]:
    """An attention for each chosen layer, and the choices with the options that were settled here (the seeds).

    An attention with a `seed` gets seed + layer, so that layers draw differently. Raises what `build` raises, and
    UnsupportedError when the attention cannot do what the layer does.
    """
    attentions: dict[int, Attention] = {}
    settled: dict[int, Choice] = {}
    shared: dict[str, dict[str, Any]] = {}
    for layer, choice in choices.items():
        site = sites[layer]
        more = shared.get(repr(choice), {})
        try:
            if site.is_causal is not None:
                find(choice.name).check_causality(site.is_causal)
            options = _options(choice, layer, site)
            attention = build(choice.name, heads=site.heads, head_dim=site.head_dim, **options, **more)
            _check_fits(attention, site)
        except UnsupportedError as error:
            raise UnsupportedError(f"layer {layer} ({site.path}): {error}") from None
        shared[repr(choice)] = more or attention.shared_options()
        attentions[layer] = attention.to(*_place(site.module)).train(site.module.training)
        settled[layer] = Choice(choice.name, options)
    return attentions, settled


def _options(choice: Choice, layer: int, site: Site) -> dict[str, Any]:
    for option in ("heads", "head_dim", "scale", "dropout"):
        if option in choice.options:
            raise ValueError(f"swap does not take {option!r}: it follows from the model")
    options = dict(choice.options)
    for option in options_of(choice.name):
        if option.name == "seed":
            seed = options.get("seed", option.default)
            options["seed"] = seed + layer if isinstance(seed, int) else seed
    if spec_of(choice.name).needs_max_length and "max_length" not in options:
        if site.max_length is None:
            raise ValueError(
                f"{choice.name} needs max_length, and this model does not tell how long its "
                f"sequences get: attnzoo.swap(model, {choice.name!r}, "
                "max_length=...)"
            )
        options["max_length"] = site.max_length
    return options


def no_dropout(module: str, dropout: float, name: str) -> str:
    """Why a layer with dropout on A cannot train with the attention of that name."""
    return (
        f"{module} drops entries of A with probability {dropout} while training, which {name} never forms; to train it, build the model with "
        "its attention dropout at 0 (in the config or in from_pretrained: BERT's "
        "attention_probs_dropout_prob=0.0, Llama's attention_dropout=0.0, "
        "GPT-2's attn_pdrop=0.0; in timm attn_drop_rate=0.0; of torch's layers set "
        "self_attn.dropout to 0 before the swap); to evaluate it only, "
        "call model.eval() before the swap"
    )


def _check_fits(attention: Attention, site: Site) -> None:
    if attention.shares_qk:
        raise UnsupportedError(f"the model projects queries and keys apart, which {attention.spec.name} with shared ones cannot take")
    if site.has_bias and not attention.spec.attn_mask:
        raise UnsupportedError(
            f"{type(site.module).__name__} adds a position_bias to its scores, which {attention.spec.name} would drop; use standard"
        )
    if site.has_sink_logits and not attention.spec.sink_logits:
        raise UnsupportedError(
            f"{type(site.module).__name__} has sink logits (s_aux) in its softmax, which {attention.spec.name} would drop; "
            "use standard or sliding_window"
        )
    if site.dropout and not attention.spec.dropout:
        refusal = no_dropout(type(site.module).__name__, site.dropout, attention.spec.name)
        if site.module.training:
            raise UnsupportedError(refusal)
        if _place(site.module)[0].type != "meta":
            warnings.warn(refusal, stacklevel=4)  # the caller of `swap`
    reach = getattr(getattr(attention.engine, "pattern", None), "reach", None)
    if site.window is not None and (reach is None or reach > site.window or attention.global_tokens):
        raise UnsupportedError(
            f"the model attends within its own sliding window of {site.window}, which {attention.spec.name} would drop; use sliding_window with "
            f"window={site.window} or less, or switch the model's window off first (Mistral: model.config.sliding_window = None)"
        )


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    weight = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    return weight.device, weight.dtype


def _choice(value: Any, options: dict[str, Any]) -> Choice:
    if isinstance(value, str):
        return Choice(value, dict(options))
    if isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], Mapping):
        return Choice(value[0], {**options, **value[1]})
    raise ValueError(f"{value!r} must be the name of an attention or a pair of its name and its options")


def _by_name(options: Mapping[Any, Any]) -> str:
    """{"window": 3} as window=3."""
    return ", ".join(f"{option}={value!r}" for option, value in options.items()) or "..."


def _parse(what: str, layers: Any, count: int) -> list[int]:
    """Layer indices, in order, from 3, [0, 2], "4", "0-3" or "0-3,6"."""
    refusal = f"{what}{layers!r} must be distinct layers of the model, such as 4, '0-3' or '0-3,6'; it has {count} attention layers, 0 to {count - 1}"
    if isinstance(layers, str):
        found = [re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part) for part in layers.split(",")]
        ends = [(int(match[1]), int(match[2] or match[1])) for match in found if match]
        if len(ends) < len(found) or any(first > last or last >= count for first, last in ends):
            raise ValueError(refusal)
        indices = [layer for first, last in ends for layer in range(first, last + 1)]
    else:
        indices = list(layers) if isinstance(layers, Iterable) else [layers]
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < count for layer in indices)
    if not indices or not whole or len(set(indices)) < len(indices):
        raise ValueError(refusal)
    return sorted(indices)
