"""FAVOR+ as statistics: unbiased, with the paper's mean squared error, orthogonal rows, and no
stabiliser that leaks or drowns."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import pytest
import torch
from cases import Case, Situation, gradients_of, tensors
from stages import in_turn
from torch import Tensor

from attnzoo.variants.performer.random_features import RandomFeatures, draw_projection

HEAD_DIM = 4
FEATURES = 4  # one orthogonal block
DRAWS = 20000
UNBIASED = ("positive", "hyperbolic", "trigonometric")


def pairs() -> tuple[Tensor, Tensor]:
    """Queries and keys of small norms, (pairs, head_dim): x·y of both signs and x = -y among
    them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, HEAD_DIM, generator=generator, dtype=torch.float64) * 0.25
    y = torch.randn(6, HEAD_DIM, generator=generator, dtype=torch.float64) * 0.25
    return torch.cat([x, x[:1]]), torch.cat([y, -x[:1]])


@lru_cache
def estimates(kind: str, orthogonal: bool, scale: float = 1.0) -> Tensor:
    """phi(x)·phi(y) of every pair for independent draws of FEATURES rows, (draws, pairs): the rows
    of one long draw, cut up."""
    x, y = pairs()
    feature_map = RandomFeatures(
        HEAD_DIM, DRAWS * FEATURES, kind, orthogonal=orthogonal, seed=0, scale=scale
    ).double()
    products = phi(feature_map.key(x)) * phi(feature_map.key(y)) * DRAWS
    return products.unflatten(-1, (-1, DRAWS, FEATURES)).sum((1, 3)).T


def phi(features: tuple[Tensor, Tensor | None]) -> Tensor:
    values, log_scale = features
    return values if log_scale is None else values * log_scale.exp()[..., None]


def mean_squared_error(kind: str, x: Tensor, y: Tensor) -> Tensor:
    """Of the mean of FEATURES independent terms, derived from E exp(ω·u) = exp(|u|²/2) and E
    cos(ω·u) = exp(-|u|²/2).

    With c = exp(-|x|²-|y|²), s = |x+y|², t = |x-y|²: a term of `positive` is √c·exp(ω·(x+y)), whose
    variance is c·(exp(2s) - exp(s)); of `hyperbolic` √c·cosh(ω·(x+y)), c·(exp(s) - 1)²/2; of
    `trigonometric` cos(ω·(x-y))/√c, (1 - exp(-t))²/2c (Choromanski et al. 2021, Lemma 2).
    """
    c = (-x.square().sum(-1) - y.square().sum(-1)).exp()
    s, t = (x + y).square().sum(-1), (x - y).square().sum(-1)
    variance = {
        "positive": c * ((2 * s).exp() - s.exp()),
        "hyperbolic": c * (s.exp() - 1) ** 2 / 2,
        "trigonometric": (1 - (-t).exp()) ** 2 / (2 * c),
    }
    return variance[kind] / FEATURES


