"""The twelve rules of meaning, each one test that runs over every registered variant and every CPU
backend."""

from __future__ import annotations

import copy
import inspect
import pickle
from functools import cache

import pytest
import torch
from cases import (
    CASES,
    Case,
    Situation,
    can,
    close,
    gradients_of,
    padding,
    preferring,
    tensors,
    usual_cases,
    with_backends,
)
from small import possible
from stages import in_turn, staged
from torch import Tensor

import attnzoo
from attnzoo.registry import options_of, sized

VARIANTS = pytest.mark.parametrize("case", usual_cases(), ids=str)
BACKENDS = pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(c, b, id=f"{c}-{b}") for c, b in with_backends(usual_cases())],
)
PADDINGS = ("left", "right", "interior", "whole")
GARBAGE = (float("nan"), float("inf"), -float("inf"), 1e30)
TOKENS = (1, 100, 128, 170, 299)
LONG = 300  # more than two chunks or blocks of any backend


def kinds(case: Case) -> list[bool]:
    """The values of is_causal that the variant can serve; the other one must be refused."""
    q, k, v, _ = tensors(Situation(3, 3))
    for is_causal in (False, True):
        if not can(case.spec, is_causal):
            with pytest.raises(attnzoo.UnsupportedError, match=case.variant):
                case.build(dtype=torch.float64)(q, k, v, is_causal=is_causal)
    return [is_causal for is_causal in (False, True) if can(case.spec, is_causal)]


def float32(*some: Tensor) -> list[Tensor]:
    return [x.float().requires_grad_() for x in some]


def same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    assert bool(torch.isfinite(expected).all()), (
        f"{what}: nothing to compare with, the clean run is not finite"
    )
    assert torch.equal(actual, expected), (
        f"{what} changed by up to {(actual - expected).abs().max().item():.3g}"
    )


@BACKENDS
def test_rule_1_true_means_attend(case: Case, backend: str) -> None:
    """Where key_mask is False A is 0; where it is True some query attends. A mask that is not bool
    is refused, not guessed at."""
    attn = case.build(dtype=torch.float64, prefer=backend)
    q, k, v, _ = tensors(Situation(20, 20), shift=case.shift)
    mask = padding("interior", 2, 20)
    assert mask is not None
    for is_causal in kinds(case):
        a = attn.weights(q, k, key_mask=mask, is_causal=is_causal)
        reached = (a != 0).any(2).any(1)
        assert torch.equal(reached, mask)
        close(
            attn(q, k, v, key_mask=mask, is_causal=is_causal),
            a @ v.repeat_interleave(2, 1),
            1e-12,
            "output under key_mask",
        )
        with pytest.raises(ValueError, match=r"key_mask.*bool.*True = attend"):
            attn(q, k, v, key_mask=mask.to(torch.int64), is_causal=is_causal)


@BACKENDS
def test_rule_2_queries_are_the_last_ones(case: Case, backend: str) -> None:
    """Fewer queries than keys give the last rows of the square call; more queries than keys stand
    before the beginning."""
    if not case.spec.cross:
        with pytest.raises(attnzoo.UnsupportedError, match="query_length"):
            case.build(dtype=torch.float64, prefer=backend)(*tensors(Situation(3, 5))[:3])
        return
    attn = case.build(2, dtype=torch.float64, prefer=backend)
    q, k, v, _ = tensors(Situation(LONG, LONG, heads=2, kv_heads=1, batch=1), shift=case.shift)
    for is_causal in kinds(case):
        whole = attn(q, k, v, is_causal=is_causal)
        for count in (1, 2, 63, 130, LONG - 1):
            close(
                attn(q[:, :, -count:], k, v, is_causal=is_causal),
                whole[:, :, -count:],
                1e-12,
                f"last {count} rows",
            )
        if is_causal:
            early = torch.cat([q[:, :, :7], q], 2)
            rows = attn(early, k, v, is_causal=True)
            assert not rows[:, :, :7].any()
            close(rows[:, :, 7:], whole, 1e-12, "rows behind 7 that see nothing")


