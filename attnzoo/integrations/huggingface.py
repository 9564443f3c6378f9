"""Hugging Face transformers: an attention of the zoo behind its `AttentionInterface`, for models that consult it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.integrations.plan import Site

#: No "/" (a kernel of the hub) and no "flash" in these names: transformers would read a meaning into them.
IMPLEMENTATION = "attnzoo"
PROBE = "attnzoo_probe"
SUBMODULE = "attention_core"
#: Attribute of the keys that a `StateCache` hands on: its layer, which has a state to step.
STATE_LAYER = "attnzoo_state_layer"
#: Arguments of a model's attention that change A and that no `Attention` takes.
CHANGES_WEIGHTS = ("position_bias", "softcap", "s_aux", "head_mask", "cu_seq_lens_q", "cu_seq_lens_k")
_PROBE_LENGTH = 4


class _Probe:
    """What a model's attention was called with in one forward, layer by layer, and the windows in its masks."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, tuple[int, int, bool, int | None]] = {}
        self.windows: set[int] = set()


_probe: ContextVar[_Probe] = ContextVar("probe")


class Restore:
    """Takes the attentions out again and gives every config its own implementation back."""

    def __init__(self, paths: list[str], configs: list[tuple[Any, Any]]) -> None:
        self.paths = paths
        self.configs = configs

    def __call__(self, model: nn.Module) -> None:
        for path in self.paths:
            delattr(model.get_submodule(path), SUBMODULE)
        for config, implementation in self.configs:
            config._attn_implementation_internal = implementation


def handles(model: nn.Module) -> bool:
    """Whether this is a transformers model; transformers is not imported for it."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def find_sites(model: Any) -> list[Site]:
    """The self-attention layers in the order in which they run, found by letting the model read a few tokens.

    Raises UnsupportedError when the model does not consult the attention interface, or has an attention that the zoo cannot honour.
    """
    _register()
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{type(model).__name__} is an encoder-decoder; swap its encoder alone: attnzoo.swap(model.get_encoder(), ...)")
    restore, probe = Restore([], _configs(model)), _Probe()
    token = _probe.set(probe)
    try:
        _set_implementation(model, PROBE)
        _read_a_little(model)
    finally:
        _probe.reset(token)
        restore(model)
    paths = {module: path for path, module in model.named_modules()}
    if not probe.calls:
        raise UnsupportedError(f"{type(model).__name__} never consulted the attention interface, so a swap would be ignored")
    sites = [Site(paths[module], module, *call) for module, call in probe.calls.items()]
    unknown = probe.windows - {site.window for site in sites}
    if unknown:
        raise UnsupportedError(f"{type(model).__name__} masks by a window of {min(unknown)} that its attention layers do not tell of")
    return sites


def insert(model: Any, sites: list[Site], attentions: dict[int, Attention]) -> Restore:
    """Put the attentions into their layers, switch the model to them, and see that every one of them runs."""
    restore = Restore([sites[layer].path for layer in attentions], _configs(model))
    for layer, attention in attentions.items():
        sites[layer].module.add_module(SUBMODULE, attention)
    try:
        _set_implementation(model, IMPLEMENTATION)
        _read_a_little(model)
        idle = [layer for layer, attention in attentions.items() if attention.last_backend is None]
        if idle:
            raise UnsupportedError(f"layer {idle[0]} ({sites[idle[0]].path}) of {type(model).__name__} did not run the attention it was given")
    except BaseException:
        restore(model)
        raise
    for attention in attentions.values():
        attention.last_backend = None  # from here on it tells of the caller's own forwards
    return restore


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _padding_mask)
    AttentionInterface.register(PROBE, _note)
    AttentionMaskInterface.register(PROBE, _note_mask)


def _configs(model: Any) -> list[tuple[Any, Any]]:
    """Every config in the model, with its attention implementation."""
    from transformers import PreTrainedModel

    waiting: list[Any] = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            waiting.extend(getattr(config, key, None) for key in config.sub_configs)
    return [(config, config._attn_implementation_internal) for config in found.values()]


def _set_implementation(model: Any, name: str) -> None:
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:  # some families only warn
        raise UnsupportedError(f"{type(model).__name__} does not let its attention be replaced, so a swap would be ignored")


def _read_a_little(model: Any) -> None:
    """One forward in evaluation mode that leaves no trace in the model or in torch's CPU generator."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(**_small_input(model))
    except UnsupportedError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedError(
            f"{type(model).__name__} could not be tried out with its {model.main_input_name} alone ({reason[0]}); swap its parts one by one"
        ) from error
    finally:
        for module, mode in training:
            module.training = mode