@pytest.mark.parametrize(("kind", "orthogonal"), in_turn([*UNBIASED], [False, True]))
def test_unbiased(kind: str, orthogonal: bool) -> None:
    """The mean over draws reaches exp(scale · x·y) within five standard errors."""
    x, y = pairs()
    for scale in (1.0, 0.25):
        found = estimates(kind, orthogonal, scale)
        standard_error = found.std(0) / DRAWS**0.5 + 1e-12
        assert ((found.mean(0) - (scale * x * y).sum(-1).exp()).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("kind", UNBIASED)
def test_mean_squared_error_is_the_papers(kind: str) -> None:
    """Independent rows reach the closed form; orthogonal rows stay below it (Theorem 2)."""
    x, y = pairs()
    exact, expected = (x * y).sum(-1).exp(), mean_squared_error(kind, x, y)
    squared = (estimates(kind, False) - exact).square()
    standard_error = squared.std(0) / DRAWS**0.5 + 1e-12
    assert ((squared.mean(0) - expected).abs() < 5 * standard_error).all()
    orthogonal = (estimates(kind, True) - exact).square().mean(0)
    assert (orthogonal < expected + 3 * standard_error).all()
    assert orthogonal.sum() < 0.95 * expected.sum()


def test_hyperbolic_beats_positive_by_the_papers_ratio() -> None:
    """MSE(hyperbolic) = (1 - exp(-|x+y|²)) / 2 · MSE(positive), with the same rows; it needs twice
    the features."""
    x, y = pairs()
    ratio = (1 - (-(x + y).square().sum(-1)).exp()) / 2
    torch.testing.assert_close(
        mean_squared_error("hyperbolic", x, y), ratio * mean_squared_error("positive", x, y)
    )
    widths = {
        kind: RandomFeatures(HEAD_DIM, 5, kind, orthogonal=True, seed=0, scale=None)
        .query(x)
        .shape[-1]
        for kind in RandomFeatures.KINDS
    }
    assert widths == {"positive": 5, "hyperbolic": 10, "trigonometric": 10, "relu": 5}


@pytest.mark.parametrize("rows", [5, 16, 40])
def test_orthogonal_rows(rows: int) -> None:
    """Exactly orthogonal within a block of head_dim rows, independent between blocks, the last
    block partial."""
    omega = draw_projection(rows, 16, orthogonal=True, seed=4).double()
    assert omega.shape == (rows, 16)
    unit = omega / omega.norm(dim=1, keepdim=True)
    gram = (unit @ unit.T - torch.eye(rows)).abs()
    for start in range(0, rows, 16):
        assert gram[start : start + 16, start : start + 16].max() < 1e-6
    if rows > 16:
        assert gram[:16, 16:].max() > 0.1


@pytest.mark.parametrize("orthogonal", [False, True], ids=["iid", "orthogonal"])
def test_rows_are_standard_normal(orthogonal: bool) -> None:
    """Norms chi-distributed (Kolmogorov-Smirnov), directions uniform: without the sign of diag(R),
    QR's rows have a mean."""
    draws, d = 4000, 6
    omega = torch.stack(
        [draw_projection(d, d, orthogonal=orthogonal, seed=seed) for seed in range(draws)]
    ).double()
    squares = omega.square().sum(-1).flatten().sort().values
    distribution = torch.special.gammainc(torch.tensor(d / 2, dtype=torch.float64), squares / 2)
    steps = torch.arange(1, len(squares) + 1, dtype=torch.float64) / len(squares)
    assert (distribution - steps).abs().max() < 1.95 / len(squares) ** 0.5  # one in a thousand
    assert omega.mean(0).abs().max() < 5 / draws**0.5
    covariance = torch.einsum("nri,nrj->rij", omega, omega) / draws
    assert (covariance - torch.eye(d)).abs().max() < 5 * (2 / draws) ** 0.5


def test_redraw() -> None:
    """Explicit, repeatable by seed and by torch's global seed, and equal to building with that
    seed."""
    attn, other = (
        Case("performer", {"num_features": 24}).build(),
        Case("performer", {"num_features": 24, "seed": 7}).build(),
    )
    q, k, v, _ = (x.float() for x in tensors(Situation(20, 20)))
    before = attn(q, k, v)
    attn.redraw(7)  # type: ignore[operator]
    assert not torch.allclose(attn(q, k, v), before)
    assert torch.equal(attn(q, k, v), other(q, k, v))
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        attn.redraw()  # type: ignore[operator]
        drawn.append(attn(q, k, v))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    attn.redraw(0)  # type: ignore[operator]
    assert torch.equal(attn(q, k, v), before)


@pytest.mark.parametrize(
    ("dtype", "features", "scale"),
    in_turn(
        [
            (dtype, features)
            for dtype in (torch.float32, torch.bfloat16)
            for features in RandomFeatures.KINDS
        ],
        [16, 64],
    ),
)
def test_large_scores_stay_finite(features: str, scale: int, dtype: torch.dtype) -> None:
    """Scores of standard deviation 16 and 64: the estimate is poor there, but it is a number,
    forward and backward."""
    for head_dim, num_features in ((8, 24), (64, 64), (64, 256)):
        for backend in ("chunked", "reference"):
            attn = Case("performer", {"num_features": num_features, "features": features}).build(
                2, head_dim, backend=backend
            )
            for seed in range(3):
                q, k, v, _ = tensors(Situation(150, 150, heads=2, batch=1), head_dim, seed=seed)
                # Scores have standard deviation spread² · √head_dim · head_dim^-½.
                spread = scale**0.5
                q, k, v = (
                    (x * s).to(dtype).requires_grad_()
                    for x, s in ((q, spread), (k, spread), (v, 1.0))
                )
                for is_causal in (False, True):
                    out = attn(q, k, v, is_causal=is_causal)
                    assert bool(torch.isfinite(out).all()), (
                        f"output by {backend}, head_dim {head_dim}"
                    )
                    for name, gradient in zip(
                        "qkv", gradients_of(out, torch.ones_like(out), q, k, v), strict=True
                    ):
                        assert bool(torch.isfinite(gradient).all()), (
                            f"gradient of {name} by {backend}, head_dim {head_dim}"
                        )


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("features", ["positive", "hyperbolic"])
@pytest.mark.parametrize("position", [1, 60, 127, 128, 200, 299])
def test_a_future_key_neither_leaks_nor_drowns_the_past(
    features: str, position: int, backend: str
) -> None:
    """Long keys have features of e^-200; under a maximum that looked ahead, a short key to come
    would turn them to 0."""
    attn = Case("performer", {"num_features": 24, "features": features}).build(backend=backend)
    q, k, v, _ = (x.float() for x in tensors(Situation(300, 300, kv_heads=4)))
    k = k / k.norm(dim=-1, keepdim=True) * 35
    prefix = attn(q[:, :, :position], k[:, :, :position], v[:, :, :position], is_causal=True)
    for norm in (0.0, 1.0, 1e4):
        future = k.clone()
        future[:, :, position] = norm / math.sqrt(8)
        rows = attn(q, future, v, is_causal=True)[:, :, :position]
        assert torch.equal(rows, attn(q, k, v, is_causal=True)[:, :, :position])
        torch.testing.assert_close(rows, prefix, rtol=1e-4, atol=1e-5)
    assert rows.abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_a_padded_slot_is_not_the_stabiliser(is_causal: bool, backend: str) -> None:
    """A padded key is cleared to 0, whose features are 1: the maximum over all keys would turn
    every long real one to 0."""
    attn = Case("performer", {"num_features": 24}).build(backend=backend)
    q, k, v, _ = (x.float() for x in tensors(Situation(50, 50, kv_heads=4)))
    k = k / k.norm(dim=-1, keepdim=True) * 35
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[:, 40:] = False
    out = attn(q, k, v, key_mask=mask, is_causal=is_causal)[:, :, :40]
    torch.testing.assert_close(
        out,
        attn(q[:, :, :40], k[:, :, :40], v[:, :, :40], is_causal=is_causal),
        rtol=1e-4,
        atol=1e-5,
    )
    assert out.abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("features", UNBIASED)
def test_more_features_approach_softmax_at_small_norms(features: str) -> None:
    """No bias is left over: the distance of A from softmax's falls as 1/√m."""
    q, k, _, _ = tensors(Situation(64, 64, heads=1, kv_heads=1, batch=1), seed=2)
    q, k = q * 0.4, k * 0.4
    exact = Case("standard").build(1, dtype=torch.float64).weights(q, k)
    errors = []
    for num_features in (128, 2048, 32768):
        a = (
            Case("performer", {"num_features": num_features, "features": features})
            .build(1, dtype=torch.float64)
            .weights(q, k)
        )
        errors.append(((a - exact).norm() / exact.norm()).item())
    assert errors[2] < 0.02
    for coarse, fine in itertools.pairwise(errors):
        assert 2 < coarse / fine < 8  # 4, but for the luck of one draw


def test_what_the_docstring_says_of_unit_norms() -> None:
    """At N(0, 1), head_dim 64 and 256 features the output is worse than answering the mean of v; at
    small norms it is better."""
    q, k, v, _ = tensors(Situation(512, 512, heads=4, kv_heads=4, batch=1), 64)
    performer, exact = (
        Case("performer").build(4, 64, dtype=torch.float64),
        Case("standard").build(4, 64, dtype=torch.float64),
    )

    def error(spread: float, answer: Tensor | None = None) -> float:
        wanted = exact(q * spread, k * spread, v)
        found = performer(q * spread, k * spread, v) if answer is None else answer
        return ((found - wanted).norm() / wanted.norm()).item()

    mean = v.mean(2, keepdim=True).expand_as(v)
    assert error(1.0) > 3 > 0.9 > error(1.0, mean) > 0.7
    assert error(0.3) < error(0.3, mean)
