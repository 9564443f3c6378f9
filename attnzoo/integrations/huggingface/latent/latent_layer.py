"""A layer of transformers that has multi-head latent attention, as a `LatentAttention`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.call import UnsupportedError
from attnzoo.layers.latent.latent_attention import LatentAttention
from attnzoo.registry import spec_of

#: Whether the turned features are pairs of neighbours; None: as the config's rope_interleave says.
#: A layer without rotary embedding is not turned at all.
INTERLEAVED: dict[str, bool | None] = {
    "DeepseekV2Attention": True,
    "DeepseekV3Attention": None,
    "Glm4MoeLiteAttention": None,
    "YoutuAttention": None,
    "MiniCPM3Attention": False,
    "KimiLinearAttention": False,
}
NOT_TURNED = ("KimiLinearAttention",)


def latent_layer(module: nn.Module, **options: Any) -> LatentAttention:
    """A `LatentAttention` with copies of the weights of one of transformers' layers: it computes
    the same from hidden states, and counts positions itself.

    module: a layer of DeepSeek-V2 or V3, GLM-4.7 Flash, Youtu, MiniCPM3 or Kimi Linear, such as
        `model.model.layers[0].self_attn`
    options: of `LatentAttention` beside those that the layer gives: attention,
        attention_options, form
    returns: batch_first, in the module's dtype, device and mode
    raises: UnsupportedError on another class, and on a rotary embedding that is neither plain nor
        YaRN's
    """
    theirs: Any = module
    name = type(module).__name__
    if name not in INTERLEAVED:
        raise UnsupportedError(
            f"{name} is not known to be multi-head latent attention as DeepSeek-V2 has it; give "
            f"one of {', '.join(INTERLEAVED)}"
        )
    down = theirs.kv_a_proj_with_mqa
    layer = LatentAttention(
        theirs.hidden_size,
        theirs.num_heads,
        dropout=theirs.attention_dropout,
        bias=down.bias is not None,
        batch_first=True,
        device=down.weight.device,
        dtype=down.weight.dtype,
        kv_lora_rank=theirs.kv_lora_rank,
        q_lora_rank=theirs.q_lora_rank,
        qk_nope_head_dim=theirs.qk_nope_head_dim,
        qk_rope_head_dim=theirs.qk_rope_head_dim,
        v_head_dim=theirs.v_head_dim,
        rotary=False if name in NOT_TURNED else _rotary(theirs.config, INTERLEAVED[name]),
        scale=float(theirs.scaling)
        if spec_of(options.get("attention", "standard")).exact
        else None,
        **options,
    )
    core = {f"attention.core.{key}": x for key, x in layer.attention.core.state_dict().items()}
    layer.load_state_dict({**core, **_weights(theirs, layer.num_heads)})
    for norm, its in (("q_norm", "q_a_layernorm"), ("kv_norm", "kv_a_layernorm")):
        if getattr(theirs, its, None) is not None:
            getattr(layer.latent, norm).eps = getattr(theirs, its).variance_epsilon
    return layer.train(module.training)


def _weights(theirs: Any, heads: int) -> dict[str, Tensor]:
    """The layer's state_dict, turned features first."""
    nope, rank = theirs.qk_nope_head_dim, theirs.kv_lora_rank
    found: dict[str, Any] = {
        "attention.kv_up.weight": theirs.kv_b_proj.weight,
        "latent.kv_norm.weight": theirs.kv_a_layernorm.weight,
        "out_proj.weight": theirs.o_proj.weight,
        "out_proj.bias": theirs.o_proj.bias,
    }
    queries = theirs.q_proj
    if theirs.q_lora_rank is not None:
        queries = theirs.q_b_proj
        found["latent.q_down.weight"] = theirs.q_a_proj.weight
        found["latent.q_down.bias"] = theirs.q_a_proj.bias
        found["latent.q_norm.weight"] = theirs.q_a_layernorm.weight
    by_head = queries.weight.unflatten(0, (heads, -1))
    turned_first = torch.cat([by_head[:, nope:], by_head[:, :nope]], 1)
    found["latent.q_proj.weight"] = turned_first.flatten(0, 1)
    for part in ("weight", "bias"):
        x = getattr(theirs.kv_a_proj_with_mqa, part)
        found[f"latent.kv_down.{part}"] = None if x is None else torch.cat([x[rank:], x[:rank]])
    return {name: x.detach() for name, x in found.items() if x is not None}


def _rotary(config: Any, interleaved: bool | None) -> dict[str, Any]:
    """The options of `RotaryEmbedding` that a config asks for."""
    given: Mapping[str, Any] = config.rope_parameters
    kind = given.get("rope_type", "default")
    if kind not in ("default", "yarn") or given.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError(
            f"rope_parameters={dict(given)!r} turns by rates that RotaryEmbedding does not have; "
            "it has the plain ones and YaRN's, of all qk_rope_head_dim features"
        )
    interleaved = bool(config.rope_interleave) if interleaved is None else interleaved
    options: dict[str, Any] = {"base": float(given["rope_theta"]), "interleaved": interleaved}
    if kind == "yarn":
        options["yarn"] = _yarn(given, config.max_position_embeddings)
    return options


def _yarn(given: Mapping[str, Any], longest: int) -> dict[str, Any]:
    trained = given["original_max_position_embeddings"]
    factor = given.get("factor") or longest / trained
    amplitude = given.get("attention_factor")
    if amplitude is None:
        one, all_dim = given.get("mscale"), given.get("mscale_all_dim")
        amplitude = _mscale(factor, 1.0)
        if one and all_dim:
            amplitude = _mscale(factor, one) / _mscale(factor, all_dim)
    return {
        "factor": float(factor),
        "original_length": trained,
        "beta_fast": float(given.get("beta_fast") or 32),
        "beta_slow": float(given.get("beta_slow") or 1),
        "attention_factor": float(amplitude),
        "truncate": given.get("truncate", True),
    }


def _mscale(factor: float, weight: float) -> float:
    """DeepSeek's 0.1 · weight · ln(factor) + 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
