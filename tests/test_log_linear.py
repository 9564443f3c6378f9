"""Log-linear attention over the gated delta rule, whose tree of states `test_gates` has over
Mamba-2 alone, and what belongs to a tree: levels, buckets, and samples with different trees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import close, padding
from test_gates import HEADS, KV_HEADS, WIDTH, gates_of, qkv, shown
from torch import Tensor

import attnzoo
from attnzoo.call import Call
from attnzoo.engines.linear.gated import fla_kernels
from attnzoo.engines.linear.log_linear import tree_fla
from attnzoo.oracles import ORACLES

OPTIONS: dict[str, Any] = {"base": "gated_deltanet", "scale": None}


def build(**options: Any) -> attnzoo.Attention:
    return attnzoo.build("log_linear", HEADS, WIDTH, **options)


@pytest.mark.parametrize("kind", ["none", "interior"])
def test_rows_and_gradients_over_the_delta_rule(kind: str) -> None:
    """Through several chunks, whose buckets merge and are erased from."""
    *qkv_, upstream = qkv(200)
    given, mask = gates_of("log_linear", 200, closed=True), padding(kind, 2, 200)
    leaves = [x.requires_grad_() for x in (*qkv_, *given.values())]
    masks: Any = {"key_mask": mask, "is_causal": True}
    expected, a = ORACLES["log_linear"](*qkv_, **given, **masks, **OPTIONS)
    wanted = torch.autograd.grad(expected, leaves, upstream)

    def told() -> dict[str, Tensor]:
        """The gates, with anything in padding."""
        if mask is None:
            return given
        return {name: x.masked_fill(~shown(mask, x), torch.nan) for name, x in given.items()}

    names = ["q", "k", "v", *given]
    for backend in ("open", "reference"):
        attn = build(**OPTIONS, backend=backend)
        out = attn(*qkv_, **told(), **masks)
        close(out, expected, 1e-12, f"rows by {backend}")
        for what, x, y in zip(
            names, torch.autograd.grad(out, leaves, upstream), wanted, strict=True
        ):
            close(x, y, 1e-12, f"gradient of {what} by {backend}")
    close(build(**OPTIONS).weights(*qkv_[:2], **told(), **masks), a, 1e-12, "A")


@pytest.mark.parametrize("base", ["mamba2", "gated_deltanet"])
def test_a_is_that_of_its_base_times_the_levels(base: str) -> None:
    """At 8 tokens, which 4 levels serve, as the paper's figure has them."""
    level = torch.tensor([0, 1, 2, 2, 3, 3, 3, 3])  # of token 0 for each, as the last bit set
    q, k, _, _ = qkv(8)
    given = gates_of("log_linear", 8)
    levels = given.pop("levels")[..., :4]
    if base == "mamba2":
        del given["beta"]
    scale: Any = {"scale": None}
    plain = attnzoo.build(base, HEADS, WIDTH, **scale).weights(q, k, is_causal=True, **given)
    a = build(base=base, **scale).weights(q, k, is_causal=True, levels=levels, **given)
    ratio = torch.stack([levels[:, :, t, level[t]] for t in range(8)], -1)
    close(a[..., 0], plain[..., 0] * ratio, 1e-12, "the first column")
    close(a[..., 7, 6], plain[..., 7, 6] * levels[:, :, 7, 1], 1e-12, "the neighbour of the last")
    close(a[..., 6, 5], plain[..., 6, 5] * levels[:, :, 6, 2], 1e-12, "a pair before it")
    close(a[..., 4, 3], plain[..., 4, 3] * levels[:, :, 4, 3], 1e-12, "the half before")
    once = build(base=base, **scale).weights(q, k, is_causal=True, **given)
    close(once, plain, 1e-12, "all levels 1")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_samples_whose_trees_differ(backend: str) -> None:
    """Padding on the left, then tokens of all: the samples' buckets are of different sizes, and
    stay with their samples."""
    q, k, v, _ = qkv(60)
    given, mask = gates_of("log_linear", 60), torch.ones(2, 60, dtype=torch.bool)
    mask[1, :13] = False
    attn = build(**OPTIONS, backend=backend)
    expected, _ = ORACLES["log_linear"](q, k, v, is_causal=True, key_mask=mask, **given, **OPTIONS)
    state: Any = attn.init_state(2, kv_heads=KV_HEADS, dtype=q.dtype)
    rows: list[Tensor] = []
    for start, end in ((0, 30), (30, 31), (31, 32), (32, 45)):
        one = {name: x[:, :, start:end] for name, x in given.items()}
        told = mask[:, start:end] if start == 0 else None
        q_, k_, v_ = (x[:, :, start:end] for x in (q, k, v))
        out, state = attn.step(q_, k_, v_, state, key_mask=told, **one)
        rows.append(out)
    close(torch.cat(rows, 2), expected[:, :, :45], 1e-12, "rows")
    order = torch.tensor([1, 0, 1])
    for chosen in (state.select(order), state.crop(5).select(order)):
        here = slice(chosen.seen, 60)
        one = {name: x[order, :, here] for name, x in given.items()}
        q_, k_, v_ = (x[order, :, here] for x in (q, k, v))
        out, _ = attn.step(q_, k_, v_, chosen, **one)
        close(out, expected[order, :, here], 1e-12, "rows of other samples")


