"""Gates and delta rules with their inputs: log_decay and beta in every rule of meaning, and against
the code that people run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Situation, close, padding, takes, tensors
from stages import in_turn, only
from torch import Tensor

import attnzoo
from attnzoo import UnsupportedError
from attnzoo.engines.linear.gated import gated_chunks, triangular
from attnzoo.oracles import ORACLES
from attnzoo.registry import spec_of


def inputs_of(name: str) -> set[str]:
    return {one.name for one in spec_of(name).inputs}


NAMES = [name for name in attnzoo.names() if {"log_decay", "beta"} & inputs_of(name)]
HEADS, KV_HEADS, WIDTH = 4, 2, 8
LEVELS = 9  # enough for 256 tokens
ALL = pytest.mark.parametrize("name", NAMES)
Gates = dict[str, Tensor]


def gates_of(name: str, length: int, *, closed: bool = False, seed: int = 1) -> Gates:
    """Gates in their range. closed: some are -inf and some 0, some strengths 0, 1 and 2."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    sizes = {"batch": 2, "kv_heads": KV_HEADS, "heads": HEADS, "keys": length, "queries": length}
    sizes |= {"width": WIDTH, "levels": LEVELS + length // 300}
    for one in spec_of(name).inputs:
        shape = [sizes[axis] for axis in one.names]
        x = torch.rand(shape, generator=generator).double()
        chosen = torch.randint(12, shape, generator=generator) if closed else torch.full(shape, 3)
        if one.name == "removal_key":
            x = F.normalize(x - 0.5, dim=-1)
        elif one.name == "removal_rate":
            pass
        elif one.name == "levels":
            x = x.masked_fill(chosen == 0, 0.0)
        elif one.name == "beta":
            x = torch.where(chosen < 3, chosen.double(), 2 * x)
        else:
            x = (-x / 4).masked_fill(chosen == 0, -torch.inf).masked_fill(chosen == 1, 0.0)
        found[one.name] = x
    return found


def qkv(length: int, queries: int | None = None) -> tuple[Tensor, ...]:
    situation = Situation(queries or length, length, heads=HEADS, kv_heads=KV_HEADS)
    return tensors(situation, WIDTH)


def build(name: str, **options: Any) -> attnzoo.Attention:
    return attnzoo.build(name, HEADS, WIDTH, **options)


def cut(gates: Gates, start: int, end: int) -> Gates:
    return {name: x[:, :, start:end] for name, x in gates.items()}


def backends(name: str, length: int) -> list[str]:
    """Those that take so many tokens on a CPU."""
    attn, (q, k, v, _) = build(name), qkv(length)
    return [
        one
        for one in attn.engine.backend_names()
        if takes(attn, one, q, k, v, is_causal=True, **gates_of(name, length))
    ]


def shown(mask: Tensor, x: Tensor) -> Tensor:
    """A mask of tokens, with the dimensions of a gate."""
    return mask.view(2, 1, -1, *(1,) * (x.dim() - 3))


@pytest.mark.parametrize(
    ("name", "closed", "kind"),
    in_turn(
        [(name, closed) for name in NAMES for closed in (False, True)],
        ["none", "left", "interior", "whole"],
    ),
)
def test_rows_weights_and_gradients(name: str, closed: bool, kind: str) -> None:
    """By every backend, with gates that are open, closed and in between, and with padding in which
    anything stands."""
    length = 70 if kind == "none" else 37
    *qkv_, upstream = qkv(length)
    given, mask = gates_of(name, length, closed=closed), padding(kind, 2, length)
    leaves = [x.requires_grad_() for x in (*qkv_, *given.values())]
    masks: Any = {"key_mask": mask, "is_causal": True}
    expected, a = ORACLES[name](*qkv_, **given, **masks)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    names = ["q", "k", "v", *given]
    for backend in backends(name, length):
        attn, bad = build(name, backend=backend), given
        if mask is not None:
            bad = {gate: x.masked_fill(~shown(mask, x), torch.nan) for gate, x in given.items()}
        out = attn(*qkv_, **bad, **masks)
        close(out, expected, 1e-12, f"rows by {backend}")
        for what, x, y in zip(
            names, torch.autograd.grad(out, leaves, upstream), wanted, strict=True
        ):
            close(x, y, 1e-12, f"gradient of {what} by {backend}")
    close(build(name).weights(qkv_[0], qkv_[1], **given, **masks), a, 1e-12, "A")


@pytest.mark.parametrize(("name", "dtype"), in_turn(NAMES, [torch.float32, torch.bfloat16]))
def test_many_chunks_in_low_precision(name: str, dtype: torch.dtype) -> None:
    """Several spans of chunks, and no more than float32's and the dtype's own error."""
    *qkv_, upstream = (x.to(dtype) for x in qkv(160))
    given = {gate: x.to(dtype) for gate, x in gates_of(name, 160, closed=True).items()}
    leaves = [x.requires_grad_() for x in (*qkv_, *given.values())]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected, _ = ORACLES[name](
        *exact[:3], is_causal=True, **dict(zip(given, exact[3:], strict=True))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated_chunks, "HELD", 2**14)
        out = build(name)(*qkv_, is_causal=True, **given)
        found = torch.autograd.grad(out, leaves, upstream)
    tolerance = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 64 * 2**-24
    close(out, expected, tolerance, "rows")
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    for what, x, y in zip(["q", "k", "v", *given], found, wanted, strict=True):
        assert x.dtype == dtype
        close(x, y, tolerance, f"gradient of {what}")


@pytest.mark.parametrize("name", [name for name in NAMES if spec_of(name).value_heads])
def test_more_value_heads_than_key_heads(name: str) -> None:
    """Consecutive value heads share a key head, each with gates of its own."""
    q, k, v, _ = qkv(20)
    given = gates_of(name, 20)
    shared = k[:, :1].expand_as(k)
    how: Any = {"is_causal": True, **given}
    attn = build(name)
    close(attn(q, k[:, :1], v, **how), attn(q, shared, v, **how), 1e-12, "rows")
    close(attn.weights(q, k[:, :1], **how), attn.weights(q, shared, **how), 1e-12, "A")
    state = attn.init_state(2, kv_heads=KV_HEADS, dtype=q.dtype)
    rows, state = attn.step(q, k[:, :1], v, state, **given)
    close(rows, attn(q, shared, v, **how), 1e-12, "rows of a step")
    with pytest.raises(ValueError, match="k has 3 heads and v has 2"):
        attn(q, k[:, :1].expand(-1, 3, -1, -1), v, **how)


@pytest.mark.parametrize("queries", [5, 29])
@ALL
def test_fewer_and_more_queries_than_keys(name: str, queries: int) -> None:
    q, k, v, _ = qkv(20, queries)
    given = gates_of(name, 20)
    if "levels" in given:
        given["levels"] = gates_of(name, queries)["levels"]
    expected, a = ORACLES[name](q, k, v, is_causal=True, **given)
    masks: Any = {"is_causal": True, **given}
    for backend in backends(name, 20):
        if not takes(build(name), backend, q, k, v, **masks):
            continue  # that takes as many queries as keys
        out = build(name, backend=backend)(q, k, v, is_causal=True, **given)
        close(out, expected, 1e-12, backend)
    close(build(name).weights(q, k, is_causal=True, **given), a, 1e-12, "A")


@ALL
def test_packed_rows(name: str) -> None:
    """Pieces cut apart, and kept apart by closed gates where nobody may read their ids."""
    q, k, v, upstream = qkv(90)
    given = gates_of(name, 90)
    segments = torch.tensor([[0] * 64 + [1] + [2] * 25, [4] * 30 + [1] * 60])
    leaves = [x.requires_grad_() for x in (q, k, v, *given.values())]
    how: Any = {"segments": segments, "is_causal": True, **given}
    expected, a = ORACLES[name](q, k, v, **how)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    attn = build(name)

    def in_a_graph(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, *gates: Tensor) -> Tensor:
        own: Any = {one: x[None] for one, x in zip(given, gates, strict=True)}
        pieces: Any = {"segments": segments[None], "is_causal": True}
        return attn(q[None], k[None], v[None], **pieces, **own)[0]

    for out in (
        attn(q, k, v, **how),
        torch.func.vmap(in_a_graph)(q, k, v, segments, *given.values()),
    ):
        close(out, expected, 1e-12, "rows")
        for x, y in zip(torch.autograd.grad(out, leaves, upstream), wanted, strict=True):
            close(x, y, 1e-12, "gradients")
    close(attn.weights(q, k, **how), a, 1e-12, "A")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@ALL
def test_decoding_and_going_back(name: str, backend: str) -> None:
    """In pieces, one by one, back by some tokens and on, a branch of each, and other samples."""
    q, k, v, _ = qkv(110)
    given, mask = gates_of(name, 110, closed=True), padding("interior", 2, 110)
    assert mask is not None
    attn = build(name, backend=backend)

    def step(state: Any, start: int, end: int, rows: Any = slice(None)) -> tuple[Tensor, Any]:
        own = {gate: x[rows, :, start:end].clone() for gate, x in given.items()}
        q_, k_, v_ = (x[rows, :, start:end].clone() for x in (q, k, v))
        out, state = attn.step(q_, k_, v_, state, key_mask=mask[rows, start:end], **own)
        for x in (k_, v_, *own.values()):
            x.zero_()  # a state keeps nothing of the caller's
        return out, state

    expected, _ = ORACLES[name](q, k, v, is_causal=True, key_mask=mask, **given)
    state, found = attn.init_state(2, kv_heads=KV_HEADS, dtype=q.dtype), []
    for start, end in ((0, 75), (75, 76), (76, 90)):
        out, state = step(state, start, end)
        found.append(out)
        back = state.crop(min(9, end - start))
        again, _ = step(back, back.seen, end)
        close(again, expected[:, :, back.seen : end], 1e-12, f"behind crop at {end}")
    close(torch.cat(found, 2), expected[:, :, :90], 1e-12, "rows in pieces")
    swapped = [1, 0]
    out, _ = step(state.crop(4).select(torch.tensor(swapped)), 86, 110, swapped)
    close(out, expected[swapped, :, 86:], 1e-12, "rows of other samples")


@pytest.mark.parametrize("name", ["mamba2", "lightning"])
def test_short_inputs_run_as_a_itself(name: str) -> None:
    """Up to 64 tokens, whole sequences alone."""
    attn = build(name)
    for length, backend in ((64, "short"), (65, "chunked")):
        q, k, v, _ = qkv(length)
        attn(q, k, v, is_causal=True)
        assert attn.last_backend == backend
        attn.step(q, k, v, attn.init_state(2, kv_heads=KV_HEADS, dtype=q.dtype))
        assert attn.last_backend == "chunked"
    attn = build(name, backend="short")
    with pytest.raises(UnsupportedError, match="up to 64 tokens, and there are 65"):
        attn(q, k, v, is_causal=True)
    with pytest.raises(UnsupportedError, match=r"'short' does not decode.*'auto'"):
        attn.step(q, k, v, attn.init_state(2, kv_heads=KV_HEADS, dtype=q.dtype))
    with pytest.raises(UnsupportedError, match="no faster than chunks for a delta rule"):
        build("kda", backend="short")(q, k, v, is_causal=True)


@ALL
def test_packed_steps(name: str) -> None:
    """A piece begins in the middle of a step."""
    q, k, v, _ = qkv(30)
    given = gates_of(name, 30)
    segments = torch.tensor([[0] * 11 + [1] * 19, [0] * 20 + [1] * 10])
    expected, _ = ORACLES[name](q, k, v, is_causal=True, segments=segments, **given)
    attn = build(name)
    state, rows = attn.init_state(2, kv_heads=KV_HEADS, dtype=q.dtype), []
    for start, end in ((0, 8), (8, 15), (15, 30)):
        q_, k_, v_ = (x[:, :, start:end] for x in (q, k, v))
        ids = segments[:, start:end]
        out, state = attn.step(q_, k_, v_, state, segments=ids, **cut(given, start, end))
        rows.append(out)
    close(torch.cat(rows, 2), expected, 1e-12, "rows")


@ALL
def test_second_derivatives_and_transforms(name: str) -> None:
    q, k, v, _ = qkv(5)
    given = gates_of(name, 5)
    leaves = [x.requires_grad_() for x in (q, k, v, *given.values())]

    def run(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> Tensor:
        return build(name)(q, k, v, is_causal=True, **dict(zip(given, gates, strict=True)))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True, atol=1e-4)


@ALL
def test_a_bad_gate_is_refused_in_one_sentence(name: str) -> None:
    """By forward, A, a step, a layer and its step."""
    q, k, v, _ = qkv(6)
    given = gates_of(name, 6)
    layer: Any = attnzoo.MultiheadAttention(
        HEADS * WIDTH, HEADS, batch_first=True, attention=name, dtype=q.dtype
    )
    x = torch.randn(2, 6, HEADS * WIDTH, dtype=q.dtype)

    def refused(message: str, **wrong: Tensor) -> None:
        attn: Any = build(name)
        gates = {**given, **wrong}
        state = attn.init_state(2, kv_heads=KV_HEADS, dtype=q.dtype)
        of_layer = {gate: y.repeat_interleave(HEADS // y.shape[1], 1) for gate, y in gates.items()}
        for call in (
            lambda: attn(q, k, v, is_causal=True, **gates),
            lambda: attn.weights(q, k, is_causal=True, **gates),
            lambda: attn.step(q, k, v, state, **gates),
            lambda: layer(x, x, x, is_causal=True, **of_layer),
            lambda: layer.step(x, layer.init_state(2), **of_layer),
        ):
            with pytest.raises(ValueError, match=message):
                call()

    if (gate := given.get("log_decay")) is not None:
        refused(r"log_decay has the value 0\.25, above 0: .*softplus", log_decay=gate * 0 + 0.25)
        open_ = gate.index_fill(2, torch.tensor([2]), torch.inf)
        refused(r"log_decay has the value inf, above 0: .*softplus", log_decay=open_)
        refused("log_decay has shape", log_decay=gate[:, :, 1:])
        refused("log_decay has dtype torch.int64; it must be floating", log_decay=gate.long())
    if (levels := given.get("levels")) is not None:
        refused("levels has the value -0.5, below 0: .*softplus", levels=levels * 0 - 0.5)
        refused(
            "levels has 3 of them, enough for 4 tokens, and there are 6: give 4",
            levels=levels[..., :3],
        )
    if (beta := given.get("beta")) is not None:
        refused("beta has the value -0.5, outside of 0 to 2", beta=beta * 0 - 0.5)
        refused("beta has the value 2.5, outside of 0 to 2", beta=beta * 0 + 2.5)
        refused("beta has the value inf, outside of 0 to 2", beta=beta * 0 + torch.inf)
    attn: Any = build(name)
    for call in (
        lambda: attn(q, k, v, **given),
        lambda: attn.weights(q, k, **given),
        lambda: layer(x, x, x),
    ):
        with pytest.raises(UnsupportedError, match=f"{name} is causal only"):
            call()
    # What stands in padding is no gate
    mask = padding("left", 2, 6)
    assert mask is not None
    bad = {gate: x + 9.0 * ~shown(mask, x) for gate, x in given.items()}
    out = build(name)(q, k, v, is_causal=True, key_mask=mask, **bad)
    assert torch.equal(out, build(name)(q, k, v, is_causal=True, key_mask=mask, **given))


@ALL
def test_a_gate_may_be_more_precise_than_q(name: str) -> None:
    """In rows, in A and in steps."""
    q, k, v = (x.float() for x in qkv(6)[:3])
    given = gates_of(name, 6)
    attn, less = build(name), {gate: x.float() for gate, x in given.items()}
    expected = attn(q, k, v, is_causal=True, **less)
    found = attn(q, k, v, is_causal=True, **given)
    a = attn.weights(q, k, is_causal=True, **given)
    stepped, _ = attn.step(q, k, v, attn.init_state(2, kv_heads=KV_HEADS), **given)
    for out in (found, stepped):
        assert out.dtype == torch.float32
        close(out, expected, 1e-6, "rows")
    close(a, attn.weights(q, k, is_causal=True, **less), 1e-6, "A")


@ALL
def test_a_nan_gate_spoils_no_earlier_row(name: str) -> None:
    q, k, v, _ = qkv(70)
    for gate in gates_of(name, 70):
        if gate == "levels":
            continue  # they are of a row alone
        given = gates_of(name, 70)
        clean = build(name)(q, k, v, is_causal=True, **given)
        given[gate][0, 1, 66] = torch.nan
        out = build(name)(q, k, v, is_causal=True, **given)
        assert torch.equal(out[0, :, :66], clean[0, :, :66]) and torch.equal(out[1], clean[1])
        assert bool(out[0, :, 66:].isnan().all())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet", "kda"])
def test_a_write_that_overflows_reaches_no_earlier_row(name: str, backend: str) -> None:
    """Where keys are not brought to length 1."""
    q, k, v = (x.float() for x in qkv(70)[:3])
    attn = build(name, l2_norm=False, backend=backend)
    given = {gate: x.float() / 20 for gate, x in gates_of(name, 70).items()}
    clean = attn(q, k, v, is_causal=True, **given)
    assert bool(clean.isfinite().all())
    here = torch.arange(70)[:, None] == 40
    for large in (1e30, 1e38):
        out = attn(*(x.masked_fill(here, large) for x in (q, k, v)), is_causal=True, **given)
        assert torch.equal(out[:, :, :40], clean[:, :, :40])
        assert not bool(out[:, :, -1].isfinite().all())


@pytest.mark.parametrize("name", only(["gated_deltanet"], NAMES))
def test_a_hundred_thousand_tokens_stay_exact(name: str) -> None:
    last_rows_agree(name, 3_000 if name == "path" else 100_000)  # it reads all keys


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["mamba2", "gla", "deltanet", "gated_deltanet", "kda", "rwkv7", "log_linear"]
)
def test_a_million_tokens_stay_exact(name: str) -> None:
    last_rows_agree(name, 1_000_000)


@torch.no_grad()
def last_rows_agree(name: str, n: int) -> None:
    """Of float32 and of float64, behind n tokens."""
    late = 400
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 1, n, 4, generator=generator) for _ in "qkv")
    given = {}
    sizes = {"width": 4, "levels": n.bit_length() + 1, "keys": n, "queries": n}
    for one in spec_of(name).inputs:
        x = torch.rand([sizes.get(axis, 1) for axis in one.names], generator=generator)
        kinds = {"beta": 2 * x, "levels": x, "log_decay": -20 * x * (x < 0.05), "removal_rate": x}
        given[one.name] = kinds.get(one.name, F.normalize(x - 0.5, dim=-1))
    attn = attnzoo.build(name, 1, 4)
    out = attn(q, k, v, is_causal=True, **given)
    exact = attn(
        *(x.double() for x in (q, k, v)),
        is_causal=True,
        **{gate: x.double() for gate, x in given.items()},
    )
    close(out[:, :, -late:], exact[:, :, -late:], 64 * 2**-24, "the last rows")
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("strong", [False, True])
def test_the_inverse_by_halves(strong: bool) -> None:
    """Where keys are alike and replaced twice over, powers of N would overflow."""
    below = torch.rand(3, 2, 64, 64).tril(-1) - 0.5
    below = torch.full_like(below, 2.0).tril(-1) if strong else below.tril(-1)
    exact = torch.linalg.inv(torch.eye(64, dtype=torch.float64) + below.double())
    by_halves = triangular.by_halves(below, below.new_ones(3, 2, 64, 1, 1))
    for found in (triangular.unit_inverse(below), by_halves):
        close(found, exact, 1e-5, "the inverse")


