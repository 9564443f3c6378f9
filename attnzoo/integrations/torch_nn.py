"""torch.nn: `attnzoo.MultiheadAttention`'s forward in `nn.MultiheadAttention`, inside torch's
Transformer layers or alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.integrations.places import Site, place_of
from attnzoo.integrations.replacing import has_other_forward, replace_forwards
from attnzoo.integrations.self_attention import which_look_at_themselves
from attnzoo.integrations.undo import Undo
from attnzoo.layers.multihead import MultiheadAttention, is_called

#: What nn.MultiheadAttention is made of.
PARTS = (
    "in_proj_weight",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
    "out_proj",
)


class SwappedAttention(MultiheadAttention):
    """`attnzoo.MultiheadAttention` that knows its place in a model, for the errors that only a call
    can bring: causality, masks."""

    place_in_model: str

    def take(self, core: Attention, place: str) -> None:
        """Let `core`, which `refuse_core` does not refuse, attend between the projections."""
        self.place_in_model = place
        if core.spec.dropout:
            engine: Any = core.engine
            engine.dropout = self.dropout
        self._take(core)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As `attnzoo.MultiheadAttention.forward`; what the core cannot do is an UnsupportedError
        that names the layer."""
        try:
            return super().forward(*args, **kwargs)
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.place_in_model}: {error}") from None


def _check_out_projections(
    modules: dict[str, nn.Module], heard: list[set[int]], model: nn.Module
) -> None:
    """Raise ValueError where out_proj does more than its weight says: torch's own forward reads
    that weight and never calls the layer.

    modules: the swapped ones by path.
    heard: of each, the hooks that its out_proj had before.
    """
    of_peft = {
        id(getattr(module, "base_layer", None)) for module in model.modules() if _is_pefts(module)
    }
    for (path, module), before in zip(modules.items(), heard, strict=True):
        if "projections" in module._modules:
            raise ValueError(
                f"{path} has its in_proj_weight split over processes; it cannot be put back"
            )
        last: Any = module.out_proj
        if (_is_called(last) or _hooks(last) - before) and id(module) not in of_peft:
            raise ValueError(
                f"{path}.out_proj is a {type(last).__module__}.{type(last).__name__} that is "
                "called, and torch's nn.MultiheadAttention would "
                "read its weight and never call it; take out first what was put there since "
                "the swap (an adapter: merge it, in PEFT by "
                "merge_and_unload; hooks: remove them)"
            )


def _restore_fast_path(
    modules: dict[str, nn.Module],
    whole: list[nn.TransformerEncoderLayer],
    stacks: list[tuple[nn.TransformerEncoder, bool]],
    model: nn.Module,
) -> None:
    """Let torch's fast path run again as it did.

    modules: the swapped ones by path.
    whole: layers that had no adapter.
    stacks: with the use_nested_tensor that each had.
    """
    # Where an adapter came into a layer since, the hook stays: torch's fast path would read the
    # weights beneath the adapter.
    more = {part for layer in whole if _holds_more(layer) for part in layer.modules()}
    for module in modules.values():
        vars(module).pop("place_in_model")
        for number in [
            number
            for number, hook in module._forward_pre_hooks.items()
            if hook is is_called and module not in more
        ]:
            del module._forward_pre_hooks[number]
    for stack, value in stacks:
        stack.use_nested_tensor = value and more.isdisjoint(stack.modules())


def _hooks(module: nn.Module) -> set[int]:
    return {*module._forward_hooks, *module._forward_pre_hooks}


def _is_called(linear: nn.Module) -> bool:
    """Whether a layer in the place of a linear one does more than multiply by its weight."""
    return type(linear).forward is not nn.Linear.forward or has_other_forward(linear)


def _is_pefts(module: nn.Module) -> bool:
    """PEFT's layer around an nn.MultiheadAttention, which merges the adapters of out_proj before
    every call."""
    return type(module).__name__ == "MultiheadAttention" and type(module).__module__.startswith(
        "peft."
    )


