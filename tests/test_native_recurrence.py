"""Backend `native` of the linear engine: what the tests of every backend, which try it too, leave
out. Where nothing can be compiled, backends are tested without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_gates import HEADS, KV_HEADS, Gates, cut, gates_of
from torch import Tensor

import attnzoo
from attnzoo.engines.native import library
from attnzoo.oracles import ORACLES
from attnzoo.registry import spec_of

pytestmark = pytest.mark.skipif(
    library.cannot_compile() is not None, reason=str(library.cannot_compile())
)
WIDTH = 8  # of `gates_of`
KERNELS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("linear", {"feature_map": "relu"}),
    ("linear", {"normalize": False}),
    ("retention", {}),
    ("performer", {"num_features": 20}),
    ("cosformer", {"max_length": 1024}),
]
GATED: list[tuple[str, dict[str, Any]]] = [
    (name, {})
    for name in ("mamba2", "lightning", "gla", "deltanet", "gated_deltanet", "kda", "rwkv7")
]
ALL = pytest.mark.parametrize(("name", "options"), KERNELS + GATED, ids=str)


def qkv(length: int, dtype: torch.dtype = torch.float32, value_dim: int = 21) -> list[Tensor]:
    """Two samples, and values that fill no vector."""
    shapes = ((HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, value_dim))
    return [torch.randn(2, h, length, w, dtype=dtype) for h, w in shapes]


def gates(name: str, length: int, dtype: torch.dtype) -> Gates:
    if not spec_of(name).inputs:
        return {}
    return {one: x.to(dtype) for one, x in gates_of(name, length).items()}


def build(name: str, options: dict[str, Any], dtype: torch.dtype, **more: Any) -> attnzoo.Attention:
    torch.default_generator.manual_seed(1)
    return attnzoo.build(name, HEADS, WIDTH, **options, **more).to(dtype)


@ALL
def test_float32_is_as_exact_as_chunks(name: str, options: dict[str, Any]) -> None:
    """More tokens than from one kept state to the next, and a last chunk that is not full."""
    length, found = 300, {}
    inputs, given = qkv(length), gates(name, length, torch.float32)
    for backend, dtype in (
        ("native", torch.float32),
        ("chunked", torch.float32),
        ("reference", torch.float64),
    ):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (*inputs, *given.values())]
        attn = build(name, options, dtype, backend=backend)
        out = attn(*leaves[:3], is_causal=True, **dict(zip(given, leaves[3:], strict=True)))
        found[backend] = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    for one, other, exact in zip(*found.values(), strict=True):
        mistake, usual = ((x.double() - exact).norm() for x in (one, other))
        assert mistake <= 2 * usual + 1e-6 * exact.norm()


@pytest.mark.parametrize("name", ["retention", "lightning"])
def test_errors_do_not_add_up_by_tokens(name: str) -> None:
    """A gate that is the same at every token rounds the same way each time: of the slowest head,
    which remembers thousands of them."""
    heads, length, found = 8, 4000, {}
    q, k, v = (torch.rand(1, heads, length, WIDTH) for _ in range(3))
    for backend, dtype in (("native", torch.float32), ("open", torch.float64)):
        attn = attnzoo.build(name, heads, WIDTH, backend=backend).to(dtype)
        found[backend] = attn(*(x.to(dtype) for x in (q, k, v)), is_causal=True)[:, -1, -1]
    error = (found["native"].double() - found["open"]).abs() / found["open"].abs()
    assert error.max() < 1e-5


@ALL
@torch.no_grad()
def test_decoding_in_pieces_equals_the_whole(name: str, options: dict[str, Any]) -> None:
    length, dtype = 150, torch.float64
    q, k, v = qkv(length, dtype)
    given = gates(name, length, dtype)
    attn = build(name, options, dtype, backend="native")
    whole = attn(q, k, v, is_causal=True, **given)
    state, start, rows = attn.init_state(2, kv_heads=KV_HEADS), 0, []
    for end in (70, 71, 74, 74 + 1, 140, 150):
        here = slice(start, end)
        one, state = attn.step(
            q[:, :, here], k[:, :, here], v[:, :, here], state, **cut(given, start, end)
        )
        assert attn.last_backend == "native"
        rows.append(one)
        start = end
    torch.testing.assert_close(torch.cat(rows, 2), whole, rtol=1e-11, atol=1e-11)
    state = state.crop(3)  # the tokens that are left are added again
    again = slice(147, 150)
    one, _ = attn.step(
        q[:, :, again], k[:, :, again], v[:, :, again], state, **cut(given, 147, 150)
    )
    torch.testing.assert_close(one, whole[:, :, again], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", [name for name, _ in GATED])
def test_steps_learn(name: str) -> None:
    """Through the state that one call hands to the next."""
    length, dtype = 40, torch.float64
    leaves = [
        x.requires_grad_() for x in (*qkv(length, dtype), *gates(name, length, dtype).values())
    ]
    names = list(gates(name, length, dtype))
    attn = build(name, {}, dtype, backend="native")

    def parts(start: int, end: int) -> tuple[list[Tensor], Gates]:
        q, k, v, *given = (x[:, :, start:end] for x in leaves)
        return [q, k, v], dict(zip(names, given, strict=True))

    state, rows = attn.init_state(2, kv_heads=KV_HEADS), []
    for start, end in ((0, 23), (23, 24), (24, length)):
        tokens, given = parts(start, end)
        q, k, v = tokens
        out, state = attn.step(q, k, v, state, **given)
        rows.append(out)
    tokens, given = parts(0, length)
    whole = attn(*tokens, is_causal=True, **given)
    sent = torch.randn_like(whole)
    found = torch.autograd.grad(torch.cat(rows, 2), leaves, sent)
    wanted = torch.autograd.grad(whole, leaves, sent)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_rows_may_be_written_over() -> None:
    """Of what normalises nothing, no gradient reads them."""
    leaves = [x.requires_grad_() for x in qkv(30)]
    attn = build("mamba2", {}, torch.float32, backend="native")
    given = gates("mamba2", 30, torch.float32)
    wanted = torch.autograd.grad((attn(*leaves, is_causal=True, **given) * 2).sum(), leaves)
    out = attn(*leaves, is_causal=True, **given)
    out *= 2
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), leaves), wanted))


def test_kernels_by_name_say_that_steps_do_not_learn() -> None:
    attn = attnzoo.build("linear", HEADS, WIDTH, backend="native")
    q, k, v = qkv(1)
    state = attn.init_state(2, kv_heads=KV_HEADS)
    with pytest.raises(attnzoo.UnsupportedError, match="under torch"):
        attn.step(q, k, v, state)


def test_a_write_that_overflows_reaches_no_earlier_row() -> None:
    """By the delta rule with long keys, in a chunk whose earlier rows weigh it by 0."""
    length, long = 40, 18
    q, k, v = qkv(length)
    k[:, :, long:] *= 1e9
    given = {"beta": torch.full((2, KV_HEADS, length), 2.0)}
    attn = build("deltanet", {"l2_norm": False}, torch.float32, backend="native")
    out = attn(q, k, v, is_causal=True, **given)
    finite = [i for i in range(length) if out[:, :, i].isfinite().all()]
    last = finite[-1]
    assert finite == list(range(last + 1)) and long <= last < 31  # not the last of its chunk
    parts = (x[:, :, : last + 1] for x in (q, k, v))
    alone = attn(*parts, is_causal=True, beta=given["beta"][..., : last + 1])
    assert torch.equal(out[:, :, : last + 1], alone)


@pytest.mark.parametrize(("name", "options"), [*KERNELS[:4], *GATED], ids=str)
def test_threads_change_no_bit(name: str, options: dict[str, Any]) -> None:
    length = 50  # of a Performer's features, torch's product changes bits
    inputs, given = qkv(length), gates(name, length, torch.float32)
    attn, threads = build(name, options, torch.float32, backend="native"), torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = attn(*leaves, is_causal=True, **given)
            found.append([out, *torch.autograd.grad(out.sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


def test_a_removal_that_is_not_the_delta_rule() -> None:
    """With rates of their own and keys that are not written to, against the oracle, from a head
    whose group shares keys."""
    length, dtype = 37, torch.float64
    q, k, v = qkv(length, dtype)
    given = gates("rwkv7", length, dtype)
    out = attnzoo.build("rwkv7", HEADS, WIDTH, backend="native")(q, k, v, is_causal=True, **given)
    expected, _ = ORACLES["rwkv7"](q, k, v, is_causal=True, **given)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_auto_takes_it_where_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    library.operators()

    def taken(name: str, **call: Any) -> str | None:
        attn = build(name, {}, torch.float32)
        q, k, v = qkv(30)
        attn(q, k, v, **call, **gates(name, 30, torch.float32))
        return attn.last_backend

    assert taken("linear", is_causal=True) == "chunked"  # the tests' machine has not compiled it
    assert taken("gla", is_causal=True) == "chunked"
    monkeypatch.setattr(library, "not_compiled", lambda: None)
    assert taken("linear", is_causal=True) == "native"
    assert taken("linear") == "chunked"
    assert taken("gla", is_causal=True) == "native"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert taken("gla", is_causal=True) == "chunked"