@BACKENDS
def test_rule_3_a_row_with_nothing_to_see_is_zero(case: Case, backend: str) -> None:
    """Exactly 0, with gradient exactly 0, though NaN sits in the slots that are masked."""
    attn = case.build(prefer=backend)
    for is_causal in kinds(case):
        for kind in ("whole", "left") if is_causal else ("whole",):
            q, k, v, _ = tensors(Situation(40, 40), shift=case.shift)
            mask = padding(kind, 2, 40)
            assert mask is not None
            bad = ~mask[:, None, :, None]
            q, k, v = float32(q, k.masked_fill(bad, float("nan")), v.masked_fill(bad, float("inf")))
            out = attn(q, k, v, key_mask=mask, is_causal=is_causal)
            seen = mask.cumsum(1) > 0 if is_causal else mask.any(1, keepdim=True).expand_as(mask)
            empty = ~seen[:, None, :, None].expand_as(out)
            assert bool(empty.any())
            assert not out[empty].any(), "an empty row is not 0"
            assert bool(torch.isfinite(out).all())
            for name, gradient in zip(
                "qkv", gradients_of(out, torch.ones_like(out), q, k, v), strict=True
            ):
                assert bool(torch.isfinite(gradient).all()), f"gradient of {name} is not finite"
                dead = empty if name == "q" else bad.expand_as(gradient)
                assert not gradient[dead].any(), (
                    f"gradient of {name} is not 0 where nothing is seen"
                )
            assert not attn.weights(q, k, key_mask=mask, is_causal=is_causal)[
                empty[..., :1].expand(-1, -1, -1, 40)
            ].any()


@pytest.mark.parametrize(
    ("case", "backend", "kind"), in_turn(with_backends(usual_cases()), PADDINGS)
)
def test_rule_4_padding_reaches_nothing(case: Case, backend: str, kind: str) -> None:
    """Whatever sits in padded slots, output and gradients keep every bit. (`test_padding.py`: a
    padded run equals the run without padding.)"""
    attn = case.build(2, prefer=backend)
    mask = padding(kind, 2, LONG)
    assert mask is not None
    padded = ~mask[:, None, :, None]
    for is_causal in kinds(case):
        clean_inputs = tensors(Situation(LONG, LONG, heads=2, kv_heads=1), shift=case.shift)
        upstream = clean_inputs[3].float()
        q, k, v = float32(*clean_inputs[:3])
        clean = attn(q, k, v, key_mask=mask, is_causal=is_causal)
        gradients = gradients_of(clean, upstream, q, k, v, *attn.parameters())
        # Every kind of garbage in one kind of padding, and every kind of padding with two of them
        for garbage in GARBAGE if kind == "interior" else GARBAGE[::3]:
            bad_k, bad_v = float32(
                k.detach().masked_fill(padded, garbage), v.detach().masked_fill(padded, garbage)
            )
            out = attn(q, bad_k, bad_v, key_mask=mask, is_causal=is_causal)
            same_bits(out, clean, f"output with {garbage} in the padding")
            for i, gradient in enumerate(
                gradients_of(out, upstream, q, bad_k, bad_v, *attn.parameters())
            ):
                same_bits(gradient, gradients[i], f"gradient {i} with {garbage} in the padding")


@pytest.mark.parametrize(
    ("case", "backend", "token"),
    # The reference has no chunks or blocks at whose ends to look
    in_turn([pair for pair in with_backends(usual_cases()) if pair[1] != "reference"], TOKENS)
    + [staged(c, b, 128, first=True) for c, b in with_backends(usual_cases()) if b == "reference"],
)
def test_rule_5_causal_means_causal(case: Case, backend: str, token: int) -> None:
    """Changing token j changes no bit of a row before j, nor of what those rows send back, though
    its key and value be NaN."""
    if not case.spec.causal:
        assert kinds(case) == [False]
        return
    attn = case.build(2, prefer=backend)
    situation = Situation(LONG, LONG, heads=2, kv_heads=1, batch=1)
    q, k, v, upstream = tensors(situation, shift=case.shift)
    grad = upstream[:, :, :token].float()

    def rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        inputs = float32(q, k, v)
        out = attn(*inputs, is_causal=True)[:, :, :token]
        return out, gradients_of(out, grad, *inputs)

    clean, gradients = rows(q, k, v)
    here = torch.arange(LONG)[:, None] == token
    # Every change of one token, and every token with three of them
    for change in (0.0, 50.0, *GARBAGE) if token == 128 else (50.0, float("nan"), 1e30):
        out, _ = rows(*(x.masked_fill(here, change) for x in (q, k, v)))
        same_bits(out, clean, f"rows before token {token} = {change}")
        if change == 1e30:
            # Finite, so nothing clears it, and its own row overflows: what flows back from there is
            # not a number
            continue
        # A NaN query spoils its own row's backward in torch itself (0 · NaN), so the query stays.
        _, sent = rows(q, k.masked_fill(here, change), v.masked_fill(here, change))
        for name, gradient, wanted in zip("qkv", sent, gradients, strict=True):
            assert not gradient[:, :, token:].any(), (
                f"rows before token {token} = {change} send a gradient to {name} from it on"
            )
            same_bits(
                gradient, wanted, f"gradient of {name} of the rows before token {token} = {change}"
            )


