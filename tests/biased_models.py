"""Tiny random transformers models whose scores get a bias by distance, or are capped."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

FAMILIES = ("t5", "mt5", "umt5", "switch", "bloom", "mpt", "falcon", "gemma2")
DECODERS = ("bloom", "mpt", "falcon", "gemma2")
#: Where transformers has what it computes with.
PLACES = {"switch": "switch_transformers"}
LENGTH, DECODER_LENGTH = 14, 11
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
#: Its eager attention adds ALiBi twice.
FALCONS: dict[str, Any] = {"attn_implementation": "sdpa"}
NO_END: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def make(family: str, layers: int = 1) -> Any:
    """A model in evaluation mode, the same numbers every time."""
    torch.manual_seed(0)
    return _BUILDERS[family](layers).eval()


def _t5(kind: str, layers: int, **more: Any) -> Any:
    config = getattr(hf, f"{kind}Config")(
        vocab_size=50,
        d_model=32,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=4,
        d_kv=8,
        d_ff=48,
        dropout_rate=0.0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=10,
        initializer_factor=0.5,
        pad_token_id=0,
        decoder_start_token_id=0,
        eos_token_id=None,
        attn_implementation="eager",
        **more,
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def _bloom(layers: int) -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 48, "n_layer": layers, "n_head": 6}
    return hf.BloomForCausalLM(
        hf.BloomConfig(
            attention_dropout=0.0, hidden_dropout=0.0, initializer_range=0.2, **sizes, **NO_END
        )
    )


def _mpt(layers: int) -> Any:
    sizes = {"vocab_size": 50, "d_model": 48, "n_layers": layers, "n_heads": 6, "max_seq_len": 64}
    return hf.MptForCausalLM(hf.MptConfig(initializer_range=0.2, use_cache=True, **sizes, **NO_END))


def _falcon(layers: int) -> Any:
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4}
    return hf.FalconForCausalLM(
        hf.FalconConfig(
            num_hidden_layers=layers,
            alibi=True,
            multi_query=False,
            initializer_range=0.2,
            **sizes,
            **NO_END,
            **FALCONS,
        )
    )


def _gemma2(layers: int) -> Any:
    return hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=5,
            attn_logit_softcapping=1.5,
            layer_types=["full_attention"] * layers,
            initializer_range=0.2,
            **NO_END,
            **EAGER,
        )
    )


_BUILDERS: dict[str, Callable[[int], Any]] = {
    "t5": lambda layers: _t5("T5", layers),
    "mt5": lambda layers: _t5("MT5", layers, tie_word_embeddings=True),
    "umt5": lambda layers: _t5("UMT5", layers),
    "switch": lambda layers: _t5(
        "SwitchTransformers", layers, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0
    ),
    "bloom": _bloom,
    "mpt": _mpt,
    "falcon": _falcon,
    "gemma2": _gemma2,
}


def source_of(family: str) -> Any:
    """The module of transformers that the model is from."""
    name = PLACES.get(family, family)
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def inputs_of(family: str, side: str | None = None) -> dict[str, Tensor]:
    """Tokens of two samples, the first of which is padded on this side."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (2, LENGTH), generator=generator)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if side is not None:
        mask[0, slice(4) if side == "left" else slice(-4, None)] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if family not in DECODERS:
        given["decoder_input_ids"] = torch.randint(1, 50, (2, DECODER_LENGTH), generator=generator)
    return given


def answer(family: str, model: Any, side: str | None = None) -> Tensor:
    """The logits of real tokens."""
    given = inputs_of(family, side)
    logits = model(**given).logits
    return logits[given["attention_mask"].bool()] if family in DECODERS else logits
