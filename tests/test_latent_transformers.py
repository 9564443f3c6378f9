"""transformers' layers of multi-head latent attention as ours: rows, gradients, decoding, and their
caches as states."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import attnzoo
from attnzoo import UnsupportedError
from attnzoo.integrations.huggingface.latent.latent_states import cached, latent_state

SIZE, HEADS, ROPE = 32, 4, 6
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 25,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
#: module, prefix of its classes, and what the config says beside sizes
LAYERS: list[tuple[str, str, dict[str, Any]]] = [
    ("deepseek_v3", "DeepseekV3", {}),
    ("deepseek_v3", "DeepseekV3", {"rope_parameters": YARN}),
    ("deepseek_v3", "DeepseekV3", {"rope_interleave": False, "attention_bias": True}),
    ("deepseek_v2", "DeepseekV2", {"q_lora_rank": None}),
    ("deepseek_v2", "DeepseekV2", {"rope_parameters": {**YARN, "mscale": None}}),
    ("glm4_moe_lite", "Glm4MoeLite", {}),
    ("youtu", "Youtu", {}),
    ("minicpm3", "MiniCPM3", {}),
    ("kimi_linear", "KimiLinear", {}),
]
CLOSE: Any = {"rtol": 1e-5, "atol": 1e-5}


class Theirs:
    """A layer of transformers with its rotary embedding and causal mask."""

    def __init__(self, name: str, prefix: str, more: dict[str, Any]) -> None:
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        sizes: dict[str, Any] = {
            "hidden_size": SIZE,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "kv_lora_rank": 12,
            "q_lora_rank": 10,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": ROPE,
            "v_head_dim": 5,
            "num_hidden_layers": 1,
            "max_position_embeddings": 200,
        }
        torch.manual_seed(0)
        config = getattr(transformers, f"{prefix}Config")(**{**sizes, **more})
        config._attn_implementation = "eager"
        self.layer: Any = getattr(module, f"{prefix}Attention")(config, 0)
        for parameter in self.layer.parameters():
            nn.init.normal_(parameter, float(parameter.dim() == 1), 0.3)
        self.layer.kv_a_layernorm.variance_epsilon = 0.05
        rotary = getattr(module, f"{prefix}RotaryEmbedding", None)
        self.rotary = None if rotary is None else rotary(config)

    def __call__(self, x: Tensor, start: int = 0, cache: Any = None) -> Tensor:
        """Rows of tokens that `start` stand before."""
        slots = torch.arange(start + x.shape[1])
        ours = slots[start:]
        hidden = torch.zeros(len(ours), len(slots)).masked_fill(slots > ours[:, None], -torch.inf)
        how = {} if self.rotary is None else {"position_embeddings": self.rotary(x, ours[None])}
        mask = hidden[None, None]
        return self.layer(x, attention_mask=mask, past_key_values=cache, **how)[0]


@pytest.mark.parametrize(("name", "prefix", "more"), LAYERS)
def test_equals_their_layer(name: str, prefix: str, more: dict[str, Any]) -> None:
    """With its weights: forward, gradients, decoding in pieces, and either's cache behind the
    other's prompt."""
    theirs = Theirs(name, prefix, more)
    ours = attnzoo.latent_layer(theirs.layer)
    assert sum(x.numel() for x in ours.parameters()) == sum(
        x.numel() for x in theirs.layer.parameters()
    )
    x = torch.randn(2, 20, SIZE, requires_grad=True)
    wanted, out = theirs(x), ours(x, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(out, wanted, **CLOSE)
    pairs = [
        (ours.attention.kv_up.weight, theirs.layer.kv_b_proj.weight),
        (ours.latent.kv_norm.weight, theirs.layer.kv_a_layernorm.weight),
        (ours.out_proj.weight, theirs.layer.o_proj.weight),
    ]
    upstream = torch.randn_like(out)
    expected = torch.autograd.grad(wanted, [x, *(two for _, two in pairs)], upstream)
    found = torch.autograd.grad(out, [x, *(one for one, _ in pairs)], upstream)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    cache: Any = transformers.DynamicCache()
    state = ours.init_state(2)
    order: Any = {"order": "deepseek_v2" if prefix == "DeepseekV2" else "deepseek_v3"}
    with torch.no_grad():
        for start, end in ((0, 9), (9, 10), (10, 20)):
            wanted = theirs(x[:, start:end], start, cache)
            out, state = ours.step(x[:, start:end], state)
            torch.testing.assert_close(out, wanted, **CLOSE)
            held: Any = cache.layers[0]
            its = (held.keys, held.values)
            for one, other in zip(cached(ours, state, **order), its, strict=True):
                torch.testing.assert_close(one, other, **CLOSE)
        behind = latent_state(ours, held.keys[:, :, :15], held.values[:, :, :15], **order)
        out, _ = ours.step(x[:, 15:], behind)
        torch.testing.assert_close(out, theirs(x)[:, 15:], **CLOSE)
        again: Any = transformers.DynamicCache()
        again.update(*(part[:, :, :15] for part in cached(ours, state, **order)), 0)
        torch.testing.assert_close(theirs(x[:, 15:], 15, again), theirs(x)[:, 15:], **CLOSE)


@torch.no_grad()
def test_a_cache_with_padding_ahead() -> None:
    """Positions go on from the first real token."""
    theirs = Theirs(*LAYERS[0])
    ours, x = attnzoo.latent_layer(theirs.layer), torch.randn(2, 12, SIZE)
    cache: Any = transformers.DynamicCache()
    theirs(x[:1, 3:9], 0, cache)
    padded = [
        nn.functional.pad(part, (0, 0, 3, 0), value=torch.nan)
        for part in (cache.layers[0].keys, cache.layers[0].values)
    ]
    real = torch.arange(9)[None] >= 3
    out, _ = ours.step(x[:1, 9:], latent_state(ours, padded[0], padded[1], real))
    torch.testing.assert_close(out, theirs(x[:1, 3:])[:, 6:], **CLOSE)


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Linear is not known to be multi-head latent"):
        attnzoo.latent_layer(nn.Linear(2, 2))
    longer = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UnsupportedError, match="turns by rates that RotaryEmbedding does not"):
        attnzoo.latent_layer(Theirs("youtu", "Youtu", {"rope_parameters": longer}).layer)
    layer = attnzoo.latent_layer(Theirs(*LAYERS[0]).layer, attention="linear")
    with pytest.raises(UnsupportedError, match="a layer of linear decodes with a state that is no"):
        latent_state(layer, torch.zeros(1, 1, 3, 12), torch.zeros(1, 1, 3, ROPE))
    layer, order = attnzoo.latent_layer(Theirs(*LAYERS[0]).layer), {"order": "deepseek_v4"}
    with pytest.raises(ValueError, match="order='deepseek_v4' is unknown"):
        cached(layer, layer.init_state(1), **order)  # pyright: ignore[reportArgumentType]
