"""Softmax with other rows: what is asked of all of them, and what of one alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import Case, Situation, ask_oracle, close, gradients_of, padding, tensors
from torch import Tensor

import attnzoo
from attnzoo.bench.peak_memory import peak_bytes
from attnzoo.conventions.paired_heads import pair_heads
from attnzoo.engines.softmax import row_tiles
from attnzoo.engines.softmax.tile_pieces import SCORES
from attnzoo.layers.options.output_gate import RowNorm
from attnzoo.oracles import ORACLES

INPUTS: dict[str, dict[str, Any]] = {
    "forgetting": {"log_decay": lambda n: torch.full((1, 1, n), -0.001)},
    "sigmoid": {},
    "differential": {},
}


@pytest.mark.parametrize("name", INPUTS)
def test_memory_grows_with_the_length(name: str) -> None:
    """Of both passes: twice the length, at most twice the bytes, and far from a number a pair."""

    def peak(length: int) -> int:
        q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in "qkv")
        given: dict[str, Tensor] = {
            one: make(length).requires_grad_() for one, make in INPUTS[name].items()
        }
        attn = attnzoo.build(name, 1, 16)

        def train() -> None:
            attn(q, k, v, is_causal=True, **given).sum().backward()

        train()
        assert attn.last_backend == "tiles"
        return peak_bytes(train)

    # Tiles have as many scores at every length until they have the fewest rows.
    assert SCORES * 2 // 4096 > row_tiles.LEAST_ROWS
    assert peak(4096) < 2.05 * peak(2048) < 2048**2 * 2


def test_sigmoid_with_a_number_is_the_published_one() -> None:
    """apple's: sigmoid(q·k / √d + b), b = -log n; and the sum of a row is free."""
    q, k, v, _ = (x.float() for x in tensors(Situation(70, 70, kv_heads=4)))
    attn = attnzoo.build("sigmoid", 4, 8, bias=-4.25)
    expected = torch.sigmoid(q @ k.mT / 8**0.5 - 4.25)
    close(attn(q, k, v), expected @ v, 1e-5, "rows")
    close(attn.weights(q, k, is_causal=True), expected.tril(), 1e-6, "A")


@pytest.mark.parametrize("bias", [float("nan"), True, "log"])
def test_a_bad_bias_is_refused(bias: Any) -> None:
    with pytest.raises(ValueError, match=f"bias={bias!r} must be a finite number"):
        attnzoo.build("sigmoid", 4, 8, bias=bias)


@pytest.mark.parametrize("name", ["differential", "differential_v2"])
@pytest.mark.parametrize("backend", ["tiles", "sdpa", "reference"])
def test_differential_maps_by_every_backend(name: str, backend: str) -> None:
    """With a λ of every row where the call brings it, negative weights included."""
    q, k, v, upstream = tensors(Situation(40, 150, kv_heads=2))
    part = torch.rand(2, 4, 40, dtype=torch.float64)
    given: dict[str, Any] = {"subtraction": part} if name == "differential_v2" else {}
    attn = Case(name).build(dtype=torch.float64, backend=backend)
    leaves = [x.requires_grad_() for x in (q, k, v, *given.values())]
    how: Any = {"is_causal": True, "key_mask": padding("left", 2, 150)}
    expected, a = ask_oracle(attn, q, k, v, **how, **given)
    out = attn(q, k, v, **how, **given)
    close(out, expected, 1e-12, "rows")
    found, wanted = (gradients_of(x, upstream, *leaves) for x in (out, expected))
    for x, y in zip(found, wanted, strict=True):
        close(x, y, 1e-12, "gradients")
    close(attn.weights(q, k, **how, **given), a, 1e-12, "A")
    assert (a < 0).any()


