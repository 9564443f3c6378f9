"""Models whose attention a swap could not reach, or only with a bias of all pairs of tokens: their
modules are of another class, see `families`, while they are swapped."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from attnzoo.integrations.huggingface.configs import configs_of
from attnzoo.integrations.huggingface.families.bloom import BloomInterfaceAttention
from attnzoo.integrations.huggingface.families.falcon import FalconInterfaceAttention
from attnzoo.integrations.huggingface.families.mpt import MptInterfaceAttention
from attnzoo.integrations.huggingface.families.t5 import AttentionByDistance
from attnzoo.integrations.huggingface.masks.interface_masks import SUBMODULE
from attnzoo.integrations.replacing import Swapped, change_class, class_over

#: By the name of transformers' class: the one that a module gets.
KINDS: dict[str, type] = {
    "BloomAttention": BloomInterfaceAttention,
    "FalconAttention": FalconInterfaceAttention,
    "MptAttention": MptInterfaceAttention,
    "LongT5Attention": AttentionByDistance,
    "MT5Attention": AttentionByDistance,
    "Pop2PianoAttention": AttentionByDistance,
    "SwitchTransformersAttention": AttentionByDistance,
    "T5Attention": AttentionByDistance,
    "UMT5Attention": AttentionByDistance,
}
#: Attribute of these modules: the positions that a bias needs at most, where that is known.
MOST = "most_positions"


@dataclass(frozen=True)
class Change:
    """What was changed in a model.

    swapped: the modules of another class.
    configs: what got a config that is this model's alone, with what it had before (None: nothing).
        One that other models share would name the implementation to those too, whose attention
        cannot follow it.
    """

    swapped: Swapped
    configs: list[tuple[Any, Any]]

    def set_implementation(self, model: Any, name: str) -> bool:
        """Let the configs name an implementation where transformers itself would only warn that
        the family does not consult it. Returns whether it did."""
        for config in configs_of(model) if self.configs else ():
            config._attn_implementation_internal = name
        return bool(self.configs)


def change_families(model: Any) -> Change:
    """Give the modules of these families their other classes; `give_classes_back` and
    `give_configs_back` undo it."""
    swapped: Swapped = {}
    for path, module in model.named_modules():
        own = type(module)
        kind = KINDS.get(own.__name__)
        if kind is not None and own.__module__.startswith("transformers.models."):
            swapped[path] = (module, own, kind)
    told = [module for module, _, kind in swapped.values() if kind is not AttentionByDistance]
    change = Change(swapped, _own_configs(model, told) if told else [])
    for module, own, kind in swapped.values():
        change_class(module, class_over(kind, own))
    return change


def _own_configs(model: Any, told: list[Any]) -> list[tuple[Any, Any]]:
    """Give a model's parts copies of their configs, and these modules that of the innermost part
    that they are in. Returns them with what they had before."""
    from transformers import PreTrainedModel

    copies: dict[int, Any] = {}
    chosen: dict[Any, Any] = {}
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            inside = set(part.modules())
            own = copies.setdefault(id(part.config), copy.deepcopy(part.config))
            chosen.update({module: own for module in told if module in inside})
            chosen[part] = own
    before = [(holder, vars(holder).get("config")) for holder in chosen]
    for holder, config in chosen.items():
        holder.config = config
    return before


def tell_reach(change: Change, model: Any, attentions: list[Any]) -> None:
    """Let a bias reach no farther than the attentions of its part of the model see, so that a step
    of a bounded state costs the same after any number of tokens.

    attentions: the modules of all self-attentions of the model, swapped or not
    """
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel):  # an inner one comes after those around it
            inside = set(part.modules())
            reaches = [_reach(module) for module in attentions if module in inside]
            known = [reach for reach in reaches if reach is not None]
            for module, _, _ in change.swapped.values():
                if module in inside:
                    setattr(module, MOST, max(known) if known == reaches else None)


def _reach(module: Any) -> int | None:
    """Keys back that a module's attention sees, the query's own included; None where it may see
    all of them."""
    attention = module._modules.get(SUBMODULE)
    if attention is None or attention.spec.takes("global_mask"):
        return None
    return attention.engine.reach


def give_configs_back(change: Change, model: Any) -> None:
    """Give the model's parts the configs that they had, but for those that were changed since."""
    for holder, before in change.configs:
        if before is not None and holder.config.to_dict() == before.to_dict():
            holder.config = before


def give_classes_back(change: Change, model: Any) -> None:
    """Give the modules their own classes back, and holders that had no config none."""
    for module, own, _ in change.swapped.values():
        change_class(module, own)
        vars(module).pop(MOST, None)
    for holder, before in change.configs:
        if before is None:
            del holder.config
