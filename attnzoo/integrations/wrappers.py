"""The model inside a wrapper, for every entry that takes a model."""

from __future__ import annotations

from torch import nn

#: The one child of a wrapper: of DDP, DataParallel and AveragedModel; of torch.compile; of FSDP; of activation checkpoints; of Fabric; of PEFT.
INSIDE = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "base_model")


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model inside of PEFT's, DDP's, FSDP's, torch.compile's, Lightning Fabric's or accelerate's wrapper, or of several; or the model itself.

    Raises ValueError on what is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} is no torch.nn.Module; give the model itself (of a transformers pipeline: its `.model`)")
    while True:
        children = dict(model.named_children())
        if type(model).__module__.startswith("peft."):
            inside = children.get("base_model") or children.get("model")
        else:
            inside = next((child for name, child in children.items() if name in INSIDE and len(children) == 1), None)
        if inside is None:
            return model
        model = inside