def test_steps_of_differential_attention_read_a_lambda_of_their_own_rows() -> None:
    q, k, v, _ = tensors(Situation(20, 20))
    part = torch.rand(2, 4, 20, dtype=torch.float64)
    attn = attnzoo.build("differential_v2", 4, 8)
    state, rows = attn.init_state(2, kv_heads=2, dtype=q.dtype), []
    for here in (slice(0, 9), slice(9, 10), slice(10, 20)):
        q_, k_, v_, own = (x[:, :, here] for x in (q, k, v, part))
        out, state = attn.step(q_, k_, v_, state, subtraction=own)
        rows.append(out)
    expected, _ = ORACLES["differential_v2"](q, k, v, is_causal=True, subtraction=part)
    close(torch.cat(rows, 2), expected, 1e-12, "rows")


def test_twice_the_queries_over_one_key() -> None:
    """V2 as its authors have it: heads 2h and 2h + 1 of queries, keys and values of one head, and
    values as wide as a map."""
    q, k, v, _ = tensors(Situation(30, 30, heads=8, kv_heads=2))
    part = torch.rand(2, 4, 30, dtype=torch.float64)
    maps, _ = ORACLES["standard"](q, k, v, is_causal=True)
    expected = maps[:, 0::2] - part[..., None] * maps[:, 1::2]
    attn = attnzoo.build("differential_v2", 4, 16)
    q, k = pair_heads(q, "neighbours"), torch.cat([k, k], -1)
    out = attn(q, k, v, is_causal=True, subtraction=part)
    close(out, expected, 1e-12, "rows")


def test_diffllama_by_its_own_weights() -> None:
    """transformers' layer of the first version: grouped keys, rotary embedding, the norm."""
    module = pytest.importorskip("transformers.models.diffllama.modeling_diffllama")
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = module.DiffLlamaConfig(**sizes, head_dim=8, attn_implementation="eager")
    theirs = module.DiffLlamaAttention(config, layer_idx=2).double().eval()
    x = torch.randn(2, 30, 64, dtype=torch.float64)
    turns = module.DiffLlamaRotaryEmbedding(config)(x, torch.arange(30)[None])
    hidden = torch.full((30, 30), float("-inf"), dtype=torch.float64).triu(1)
    expected = theirs(x, position_embeddings=turns, attention_mask=hidden[None, None])[0]

    q, k, v = (
        project(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        for project in (theirs.q_proj, theirs.k_proj, theirs.v_proj)
    )
    q, k = module.apply_rotary_pos_emb(q, k, *turns)
    q, k, v = (pair_heads(one, "halves") for one in (q, k, v))
    attn = attnzoo.build("differential", 4, 16, layer=2).double()
    learned: Any = attn.engine.learned
    for name in ("q1", "k1", "q2", "k2"):
        getattr(learned, name).data.copy_(getattr(theirs, f"lambda_{name}"))
    norm = RowNorm(16, attn.output_scale).double()
    norm.eps = config.rms_norm_eps
    rows = norm(attn(q, k, v, is_causal=True))
    found = theirs.o_proj(rows.transpose(1, 2).flatten(2))
    close(found, expected, 64 * 2**-24, "rows")  # its softmax runs in float32


def test_a_layer_begins_its_norm_where_the_paper_scales_rows() -> None:
    options = {"layer": 1}
    layer: Any = attnzoo.MultiheadAttention(
        16, 2, attention="differential", attention_options=options, output_norm=True
    )
    assert torch.allclose(layer.out_norm.weight, torch.full((8,), 0.2 + 0.6 * math.exp(-0.3)))
    with pytest.raises(ValueError, match="head_dim=5 must be even"):
        attnzoo.build("differential", 2, 5)


@pytest.mark.parametrize("backend", ["sdpa", "rows", "reference"])
def test_values_wider_or_narrower_than_keys(backend: str) -> None:
    """Which torch's fused kernels do not take."""
    q, k, v, _ = tensors(Situation(20, 20))
    attn = attnzoo.build("standard", 4, 8, backend=backend)
    for values in (torch.cat([v, v + 1], -1), v[..., :3]):
        for masks in ({"is_causal": True}, {"key_mask": padding("interior", 2, 20)}):
            expected, _ = ORACLES["standard"](q, k, values, **masks)
            close(attn(q, k, values, **masks), expected, 1e-12, "rows")