@pytest.mark.parametrize("window", [1, 2, 5, 64, 65, 200])
@pytest.mark.parametrize(
    "name",
    [name for name in attnzoo.names() if "window" in [option.name for option in options_of(name)]],
)
def test_rule_6_a_window_of_w_is_w_keys(name: str, window: int) -> None:
    """Query i sees key j when |i - j| < window, and j <= i when causal: w keys, itself included."""
    case = Case(name, {"window": window})
    for backend in [b for _, b in with_backends([case])]:
        attn = case.build(2, dtype=torch.float64, prefer=backend)
        for query_length, key_length in ((140, 140), (5, 140), (140, 130)):
            q, k, _, _ = tensors(Situation(query_length, key_length, heads=2))
            identity = torch.eye(key_length, dtype=torch.float64).expand(2, 2, -1, -1)
            i = torch.arange(query_length)[:, None] + key_length - query_length
            j = torch.arange(key_length)
            for is_causal in kinds(case):
                support = attn(q, k, identity, is_causal=is_causal) != 0
                expected = ((i - j).abs() < window) & ((j <= i) | (not is_causal))
                assert torch.equal(support, expected.expand_as(support))
        causal = attn.weights(q[:, :, -1:], k, is_causal=True) != 0
        assert int(causal[0, 0, 0].sum()) == min(window, 130)


@BACKENDS
def test_rule_7_a_sparse_row_is_a_set_of_keys(case: Case, backend: str) -> None:
    """On A's support log A differs from the scores by one constant a row, so that no key counts
    twice; training draws what eval draws; a short input sees everything."""
    attn = case.build(2, dtype=torch.float64, prefer=backend)
    situation = Situation(LONG, LONG, heads=2, kv_heads=2, batch=1)
    q, k, _, _ = tensors(situation, shift=case.shift)
    identity = torch.eye(LONG, dtype=torch.float64).expand(1, 2, -1, -1)
    for is_causal in kinds(case):
        a = attn.train()(q, k, identity, is_causal=is_causal)
        assert torch.equal(a, attn.eval()(q, k, identity, is_causal=is_causal)), (
            "train and eval differ"
        )
        close(a, attn.weights(q, k, is_causal=is_causal), 1e-12, "A by this backend")
        if not case.spec.exact:
            continue
        close(a.sum(-1), torch.ones_like(a[..., 0]), 1e-12, "row sums")
        scores = q @ k.mT * q.shape[-1] ** -0.5
        constant = (a.log() - scores).masked_fill(a == 0, float("nan"))
        spread = constant.nan_to_num(nan=-1e9).amax(-1) - constant.nan_to_num(nan=1e9).amin(-1)
        assert spread.max().item() < 1e-9, "a key of a row weighs more than its score"
    if case.spec.family == "sparse" and not case.spec.data_dependent:
        default = Case(case.variant).build(dtype=torch.float64, prefer=backend)
        exact = Case("standard").build(dtype=torch.float64)
        short = tensors(Situation(5, 5))[:3]
        for is_causal in kinds(case):
            close(
                default(*short, is_causal=is_causal),
                exact(*short, is_causal=is_causal),
                1e-12,
                "5 tokens against exact attention",
            )


