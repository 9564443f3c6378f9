"""benchmarks/papers: its closed forms against quadrature, its reach against a plain search, and
that every study has its row, result and figure."""

from __future__ import annotations

import json
import math
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
import attnzoo.benchmarking.peak_memory
from attnzoo.engines.sparse.patterns.grid import Grid

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks/ is run from the repository's root and not installed
FOLDER = ROOT / "benchmarks" / "papers"
STUDIES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "study")
study: Any = import_module("benchmarks.papers.study")
kernel: Any = import_module("benchmarks.papers.performer_kernel")
spectrum: Any = import_module("benchmarks.papers.linformer_spectrum")
reach: Any = import_module("benchmarks.papers.bigbird_reach")
decoding: Any = import_module("benchmarks.papers.linear_decoding")
flash: Any = import_module("benchmarks.papers.flash_memory")
longformer: Any = import_module("benchmarks.papers.longformer_speed")

PAIRS = (((0.3, 0.1), (0.2, 0.4)), ((0.5, 0.0), (-0.4, 0.3)), ((0.4, 0.2), (-0.4, -0.2)))
X, Y = (torch.tensor([pair[side] for pair in PAIRS], dtype=torch.float64) for side in range(2))


def gaussian(count: int = 4001, span: float = 10.0) -> tuple[Tensor, Tensor]:
    """Points and weights that integrate against N(0, 1)."""
    points = torch.linspace(-span, span, count, dtype=torch.float64)
    weights = (-points.square() / 2).exp()
    return points, weights / weights.sum()


@pytest.mark.parametrize("kind", kernel.KINDS)
def test_lemma_2_against_quadrature(kind: str) -> None:
    """The variance of one term, integrated over the one direction of ω that it depends on."""
    points, weights = gaussian()
    base = (X.square() + Y.square()).sum(-1, keepdim=True) / 2
    along = points * (X - Y if kind == "trigonometric" else X + Y).norm(dim=-1, keepdim=True)
    terms = {
        "positive": (along - base).exp(),
        "hyperbolic": along.cosh() * (-base).exp(),
        "trigonometric": along.cos() * base.exp(),
    }[kind]
    mean = terms @ weights
    torch.testing.assert_close(mean, (X * Y).sum(-1).exp())
    torch.testing.assert_close(
        kernel.closed_form(kind, X, Y, 5), (terms.square() @ weights - mean**2) / 5
    )


def test_theorem_2_bounds_the_error_of_two_orthogonal_directions() -> None:
    """In the plane: ω₁ and ω₂ at right angles, norms independent, integrated over both norms and
    the angle."""
    radii = torch.linspace(0, 9, 901, dtype=torch.float64)
    density = radii * (-radii.square() / 2).exp()
    density = density / density.sum()
    angles = torch.arange(720, dtype=torch.float64) * (2 * math.pi / 720)
    z = (X + Y).norm(dim=-1)[:, None, None]
    along = ((radii * angles.cos()[:, None] * z).exp() * density).sum(-1)  # (pairs, angles)
    across = ((radii * angles.sin()[:, None] * z).exp() * density).sum(-1)
    base = (-(X.square() + Y.square()).sum(-1)).exp()
    product = base * (along * across).mean(-1)
    independent = kernel.closed_form("positive", X, Y, 2)
    orthogonal = independent + (product - (2 * X * Y).sum(-1).exp()) / 2
    bound = independent - kernel.orthogonal_gain(X, Y, 2)
    assert (orthogonal <= bound + 1e-9).all()
    assert (bound[:2] < independent[:2] - 1e-6).all()
    assert bound[2] == pytest.approx(float(independent[2]), abs=1e-12)  # x = -y: nothing to gain


@pytest.mark.parametrize("kind", kernel.KINDS)
def test_estimates_reach_the_closed_form(kind: str) -> None:
    found = kernel.estimates(kind, X, Y, 20000, features=4, orthogonal=False, seed=0)
    squared = (found - (X * Y).sum(-1).exp()).square()
    assert found.shape == (20000, len(PAIRS))
    assert (
        (squared.mean(0) - kernel.closed_form(kind, X, Y, 4)).abs()
        < 5 * squared.std(0) / 20000**0.5 + 1e-12
    ).all()


