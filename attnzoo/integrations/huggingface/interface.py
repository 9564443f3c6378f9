"""Hugging Face transformers: an attention of the zoo behind its `AttentionInterface`, for models
that consult it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.integrations.huggingface.changed_families import (
    change_families,
    give_classes_back,
    give_configs_back,
    tell_reach,
)
from attnzoo.integrations.huggingface.choice import (
    give_choices,
    runs_its_swap,
    take_choices,
)
from attnzoo.integrations.huggingface.configs import (
    IMPLEMENTATION,
    Claim,
    claim,
    mark,
    release,
)
from attnzoo.integrations.huggingface.masks.interface_masks import SUBMODULE
from attnzoo.integrations.huggingface.masks.packed_rows import refuse_unseen_packing
from attnzoo.integrations.huggingface.probe import find_sites as find_sites
from attnzoo.integrations.huggingface.probe import set_implementation
from attnzoo.integrations.huggingface.projected_inputs import add_gates
from attnzoo.integrations.huggingface.trial import trial_of
from attnzoo.integrations.places import Site
from attnzoo.integrations.replacing import check_classes
from attnzoo.integrations.undo import Undo


def handles(model: nn.Module) -> bool:
    """Whether this is a transformers model; transformers is not imported for it."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def insert(
    model: Any,
    sites: list[Site],
    attentions: dict[int, Attention],
    example_inputs: Mapping[str, Any] | None = None,
) -> Undo:
    """Put the attentions into their layers, switch the model to them, and see that every one of
    them runs. The answer undoes it."""
    names = {layer: attention.spec.name for layer, attention in attentions.items()}
    modules = [sites[layer].module for layer in attentions]
    change = change_families(model)
    claims = claim(model, names)
    gates = []
    for layer, attention in attentions.items():
        sites[layer].module.add_module(SUBMODULE, attention)
        gates.append(add_gates(sites[layer], attention))
    tell_reach(change, model, [site.module for site in sites])
    repeated = _repeated_keys(model)
    model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) | repeated
    untold = any(site.is_causal and not site.reads_positions for site in sites)
    holders = _holders(model, [sites[layer].path for layer in attentions])
    hooks = [
        part.register_forward_pre_hook(partial(_check_forward, untold), with_kwargs=True)
        for part in holders
    ]
    hooks += [hook for hook in gates if hook is not None]
    give_choices(holders, can_follow=not change.swapped)
    undo = Undo(
        [partial(check_classes, change.swapped)],
        [
            partial(give_configs_back, change),
            partial(give_classes_back, change),
            partial(_take_out, modules, claims, repeated, hooks),
        ],
    )
    try:
        set_implementation(model, IMPLEMENTATION, change)
        mark(model, claims)
        trial_of(model, example_inputs).read()
        idle = [layer for layer, attention in attentions.items() if attention.last_backend is None]
        if idle:
            raise UnsupportedError(
                f"layer {idle[0]} ({sites[idle[0]].path}) of {type(model).__name__} did not run "
                "the attention it was given"
            )
    except BaseException:
        undo(model)
        raise
    for attention in attentions.values():
        attention.last_backend = None  # from here on it tells of the caller's own forwards
    return undo


def _take_out(
    modules: list[nn.Module],
    claims: list[Claim],
    repeated: set[str],
    hooks: list[RemovableHandle],
    model: Any,
) -> None:
    """Take the attentions out again, and give every config its own implementation back."""
    for hook in hooks:
        hook.remove()
    take_choices(model)
    for module in modules:
        delattr(module, SUBMODULE)
    model._keys_to_ignore_on_save = model._keys_to_ignore_on_save - repeated
    release(claims)


def _repeated_keys(model: Any) -> set[str]:
    """Keys of what attentions share, but for the first of each: `save_pretrained` takes a parameter
    once, and loading finds all of them by it."""
    found: dict[int, str] = {}
    inside = f".{SUBMODULE}."
    return {
        key
        for key, value in model.named_parameters(remove_duplicate=False)
        if inside in key and found.setdefault(id(value), key) != key
    }


def _holders(model: Any, paths: list[str]) -> list[Any]:
    """The model and its parts that are models themselves, with a config that may be their own, and
    hold one of these layers."""
    from transformers import PreTrainedModel

    parts = [
        (f"{path}." if path else "", part)
        for path, part in model.named_modules()
        if isinstance(part, PreTrainedModel)
    ]
    return [part for prefix, part in parts if any(path.startswith(prefix) for path in paths)]


def _refuse_reread(model: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError where a state is given to a forward that is told to use none: `generate`
    then passes all tokens again at every step, and a state would add them again."""
    if kwargs.get("use_cache") is not False:
        return
    cache = kwargs.get("past_key_values")
    cache = getattr(cache, "self_attention_cache", cache)  # of an encoder-decoder
    from attnzoo.integrations.huggingface.state_cache import StateCache

    if isinstance(cache, StateCache):
        raise ValueError(
            f"{type(model).__name__} was given attnzoo.state_cache and use_cache=False, with which "
            "generate passes every token again to a state that has it already; give "
            "use_cache=True beside it, or no past_key_values"
        )


def _check_forward(untold: bool, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook that refuses arguments and settings by which the swapped attentions would
    be skipped unasked, and packed rows that a causal one is not told of (`untold`).

    Every part has it, since a part may be called alone and its attention set alone.
    """
    if runs_its_swap(model):
        _refuse_reread(model, kwargs)
        if untold:
            refuse_unseen_packing(model, args, kwargs)
