"""Which layer gets which attention: the places found in a model, the choice for each, and the
attentions built for them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.registry import Choice, find, options_of, spec_of

#: In which attention computes; other floating dtypes, such as float8, only store.
COMPUTES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: name of an attention, or (name, options), for a range of layers: {"0-3": "sliding_window", 4:
#: ("performer", {"num_features": 64})}.
Mix = Mapping[Any, Any]
Layers = int | str | Iterable[int | str]


@dataclass(frozen=True)
class Site:
    """One attention of a model.

    path: of `module` in the model.
    is_causal: None where only the call tells.
    window: keys its own sliding window shows, itself included (None: all).
    has_bias: it adds a bias of positions to its scores.
    has_sink_logits: it has one more score a head, which counts in the sum of every row.
    dropout: of the entries of A while training.
    place: device and dtype of its queries, where a trial told them.
    is_self: False where it looks at another sequence, None where that is not known.
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
    place: tuple[torch.device, torch.dtype] | None = None
    is_self: bool | None = True
    max_length: int | None = None


def choose(
    name: str | Mix, layers: Layers | None, options: dict[str, Any], sites: list[Site]
) -> tuple[list[Site], dict[int, Choice]]:
    """The layers, and the choice for each of them by its place there; a layer that is not named
    keeps its own attention.

    The layers are the self-attentions of `sites` in their order, and then what else was named, by
    its path.

    Raises ValueError on a layer that the model does not have, one named twice, a malformed mapping,
    and options in the place of layers; UnsupportedError where every layer is meant and it is not
    known which are.
    """
    numbered = [site for site in sites if site.is_self]
    ordered = numbered + [site for site in sites if not site.is_self]
    choices: dict[int, Choice] = {}
    if isinstance(name, str):
        if isinstance(layers, Mapping):
            raise ValueError(
                f"layers={layers!r} is a mapping; give options by name: attnzoo.swap(model, "
                f"{name!r}, {_by_name(layers)})"
            )
        if layers is None:
            _refuse_unknown(ordered)
        chosen = (
            range(len(numbered))
            if layers is None
            else _parse("layers=", layers, ordered, len(numbered))
        )
        choices = {layer: Choice(name, dict(options)) for layer in chosen}
    else:
        if not isinstance(name, Mapping) or not name:
            raise ValueError(
                f"name={name!r} must be the name of an attention, or a mapping such as {{'0-3': "
                f"'sliding_window', '4': 'standard'}}"
            )
        if layers is not None:
            raise ValueError("layers goes with one name; a mapping names its layers itself")
        for key, value in name.items():
            for layer in _parse("the mapping's key ", key, ordered, len(numbered)):
                if layer in choices:
                    raise ValueError(
                        f"layer {layer} is named twice in {dict(name)!r}; name it once"
                    )
                choices[layer] = _choice(value, options)
    kept = [layer for layer in range(len(ordered)) if layer < len(numbered) or layer in choices]
    return [ordered[layer] for layer in kept], {
        place: choices[layer] for place, layer in enumerate(kept) if layer in choices
    }


def _refuse_unknown(sites: list[Site]) -> None:
    """Raise UnsupportedError where not every attention is known to look at itself or at another
    sequence, or where none looks at itself."""
    unknown = [site for site in sites if site.is_self is None]
    if unknown:
        raise UnsupportedError(
            f"{' and '.join(site.path for site in unknown)}: attnzoo could not find out by trying "
            "whether this is self-attention or looks at another "
            f"sequence; say what to swap: layers={[site.path for site in unknown]!r}, or the "
            "numbers or paths of the others"
        )
    if not any(site.is_self for site in sites):
        raise UnsupportedError(
            f"{' and '.join(site.path for site in sites)} looks at another sequence, and by itself "
            "a swap takes self-attention only; "
            f"to swap it all the same name it: layers={[site.path for site in sites]!r}"
        )


