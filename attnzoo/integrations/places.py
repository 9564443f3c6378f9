"""The places of attention in a model, and the attentions that are built for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.registry import Choice, names, options_of, spec_of
from attnzoo.spec import Spec, with_spec
from attnzoo.spec_checks import check_causality

#: In which attention computes; other floating dtypes, such as float8, only store.
COMPUTES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Site:
    """One attention of a model.

    path: of `module` in the model.
    is_causal: None where only the call tells.
    window: keys its own sliding window shows, itself included (None: all).
    has_bias: it adds a bias of positions to its scores.
    bias_by_distance: which depends on how far apart they are.
    softcap: what its scores are kept within.
    has_sink_logits: it has one more score a head, which counts in the sum of every row.
    dropout: of the entries of A while training.
    place: device and dtype of its queries, where a trial told them.
    is_self: False where it looks at another sequence, None where that is not known.
    max_length: of the sequences that it reads, where the model tells.
    reads_positions: its model tells it the positions of its tokens, beside what they do to q and k.
    hidden_size: width of the hidden states that it reads, where gates can be made of them.
    """

    path: str
    module: nn.Module
    heads: int
    head_dim: int
    is_causal: bool | None = None
    window: int | None = None
    has_bias: bool = False
    bias_by_distance: bool = False
    softcap: float | None = None
    has_sink_logits: bool = False
    dropout: float = 0.0
    place: tuple[torch.device, torch.dtype] | None = None
    is_self: bool | None = True
    max_length: int | None = None
    reads_positions: bool = False
    hidden_size: int | None = None


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
                check_causality(spec_of(choice.name), site.is_causal)
            own = Choice(choice.name, _options(choice, layer, site))
            options = {**own.options, **more, **_softcap(choice.name, site)}
            attention = Choice(own.name, options).build(site.heads, site.head_dim)
            place = site.place or place_of(site.module, model)
            _check_fits(attention, site, place[0])
        except UnsupportedError as error:
            raise UnsupportedError(f"layer {layer} ({site.path}): {error}") from None
        shared[repr(choice)] = more or attention.shared_options()
        attentions[layer] = attention.to(*place).train(site.module.training)
        settled[layer] = own
    return attentions, settled


def _options(choice: Choice, layer: int, site: Site) -> dict[str, Any]:
    for option in ("heads", "head_dim", "scale", "dropout", "softcap"):
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


def _softcap(name: str, site: Site) -> dict[str, Any]:
    """The option that caps scores as the layer does."""
    if site.softcap is None:
        return {}
    able = [one for one in names() if any(option.name == "softcap" for option in options_of(one))]
    if name not in able:
        raise UnsupportedError(
            f"{type(site.module).__name__} caps its scores (softcap={site.softcap}), which {name} "
            f"would drop; use one of {', '.join(able)}"
        )
    return {"softcap": site.softcap}


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
    if not isinstance(site.module, nn.MultiheadAttention):  # which projects, or hands on, inputs
        missing = [
            one.name
            for one in attention.spec.inputs
            if one.required and not (one.is_projected and site.hidden_size)
        ]
        if missing:
            raise UnsupportedError(
                f"{attention.spec.name} needs {' and '.join(missing)} in every call, which "
                f"{type(site.module).__name__} does not give; use an attention without required "
                "inputs, or build a model with attnzoo.MultiheadAttention"
            )
        if attention.spec.has_gates and not site.hidden_size:
            raise UnsupportedError(
                f"{attention.spec.name} makes its gates of hidden states, whose width the config "
                f"of {type(site.module).__name__} does not tell; use an attention without gates"
            )
    if "k" not in attention.projected:
        raise UnsupportedError(
            f"the model projects queries and keys apart, which {attention.spec.name} with shared "
            "ones cannot take"
        )
    able = with_spec(lambda spec: _adds_bias(spec, site))
    if site.has_bias and attention.spec.name not in able:
        raise UnsupportedError(
            f"{type(site.module).__name__} adds a position_bias to its scores, which "
            f"{attention.spec.name} would drop; use one of {', '.join(able)}"
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
            warnings.warn(refusal, stacklevel=5)  # the caller of `swap`
    reach = attention.engine.reach
    if site.window is not None and (reach is None or reach > site.window):
        raise UnsupportedError(
            f"the model attends within its own sliding window of {site.window}, which "
            f"{attention.spec.name} would drop; use sliding_window with "
            f"window={site.window} or less, or switch the model's window off first (Mistral: "
            "model.config.sliding_window = None)"
        )


def _adds_bias(spec: Spec, site: Site) -> bool:
    return spec.attn_mask or (site.bias_by_distance and spec.takes("distance_bias"))


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
