"""Attention by an indexer against transformers' layers with the same weights: DeepSeek-V3.2, whose
indexer turns halves, and GLM, whose turns pairs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from cases import close
from torch import Tensor

import attnzoo

pytest.importorskip("transformers.models.deepseek_v32")
BATCH, LENGTH, TOP_K, INDEX_HEADS, INDEX_DIM, TURNED = 2, 40, 6, 8, 12, 8
FAMILIES = {
    "deepseek_v32": ("DeepseekV32", "apply_rotary_pos_emb"),
    "glm_moe_dsa": ("GlmMoeDsa", "apply_rotary_pos_emb_interleave"),
}


def layer_of(family: str, prefix: str) -> tuple[Any, Any]:
    """The module of the family, and a small attention layer of it in float64."""
    modeling: Any = import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(import_module(f"transformers.models.{family}"), f"{prefix}Config")(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=1,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=TURNED,
        qk_nope_head_dim=8,
        v_head_dim=16,
        index_topk=TOP_K,
        index_n_heads=INDEX_HEADS,
        index_head_dim=INDEX_DIM,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return modeling, getattr(modeling, f"{prefix}Attention")(config, layer_idx=0).double().eval()


def index_inputs(indexer: Any, turn: Any, hidden: Tensor, latent: Tensor, places: Any) -> Any:
    """What the layer's own indexer multiplies, made by its own weights."""
    q = indexer.wq_b(latent).unflatten(-1, (INDEX_HEADS, INDEX_DIM))
    k = indexer.k_norm(indexer.wk(hidden))[:, :, None]
    turned = turn(q[..., :TURNED], k[..., :TURNED], *places, unsqueeze_dim=2)
    q, k = (torch.cat([a, b[..., TURNED:]], -1) for a, b in zip(turned, (q, k), strict=True))
    w = indexer.weights_proj(hidden).transpose(1, 2)
    return {"q_index": q.transpose(1, 2), "k_index": k.transpose(1, 2), "w_index": w}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_weights_give_the_layers_rows(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, turn = FAMILIES[family]
    modeling, layer = layer_of(family, prefix)
    seen: dict[str, Tensor] = {}
    attend = modeling.eager_attention_forward

    def recorded(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.update(q=q, k=k, v=v)
        seen["out"], seen["weights"] = attend(module, q, k, v, *args, **kwargs)
        return seen["out"], seen["weights"]

    monkeypatch.setattr(modeling, "eager_attention_forward", recorded)
    hidden = torch.randn(BATCH, LENGTH, 32).double()
    angles = torch.arange(LENGTH)[:, None] * 10000.0 ** (-torch.arange(TURNED // 2) / 4)
    angles = torch.cat([angles, angles], -1).double().expand(BATCH, -1, -1)
    places = (angles.cos(), angles.sin())
    hides = torch.full((LENGTH, LENGTH), float("-inf")).double().triu(1).expand(BATCH, 1, -1, -1)
    with torch.no_grad():
        layer(hidden, places, hides)
        latent = layer.q_a_layernorm(layer.q_a_proj(hidden))
        inputs = index_inputs(layer.indexer, getattr(modeling, turn), hidden, latent, places)
        attn = attnzoo.build(
            "indexed",
            heads=4,
            head_dim=16,
            top_k=TOP_K,
            index_heads=INDEX_HEADS,
            index_dim=INDEX_DIM,
            scale=layer.scaling,
        ).double()
        q, k, v = seen["q"], seen["k"], seen["v"]
        weights = attn.weights(q, k, is_causal=True, **inputs)
        out = attn(q, k, v, is_causal=True, **inputs)
    # transformers takes softmax in float32.
    close(weights, seen["weights"].double(), 1e-6, "A")
    close(out, seen["out"].transpose(1, 2), 1e-6, "rows")
    assert int((weights > 0).sum(-1).max()) == TOP_K


def test_a_layer_projects_what_the_indexer_takes() -> None:
    """With the sizes that its attention is told, and without them nothing; steps are the forward's
    rows."""
    options = {"top_k": 4, "index_heads": 2, "index_dim": 6}
    layer = attnzoo.MultiheadAttention(
        16, 4, batch_first=True, attention="indexed", attention_options=options
    )
    made: Any = layer.attention.input_projections
    features = {name: one.out_features for name, one in made.items()}
    assert features == {"q_index": 12, "k_index": 6, "w_index": 2}
    x = torch.randn(2, 12, 16)
    out, weights = layer(x, x, x, is_causal=True, average_attn_weights=False)
    assert weights is not None
    assert torch.equal((weights > 0).sum(-1), torch.arange(1, 13).clamp(max=4).expand(2, 4, -1))
    assert torch.equal(weights[:, 0] > 0, weights[:, 3] > 0)  # one choice for all heads
    state, rows = layer.init_state(batch_size=2), []
    for some in x.split([7, 1, 4], 1):
        row, state = layer.step(some, state)
        rows.append(row)
    close(torch.cat(rows, 1).double(), out.double(), 1e-5, "steps")
    plain = attnzoo.MultiheadAttention(16, 4, attention="indexed")
    assert not hasattr(plain.attention, "input_projections")
