"""Tiny random transformers models, nothing downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODERS = ["bert", "roberta", "modernbert"]
DECODERS = ["gpt2", "llama", "mistral", "qwen2", "qwen3"]


def make(family: str, **options: Any) -> Any:
    """A model in evaluation mode with eager attention, the same numbers every time."""
    torch.manual_seed(0)
    return _build(family, {**SIZES, "attn_implementation": "eager", **options}).eval()


def _build(family: str, options: dict[str, Any]) -> Any:
    if family == "bert":
        return hf.BertModel(hf.BertConfig(**NO_DROPOUT, **options))
    if family == "roberta":
        return hf.RobertaModel(hf.RobertaConfig(**NO_DROPOUT, **options))
    if family == "modernbert":
        return hf.ModernBertModel(hf.ModernBertConfig(local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, **options))
    if family == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=None, **_own(options)))
    if family == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **_no_end(options)))
    if family == "mistral":
        return hf.MistralForCausalLM(hf.MistralConfig(num_key_value_heads=2, **_no_end({"sliding_window": None, **options})))
    if family == "qwen2":
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(num_key_value_heads=2, **_no_end(options)))
    if family == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(num_key_value_heads=2, head_dim=8, **_no_end(options)))
    if family == "vit":
        return hf.ViTModel(hf.ViTConfig(image_size=16, patch_size=4, **NO_DROPOUT, **{k: v for k, v in options.items() if k != "vocab_size"}))
    if family == "wav2vec2":
        convolutions: dict[str, Any] = {"conv_dim": (32, 32), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
        return hf.Wav2Vec2Model(hf.Wav2Vec2Config(**convolutions, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **options))
    if family == "t5":
        return hf.T5EncoderModel(hf.T5Config(vocab_size=50, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48, **_own(options)))
    raise KeyError(family)


def _own(options: dict[str, Any]) -> dict[str, Any]:
    """Without the sizes, for a config that names them otherwise."""
    return {key: value for key, value in options.items() if key not in SIZES}


def _no_end(options: dict[str, Any]) -> dict[str, Any]:
    return {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, **options}


def tokens(length: int = 24, batch_size: int = 2) -> Tensor:
    """(batch_size, length) token ids, none of them a padding token."""
    return torch.randint(3, 50, (batch_size, length), generator=torch.Generator().manual_seed(3))


def padded(side: str, length: int = 24) -> Tensor:
    """(2, length) attention mask whose second row has five padded slots."""
    mask = torch.ones(2, length, dtype=torch.long)
    if side == "right":
        mask[1, -5:] = 0
    elif side == "left":
        mask[1, :5] = 0
    return mask


def answer(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """The logits, or the last hidden state of a model without a head."""
    out = model(ids, **options)
    return out.logits if "logits" in out else out.last_hidden_state
