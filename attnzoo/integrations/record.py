"""What `swap` did to a model, kept on it so that it can be undone, saved and shown."""

from __future__ import annotations

from typing import Any

from torch import nn

from attnzoo.attention import Attention
from attnzoo.integrations.places import Site
from attnzoo.integrations.undo import Undo
from attnzoo.registry import Choice

#: The attribute of a model that holds its `Record`.
RECORD = "_attnzoo_swap"


class Record:
    """What `swap` did to a model.

    integration: the kind of model, a key of `swapping.INTEGRATIONS`.
    sites: every attention layer found, kept as (path, heads, head_dim).
    choices: by layer, with settled options.
    attentions: by layer.
    undo: takes them out.
    keys: of the layers, as `swap` takes them.
    modules: those that the attentions are in, by layer, where they are named `core`.
    """

    def __init__(
        self,
        integration: str,
        sites: list[Site],
        choices: dict[int, Choice],
        attentions: dict[int, Attention],
        undo: Undo,
    ) -> None:
        self.integration = integration
        self.sites = [(site.path, site.heads, site.head_dim) for site in sites]
        self.keys = [str(layer) if site.is_self else site.path for layer, site in enumerate(sites)]
        self.choices = choices
        self.modules = {layer: sites[layer].module for layer in choices}
        self.undo = undo
        undo.checks.append(self.check_standing)
        layer = next(iter(choices))
        self.core = next(
            name
            for name, child in self.modules[layer].named_children()
            if child is attentions[layer]
        )
        self.made_of = {layer: _kinds(attention) for layer, attention in attentions.items()}

    @property
    def cores(self) -> dict[int, Any]:
        """What stands in the place of each layer's attention: it, or what was put around it
        since."""
        return {layer: module._modules[self.core] for layer, module in self.modules.items()}

    @property
    def attentions(self) -> dict[int, Attention]:
        """The attention that runs in each layer. Raises ValueError where something is around it
        that hides which that is."""
        return {layer: self._attention(layer, core) for layer, core in self.cores.items()}

    def _attention(self, layer: int, core: Any) -> Attention:
        copies = getattr(core, "modules_to_save", None)
        # PEFT's, of which it trains one and leaves the original as it was.
        if isinstance(copies, nn.ModuleDict):
            core = copies[core.active_adapters[0]] if core.active_adapters else core.original_module
        if not isinstance(core, Attention):
            raise ValueError(
                f"{self.place(layer)}: its attention was replaced or wrapped since the swap, in a "
                f"{type(core).__name__}; take that out"
            )
        return core

    def place(self, layer: int) -> str:
        """A layer by number and path, for messages."""
        return f"layer {layer} ({self.sites[layer][0]})"

    def check_standing(self, model: nn.Module) -> None:
        """Raise ValueError where the attentions are not in the model any more as they were put
        there."""
        present = set(model.modules())
        for layer, module in self.modules.items():
            if module not in present:
                raise ValueError(
                    f"{self.place(layer)}: the {type(module).__name__} that was swapped is not in "
                    f"this {type(model).__name__} any more; put it back "
                    "before attnzoo.unswap"
                )
        for layer, core in self.cores.items():
            for path, kind in _kinds(core).items() ^ self.made_of[layer].items():
                raise ValueError(
                    f"{self.place(layer)}: {path or 'the attention'} of its "
                    f"{self.choices[layer].name} was replaced, wrapped or taken out since the "
                    f"swap ({kind}), and would be gone with it; undo that first (an adapter or a "
                    "trained copy: in PEFT by merge_and_unload)"
                )


def _kinds(module: nn.Module) -> dict[str, str]:
    return {path: type(part).__name__ for path, part in module.named_modules()}