def _holds_more(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether torch's fast path, which reads the layer's weights, would skip something that the
    layer does."""
    return _is_pefts(layer.self_attn) or _is_called(layer.linear1) or _is_called(layer.linear2)


def handles(model: nn.Module) -> bool:
    """Whether the model has an nn.MultiheadAttention of torch's."""
    return any(True for _ in _attentions(model))


def find_sites(model: nn.Module) -> list[Site]:
    """Every nn.MultiheadAttention inside the model, and whether it is known to be self-attention.

    Raises ValueError when the model itself is one: it has no layer around it; UnsupportedError on
    one that does more than torch's.
    """
    found = list(_attentions(model))
    if any(module is model for _, module in found):
        raise ValueError(
            "an nn.MultiheadAttention cannot be swapped in place; build an "
            "attnzoo.MultiheadAttention and load its state_dict"
        )
    itself = which_look_at_themselves(model, [module for _, module in found])
    for path, module in found:
        if itself[module] is not False:
            _refuse_other_attention(path, module)
    # torchvision's vision transformers have it: their images are of one size.
    told = getattr(model, "seq_length", None)
    longest = told if isinstance(told, int) else None
    return [
        Site(
            path,
            module,
            module.num_heads,
            module.head_dim,
            dropout=module.dropout,
            is_self=itself[module],
            max_length=longest,
        )
        for path, module in found
    ]


def _attentions(model: nn.Module) -> Iterator[tuple[str, nn.MultiheadAttention]]:
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiheadAttention):
            yield path, module


def _refuse_other_attention(path: str, module: nn.MultiheadAttention) -> None:
    """Raise UnsupportedError on a forward that is not torch's, and on parts (a parametrization, a
    pruned weight) that torch's has not."""
    parts = [
        name
        for name, _ in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
            *module.named_children(),
        )
    ]
    extra = [name for name in parts if name not in PARTS]
    if type(module).forward is not nn.MultiheadAttention.forward or has_other_forward(module):
        extra.append("a forward of its own")
    if extra:
        raise UnsupportedError(
            f"{path} is a {type(module).__name__} with {' and '.join(extra)}, which a swapped "
            "attention would drop; "
            "swap the model's other parts one by one"
        )


def _refuse(module: nn.Module, core: Attention) -> None:
    """Raise UnsupportedError where a module has what its attention cannot do, or not what it
    needs."""
    MultiheadAttention.refuse_core(cast(nn.MultiheadAttention, module), core)
    packed: Any = module.in_proj_weight
    if (
        core.own_projection is not None
        and packed is not None
        and packed.is_meta
        and place_of(module)[0].type != "meta"
    ):
        raise UnsupportedError(
            f"its weights are offloaded, and {core.spec.name} begins with copies of them; swap "
            "first and offload then"
        )


def insert(model: nn.Module, sites: list[Site], attentions: dict[int, Attention]) -> Undo:
    """Give the modules at `sites` their attentions; the answer undoes it."""
    modules = {sites[layer].path: sites[layer].module for layer in attentions}
    for path, module in modules.items():
        _refuse_other_attention(path, module)  # pyright: ignore[reportArgumentType]
    heard = [_hooks(module.out_proj) for module in modules.values()]  # pyright: ignore[reportArgumentType]
    layers = [part for part in model.modules() if isinstance(part, nn.TransformerEncoderLayer)]
    whole = [layer for layer in layers if not _holds_more(layer)]
    stacks = [
        (stack, stack.use_nested_tensor)
        for stack in model.modules()
        if isinstance(stack, nn.TransformerEncoder)
    ]
    undo = replace_forwards(sites, attentions, SwappedAttention, _refuse, SwappedAttention.take)
    for stack, _ in stacks:
        # Its nested tensors are for layers that run torch's own fast path.
        stack.use_nested_tensor = False
    undo.checks.append(partial(_check_out_projections, modules, heard))
    undo.steps.append(partial(_restore_fast_path, modules, whole, stacks))
    return undo