def build_attentions(
    model: nn.Module, sites: list[Site], choices: dict[int, Choice]
) -> tuple[dict[int, Attention], dict[int, Choice]]:
    """An attention for each chosen layer, and the choices with the options that were settled here
    (the seeds).

    An attention with a `seed` gets seed + layer, so that layers draw differently.

    Raises what `build` raises, and UnsupportedError when the attention cannot do what the layer
    does.
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
            own = Choice(choice.name, _options(choice, layer, site))
            attention = Choice(own.name, {**own.options, **more}).build(site.heads, site.head_dim)
            place = site.place or place_of(site.module, model)
            _check_fits(attention, site, place[0])
        except UnsupportedError as error:
            raise UnsupportedError(f"layer {layer} ({site.path}): {error}") from None
        shared[repr(choice)] = more or attention.shared_options()
        attentions[layer] = attention.to(*place).train(site.module.training)
        settled[layer] = own
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
        f"{module} drops entries of A with probability {dropout} while training, which {name} "
        "never forms; to train it, build the model with "
        "its attention dropout at 0 (in the config or in from_pretrained: BERT's "
        "attention_probs_dropout_prob=0.0, Llama's attention_dropout=0.0, "
        "GPT-2's attn_pdrop=0.0; in timm attn_drop_rate=0.0; of torch's layers set "
        "self_attn.dropout to 0 before the swap); to evaluate it only, "
        "call model.eval() before the swap"
    )


def _check_fits(attention: Attention, site: Site, device: torch.device) -> None:
    if site.is_self is False and not attention.spec.cross:
        raise UnsupportedError(
            f"it looks at another sequence, which {attention.spec.name} cannot: it needs as many "
            "queries as keys; use standard"
        )
    if "k" not in attention.projected:
        raise UnsupportedError(
            f"the model projects queries and keys apart, which {attention.spec.name} with shared "
            "ones cannot take"
        )
    if site.has_bias and not attention.spec.attn_mask:
        raise UnsupportedError(
            f"{type(site.module).__name__} adds a position_bias to its scores, which "
            f"{attention.spec.name} would drop; use standard"
        )
    if site.has_sink_logits and not attention.spec.takes("sink_logits"):
        raise UnsupportedError(
            f"{type(site.module).__name__} has sink logits (s_aux) in its softmax, which "
            f"{attention.spec.name} would drop; "
            "use standard or sliding_window"
        )
    if site.dropout and not attention.spec.dropout:
        refusal = no_dropout(type(site.module).__name__, site.dropout, attention.spec.name)
        if site.module.training:
            raise UnsupportedError(refusal)
        if device.type != "meta":
            warnings.warn(refusal, stacklevel=4)  # the caller of `swap`
    reach = attention.engine.reach
    if site.window is not None and (reach is None or reach > site.window):
        raise UnsupportedError(
            f"the model attends within its own sliding window of {site.window}, which "
            f"{attention.spec.name} would drop; use sliding_window with "
            f"window={site.window} or less, or switch the model's window off first (Mistral: "
            "model.config.sliding_window = None)"
        )


def place_of(*modules: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the first of these modules computes that has a weight to tell, and in which dtype.
    Weights that are only stored (8 bits) tell the device alone, and accelerate's hooks may keep
    them elsewhere."""
    weights = [weight for module in modules for weight in (*module.parameters(), *module.buffers())]
    computing = next((weight for weight in weights if weight.dtype in COMPUTES), None)
    dtype = torch.get_default_dtype() if computing is None else computing.dtype
    hooked = next((device for module in modules for device in _execution_devices(module)), None)
    if hooked is not None:
        return hooked, dtype
    if computing is not None:
        return computing.device, dtype
    return weights[0].device if weights else torch.device("cpu"), dtype


def _execution_devices(module: nn.Module) -> Iterator[torch.device]:
    """Where accelerate's hooks have the parts of a module compute."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                yield (
                    torch.device("cuda", device)
                    if isinstance(device, int)
                    else torch.device(device)
                )


def _choice(value: Any, options: dict[str, Any]) -> Choice:
    if isinstance(value, str):
        return Choice(value, dict(options))
    if isinstance(value, Choice):
        return Choice(value.name, {**options, **value.options})
    if (
        isinstance(value, tuple | list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], Mapping)
    ):
        return Choice(value[0], {**options, **value[1]})
    raise ValueError(
        f"{value!r} must be the name of an attention or a pair of its name and its options"
    )


def _by_name(options: Mapping[Any, Any]) -> str:
    """{"window": 3} as window=3."""
    return ", ".join(f"{option}={value!r}" for option, value in options.items()) or "..."


def _parse(what: str, layers: Any, sites: list[Site], count: int) -> list[int]:
    """Indices of sites, in order, from 3, [0, 2], "4", "0-3" or "0-3,6", which count the first
    `count`; and from paths, or patterns of paths."""
    parts = (
        layers.split(",")
        if isinstance(layers, str)
        else list(layers)
        if isinstance(layers, Iterable)
        else [layers]
    )
    found = [_indices(part, sites, count) for part in parts]
    indices = sorted(index for some in found for index in some)
    if not found or not all(found) or len(set(indices)) < len(indices):
        has = (
            f"it has {count} attention layers, 0 to {count - 1}"
            if count
            else "none of its attentions is known to be self-attention"
        )
        others = "".join(f", {site.path}" for site in sites[count:])
        raise ValueError(
            f"{what}{layers!r} must be distinct layers of the model, such as 4, '0-3' or '0-3,6'; "
            f"{has}"
            f"{f', and those that are named by their paths{others}' if others else ''}"
        )
    return indices


def _indices(layer: Any, sites: list[Site], count: int) -> list[int]:
    """Of one layer, a range, a path or a pattern of paths; empty where the model has none such."""
    if isinstance(layer, int):
        return [layer] if not isinstance(layer, bool) and 0 <= layer < count else []
    if not isinstance(layer, str):
        return []
    numbers = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", layer)
    if numbers:
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if first <= last < count:
            return list(range(first, last + 1))
    return [index for index, site in enumerate(sites) if fnmatchcase(site.path, layer.strip())]
