"""Short and padded calls by compiled code: masks of all pairs, blocks that the data select, and
padded slots, which nobody clears since nobody reads them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import close
from torch import Tensor

import attnzoo
from attnzoo.engines.native import library
from attnzoo.engines.softmax.native.mask_plan import plan_of_mask

compiled = pytest.mark.skipif(
    library.cannot_compile() is not None, reason=str(library.cannot_compile())
)
PATTERNS: list[tuple[str, dict[str, Any]]] = [
    ("sliding_window", {"window": 7, "sinks": 3}),
    ("sliding_window", {"window": 5, "dilation": 3}),
    ("sliding_window", {"window": 200}),
    ("sparse_transformer", {}),
    ("bigbird", {"block_size": 8, "num_random_blocks": 1}),
    ("longformer", {"window": 9}),
    ("moba", {"block_size": 16, "top_k": 2}),
    ("xattention", {"block_size": 8, "stride": 4}),
]
RECURRENT: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosformer", {"max_length": 128}),
    ("retention", {}),
    ("mamba2", {}),
    ("gla", {}),
    ("gated_deltanet", {}),
    ("rwkv7", {}),
]


def inputs_of(attn: attnzoo.Attention, k: Tensor) -> dict[str, Tensor]:
    """Half-open gates and write strengths."""
    found = {}
    for one in attn.spec.inputs:
        x = k if one.axes.endswith("width") else k[..., 0]
        if one.name == "log_decay":
            found[one.name] = -torch.nn.functional.softplus(x - 2)
        elif one.name in ("beta", "removal_rate"):
            found[one.name] = x.sigmoid()
        elif one.name == "removal_key":
            found[one.name] = torch.nn.functional.normalize(x, dim=-1)
    return found


def run(
    attn: attnzoo.Attention, tensors: list[Tensor], sent: Tensor, **call: Any
) -> tuple[Tensor, ...]:
    """A·v, and gradients of q, k and v."""
    own = [x.detach().requires_grad_() for x in tensors]
    out = attn(*own, **call)
    return out, *torch.autograd.grad(out, own, sent)


def calls() -> list[tuple[str, dict[str, Any], bool]]:
    """Every call that has a compiled backend: name, options, whether it is causal."""
    found = [(name, options, True) for name, options in PATTERNS + RECURRENT]
    for name, options in PATTERNS:
        if attnzoo.build(name, heads=4, head_dim=8, **options).spec.runs(False):
            found.append((name, options, False))
    return found


@compiled
@pytest.mark.parametrize("bad", [math.nan, 1e3])
@pytest.mark.parametrize(("name", "options", "is_causal"), calls())
def test_padded_slots_are_not_read(
    name: str, options: dict[str, Any], is_causal: bool, bad: float
) -> None:
    """NaN or numbers in them change no bit of any row, of no gradient, and get none. A causal call
    with NaN is cleared, to tell whether it stands in a real slot."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(3, 4, 70, 8, dtype=torch.float64, generator=generator)
    k, v = torch.randn(2, 3, 2, 70, 8, dtype=torch.float64, generator=generator).unbind()
    sent = torch.randn(q.shape, dtype=torch.float64, generator=generator)
    mask = torch.ones(3, 70, dtype=torch.bool)
    mask[0, 41:], mask[1, :13], mask[2, 20:30], mask[2, 60:] = False, False, False, False
    hidden = ~mask[:, None, :, None]
    attn = attnzoo.build(name, heads=4, head_dim=8, backend="native", **options).double()
    gates = inputs_of(attn, k.masked_fill(hidden, 0))
    call = {"key_mask": mask, "is_causal": is_causal, **gates}
    clean = run(attn, [q, k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)], sent, **call)
    spoilt = [q, k.masked_fill(hidden, bad), v.masked_fill(hidden, -bad)]
    for one, x in zip(attn.spec.inputs, gates.values(), strict=False):
        call[one.name] = x.masked_fill(hidden if x.dim() == 4 else hidden[..., 0], math.inf)
    dirty = run(attn, spoilt, sent, **call)
    assert all(torch.equal(x, y) for x, y in zip(clean, dirty, strict=True))
    assert not dirty[2].masked_select(hidden).any() and not dirty[3].masked_select(hidden).any()
    reference = attnzoo.build(name, heads=4, head_dim=8, backend="reference", **options).double()
    reference.load_state_dict(attn.state_dict())
    for x, y in zip(dirty, run(reference, spoilt, sent, **call), strict=True):
        close(x, y, 1e-10, f"{name} with padding, native")


@compiled
@pytest.mark.parametrize(("name", "options"), PATTERNS + RECURRENT)
def test_padded_slots_have_no_gradient_of_bad_rows(name: str, options: dict[str, Any]) -> None:
    """Not even where a query, or what is sent back to its row, is NaN."""
    generator = torch.Generator().manual_seed(10)
    q, k, v, sent = torch.randn(4, 1, 2, 40, 8, generator=generator).unbind()
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[:, 5:8] = False
    attn = attnzoo.build(name, heads=2, head_dim=8, backend="native", **options)
    for bad in (q, sent):
        spoilt = bad.clone()
        spoilt[:, 0, 20, 0] = math.nan
        given = [spoilt, k, v] if bad is q else [q, k, v]
        call = {"key_mask": mask, "is_causal": True, **inputs_of(attn, k)}
        *_, d_k, d_v = run(attn, given, sent if bad is q else spoilt, **call)
        assert not d_k[:, :, 5:8].any() and not d_v[:, :, 5:8].any()