def test_a_strength_of_two_turns_the_sign() -> None:
    """Householder's reflection: parity, which no strength up to 1 can count."""
    k = torch.zeros(1, 1, 9, 2)
    k[..., 0] = 1.0
    v = torch.zeros(1, 1, 9, 1)
    v[:, :, 0] = 1.0
    beta = torch.tensor([1.0] + [2.0] * 8)[None, None]
    out = attnzoo.build("deltanet", 1, 2, scale=1.0, l2_norm=False)(
        k, k, v, is_causal=True, beta=beta
    )
    close(out.flatten(), torch.tensor([1.0, -1.0] * 4 + [1.0]), 1e-5, "signs")


# ---- what people run


def transposed(*some: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in some]


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_transformers_gated_delta_rule(form: str) -> None:
    """Rows, and the state behind them."""
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    q, k, v, _ = (x.float() for x in qkv(90))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    given = {
        gate: x.float().repeat_interleave(HEADS // KV_HEADS, 1)
        for gate, x in gates_of("gated_deltanet", 90).items()
    }
    theirs, last = getattr(module, f"torch_{form}_gated_delta_rule")(
        *transposed(q, k, v),
        g=given["log_decay"].transpose(1, 2),
        beta=given["beta"].transpose(1, 2),
        initial_state=None,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    attn = attnzoo.build("gated_deltanet", HEADS, WIDTH)
    close(attn(q, k, v, is_causal=True, **given), theirs.transpose(1, 2), 2e-6, "rows")
    _, state = attn.step(q, k, v, attn.init_state(2), **given)
    close(state.past.sums, last, 2e-6, "the state")


def test_mamba2_by_its_own_sums() -> None:
    """The paper's appendix (listing 1): scores weighed by segment sums, whole."""
    q, k, v, _ = qkv(40)
    g = gates_of("mamba2", 40)["log_decay"].repeat_interleave(2, 1)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    total = g.cumsum(-1)
    left = (total[..., :, None] - total[..., None, :]).exp().tril()
    expected = torch.einsum("bhln,bhsn,bhls,bhsp->bhlp", q, k, left, v)
    close(build("mamba2")(q, k, v, is_causal=True, log_decay=g), expected, 1e-12, "rows")


def test_the_rules_contain_each_other() -> None:
    """A gate alike in all channels is one for the head; without gates and writes of strength 1 all
    delta rules are one; with a constant gate Mamba-2 is retention."""
    q, k, v, _ = qkv(50)
    given = gates_of("gated_deltanet", 50)
    wide = {**given, "log_decay": given["log_decay"][..., None].expand(-1, -1, -1, WIDTH)}
    whole = build("gated_deltanet")(q, k, v, is_causal=True, **given)
    close(build("kda")(q, k, v, is_causal=True, **wide), whole, 1e-12, "kda")
    gates = {"log_decay": wide["log_decay"]}
    close(
        build("gla", scale=1.0)(q, k, v, is_causal=True, **gates),
        build("mamba2")(q, k, v, is_causal=True, log_decay=given["log_decay"]),
        1e-12,
        "gla",
    )
    plain = build("deltanet")(q, k, v, is_causal=True)
    close(build("gated_deltanet")(q, k, v, is_causal=True), plain, 1e-12, "no gates")
    slopes = (1 - 2.0 ** (-5 - torch.arange(KV_HEADS).double())).log()
    constant = slopes[:, None].expand(2, -1, 50)
    close(
        build("mamba2", scale=None)(q, k, v, is_causal=True, log_decay=constant),
        build("retention")(q, k, v, is_causal=True),
        1e-12,
        "retention",
    )


def test_slopes_are_those_that_are_published() -> None:
    """MiniMax's `get_slope_rate` and flash-linear-attention's `g_gamma`, with 8 heads."""
    q = torch.ones(1, 8, 2, 4)

    def left(**options: Any) -> list[float]:
        a = attnzoo.build("lightning", 8, 4, **options).weights(q, q, is_causal=True)
        return (a[0, :, 1, 0] / a[0, :, 1, 1]).tolist()

    base = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625])
    wanted = (-base * (1 - 2 / 4 + 1e-5)).exp().tolist()
    assert left(layer=2, num_layers=5) == pytest.approx(wanted, rel=1e-6)
    wanted = (-torch.arange(8.0) * (1 - 2 / 5)).exp().tolist()
    assert left(slopes="fla", layer=2, num_layers=5) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match="layer=5 must be below num_layers=5"):
        attnzoo.build("lightning", 8, 4, layer=5, num_layers=5)


