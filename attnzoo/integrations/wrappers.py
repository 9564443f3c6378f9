"""The model inside a wrapper, for every entry that takes a model."""

from __future__ import annotations

from torch import nn

#: The one child of a wrapper that only calls it: of DDP, DataParallel and AveragedModel; of
#: torch.compile; of activation checkpoints; of Fabric.
CALLED = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_forward_module")
#: The one child of a wrapper that does more: of FSDP, which holds the weights; of PEFT, which may
#: add tokens.
HELD = ("_fsdp_wrapped_module", "base_model")


def called_by(model: nn.Module) -> nn.Module:
    """The module that DDP, torch.compile, accelerate and their like only call; a model that is none
    of these is returned itself."""
    inside = _only_child(model, CALLED)
    return model if inside is None else called_by(inside)


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model inside of PEFT's, DDP's, FSDP's, torch.compile's, Fabric's or accelerate's wrapper,
    or of several; or the model itself.

    Raises ValueError on what is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model={model!r} is no torch.nn.Module; give the model itself (of a transformers "
            "pipeline: its `.model`)"
        )
    if type(model).__module__.startswith("peft."):
        parts = dict(model.named_children())
        inside = parts.get("base_model") or parts.get("model")
    else:
        inside = _only_child(model, CALLED + HELD)
    return model if inside is None else without_wrappers(inside)


def _only_child(model: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    children = list(model.named_children())
    return children[0][1] if len(children) == 1 and children[0][0] in names else None