def chunk_log_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, level_scales: Tensor, scale: float
) -> tuple[Tensor, None]:
    """flash-linear-attention's definition with its signature: all (batch, length, heads, ...), a
    row weighs a token by the level of the highest bit in which their places differ."""
    assert q.shape == k.shape and level_scales.shape[:3] == q.shape[:3] == g.shape
    rows = []
    for t in range(q.shape[1]):
        row = torch.zeros_like(v[:, 0])
        for s in range(t + 1):
            level = level_scales[:, t, :, (t ^ s).bit_length()]
            left = g[:, s + 1 : t + 1].sum(1).exp()
            product = (q[:, t] * k[:, s]).sum(-1)
            row = row + (level * left * product)[..., None] * v[:, s]
        rows.append(scale * row)
    return torch.stack(rows, 1), None


@pytest.mark.parametrize("gated", [True, False])
def test_what_is_handed_to_the_fla_kernel(gated: bool) -> None:
    *qkv_, _ = qkv(20)
    given = gates_of("log_linear", 20, closed=True) if gated else {}
    attn = build(scale=0.3)
    engine: Any = attn.engine
    q, k, v = qkv_
    call = engine.completed(Call(q, k, v, is_causal=True, inputs=given, declared=attn.spec.inputs))
    out = tree_fla.attend(engine.rule, call, chunk_log_linear_attn)
    close(out, engine(call, "reference")[0], 1e-12, "rows by the definition of the kernel")


def test_when_the_fla_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(width: int, value_dim: int, mask: Tensor | None = None, **options: Any) -> str:
        attn = attnzoo.build("log_linear", HEADS, width, **options)
        q, k = (torch.randn(1, HEADS, 8, width, dtype=torch.bfloat16) for _ in range(2))
        v = torch.randn(1, HEADS, 8, value_dim, dtype=torch.bfloat16)
        call = Call(q, k, v, mask, None, True, {}, attn.spec.inputs)
        engine: Any = attn.engine
        return str(tree_fla.why_not(engine, call))

    monkeypatch.setattr(fla_kernels, "missing", lambda *_: None)
    assert "needs tensors on a CUDA device" in reason(64, 64)
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    assert reason(64, 64) == "None"
    assert "a multiple of 64 wide, got head_dim=48" in reason(48, 64)
    assert "a power of 2 wide, got value_dim=96" in reason(64, 96)
    assert "none of delta rules" in reason(64, 64, base="gated_deltanet")
    assert "real tokens alone count" in reason(64, 64, torch.ones(1, 8, dtype=torch.bool))
