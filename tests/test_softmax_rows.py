"""Softmax with other rows: what is asked of all of them, and what of one alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, Situation, ask_oracle, close, gradients_of, padding, tensors
from stages import only
from torch import Tensor

import attnzoo
from attnzoo.benchmarking.peak_memory import peak_bytes
from attnzoo.conventions.paired_heads import pair_heads
from attnzoo.engines.softmax.tiles import row_tiles
from attnzoo.engines.softmax.tiles.tile_pieces import SCORES
from attnzoo.layers.options.output_gate import RowNorm
from attnzoo.oracles import ORACLES

INPUTS: dict[str, dict[str, Any]] = {
    "forgetting": {"log_decay": lambda n: torch.full((1, 1, n), -0.001)},
    "sigmoid": {},
    "differential": {},
    "path": {
        "removal_key": lambda n: F.normalize(torch.randn(1, 1, n, 16), dim=-1),
        "beta": lambda n: torch.rand(1, 1, n),
        "log_decay": lambda n: torch.full((1, 1, n), -0.001),
    },
}


@pytest.mark.parametrize("name", only([*INPUTS][::2], [*INPUTS]))
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
        assert attn.last_backend in ("tiles", "chunked", "sdpa")
        return peak_bytes(train)

    # Tiles have as many scores at every length until they have the fewest rows.
    assert SCORES * 2 // 4096 > row_tiles.LEAST_ROWS
    assert peak(4096) < min(2.05 * peak(2048), 4096**2 * 2)


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
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
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


def through(length: int) -> dict[str, Tensor]:
    """w, β and gates of two key heads and four heads."""
    w = F.normalize(torch.randn(2, 2, length, 8, dtype=torch.float64), dim=-1)
    beta = 2 * torch.rand(2, 2, length, dtype=torch.float64)
    return {"removal_key": w, "beta": beta, "log_decay": -torch.rand(2, 4, length).double() / 9}


def test_path_counts_what_stands_in_between() -> None:
    """Reflections along the key turn its score's sign: parity of the tokens between."""
    ones = torch.ones(1, 1, 9, 1, dtype=torch.float64)
    beta = 2 * (torch.arange(9) % 3 == 1).double()[None, None]
    how: Any = {"removal_key": ones, "beta": beta, "is_causal": True}
    attn = attnzoo.build("path", 1, 1, scale=1.0)
    a = attn.weights(ones, ones, **how)[0, 0]
    behind = [(beta[0, 0, j + 1 : 9].sum() / 2) % 2 for j in range(9)]
    scores = torch.tensor([1.0 - 2.0 * float(one) for one in behind]).double()
    close(a[-1], scores.softmax(-1), 1e-12, "the last row")


def test_path_trains_twice_through_many_chunks() -> None:
    """Second derivatives, where rows are computed again in the backward pass."""
    q, k, v, upstream = tensors(Situation(150, 150))
    given = through(150)
    leaves = [x.requires_grad_() for x in (q, k, v, *given.values())]
    found = []
    for backend in ("chunked", "reference"):
        attn = attnzoo.build("path", 4, 8, backend=backend)
        out = attn(q, k, v, is_causal=True, **given)
        first = torch.autograd.grad(out, leaves, upstream, create_graph=True)
        second = torch.stack([(x * x.detach().cos()).sum() for x in first]).sum()
        found.append(torch.autograd.grad(second, leaves))
    for x, y in zip(*found, strict=True):
        close(x, y, 1e-12, "second derivatives")


def test_long_decoding_of_path_turns_keys_once() -> None:
    """Steps that bring keys among those turned far back, with padding, other samples, and going
    back before what was brought there."""
    q, k, v, _ = tensors(Situation(420, 420))
    given, mask = through(420), padding("interior", 2, 420)
    assert mask is not None
    attn = attnzoo.build("path", 4, 8)
    how: Any = {"key_mask": mask, "is_causal": True}
    expected = attn(q, k, v, **how, **given)
    state: Any = attn.init_state(2, kv_heads=2, dtype=q.dtype)

    def step(state: Any, start: int, end: int, rows: Any = slice(None)) -> Any:
        own = {name: x[rows, :, start:end] for name, x in given.items()}
        q_, k_, v_ = (x[rows, :, start:end] for x in (q, k, v))
        out, state = attn.step(q_, k_, v_, state, key_mask=mask[rows, start:end], **own)
        close(out, expected[rows, :, start:end], 1e-12, f"rows {start} to {end}")
        return state

    one_by_one = [(token, token + 1) for token in range(350, 420)]
    for start, end in ((0, 100), (100, 101), (101, 300), (300, 350), *one_by_one):
        state = step(state, start, end)
    assert state.far.shape[2] == 381
    swapped = torch.tensor([1, 0])
    step(state.crop(30).select(swapped), 390, 420, swapped)
    back = state.crop(200)
    assert back.keys is None
    step(step(back, 220, 400), 400, 420)
    q, k, v = (x[:, :, :3].detach().requires_grad_() for x in (q, k, v))
    own = {name: x[:, :, :3] for name, x in given.items()}
    out, _ = attn.step(q, k, v, state, **own)  # learned through the state
    assert torch.autograd.grad(out.sum(), k)[0].any()


def test_beta_without_a_key_is_refused() -> None:
    q, k, v, _ = tensors(Situation(5, 5))
    attn = attnzoo.build("path", 4, 8)
    with pytest.raises(ValueError, match="beta says how much of removal_key is taken"):
        attn(q, k, v, is_causal=True, beta=torch.ones(2, 2, 5))
    w = through(5)["removal_key"]
    expected, _ = ORACLES["path"](q, k, v, is_causal=True, removal_key=w)
    close(attn(q, k, v, is_causal=True, removal_key=w), expected, 1e-12, "a β of 1")


@pytest.mark.slow
def test_flash_linear_attention_says_the_same_of_path() -> None:
    """Which multiplies the gates by the scale."""
    naive = pytest.importorskip("fla.ops.path_attn.naive", exc_type=ImportError)
    q, k, v, _ = (x.float() for x in tensors(Situation(70, 70)))
    w, beta, g = (x.float() for x in through(70).values())
    laid = (x.transpose(1, 2) for x in (q, k, v, w, beta, g / 8**-0.5))
    theirs = naive.naive_path_attn(*laid, scale=8**-0.5).transpose(1, 2)
    given: Any = {"removal_key": w, "beta": beta, "log_decay": g}
    close(attnzoo.build("path", 4, 8)(q, k, v, is_causal=True, **given), theirs, 2e-5, "rows")


def test_softmax_off_by_one_is_a_sink_logit_of_zero() -> None:
    """exp(s) / (1 + Σ exp(s))."""
    q, k, _, _ = tensors(Situation(20, 20, kv_heads=4))
    attn = attnzoo.build("standard", 4, 8)
    a = attn.weights(q, k, sink_logits=torch.zeros(4, dtype=torch.float64), is_causal=True)
    scores = (q @ k.mT / 8**0.5).exp().tril()
    close(a, scores / (1 + scores.sum(-1, keepdim=True)), 1e-12, "A")
