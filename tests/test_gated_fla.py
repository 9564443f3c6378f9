"""What is handed to flash-linear-attention's kernels of gates and delta rules, through plain
recurrences of their definitions, with their signatures and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Situation, close, gradients_of, padding, tensors
from small import build_small
from test_gates import HEADS, KV_HEADS, WIDTH, gates_of
from torch import Tensor

import attnzoo
from attnzoo.call import Call
from attnzoo.engines.linear.gated import fla_kernels
from attnzoo.engines.linear.gated.gated_linear import GatedLinear
from attnzoo.engines.linear.log_linear.tree_linear import LogLinear
from attnzoo.registry import spec_of
from attnzoo.sequences.bad_slots import clear_padding

NAMES = [
    name
    for name, engine in ((name, build_small(name, 1, 8).engine) for name in attnzoo.names())
    if isinstance(engine, GatedLinear) and not isinstance(engine, LogLinear)
]


def unit(x: Tensor, wanted: bool) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() if wanted else x


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    fade: Tensor | None,
    beta: Tensor | None,
    add: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, None]:
    """All (batch, length, heads, ...). fade: of each row of the state. beta: of the delta rule.
    add: a and b of S + b (Sᵀ a)ᵀ, in which a reads the state that has not faded."""
    assert q.shape == k.shape and v.shape[:3] == q.shape[:3]
    state, rows = torch.zeros(q.shape[0], *q.shape[2:], v.shape[3], dtype=q.dtype), []
    for t in range(q.shape[1]):
        before, k_t, v_t = state, k[:, t], v[:, t]
        if fade is not None:
            assert bool((fade[:, t] <= 0).all() and fade.isfinite().all())
            state = state * fade[:, t].exp()[..., None]
        if add is not None:
            a, b = (x[:, t] for x in add)
            state = state + b[..., None] * (a[..., None, :] @ before)
        if beta is not None:
            v_t = (v_t - (k_t[..., None, :] @ state)[..., 0, :]) * beta[:, t, :, None]
        state = state + k_t[..., None] * v_t[..., None, :]
        rows.append(scale * (q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(rows, 1), None


def chunk_simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> Any:
    return recurrence(q, k, v, scale, g[..., None], None)


def chunk_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> Any:
    assert g.shape == k.shape
    return recurrence(q, k, v, scale, g, None)


def chunk_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, scale: float, use_qk_l2norm_in_kernel: bool
) -> Any:
    assert q.dtype == k.dtype == v.dtype and beta.dim() == 3
    q, k = (unit(x, use_qk_l2norm_in_kernel) for x in (q, k))
    return recurrence(q, k, v, scale, None, beta)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    use_qk_l2norm_in_kernel: bool,
) -> Any:
    q, k = (unit(x, use_qk_l2norm_in_kernel) for x in (q, k))
    return recurrence(q, k, v, scale, g[..., None], beta)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    use_qk_l2norm_in_kernel: bool,
) -> Any:
    assert g.shape == k.shape and beta.shape == k.shape[:3]
    q, k = (unit(x, use_qk_l2norm_in_kernel) for x in (q, k))
    return recurrence(q, k, v, scale, g, beta)


def chunk_dplr_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gk: Tensor, scale: float
) -> Any:
    return recurrence(q, k, v, scale, gk, None, (a, b))


def call_of(name: str, given: dict[str, Tensor], mask: Tensor | None, dtype: torch.dtype) -> Call:
    situation = Situation(40, 40, heads=HEADS, kv_heads=KV_HEADS)
    q, k, v, _ = (x.to(dtype) for x in tensors(situation, WIDTH))
    declared = spec_of(name).inputs
    return clear_padding(Call(q, k, v, mask, None, True, given, declared))


@pytest.mark.parametrize("kind", ["none", "interior"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_mathematics_is_ours(name: str, gated: bool, kind: str) -> None:
    """Rows and gradients, with gates that are closed and with none."""
    engine: Any = attnzoo.build(name, HEADS, WIDTH).engine
    given = gates_of(name, 40, closed=True) if gated else {}
    call = call_of(name, given, padding(kind, 2, 40), torch.float64)
    leaves = [x.requires_grad_() for x in (call.q, call.k, call.v)]
    call = engine.completed(call)
    expected = engine(call, "reference")[0]
    module, kernel = fla_kernels.kernel_of(engine.rule)
    out = fla_kernels.attend(engine.rule, call, globals()[kernel])
    close(out, expected, 1e-12, f"rows by {module}.{kernel}")
    upstream = torch.randn_like(out)
    for what, found, wanted in zip(
        "qkv",
        gradients_of(out, upstream, *leaves),
        gradients_of(expected, upstream, *leaves),
        strict=True,
    ):
        close(found, wanted, 1e-10, f"gradient of {what}")


def test_what_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of that name, of its module, with q, k and v in their own precision and gates in
    that of sums."""
    asked: list[tuple[str, dict[str, Any]]] = []

    class Module:
        @staticmethod
        def chunk_kda(**given: Any) -> tuple[Tensor, None]:
            asked.append(("chunk_kda", given))
            return given["v"], None

    def imported(name: str) -> type[Module]:
        asked.append((name, {}))
        return Module

    monkeypatch.setattr(fla_kernels, "import_module", imported)
    engine: Any = attnzoo.build("kda", HEADS, WIDTH).engine
    call = call_of("kda", gates_of("kda", 40, closed=True), None, torch.bfloat16)
    out = fla_kernels.run(engine, call)
    (module, _), (_, given) = asked
    assert module == "fla.ops.kda" and out.dtype == torch.bfloat16
    assert {name: x.dtype for name, x in given.items() if isinstance(x, Tensor)} == {
        **dict.fromkeys(("q", "k", "v"), torch.bfloat16),
        **dict.fromkeys(("g", "beta"), torch.float32),
    }
    assert given["scale"] == WIDTH**-0.5 and given["use_qk_l2norm_in_kernel"] is True
    assert given["k"].shape == given["q"].shape == (2, 40, HEADS, WIDTH)
    assert given["g"].min() == fla_kernels.CLOSED