@pytest.mark.parametrize("form", ["block", "recurrent"])
def test_transformers_lightning_attention(form: str) -> None:
    """MiniMax's layer with its norm, gate and projections undone."""
    module = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = module.MiniMaxConfig(
        hidden_size=16, num_attention_heads=4, head_dim=4, num_hidden_layers=3, block_size=8
    )
    theirs = module.MiniMaxLightningAttention(config, layer_idx=1)
    attn = attnzoo.build("lightning", 4, 4, layer=1, num_layers=3)
    x = torch.randn(2, 20, 16)
    held: list[Tensor] = []
    theirs.norm.register_forward_hook(lambda _, args, out: held.append(args[0]))
    with torch.no_grad():
        qkv_ = F.silu(theirs.qkv_proj(x)).view(2, 20, 4, 12).transpose(1, 2)
        q, k, v = qkv_.split(4, 3)
        mask = torch.ones(2, 20, dtype=torch.bool)
        position: Any = (torch.zeros(2, 20, 4), torch.zeros(2, 20, 4))
        theirs(x, position, mask)
        if form == "block":
            out = attn(q, k, v, is_causal=True)
        else:
            state, rows = attn.init_state(2), []
            for t in range(20):
                here = slice(t, t + 1)
                row, state = attn.step(q[:, :, here], k[:, :, here], v[:, :, here], state)
                rows.append(row)
            out = torch.cat(rows, 2)
    close(out.transpose(1, 2).flatten(2), held[0], 1e-5, "rows")


