"""Backend `native_row`: one query of every head by compiled code, as a step of decoding brings it.
Where nothing can be compiled, decoding is tested without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, cases, close, padding
from stages import in_turn
from torch import Tensor

import attnzoo
from attnzoo import Attention
from attnzoo.engines.native import library
from attnzoo.engines.softmax.native import one_row
from attnzoo.engines.softmax.softmax import Softmax

pytestmark = pytest.mark.skipif(
    library.cannot_compile() is not None, reason=str(library.cannot_compile())
)
NAME, N, PROMPT = "native_row", 60, 20
ROWS = [
    case for case in cases() if case.spec.decodes and NAME in case.build().engine.backend_names()
]
KINDS = ["none", "left", "right", "interior", "whole"]


@pytest.fixture(autouse=True)
def taken(only_native_by_name: None, monkeypatch: pytest.MonkeyPatch) -> None:
    library.operators()
    monkeypatch.setattr(library, "not_compiled", lambda: None)


def inputs_of(attn: Attention, queries: int, heads: int, kv_heads: int) -> dict[str, Tensor]:
    """What the variant takes beside q, k and v, of as many keys as queries, in float64."""
    sizes = {"batch": 2, "heads": heads, "kv_heads": kv_heads, "queries": queries, "keys": queries}
    sizes |= {"width": 8, "levels": 8, "index_heads": 4, "index_key_heads": 2, "index_width": 6}
    found = {}
    for one in attn.spec.inputs:
        sizes["distances"] = 2 * N + 1
        x = torch.randn([sizes[axis] for axis in one.names], dtype=torch.float64)
        found[one.name] = x if one.activation is None else one.activation(x + 2)
    return found


def stepped(
    attn: Attention, lengths: list[int], tensors: list[Tensor], mask: Tensor | None, **own: Tensor
) -> tuple[Tensor, set[str | None]]:
    """The rows of tokens that come in pieces, and the backends that ran for single ones."""
    q, k, v = tensors
    state, rows, ran, start = attn.init_state(2, kv_heads=k.shape[1], dtype=q.dtype), [], set(), 0
    axes = {one.name: one for one in attn.spec.inputs}
    for length in lengths:
        here = slice(start, start + length)
        some = {name: x[:, :, here] if axes[name].has_length else x for name, x in own.items()}
        out, state = attn.step(
            q[:, :, here],
            k[:, :, here],
            v[:, :, here],
            state,
            key_mask=None if mask is None else mask[:, here],
            **some,
        )
        rows.append(out)
        if length == 1:
            ran.add(attn.last_backend)
        start += length
    return torch.cat(rows, 2), ran


@pytest.mark.parametrize(("case", "kind"), in_turn(ROWS, KINDS))
def test_a_step_is_a_row_of_the_reference(case: Case, kind: str) -> None:
    for kv_heads, with_inputs in ((4, False), (2, True), (1, True)):
        attn = case.build(dtype=torch.float64)
        q = torch.randn(2, 4, N, 8, dtype=torch.float64)
        k, v = (torch.randn(2, kv_heads, N, 8, dtype=torch.float64) for _ in "kv")
        own = inputs_of(attn, N, 4, kv_heads) if with_inputs else {}
        mask = padding(kind, 2, N)
        with torch.no_grad():
            rows, ran = stepped(attn, [PROMPT, *[1] * (N - PROMPT)], [q, k, v], mask, **own)
            attn = case.build(dtype=torch.float64, backend="reference")
            wanted = attn(q, k, v, key_mask=mask, is_causal=True, **own)
        close(rows, wanted, 1e-12, f"rows of {kv_heads} key heads")
        refuses = attn.spec.name == "nsa" and bool(case.options.get("compressed_size"))
        refuses |= "softcap" in case.options or case.options.get("key_compression") == "mlp"
        refuses |= attn.spec.name == "log_linear" and kind == "right"
        if not refuses and kind in ("none", "right"):
            assert ran == {NAME}


def test_vectors_that_are_not_full() -> None:
    """Widths and lengths that fill no vector, values wider than keys, other strides."""
    engine = Softmax()
    for width, value_dim, length in ((5, 11, 3), (20, 70, 37), (64, 130, 129)):
        for dtype in (torch.float32, torch.float64):
            q, k = torch.randn(2, 4, 1, width), torch.randn(2, 2, width, length).mT
            v = torch.randn(2, 2, 2 * length, value_dim)[:, :, ::2]
            call = attnzoo.call.Call(*(x.to(dtype) for x in (q, k, v)), is_causal=True)
            exact = attnzoo.call.Call(*(x.double() for x in (call.q, call.k, call.v)))
            found = one_row.attend(engine, call).double()
            wanted = engine.matrix(exact) @ exact.v.repeat_interleave(2, 1)
            limit = 1e-12 if dtype == torch.float64 else 2e-6
            assert (found - wanted).abs().max() <= limit


def test_many_keys_in_more_than_one_thread() -> None:
    """Threads change no bit of rows and choices."""
    found, before = [], torch.get_num_threads()
    shapes = (2, 4, 1100, 64)
    q, k, v = (torch.randn(shapes) for _ in "qkv")
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            rows = []
            for name in ("moba", "nsa", "indexed", "sigmoid", "bigbird"):
                attn = attnzoo.build(name, heads=4, head_dim=64)
                rows.append(stepped(attn, [1090, *[1] * 10], [q, k, v], None)[0][:, :, -10:])
            found.append(torch.cat(rows))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["sigmoid", "forgetting", "flash", "differential"])
def test_a_number_that_is_none(name: str) -> None:
    """A NaN in a token makes the rows behind it NaN, and what stands in padding none."""
    attn = attnzoo.build(name, heads=2, head_dim=8)
    q, k, v = (torch.randn(2, 2, 12, 8) for _ in "qkv")
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 3] = False
    k[:, :, 3], v[:, :, 3] = torch.nan, torch.nan
    with torch.no_grad():
        rows, _ = stepped(attn, [1] * 12, [q, k, v], mask)
    assert rows[0].isfinite().all()
    assert rows[1, :, :3].isfinite().all() and rows[1, :, 3:].isnan().all()


def test_gates_that_close() -> None:
    """A closed gate hides all before it, and one that is no number spoils every later row."""
    attn = attnzoo.build("forgetting", heads=2, head_dim=8).double()
    q, k, v = (torch.randn(2, 2, 12, 8, dtype=torch.float64) for _ in "qkv")
    gates = -torch.rand(2, 2, 12, dtype=torch.float64)
    gates[0, 0, 5], gates[0, 1, 7], gates[1, 0, 0], gates[1, 1, 11] = -torch.inf, -1e5, -1e30, -2e5
    rows, ran = stepped(attn, [1] * 12, [q, k, v], None, log_decay=gates)
    assert ran == {NAME}
    attn.backend = "reference"
    close(rows, attn(q, k, v, log_decay=gates, is_causal=True), 1e-12, "rows")
    gates[0, 0, 2] = torch.nan
    attn.backend = "auto"
    rows, _ = stepped(attn, [1] * 12, [q, k, v], None, log_decay=gates)
    assert rows[0, 0, 2:].isnan().all() and rows[0, 1].isfinite().all()


def test_equal_scores_take_the_earlier_block() -> None:
    """Keys that are all alike leave blocks of one score."""
    v = torch.randn(2, 2, 40, 8, dtype=torch.float64)
    q = torch.randint(-3, 4, (2, 2, 40, 8)).double()  # of which no order of sums rounds
    k = torch.ones(2, 2, 40, 8, dtype=torch.float64)
    for name, options in (
        ("moba", {"block_size": 4, "top_k": 3}),
        ("indexed", {"top_k": 7}),
        ("indexed", {"top_k": 8, "block_size": 4}),
        ("nsa", {"block_size": 4, "top_k": 5, "window_size": 3}),
    ):
        attn = attnzoo.build(name, heads=2, head_dim=8, **options)
        rows, ran = stepped(attn, [1] * 40, [q, k, v], None)
        assert ran == {NAME}
        attn.backend = "reference"
        close(rows, attn(q, k, v, is_causal=True), 1e-12, name)


@pytest.mark.parametrize("features", ["positive", "hyperbolic"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_random_features_of_one_token(features: str, dtype: torch.dtype) -> None:
    """The largest exponent so far grows and stays, behind a prompt and from the first token on."""
    options = {"num_features": 21, "features": features}
    q = torch.randn(2, 4, 12, 10, dtype=torch.float64).to(dtype)
    k, v = (torch.randn(2, 2, 12, 10, dtype=torch.float64).to(dtype) for _ in "kv")
    k *= torch.tensor([1, 0.1, 3, 0.2, 2, 0.5, 8, 0.1, 1, 20, 0.3, 1])[:, None].to(dtype)
    for prompt in ([7], []):
        attn = attnzoo.build("performer", heads=4, head_dim=10, **options)
        with torch.no_grad():
            rows, ran = stepped(attn, [*prompt, *[1] * (12 - sum(prompt))], [q, k, v], None)
        assert ran == {"native"}
        attn.backend = "reference"
        wanted = attn(*(x.double() for x in (q, k, v)), is_causal=True)
        close(rows, wanted, 1e-12 if dtype == torch.float64 else 2e-2, "rows")


def test_what_it_refuses() -> None:
    q = torch.randn(1, 2, 9, 8)

    def refused(match: str, queries: int = 1, dtype: Any = torch.float32, **options: Any) -> None:
        attn = attnzoo.build("flash", heads=2, head_dim=8, backend=NAME, **options).to(dtype)
        x = q.to(dtype)
        with pytest.raises(attnzoo.UnsupportedError, match=match):
            attn(x[:, :, :queries].requires_grad_(queries == 1), x, x)

    refused("one query, got 2", 2)
    refused("no softcap", softcap=2.0)
    refused("no gradient")
    refused("one dtype", dtype=torch.bfloat16)
    attn = attnzoo.build("flash", heads=2, head_dim=8, backend=NAME)
    with pytest.raises(attnzoo.UnsupportedError, match="graph or transform"):
        torch.func.vmap(lambda one: attn(one[:, :, :1], one, one))(q[None])
    with pytest.raises(attnzoo.UnsupportedError, match="no attn_mask"):
        attn(q[:, :, :1], q, q, attn_mask=torch.ones(1, 9, dtype=torch.bool))
