"""Put this library's engine under the recurrent layers of a transformers model, and take it away.

Layers change their class and nothing else, and the parts of the model that hold them get a hook
that tells them of packed rows, which transformers keeps from them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from attnzoo.call import UnsupportedError
from attnzoo.eager import holds_anywhere, may_branch
from attnzoo.integrations.huggingface.fallbacks.gated_delta_layers import (
    BailingHybridLayer,
    KimiLinearLayer,
    OlmoHybridLayer,
    Qwen3NextLayer,
    Qwen35Layer,
)
from attnzoo.integrations.huggingface.fallbacks.lightning_layer import LightningLayer
from attnzoo.integrations.huggingface.fallbacks.mamba2_layers import FalconH1Layer, Mamba2Layer
from attnzoo.integrations.huggingface.fallbacks.recurrent_layer import ReplacedLayer
from attnzoo.integrations.huggingface.masks.packed_rows import refuse_unseen_packing
from attnzoo.integrations.replacing import change_class, class_over
from attnzoo.sequences.segments import from_position_ids

#: By the name of transformers' class: the one that a layer gets.
KINDS: dict[str, type[ReplacedLayer]] = {
    "BailingHybridDeltaAttention": BailingHybridLayer,
    "BambaMixer": Mamba2Layer,
    "FalconH1Mixer": FalconH1Layer,
    "Glm5NextTextLinearAttention": KimiLinearLayer,
    "GraniteMoeHybridMambaLayer": Mamba2Layer,
    "KimiLinearDeltaAttention": KimiLinearLayer,
    "Mamba2Mixer": Mamba2Layer,
    "MiniMaxLightningAttention": LightningLayer,
    "NemotronHMamba2Mixer": Mamba2Layer,
    "OlmoHybridGatedDeltaNet": OlmoHybridLayer,
    "Qwen3NextGatedDeltaNet": Qwen3NextLayer,
    "Qwen3_5GatedDeltaNet": Qwen35Layer,
    "Qwen3_5MoeGatedDeltaNet": Qwen35Layer,
    "Qwen4ExpTextGatedDeltaNet": Qwen35Layer,
    "Zamba2MambaMixer": Mamba2Layer,
}

#: Models that do not hand their layers what tells of packed rows.
LOSES_PIECES = ("Mamba2ForCausalLM",)
#: Models that let packed rows leak into each other, and what of them does.
LEAKS = {"GraniteMoeHybridModel": "softmax layers", "Glm5NextTextModel": "indexed layers"}


def replace_fallbacks(model: nn.Module) -> list[str]:
    """Run the recurrent layers of a transformers model by this library's engine, in place of the
    torch code that transformers falls back to where flash-linear-attention is not.

    The weights are the same and so are the results, to rounding; padding is absent wherever it
    stands, and packed rows are kept apart. `restore_fallbacks` takes it back.

    model: with layers of Qwen3-Next, Qwen3.5, Qwen4, OLMo Hybrid, Kimi Linear, GLM-5 Next, Bailing
        Hybrid, MiniMax, or Mamba-2, as Bamba, Falcon-H1, Granite, Nemotron-H and Zamba2 have them
    returns: the names of the layers
    raises: ValueError on a model without such layers, and on one whose layers are replaced already
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"replace_fallbacks takes a transformers model; got {model!r}")
    if any(True for _ in _replaced(model)):
        raise ValueError(
            "the recurrent layers of this model are replaced already; call "
            "attnzoo.restore_fallbacks(model) first to have transformers' own back"
        )
    found = {path: module for path, module in model.named_modules() if _kind(module) is not None}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no recurrent layer that attnzoo knows; replace_fallbacks "
            f"takes a transformers model with one of {', '.join(sorted(KINDS))}"
        )
    _check_version()
    for part in _parts_around(model, list(found.values())):
        part.register_forward_pre_hook(tell_pieces, with_kwargs=True)
    for part in model.modules():
        if type(part).__name__ in LOSES_PIECES:
            part.register_forward_pre_hook(refuse_lost_pieces, with_kwargs=True)
    for module in found.values():
        kind = _kind(module)
        assert kind is not None
        change_class(module, class_over(kind, type(module)))
        assert isinstance(module, ReplacedLayer)
        module.build()
    return list(found)