def _small_input(model: Any) -> dict[str, Tensor]:
    name, config = model.main_input_name, model.config
    if name == "input_ids":
        token = 1 if getattr(config, "pad_token_id", None) == 0 else 0
        return {name: torch.full((1, _PROBE_LENGTH), token, device=model.device)}
    if name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {name: torch.zeros(1, getattr(config, "num_channels", 3), height, width, dtype=model.dtype, device=model.device)}
    if name == "input_values":
        samples = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel if samples > 1 else (_PROBE_LENGTH - 1) * stride + kernel
        return {name: torch.zeros(1, samples, dtype=model.dtype, device=model.device)}
    raise UnsupportedError(f"{type(model).__name__} reads {name}, which attnzoo cannot make up to try the swap; swap its parts one by one")


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: transformers' arguments, the answer as (batch, length, heads, head_dim)."""
    _refuse_other_attention(module, kwargs)
    causal = call_is_causal(module, is_causal)
    state_layer = getattr(key, STATE_LAYER, None)
    if attention_mask is not None and attention_mask.dim() == 2:  # a static cache has slots that are not filled yet
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    attention = getattr(module, SUBMODULE, None)
    if state_layer is not None:
        state_layer.check_reader(attention, causal)
    if attention is None:
        return _attend_exactly(module, query, key, value, attention_mask, dropout, scaling, causal, sliding_window)
    _set_dropout(module, attention, dropout)
    if scaling is not None and scaling != query.shape[-1] ** -0.5:
        query = query * (scaling * query.shape[-1] ** 0.5)
    if state_layer is not None:
        out = state_layer.step(query, key, value, attention_mask)
    elif attention_mask is None or attention_mask.dim() == 2:
        out = attention(query, key, value, key_mask=attention_mask, is_causal=causal)
    else:  # the caller's own, which already says what is causal
        out = attention(query, key, value, attn_mask=attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _attend_exactly(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool,
    window: int | None,
) -> tuple[Tensor, None]:
    """transformers' own SDPA, for a layer that was not swapped in a model that was."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    queries, keys = query.shape[2], key.shape[2]
    if mask is None or mask.dim() == 2:
        mask = sdpa_mask(
            batch_size=query.shape[0],
            q_length=queries,
            kv_length=keys,
            q_offset=keys - queries,
            mask_function=_mask_function(is_causal, window),
            attention_mask=mask,
            allow_is_causal_skip=is_causal and window is None and queries == keys,
            allow_is_bidirectional_skip=not is_causal and window is None,
            device=query.device,
        )
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal)


def _mask_function(is_causal: bool, window: int | None) -> Callable[..., Any]:
    from transformers import masking_utils

    if window is None:
        return masking_utils.causal_mask_function if is_causal else masking_utils.bidirectional_mask_function
    if is_causal:
        return masking_utils.sliding_window_causal_mask_function(window)
    return masking_utils.sliding_window_bidirectional_mask_function(window - 1)  # theirs counts the distance, inclusive


def _padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function: the keys to attend to, (batch, filled slots) bool, or None when they are all of the kv_length slots."""
    filled = kv_length
    if _is_causal_mask(mask_function):
        filled = int(q_offset) + q_length - kv_offset
    if attention_mask is None:
        return None if filled == kv_length else torch.ones(batch_size, filled, dtype=torch.bool, device=device)
    if attention_mask.shape[1] != filled:  # not cut to these slots before
        attention_mask = attention_mask[:, kv_offset : kv_offset + filled]
        attention_mask = nn.functional.pad(attention_mask, (0, filled - attention_mask.shape[1]), value=False)
    look = not (attention_mask.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing())
    return None if look and filled == kv_length and bool(attention_mask.all()) else attention_mask


def _is_causal_mask(mask_function: Callable[..., Any] | None) -> bool:
    """Whether a mask function is causal; a mask that is more than causality and a window raises UnsupportedError."""
    from transformers import masking_utils

    if mask_function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
        return mask_function is masking_utils.causal_mask_function  # the two that a compiled graph can tell
    causal = False
    for part in _parts(mask_function):
        if part in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
            causal |= part is masking_utils.causal_mask_function
        elif not getattr(part, "__qualname__", "").startswith(("sliding_window_overlay.", "sliding_window_bidirectional_overlay.")):
            raise UnsupportedError(
                "the model asks for a mask that is more than causality, padding and a window (packed sequences: position_ids that start "
                "again; chunks; blocks that see each other); attnzoo would drop it: give one sequence per row, and pad with attention_mask. "
                "A traced or compiled causal model always asks so unless it is given an attention_mask"
            )
    return causal


def _parts(mask_function: Any) -> Iterator[Any]:
    """The functions whose intersection a mask function is."""
    if getattr(mask_function, "__qualname__", "").startswith("and_masks."):
        for part in inspect.getclosurevars(mask_function).nonlocals["mask_functions"]:
            yield from _parts(part)
    else:
        yield mask_function


def _note(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _refuse_other_attention(module, kwargs)
    causal = call_is_causal(module, kwargs.get("is_causal"))
    _probe.get().calls[module] = (query.shape[1], query.shape[3], causal, kwargs.get("sliding_window"))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _note_mask(*args: Any, mask_function: Callable[..., Any], local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    causal = _is_causal_mask(mask_function)
    if local_size is not None:
        _probe.get().windows.add(local_size if causal else local_size + 1)
    return sdpa_mask(*args, mask_function=mask_function, local_size=local_size, **kwargs)


def call_is_causal(module: Any, given: bool | None) -> bool:
    """Whether a model's attention reads from left to right. given: what it was called with."""
    if given is not None:
        return given
    return bool(getattr(module, "is_causal", True)) and getattr(module.config, "is_causal", True) is not False


def _refuse_other_attention(module: Any, kwargs: dict[str, Any]) -> None:
    extra = [name for name in CHANGES_WEIGHTS if kwargs.get(name) is not None]
    if extra:
        raise UnsupportedError(
            f"{type(module).__name__} uses {' and '.join(extra)}, which a swapped attention would drop; this model cannot be swapped"
        )
    if kwargs.get("output_attentions"):
        raise UnsupportedError("output_attentions=True: a swapped attention does not return its weights; use attnzoo's Attention.weights on q and k")


def _set_dropout(module: Any, attention: Attention, dropout: float) -> None:
    engine: Any = attention.engine
    if attention.spec.dropout:
        if engine.training and engine.dropout != dropout:
            engine.dropout = dropout
    elif dropout:
        raise UnsupportedError(
            f"{type(module).__name__} drops entries of A with probability {dropout} while training, which {attention.spec.name} never forms; "
            "build the model with its attention dropout at 0 (in BERT's config attention_probs_dropout_prob, in Llama's attention_dropout)"
        )