@BACKENDS
def test_heads_kept_alone_say_what_they_said_together(case: Case, backend: str) -> None:
    """For a process that holds some of the heads; what a head learned, drew or is by its place
    among the heads goes with it."""
    q, k, v, _ = tensors(Situation(40, 40, kv_heads=4), shift=case.shift)
    for is_causal in kinds(case):
        whole = case.build(dtype=torch.float64, prefer=backend)
        for kv_heads in (4, 2):
            some = case.build(dtype=torch.float64, prefer=backend)
            some.keep_heads(2, 2)
            expected = whole(q, k[:, :kv_heads], v[:, :kv_heads], is_causal=is_causal)
            second = slice(kv_heads // 2, kv_heads)
            close(
                some(q[:, 2:], k[:, second], v[:, second], is_causal=is_causal),
                expected[:, 2:],
                1e-12,
                f"heads 2 and 3, {kv_heads} of keys",
            )


@BACKENDS
def test_rows_do_not_depend_on_how_tensors_lie_in_memory(case: Case, backend: str) -> None:
    q, k, v, grad = tensors(Situation(40, 40), shift=case.shift)
    for is_causal in kinds(case):
        attn, found = case.build(dtype=torch.float64, prefer=backend), []
        for lay in (Tensor.clone, lambda x: x.mT.contiguous().mT):
            own = [lay(x).requires_grad_() for x in (q, k, v)]
            out = attn(*own, is_causal=is_causal)
            found.append((out, *gradients_of(out, lay(grad), *own)))
        for one, other in zip(*found, strict=True):
            close(other, one.detach(), 1e-12, "the length last in memory")


@BACKENDS
def test_rule_8_any_length(case: Case, backend: str) -> None:
    """No length must be a multiple of anything, 0 included; past max_length there is an error that
    says so."""
    attn = case.build(2, dtype=torch.float64, prefer=backend)
    for is_causal in kinds(case):
        for length in (*range(8), 15, 16, 17, 33, 63, 64, 65, 129, 191):
            situation = Situation(length, length, heads=2, kv_heads=1, batch=1)
            q, k, v, _ = tensors(situation, shift=case.shift)
            out = attn(q, k, v, is_causal=is_causal)
            assert out.shape == q.shape
            assert bool(torch.isfinite(out).all())
        nothing = Situation(3 if case.spec.cross else 0, 0, heads=2, kv_heads=1)
        q, k, v, _ = tensors(nothing)
        assert not attn(q, k, v, is_causal=is_causal).any()
    if case.spec.needs_max_length:
        short = case.build(dtype=torch.float64, prefer=backend, max_length=20)
        q, k, v, _ = tensors(Situation(21, 21))
        with pytest.raises(ValueError, match=r"21.*max_length=20"):
            short(q, k, v, **possible(case.spec))
        assert (
            short(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], **possible(case.spec)).shape
            == q[:, :, 1:].shape
        )


@pytest.mark.parametrize(
    "case",
    [
        case
        for name in attnzoo.names()
        for case in CASES.get(name, [Case(name)])
        if hasattr(case.build(), "redraw")
    ],
    ids=str,
)
def test_rule_9_random_features(case: Case) -> None:
    """Redrawing is explicit and repeatable, training never does it, and large scores stay finite.
    (`test_favor.py` has the statistics.)"""
    attn = case.build().train()
    q, k, v, _ = tensors(Situation(200, 200))
    first = copy.deepcopy(attn.state_dict())
    for is_causal in kinds(case):
        for spread in (1.0, 4.0, 8.0):
            q32, k32, v32 = float32(q * spread, k * spread, v)
            out = attn(q32, k32, v32, is_causal=is_causal)
            assert bool(torch.isfinite(out).all()), f"spread {spread}"
            for gradient in gradients_of(out, torch.ones_like(out), q32, k32, v32):
                assert bool(torch.isfinite(gradient).all()), f"gradient at spread {spread}"
    assert all(torch.equal(first[name], value) for name, value in attn.state_dict().items())
    attn.redraw(7)  # type: ignore[operator]
    second = copy.deepcopy(attn.state_dict())
    assert any(not torch.equal(first[name], value) for name, value in second.items())
    attn.redraw(8)  # type: ignore[operator]
    attn.redraw(7)  # type: ignore[operator]
    assert all(torch.equal(second[name], value) for name, value in attn.state_dict().items())


