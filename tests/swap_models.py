"""Tiny random transformers models, nothing downloaded."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODERS = ["bert", "roberta", "modernbert"]
DECODERS = ["gpt2", "llama", "mistral", "qwen2", "qwen3"]


COMPOSITES = ["t5_whole", "bart", "clip"]


def make(family: str, **options: Any) -> Any:
    """A model in evaluation mode with eager attention, the same numbers every time."""
    torch.manual_seed(0)
    return _build(family, {**SIZES, "attn_implementation": "eager", **options}).eval()


def _build(family: str, options: dict[str, Any]) -> Any:
    sizes: dict[str, Any]
    if family == "bert":
        return hf.BertModel(hf.BertConfig(**NO_DROPOUT, **options))
    if family == "roberta":
        return hf.RobertaModel(hf.RobertaConfig(**NO_DROPOUT, **options))
    if family == "modernbert":
        return hf.ModernBertModel(
            hf.ModernBertConfig(
                local_attention=8,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                cls_token_id=1,
                **options,
            )
        )
    if family == "gpt2":
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=50,
                n_embd=32,
                n_layer=3,
                n_head=4,
                attn_pdrop=0.0,
                bos_token_id=1,
                eos_token_id=None,
                **_own(options),
            )
        )
    if family == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **_no_end(options)))
    if family == "mistral":
        return hf.MistralForCausalLM(
            hf.MistralConfig(num_key_value_heads=2, **_no_end({"sliding_window": None, **options}))
        )
    if family == "qwen2":
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(num_key_value_heads=2, **_no_end(options)))
    if family == "qwen3":
        return hf.Qwen3ForCausalLM(
            hf.Qwen3Config(num_key_value_heads=2, head_dim=8, **_no_end(options))
        )
    if family == "vit":
        return hf.ViTModel(
            hf.ViTConfig(
                image_size=16,
                patch_size=4,
                **NO_DROPOUT,
                **{k: v for k, v in options.items() if k != "vocab_size"},
            )
        )
    if family == "wav2vec2":
        convolutions: dict[str, Any] = {
            "conv_dim": (32, 32),
            "conv_stride": (4, 2),
            "conv_kernel": (8, 4),
            "attention_dropout": 0.0,
            "num_feat_extract_layers": 2,
        }
        return hf.Wav2Vec2Model(
            hf.Wav2Vec2Config(
                **convolutions,
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                **options,
            )
        )
    if family in ("t5", "t5_whole"):
        sizes = {
            "vocab_size": 50,
            "d_model": 32,
            "num_layers": 2,
            "num_heads": 4,
            "d_kv": 8,
            "d_ff": 48,
            "dropout_rate": 0.0,
        }
        ends: dict[str, Any] = {
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
            "eos_token_id": None,
        }
        kind = hf.T5EncoderModel if family == "t5" else hf.T5ForConditionalGeneration
        return kind(hf.T5Config(**sizes, **ends, **_own(options)))
    if family == "bart":
        halves: dict[str, Any] = {
            f"{half}_{size}": value
            for half in ("encoder", "decoder")
            for size, value in _HALF.items()
        }
        return hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=50, d_model=32, dropout=0.0, init_std=0.2, **halves, **_own(options)
            )
        )
    if family == "clip":
        layers: dict[str, Any] = {key: value for key, value in SIZES.items() if key != "vocab_size"}
        text = {
            **SIZES,
            "max_position_embeddings": 40,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return hf.CLIPModel(
            hf.CLIPConfig(
                text_config=text,
                vision_config={**layers, "image_size": 16, "patch_size": 4},
                **_own(options),
            )
        )
    if family == "gemma2":
        # The family's own windows come in turn with whole layers; soft-capping is off unless asked
        # for.
        own = {
            "attn_logit_softcapping": None,
            "sliding_window": 6,
            "head_dim": 8,
            "num_key_value_heads": 2,
        }
        return hf.Gemma2ForCausalLM(hf.Gemma2Config(**_no_end({**own, **options})))
    if family == "gpt_oss":
        experts: dict[str, Any] = {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "num_key_value_heads": 2,
            "head_dim": 8,
        }
        return hf.GptOssForCausalLM(hf.GptOssConfig(**experts, **_no_end(options)))
    if family == "splinter":
        return hf.SplinterModel(hf.SplinterConfig(**NO_DROPOUT, **options))
    if family == "doge":
        return hf.DogeForCausalLM(hf.DogeConfig(**_no_end(options)))
    if family == "pegasus_x":
        halves = {
            f"{half}_{size}": value
            for half in ("encoder", "decoder")
            for size, value in _HALF.items()
        }
        return hf.PegasusXForConditionalGeneration(
            hf.PegasusXConfig(vocab_size=50, d_model=32, block_size=8, **halves, **_own(options))
        )
    if family == "llava":
        pictures = {
            **{key: value for key, value in SIZES.items() if key != "vocab_size"},
            "image_size": 16,
            "patch_size": 4,
        }
        parts = {
            "text_config": {"model_type": "llama", **SIZES},
            "vision_config": {"model_type": "clip_vision_model", **pictures},
        }
        return hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(**parts, image_token_index=49, **_own(options))
        )
    if family == "qwen2_vl":
        rotary = {
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 2],
                "rope_theta": 1e4,
            }
        }
        pictures = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
        parts = {
            "text_config": {**SIZES, "num_key_value_heads": 2, **rotary},
            "vision_config": pictures,
        }
        return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(**parts, **_own(options)))
    if family in ("whisper", "speech_to_text", "time_series"):
        halves = {
            f"{half}_{size}": value
            for half in ("encoder", "decoder")
            for size, value in _HALF.items()
        }
        sizes = {"d_model": 32, **halves, **_own(options)}
        positions = {
            "vocab_size": 50,
            "max_source_positions": 16,
            "max_target_positions": 24,
            "pad_token_id": 0,
            "bos_token_id": 1,
        }
        if family == "whisper":
            return hf.WhisperForConditionalGeneration(
                hf.WhisperConfig(num_mel_bins=8, **positions, **sizes)
            )
        if family == "speech_to_text":
            return hf.Speech2TextForConditionalGeneration(
                hf.Speech2TextConfig(
                    input_feat_per_channel=8, conv_channels=16, **positions, **sizes
                )
            )
        series: dict[str, Any] = {
            "prediction_length": 4,
            "context_length": 8,
            "lags_sequence": [1, 2],
            "num_time_features": 1,
        }
        return hf.TimeSeriesTransformerForPrediction(
            hf.TimeSeriesTransformerConfig(**series, **sizes)
        )
    layers = {key: value for key, value in options.items() if key != "vocab_size"}
    if family == "ast":
        patches: dict[str, Any] = {"patch_size": 8, "frequency_stride": 8, "time_stride": 8}
        return hf.ASTModel(
            hf.ASTConfig(num_mel_bins=16, max_length=24, **patches, **NO_DROPOUT, **layers)
        )
    if family == "videomae":
        return hf.VideoMAEModel(
            hf.VideoMAEConfig(image_size=16, patch_size=8, num_frames=4, **NO_DROPOUT, **layers)
        )
    if family == "patchtst":
        series = {
            "num_input_channels": 2,
            "context_length": 16,
            "prediction_length": 4,
            "patch_length": 4,
            "patch_stride": 4,
        }
        return hf.PatchTSTForPrediction(
            hf.PatchTSTConfig(
                d_model=32,
                num_attention_heads=4,
                num_hidden_layers=2,
                ffn_dim=48,
                **series,
                **_own(options),
            )
        )
    if family == "musicgen":
        text = hf.T5Config(
            vocab_size=50, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48, dropout_rate=0.0
        )
        audio = hf.EncodecConfig(
            codebook_size=32,
            hidden_size=16,
            num_filters=4,
            upsampling_ratios=[2, 2],
            num_lstm_layers=1,
            codebook_dim=16,
        )
        ends = {"pad_token_id": 31, "bos_token_id": 31}
        decoder = hf.MusicgenDecoderConfig(
            num_codebooks=2,
            ffn_dim=48,
            **ends,
            **{**layers, "vocab_size": 32, "num_hidden_layers": 2},
        )
        return hf.MusicgenForConditionalGeneration(
            hf.MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder)
        )
    if family == "qwen2_moe":
        experts = {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        }
        return hf.Qwen2MoeForCausalLM(
            hf.Qwen2MoeConfig(num_key_value_heads=2, **experts, **_no_end(options))
        )
    raise KeyError(family)


_HALF = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


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
    return _numbers(model(ids, **options))


def answer_of(family: str, model: Any, **options: Any) -> Tensor:
    """What the model makes of the inputs of its family, padded tokens left out."""
    inputs = inputs_of(family)
    numbers, mask = _numbers(model(**inputs, **options)), inputs.get("attention_mask")
    return numbers[mask.bool()] if mask is not None and mask.shape == numbers.shape[:2] else numbers


def inputs_of(family: str) -> dict[str, Tensor]:
    """What a model of the family reads, with padding in the second text."""
    generator = torch.Generator().manual_seed(4)
    pixels, samples = (
        torch.randn(2, 3, 16, 16, generator=generator),
        torch.randn(2, 400, generator=generator),
    )
    if family == "vit":
        return {"pixel_values": pixels}
    if family == "videomae":
        return {"pixel_values": torch.randn(2, 4, 3, 16, 16, generator=generator)}
    if family == "ast":
        return {"input_values": torch.randn(2, 24, 16, generator=generator)}
    if family == "patchtst":
        return {"past_values": torch.randn(2, 16, 2, generator=generator)}
    if family == "whisper":
        return {
            "input_features": torch.randn(2, 8, 32, generator=generator),
            "decoder_input_ids": tokens(10),
        }
    if family == "speech_to_text":
        return {
            "input_features": torch.randn(2, 40, 8, generator=generator),
            "decoder_input_ids": tokens(12),
        }
    if family == "time_series":
        past = {
            name: torch.randn(2, 10, generator=generator).abs()
            for name in ("past_values", "past_observed_mask")
        }
        times = {
            f"{when}_time_features": torch.randn(2, length, 1, generator=generator)
            for when, length in (("past", 10), ("future", 4))
        }
        return {**past, **times, "future_values": torch.randn(2, 4, generator=generator)}
    if family == "wav2vec2":
        return {"input_values": samples}
    text = {"input_ids": tokens(), "attention_mask": padded("right")}
    if family == "musicgen":
        return {**text, "decoder_input_ids": torch.randint(0, 31, (4, 10), generator=generator)}
    if family == "clip":
        return {**text, "pixel_values": pixels}
    return {**text, "decoder_input_ids": tokens(10)} if family in COMPOSITES else text


def _numbers(out: Any) -> Tensor:
    names = ("logits", "logits_per_image", "last_hidden_state", "prediction_outputs", "loss")
    return next(out[key] for key in names if key in out)