@compiled
@pytest.mark.parametrize(("name", "options"), [PATTERNS[0], PATTERNS[3], PATTERNS[4], PATTERNS[6]])
def test_a_padded_call_has_second_derivatives(name: str, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(4)
    q, k, v = torch.randn(3, 2, 2, 40, 4, dtype=torch.float64, generator=generator).unbind()
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 31:] = False
    k = k.masked_fill(~mask[:, None, :, None], math.nan)

    def twice(backend: str) -> Tensor:
        attn = attnzoo.build(name, heads=2, head_dim=4, backend=backend, **options).double()
        own = q.clone().requires_grad_()
        (once,) = torch.autograd.grad(
            attn(own, k, v, key_mask=mask).square().sum(), own, create_graph=True
        )
        return torch.autograd.grad(once.square().sum(), own)[0]

    torch.manual_seed(5)
    found = twice("native")
    torch.manual_seed(5)
    close(found, twice("reference"), 1e-9, f"second derivative of {name}, native")


@compiled
def test_what_a_later_row_selects_changes_no_bit_of_an_earlier_one() -> None:
    """Rows of one tile share their blocks, and only these."""
    attn = attnzoo.build("moba", heads=4, head_dim=8, block_size=4, top_k=3, backend="native")
    q, k, v = torch.randn(3, 2, 4, 130, 8, generator=torch.Generator().manual_seed(9)).unbind()
    wanted = attn(q, k, v, is_causal=True)
    for token in range(1, 130, 3):
        changed = q.clone()
        changed[:, :, token:] = q[:, :, token:].flip(2) * 3
        assert torch.equal(attn(changed, k, v, is_causal=True)[:, :, :token], wanted[:, :, :token])


@compiled
def test_a_bad_real_key_is_found_beside_padding() -> None:
    """Where padding need not be cleared, a NaN in a real slot still reaches no row before it."""
    q, k, v = torch.randn(3, 1, 2, 50, 8, generator=torch.Generator().manual_seed(6)).unbind()
    mask = torch.ones(1, 50, dtype=torch.bool)
    mask[0, 45:] = False
    attn = attnzoo.build("sliding_window", heads=2, head_dim=8, window=9, backend="native")
    wanted = attn(q, k, v, key_mask=mask, is_causal=True)
    k[:, :, 30], k[:, :, 46] = math.nan, math.nan
    found = attn(q, k, v, key_mask=mask, is_causal=True)
    assert torch.equal(found[:, :, :30], wanted[:, :, :30])
    assert found[:, :, 30:].isnan().all()


@compiled
@pytest.mark.parametrize(("name", "options"), RECURRENT)
def test_a_bad_query_reaches_no_gradient_of_another_sample(
    name: str, options: dict[str, Any]
) -> None:
    """One thread works on one sample after the other, in the same memory."""
    generator = torch.Generator().manual_seed(8)
    q, k, v, sent = torch.randn(4, 3, 2, 40, 9, generator=generator).unbind()
    attn = attnzoo.build(name, heads=2, head_dim=9, backend="native", **options)
    call = {"is_causal": True, **inputs_of(attn, k)}
    wanted = run(attn, [q, k, v], sent, **call)
    for bad in (q, sent):
        spoilt = bad.clone()
        spoilt[:2] = math.nan
        given = [spoilt, k, v] if bad is q else [q, k, v]
        found = run(attn, given, sent if bad is q else spoilt, **call)
        assert all(torch.equal(x[2], y[2]) for x, y in zip(found, wanted, strict=True))


def test_the_plan_of_a_mask_holds_every_pair_once() -> None:
    """Tiles, runs and caps together say of every pair what the mask says."""
    seen = torch.rand(2, 150, 90, generator=torch.Generator().manual_seed(7)) < 0.1
    seen[0, :64], seen[1, 70:90] = True, False
    plan = plan_of_mask(seen, torch.float32)
    found = torch.zeros_like(seen)
    for head, (begin, end) in enumerate(plan.ranges.tolist()):
        for first, size, run_, run_end, cap, cap_end in plan.tiles[begin:end].tolist():
            runs = plan.runs[run_:run_end].tolist()
            keys = [key for start, count, _ in runs for key in range(start, start + count)]
            assert len(set(keys)) == len(keys)
            shown = torch.ones(len(keys), size, dtype=torch.bool)
            for start, stop, limits, spans, step in plan.caps[cap:cap_end].tolist():
                assert step == 1
                most = plan.limits[limits : limits + (stop - start) * size].view(-1, size)
                shown[start:stop] &= most > 0
                for key, (low, high) in enumerate(plan.spans[spans : spans + stop - start]):
                    assert not shown[start + key, :low].any()
                    assert not shown[start + key, high:].any()
            found[head, first : first + size, keys] = shown.mT
    assert torch.equal(found, seen)