@cache
def reference_in_half(
    case: Case, dtype: torch.dtype, is_causal: bool, mean: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k and v of 600 tokens, what exact numbers give of them, and what the reference does."""
    q, k, v, _ = (
        x.to(dtype)
        for x in tensors(Situation(600, 600, heads=2, kv_heads=1, batch=1), shift=case.shift)
    )
    v = v + mean
    exact = case.build(2).double()(q.double(), k.double(), v.double(), is_causal=is_causal)
    reference = case.build(2, dtype=dtype, backend="reference")(q, k, v, is_causal=is_causal)
    return q, k, v, exact.detach(), reference.detach()


@pytest.mark.parametrize(
    ("case", "backend", "dtype"),
    [
        staged(c, b, dtype, first=place % 2 == number)
        for place, case in enumerate(usual_cases())
        for number, dtype in enumerate((torch.float16, torch.bfloat16))
        for c, b in with_backends([case])
        if b != "reference"  # which it is measured by
    ],
)
def test_rule_10_sums_run_in_float32(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Half precision errs at most twice as much as the reference does, over a length at which sums
    in half precision would be lost."""
    # A mean of 1 does not cancel.
    for is_causal, mean in ((causal, mean) for causal in kinds(case) for mean in (0.0, 1.0)):
        q, k, v, exact, reference = reference_in_half(case, dtype, is_causal, mean)
        out = case.build(2, dtype=dtype, prefer=backend)(q, k, v, is_causal=is_causal)
        assert out.dtype == dtype
        allowed, error = reference.double() - exact, out.double() - exact
        assert error.norm() <= 2 * allowed.norm(), (
            f"error {error.norm():.3g}, the reference's is {allowed.norm():.3g}"
        )
        # One entry of the reference may be lucky; rounding the largest output alone may cost half a
        # unit of it.
        worst = max(
            allowed.abs().max().item(), torch.finfo(dtype).eps / 2 * exact.abs().max().item()
        )
        assert error.abs().max() <= 2 * worst, (
            f"largest error {error.abs().max():.3g}, the reference's is {worst:.3g}"
        )


@VARIANTS
def test_rule_11_one_number_one_convention(case: Case) -> None:
    """flops = 2 · macs; the support's MACs of an exact variant are two products of head_dim for
    every nonzero entry of A, or for as many as there can be."""
    attn = case.build(dtype=torch.float64)
    for query_length, key_length in ((70, 70), (9, 70), (1, 1)):
        q, k, _, _ = tensors(Situation(query_length, key_length), shift=case.shift)
        for is_causal in kinds(case):
            cost = attn.cost(2, query_length, key_length, kv_heads=2, is_causal=is_causal)
            assert isinstance(cost.macs, int) and cost.flops == 2 * cost.macs > 0
            if case.spec.exact and (query_length == key_length or case.spec.cross):
                pairs = int((attn.weights(q, k, is_causal=is_causal) != 0).sum())
                needed = 2 * attn.head_dim * pairs
                assert cost.support_macs == needed or (
                    case.spec.data_dependent and cost.support_macs > needed
                )


@BACKENDS
def test_rule_12_trains_and_travels(case: Case, backend: str) -> None:
    """Gradcheck in float64; copies, pickles and a state_dict loaded into another draw give the same
    bits. (`test_compile.py` compiles.)"""
    attn = case.build(2, 4, dtype=torch.float64, prefer=backend)
    q, k, v, _ = tensors(
        Situation(5 if case.spec.cross else 6, 6, heads=2, kv_heads=1), 4, shift=case.shift
    )
    mask = torch.tensor([[True] * 6, [False, True, True, False, True, False]])
    ways = kinds(case)
    for is_causal in ways:
        # Where there are two, one is tried without a mask and one with it
        for key_mask in (None, mask) if len(ways) == 1 else (mask if is_causal else None,):
            inputs = (
                q.requires_grad_(),
                k.requires_grad_(),
                v.requires_grad_(),
                *attn.parameters(),
            )

            def run(
                q: Tensor,
                k: Tensor,
                v: Tensor,
                *_: Tensor,
                mask: Tensor | None = key_mask,
                causal: bool = is_causal,
            ) -> Tensor:
                return attn(q, k, v, key_mask=mask, is_causal=causal)

            assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-6, fast_mode=True)
    more = {"seed": 99} if "seed" in inspect.signature(type(attn)).parameters else {}
    torch.manual_seed(99)
    other = attnzoo.build(
        case.variant, heads=2, head_dim=4, **(sized(case.variant, 1024) | case.options | more)
    ).double()
    other.load_state_dict(attn.state_dict())
    plain = case.build(2, 4, dtype=torch.float64)
    twins = {
        "deepcopy": copy.deepcopy(plain),
        "pickle": pickle.loads(pickle.dumps(plain)),
        "state_dict": other,
    }
    q, k, v, _ = tensors(Situation(LONG, LONG, heads=2), 4, shift=case.shift)
    for is_causal in kinds(case):
        out = attn(q, k, v, is_causal=is_causal)
        for how, twin in twins.items():
            same = preferring(twin, backend)(q, k, v, is_causal=is_causal)
            assert torch.equal(same, out), f"after {how}"
