"""Hugging Face models by their configuration, with random weights on the meta device: nothing is
downloaded and no memory is taken."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnzoo.arguments import check_positive, nearest
from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.cost.model_flops import (
    CORE,
    FEED_FORWARD,
    HEAD,
    OTHER,
    PROJECTIONS,
    Call,
    Subject,
)
from attnzoo.integrations.swapping import swap
from attnzoo.packages import require
from attnzoo.registry import Choice, names

PRODUCTS = ("Linear", "Conv1D")  # GPT-2's Conv1D is a linear layer


def whole_model(text: str, values: dict[str, Any]) -> Subject:
    """The model of a folder with config.json, or of a model type with its default sizes; values
    replace entries of the configuration.

    Raises ValueError on a folder without config.json, an unknown type, an unknown or unfit entry,
    and a model that does not read tokens.
    """
    require(f"counting {text!r}", ("transformers", "fvcore"))
    config = _configuration(text, values)
    model = _build(text, config)
    if model.main_input_name != "input_ids" or config.is_encoder_decoder:
        raise UnsupportedError(
            f"{type(model).__name__} does not read one sequence of tokens, as the encoders and "
            "decoders that attnzoo flops counts do; use attnzoo.count_flops(model, *inputs)"
        )

    def call(n: int, chosen: Choice | None) -> Call:
        model = _build(text, config)
        if chosen is not None:
            completed = chosen.completed(max_length=n)
            swap(model, completed.name, **completed.options)
        # Tokenizers give a mask too; without one, transformers would look for packed sequences,
        # which a trace cannot.
        tokens = {
            "input_ids": torch.zeros(1, n, dtype=torch.long),
            "attention_mask": torch.ones(1, n, dtype=torch.long),
        }
        keywords = {name: tensor.to("meta") for name, tensor in tokens.items()}
        cores = [name for name, module in model.named_modules() if isinstance(module, Attention)]
        return Call(
            model,
            (),
            {**keywords, "use_cache": False},
            lambda name, module: _component(name, module, cores),
        )

    longest = _learned_positions(model)
    advice = f"give --lengths up to that, or {text}:max_position_embeddings=TOKENS"
    return Subject(f"{type(model).__name__} ({text})", "exact", call, longest, advice)


def _configuration(text: str, values: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    folder = Path(text)
    known = list(CONFIG_MAPPING.keys())
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"the folder {text!r} has no config.json; give the folder of a saved Hugging Face "
                "model"
            )
        read = partial(AutoConfig.from_pretrained, folder, local_files_only=True)
    elif text in known:
        read = partial(AutoConfig.for_model, text)
    else:
        raise ValueError(
            f"unknown model {text!r}{nearest(text, [*names(), *known])}; give a variant of "
            "`attnzoo list`, layer:PRESET of configs/models.yaml, a folder with config.json, or a "
            "model type of transformers such as bert, gpt2 or llama"
        )
    config = _made(text, read)
    for key in values:
        if not hasattr(config, key):
            raise ValueError(
                f"{text} has no configuration entry {key!r}{nearest(key, list(config.to_dict()))}"
            )
    # Made anew, since some entries follow from others: Llama's head_dim from its hidden_size.
    config = _made(text, partial(read, **values))
    heads, width = (
        getattr(config, "num_attention_heads", None),
        getattr(config, "hidden_size", None),
    )
    if isinstance(heads, int) and isinstance(width, int):
        check_positive("num_attention_heads", heads)
        if width % heads and config.to_dict().get("head_dim") in (None, width // heads):
            raise ValueError(
                f"{text}: hidden_size={width} is not divisible by num_attention_heads={heads}; "
                "change one of them"
            )
    return config


def _made(text: str, make: Callable[[], Any]) -> Any:
    """What transformers makes; any error on a bad configuration becomes one ValueError."""
    try:
        return make()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"transformers cannot make {text!r} with this configuration: {reason}"
        ) from None


def _build(text: str, config: Any) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto

    named = [
        getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()
    ]
    if named and named[0] is not None:
        make = named[0]._from_config
    elif config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        make = transformers.AutoModelForMaskedLM.from_config
    elif config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        make = transformers.AutoModelForCausalLM.from_config
    else:
        make = transformers.AutoModel.from_config
    with torch.device("meta"):
        return _made(text, partial(make, config)).eval()


def _learned_positions(model: nn.Module) -> int | None:
    """Tokens that learned positions reach; None where positions are computed, as rotary ones
    are."""
    tables = [
        m
        for name, m in model.named_modules()
        if isinstance(m, nn.Embedding) and re.search(r"position|wpe", name.rpartition(".")[2])
    ]
    if not tables:
        return None
    stated = getattr(model.config, "max_position_embeddings", None)
    rows = min(
        table.num_embeddings - (table.padding_idx + 1 if table.padding_idx is not None else 0)
        for table in tables
    )
    return rows if stated is None else min(rows, stated)


def _component(name: str, module: nn.Module, cores: list[str]) -> str:
    """Of what the module does itself, by the names that transformers gives."""
    if any(name == core or name.startswith(core + ".") for core in cores):
        of_inputs = ".input_projections." in name and type(module).__name__ in PRODUCTS
        return PROJECTIONS if of_inputs else CORE
    in_layer, in_attention = (
        re.search(r"\.\d+(\.|$)", name),
        re.search(r"att(n|ention)", name, re.IGNORECASE),
    )
    if type(module).__name__ in PRODUCTS:
        return PROJECTIONS if in_attention else FEED_FORWARD if in_layer else HEAD
    if in_layer and in_attention and "norm" not in type(module).__name__.lower():
        return CORE
    if in_layer and re.search(r"mlp|ffn|feed_forward|intermediate|act", name):
        return FEED_FORWARD
    return OTHER if in_layer else HEAD
