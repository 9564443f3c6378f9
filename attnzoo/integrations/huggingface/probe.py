"""Finding the self-attention layers of a Hugging Face model: it reads a few tokens while an
attention function notes what it is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.call import UnsupportedError
from attnzoo.eager import can_look
from attnzoo.integrations.huggingface.attention_function import (
    call_is_causal,
    refuse_other_attention,
)
from attnzoo.integrations.huggingface.changed_families import (
    Change,
    change_families,
    give_classes_back,
    give_configs_back,
)
from attnzoo.integrations.huggingface.configs import configs_of, register
from attnzoo.integrations.huggingface.masks.interface_masks import SUBMODULE
from attnzoo.integrations.huggingface.masks.packed_rows import read_mask_function
from attnzoo.integrations.huggingface.trial import EXAMPLE, Trial, longest_sequence, trial_of
from attnzoo.integrations.places import Site

PROBE = "attnzoo_probe"


class _Probe:
    """What a model's self-attentions were called with, and the windows in the masks that they were
    given."""

    def __init__(self, model: nn.Module, trial: Trial) -> None:
        self.trial = trial
        self.paths = {module: path for path, module in model.named_modules()}
        self.sites: dict[nn.Module, Site] = {}
        self.asked: set[nn.Module] = set()
        self.masks: list[tuple[Tensor, int | None]] = []  # made for this read, with their windows
        self.lengths: set[int] = set()  # of the sequences
        self.windows: set[int] = set()  # of masks that a layer was given

    def note_window(self, mask: Tensor | None) -> None:
        """Note that a layer was given this mask. A mask that is none of those made may be cut from
        any of them."""
        known = [window for made, window in self.masks if made is mask]
        self.windows.update(
            window for window in known or [window for _, window in self.masks] if window is not None
        )


_probe: ContextVar[_Probe] = ContextVar("probe")


def find_sites(model: Any, example_inputs: Mapping[str, Any] | None = None) -> list[Site]:
    """The self-attention layers in the order in which they run, found by letting the model read a
    few tokens, or these inputs.

    Raises UnsupportedError when the model does not consult the attention interface, or has an
    attention that the zoo cannot honour; ValueError when it is part of a model that is swapped
    already.
    """
    register()
    _register_probe()
    name = type(model).__name__
    if any(SUBMODULE in module._modules for module in model.modules()):
        raise ValueError(
            f"{name} is part of a model that is swapped already; unswap that one first (a mapping "
            "gives each layer an attention of its own)"
        )
    trial = trial_of(model, example_inputs)
    probe = _Probe(model, trial)
    change = change_families(model)
    configs = [(config, config._attn_implementation_internal) for config in configs_of(model)]
    token = _probe.set(probe)
    try:
        set_implementation(model, PROBE, change)
        trial.read()
        trial.read(training=list(probe.sites))  # only then do they tell of their dropout
        _refuse_unread(model, probe, trial)
    finally:
        _probe.reset(token)
        for config, implementation in configs:
            config._attn_implementation_internal = implementation
        give_classes_back(change, model)
        give_configs_back(change, model)
    if not probe.sites:
        raise UnsupportedError(
            f"{name} never consulted the attention interface, so a swap would be ignored"
        )
    sites = list(probe.sites.values())
    if (
        trial.given
        and len(probe.lengths) == 1
        and getattr(model.config, "is_encoder_decoder", False)
    ):
        raise UnsupportedError(
            f"the example_inputs give {name}'s encoder and decoder sequences of one length, "
            f"{min(probe.lengths)}, so that a decoder's look at its "
            "encoder cannot be told from self-attention; give decoder_input_ids of another length"
        )
    unknown = probe.windows - {site.window for site in sites}
    if unknown:
        raise UnsupportedError(
            f"{name} masks by a window of {min(unknown)} that its attention layers do not tell of"
        )
    return sites


def _refuse_unread(model: Any, probe: _Probe, trial: Trial) -> None:
    """Raise UnsupportedError on a part with attention of its own that the read did not reach, such
    as a vision tower beside a reader of text: it would stay exact.

    The cross-attention of a decoder that stands alone is not reached either, and is not swapped
    anyway.
    """
    read = [site.path for site in probe.sites.values()]
    if not read:
        return
    for module, path in probe.paths.items():
        tower = (
            None
            if module in probe.asked or not _consults_interface(module)
            else _part(model, path, without=read)
        )
        if tower is not None:
            parts = [repr(part) for part in (_part(model, read[0], without=[path]), tower) if part]
            raise UnsupportedError(
                f"{type(model).__name__} does not reach {path} by a few "
                f"{' and '.join(trial.names)}, so a swap would leave it as it is; swap the "
                f"model's parts one by one: model.get_submodule(...) of {' and of '.join(parts)}; "
                f"or give inputs that reach it: {EXAMPLE}"
            )


def _consults_interface(module: Any) -> bool:
    """Whether a module looks like one that calls the attention interface: its functions read
    is_causal and config off it."""
    return (
        "Attention" in type(module).__name__
        and hasattr(module, "is_causal")
        and hasattr(module, "config")
    )


def _part(model: Any, path: str, without: list[str]) -> str | None:
    """The path of the outermost part that is a model itself, holds `path` and none of the
    others."""
    from transformers import PreTrainedModel

    for part, module in model.named_modules():
        inside = f"{part}."
        if (
            isinstance(module, PreTrainedModel)
            and path.startswith(inside)
            and not any(other.startswith(inside) for other in without)
        ):
            return part
    return None


def _register_probe() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PROBE, _note)
    AttentionMaskInterface.register(PROBE, _note_mask)


def set_implementation(model: Any, name: str, change: Change) -> None:
    """Switch a model to the attention implementation of that name. change: what was changed in it
    for that.

    Raises UnsupportedError where the model only warns and keeps its own.
    """
    if not change.set_implementation(model, name):
        model.set_attn_implementation(name)
    if model.config._attn_implementation != name:  # some families only warn
        raise UnsupportedError(
            f"{type(model).__name__} does not let its attention be replaced, so a swap would be "
            "ignored"
        )


def _note(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function that answers as transformers' own and notes what it was asked; a
    decoder's look at its encoder is not noted."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    refuse_other_attention(module, kwargs)
    probe = _probe.get()
    probe.asked.add(module)
    probe.note_window(attention_mask)
    if query.shape[2] == key.shape[2]:
        probe.lengths.add(query.shape[2])
        bias, sinks = kwargs.get("position_bias"), kwargs.get("s_aux") is not None
        causal, window, dropout = (
            call_is_causal(module, kwargs.get("is_causal")),
            kwargs.get("sliding_window"),
            kwargs.get("dropout") or 0.0,
        )
        _refuse_other_causality(module, causal, attention_mask)
        site = probe.sites.get(module) or Site(
            probe.paths[module],
            module,
            query.shape[1],
            query.shape[3],
            causal,
            window,
            has_bias=bias is not None,
            bias_by_distance=bias is not None and bias.dim() == 2,
            softcap=kwargs.get("softcap"),
            has_sink_logits=sinks,
        )
        longest = longest_sequence(module, causal, query.shape[2] if probe.trial.is_whole else None)
        place = (query.device, query.dtype)
        told = kwargs.get("position_ids") is not None
        probe.sites[module] = replace(
            site,
            dropout=dropout,
            place=place,
            max_length=longest,
            reads_positions=told,
            hidden_size=getattr(module.config, "hidden_size", None),
        )
    # What it answers does not matter, and SDPA has no place for all of it.
    kwargs = {name: x for name, x in kwargs.items() if name not in ("position_bias", "softcap")}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _refuse_other_causality(module: Any, is_causal: bool, mask: Tensor | None) -> None:
    """Raise UnsupportedError where a mask and the layer's own is_causal differ: eager attention
    follows the mask, a swapped attention is_causal."""
    if mask is None or not can_look(mask, may_stall=True):
        return
    ahead = mask[..., 0, 1]  # the first query and the key after it
    hides_ahead = not bool(
        (ahead if mask.dtype == torch.bool else ahead > torch.finfo(mask.dtype).min / 2).any()
    )
    if hides_ahead != is_causal:
        raise UnsupportedError(
            f"{type(module).__name__} says is_causal={is_causal} and is given a mask that is "
            f"{'' if hides_ahead else 'not '}causal, so a swapped "
            "attention could not tell which keys it sees; this model cannot be swapped"
        )


def _note_mask(
    *args: Any, mask_function: Callable[..., Any], local_size: int | None = None, **kwargs: Any
) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    causal, _ = read_mask_function(mask_function)
    # The whole mask, to hold beside what the layer says.
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    mask = sdpa_mask(*args, mask_function=mask_function, local_size=local_size, **kwargs)
    if mask is not None:
        window = local_size if local_size is None or causal else local_size + 1
        _probe.get().masks.append((mask, window))
    return mask