def restore_fallbacks(model: nn.Module) -> nn.Module:
    """Take `replace_fallbacks` back, in place; what was trained since stays.

    model: as it was given to `replace_fallbacks`, or a copy of it
    returns: the model
    raises: ValueError where no layer is replaced
    """
    found = list(_replaced(model))
    if not found:
        raise ValueError(
            "no recurrent layer of this model is replaced, so there is nothing to restore; "
            "attnzoo.replace_fallbacks(model) replaces them"
        )
    for module in found:
        change_class(module, type(module).__bases__[1])  # `class_over` makes it of two
    for part in model.modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if hook in (tell_pieces, refuse_lost_pieces):
                del part._forward_pre_hooks[key]
                part._forward_pre_hooks_with_kwargs.pop(key, None)
    return model


def tell_pieces(model: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """A hook before the forward of a part that holds recurrent layers: `seq_idx` for rows whose
    position_ids start again."""
    given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
    positions, mask, cache = (
        given.get(name) for name in ("position_ids", "attention_mask", "use_cache")
    )
    if isinstance(positions, Tensor) and positions.dim() == 3 and positions.shape[0] == 4:
        positions = positions[0]  # of text, before those of time, height and width
    told = any(given.get(name) is not None for name in ("seq_idx", "cu_seq_lens_q"))
    if told:
        _check_keeps_apart(model)
    if told or isinstance(mask, dict) or not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    refuse_unseen_packing(model, (), {**given, "position_ids": positions})
    cached = model.config.use_cache if cache is None else cache
    if mask is not None or cached or given.get("past_key_values") is not None:
        return None
    segments = from_position_ids(positions)
    if may_branch(positions) and not holds_anywhere(segments > 0):
        return None
    _check_keeps_apart(model)
    return args, {**kwargs, "seq_idx": segments}


def _check_keeps_apart(model: Any) -> None:
    leaks = LEAKS.get(type(model).__name__)
    if getattr(model.config, "ple_layer_ids", None):  # of Qwen4, which look at the last tokens
        leaks = "n-gram embeddings"
    if leaks is not None:
        raise UnsupportedError(
            f"{type(model).__name__} was given packed rows, which its {leaks} do not keep apart; "
            "give every piece as a sample, with attention_mask"
        )


def refuse_lost_pieces(model: Any, args: Any, kwargs: Any) -> None:
    """A hook before the forward of a model that drops what tells of packed rows."""
    for name in ("position_ids", "seq_idx", "cu_seq_lens_q"):
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                f"{name} does not reach the layers of {type(model).__name__}, which drops it; give "
                "packed rows to the model inside, model.backbone, or every piece as a sample"
            )


def is_recurrent(module: nn.Module) -> bool:
    """Whether `replace_fallbacks` would replace this layer."""
    return _kind(module) is not None and not isinstance(module, ReplacedLayer)


def recurrent_layers(model: nn.Module) -> list[str]:
    """The paths of the layers that `replace_fallbacks` knows, as they are or replaced."""
    return [
        path
        for path, module in model.named_modules()
        if _kind(module) is not None or isinstance(module, ReplacedLayer)
    ]


def _kind(module: nn.Module) -> type[ReplacedLayer] | None:
    own = type(module)
    is_theirs = own.__module__.startswith("transformers.models.")
    return KINDS.get(own.__name__) if is_theirs else None


def _replaced(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, ReplacedLayer))


def _parts_around(model: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """The innermost models of transformers that these layers are in."""
    from transformers import PreTrainedModel

    chosen: dict[nn.Module, nn.Module] = {}
    for part in model.modules():  # an inner one comes after those around it
        if isinstance(part, PreTrainedModel):
            inside = set(part.modules())
            chosen.update({layer: part for layer in layers if layer in inside})
    return list(dict.fromkeys(chosen.values()))


def _check_version() -> None:
    import transformers

    if not hasattr(transformers.cache_utils.Cache, "get_conv_state"):
        raise ValueError(
            f"transformers {transformers.__version__} keeps the states of recurrent layers "
            "otherwise than attnzoo reads them; replace_fallbacks needs 5.23 or newer"
        )