def test_a_layer_trains_its_gates() -> None:
    mha = attnzoo.MultiheadAttention(32, HEADS, batch_first=True, attention="gated_deltanet")
    x = torch.randn(2, 12, 32)
    mask = torch.ones(12, 12, dtype=torch.bool).triu(1)
    mha(x, x, x, attn_mask=mask, is_causal=True)[0].square().sum().backward()
    projections: Any = mha.attention.input_projections
    assert list(projections) == ["log_decay", "beta"]
    for projection in projections.values():
        for parameter in projection.parameters():
            assert parameter.grad.abs().max() > 0


def test_log_sigmoid_is_what_makes_a_gate() -> None:
    one = spec_of("gated_deltanet").inputs[0]
    assert one.activation is F.logsigmoid and one.padded == 0.0


def test_a_state_of_another_rule_is_refused() -> None:
    q = torch.randn(1, 2, 3, 8)
    maker = attnzoo.build("mamba2", 2, 8)
    _, state = maker.step(q, q, q, maker.init_state(1))
    for name in ("gla", "log_linear", "retention", "linear"):
        with pytest.raises(ValueError, match=f"state was made by mamba2, and {name} reads"):
            attnzoo.build(name, 2, 8).step(q, q, q, state)


def test_behind_an_overflow_no_row_is_a_number() -> None:
    """Long keys without a norm let writes grow beyond float32: earlier rows are right, and later
    ones NaN rather than finite and wrong."""
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, 1, 40, 16) for _ in range(3))
    attn = attnzoo.build("deltanet", 1, 16, l2_norm=False)
    out = attn(q, 6 * k, v, is_causal=True)
    exact = attn(*(x.double() for x in (q, 6 * k, v)), is_causal=True)
    beyond = exact.abs() > torch.finfo(torch.float32).max
    assert bool(beyond.any()) and not bool(out[beyond].isfinite().any())
    early = out.isfinite().all(-1)
    assert bool(early[:, :, :15].all())
    close(out[early] / exact[early], torch.ones_like(out[early]), 1e-2, "rows before")


def test_what_removes_has_a_length_of_1() -> None:
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"removal_key has a vector of length .*, above 1"):
        attnzoo.build("rwkv7", 2, 8)(
            q, q, q, is_causal=True, removal_key=2 * F.normalize(q, dim=-1)
        )
    options: Any = {"l2_norm": "no"}
    with pytest.raises(ValueError, match="l2_norm='no' must be True or False"):
        attnzoo.build("kda", 2, 8, **options)