def test_cumulative_spectrum_and_best_error() -> None:
    a = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, values, v = torch.linalg.svd(a)
    assert spectrum.cumulative(torch.tensor([3.0, 1.0, 0.0])).tolist() == [0.75, 1.0, 1.0]
    truncated = u[:, :2] * values[:2] @ v[:2]
    assert float(spectrum.best_error(values, 2)) == pytest.approx(
        float((a - truncated).norm() / a.norm())
    )


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_shuffled_rows_keep_their_entries_and_the_future_hidden(is_causal: bool) -> None:
    scores = torch.randn(3, 40, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hidden = torch.ones(40, 40).triu(1).bool() if is_causal else torch.zeros(40, 40).bool()
    a = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    other = spectrum.shuffled(a, is_causal)
    assert torch.equal(other.sort(-1).values, a.sort(-1).values)
    assert not torch.equal(other, a)
    assert other.masked_select(hidden).abs().sum() == 0


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("name", reach.ABLATION)
def test_reach_is_that_of_a_plain_search(name: str, heads: int) -> None:
    """Every source by itself, one layer after another, over the blocks of the pattern's own
    mask."""
    blocks = reach.ABLATION[name]
    for length, seed in ((512, 0), (1024, 0), (1024, 1)):
        options = dict(
            zip(
                ("num_random_blocks", "num_window_blocks", "num_global_blocks"), blocks, strict=True
            )
        )
        attention: Any = attnzoo.build("bigbird", heads=heads, head_dim=64, seed=seed, **options)
        seen = (
            attention.engine.pattern.mask(Grid(heads, length, length, False))
            .any(0)[::64, ::64]
            .tolist()
        )
        assert reach.layers_needed(blocks, length, heads, seed) == plain_reach(seen)


def plain_reach(seen: list[list[bool]]) -> int | None:
    farthest = 0
    for source in range(len(seen)):
        reached, layers = {source}, 0
        while len(reached) < len(seen):
            further = {i for i, row in enumerate(seen) if any(row[j] for j in reached)} | reached
            if further == reached:
                return None
            reached, layers = further, layers + 1
        farthest = max(farthest, layers)
    return farthest


def test_reach_of_known_graphs() -> None:
    assert reach.layers_needed((0, 3, 0), 64 * 20, 1, 0) == 19  # a path of blocks
    assert reach.layers_needed((0, 9, 0), 64 * 21, 1, 0) == 5
    assert reach.layers_needed((0, 3, 2), 64 * 20, 1, 0) == 2  # by way of the first block
    assert reach.layers_needed((0, 1, 0), 64 * 20, 1, 0) is None


def test_stored_attention_is_exact_attention() -> None:
    q, k, v = (torch.randn(2, 3, 20, 8, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(
        study.stored_attention(q, k, v), attnzoo.build("standard", heads=3, head_dim=8)(q, k, v)
    )


@pytest.mark.parametrize("length", [3, 9, 40])
def test_a_window_by_diagonals_is_a_window(length: int) -> None:
    q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.float64) for _ in range(3))
    wanted = attnzoo.build("sliding_window", heads=3, head_dim=8, window=7)(q, k, v)
    torch.testing.assert_close(longformer.by_diagonals(q, k, v, window=7), wanted)


def test_a_window_needs_no_square() -> None:
    """Whichever way it is computed: twice the tokens take about twice the memory, and of A four
    times."""
    peaks = {
        n: {
            label: attnzoo.benchmarking.peak_memory.peak_bytes(call)
            for label, call in longformer.calls(n, 1).items()
        }
        for n in (1024, 2048)
    }
    grown = {label: peaks[2048][label] / peaks[1024][label] for label in peaks[1024]}
    assert (
        grown["A stored"] == pytest.approx(4, rel=0.05)
        and max(grown["window, by diagonals"], grown["longformer"]) < 2.2
    ), grown


def test_flash_needs_no_square() -> None:
    """A stored: its scores and their softmax, 2n² numbers. Tiles: far less at the first length
    where several fit."""
    assert flash.peak(study.stored_attention, 512, False) >= 2 * 512**2 * 4
    assert flash.peak(flash.CONTENDERS["flash"], 512, False) < 512**2 * 4


def test_the_past_of_linear_attention_does_not_grow() -> None:
    read = {
        (variant, length): decoding.Decoder(variant, length).read_bytes()
        for variant in ("linear", "standard")
        for length in (10, 600)
    }
    assert read["linear", 600] == read["linear", 10] > 0
    assert [read["standard", length] for length in (10, 600)] == [
        2 * 4 * 8 * 32 * length for length in (10, 600)
    ]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_recorded_drawn_and_on_the_page(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    module: Any = import_module(f"benchmarks.papers.{name}")
    rows = study.read(study.RESULTS / f"{name}.jsonl")
    assert name == module.NAME
    assert all(row["environment"]["torch"] for row in rows)
    module.draw(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert (study.FIGURES / f"{name}.png").exists()
    page = (study.ROOT / "docs" / "results" / "papers.md").read_text(encoding="utf-8")
    assert f"| [`{name}`](../../benchmarks/papers/{name}.py) |" in page
    assert f"(../figures/papers/{name}.png)" in page


def test_record_keeps_the_older_file_when_a_study_stops(tmp_path: Path) -> None:
    path = tmp_path / "a" / "rows.jsonl"
    study.record(path, [{"x": 1}])

    def stopping() -> Any:
        yield {"x": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study.record(path, stopping())
    assert [json.loads(line)["x"] for line in path.read_text().splitlines()] == [1]
    assert list(path.parent.iterdir()) == [path]


def test_redraw_without_a_result_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["study", "--redraw"])
    with pytest.raises(
        SystemExit, match=r"rows\.jsonl is not there: run the study without --redraw first$"
    ):
        study.run("rows", lambda quick: [], lambda rows, path: None)