@pytest.mark.parametrize("name", NAMES)
def test_only_asked_by_name_and_not_for_decoding(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attn = attnzoo.build(name, HEADS, WIDTH)
    engine: Any = attn.engine
    call = engine.completed(call_of(name, {}, None, torch.bfloat16))
    with monkeypatch.context() as patch:
        patch.setattr(fla_kernels, "missing", lambda *_: None)
        patch.setattr(torch.Tensor, "device", torch.device("cuda"))
        assert engine.choose(call, "fla").name == "fla"
        assert engine.choose(call, "auto").name in ("short", "chunked")
        assert "query_length == key_length" in str(
            fla_kernels.why_not(engine, call.select(queries=slice(3, None)))
        )
        single = call.of_each(lambda x, _: x.float())
        assert "too coarse for torch.float32" in str(fla_kernels.why_not(engine, single))
        wide = call.of_each(lambda x, axes: x.repeat_interleave(64, -1) if "width" in axes else x)
        erases = engine.rule.delta or engine.rule.removes
        assert ("at most 256 channels" in str(fla_kernels.why_not(engine, wide))) == erases
    assert "not installed" in str(fla_kernels.missing("no_such_package", "nowhere"))
    attn.backend = "fla"
    with pytest.raises(attnzoo.UnsupportedError, match=r"'fla' does not decode.*'auto'"):
        attn.step(call.q, call.k, call.v, attn.init_state(2, kv_heads=KV_HEADS))


def test_each_rule_has_a_kernel_of_its_own() -> None:
    engines: list[Any] = [attnzoo.build(name, HEADS, WIDTH).engine for name in NAMES]
    kernels = {fla_kernels.kernel_of(engine.rule) for engine in engines}
    assert len(kernels) == 6 and {"mamba2", "lightning"} <= set(NAMES)
