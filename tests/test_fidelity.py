"""Distances from exact attention, and the comparison that is made of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import TOYS, Uniform

import attnzoo
from attnzoo import packages, registry
from attnzoo.fidelity import (
    Comparison,
    Sample,
    compare,
    load_samples,
    metrics,
    synthetic_sample,
)
from attnzoo.fidelity.measure_variant import BASELINE, DRAWS, build_for
from attnzoo.registry import Choice, sized
from attnzoo.report.heatmaps import heat_map_figure
from attnzoo.texts.plays import play, titles


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, toy in TOYS.items():
        monkeypatch.setitem(registry._registered, name, toy)


def grouped_sample(length: int = 40, is_causal: bool = True) -> Sample:
    return synthetic_sample(
        length, is_causal=is_causal, spread=2.0, heads=4, kv_heads=2, head_dim=8
    )


def exact_by_loops(q: torch.Tensor, k: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """Softmax's A for one head, from the equation."""
    weights = torch.zeros(q.shape[0], k.shape[0], dtype=torch.float64)
    for i in range(q.shape[0]):
        keys = range(i + 1) if is_causal else range(k.shape[0])
        scores = [
            math.exp(float(q[i].double() @ k[j].double()) / math.sqrt(q.shape[1])) for j in keys
        ]
        for j in keys:
            weights[i, j] = scores[j] / sum(scores)
    return weights


@pytest.mark.parametrize("is_causal", [False, True])
def test_exact_attention_is_softmax_row_by_row(
    is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "ROWS", 16)
    sample = grouped_sample(is_causal=is_causal)
    out = metrics.exact_output(sample.q, sample.k, sample.v, is_causal=is_causal)
    for head in range(4):
        weights = exact_by_loops(sample.q[0, head], sample.k[0, head // 2], is_causal)
        torch.testing.assert_close(
            out[0, head], weights @ sample.v[0, head // 2].double(), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("is_causal", [False, True])
def test_score_std_is_that_of_the_visible_pairs(
    is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "ROWS", 16)
    sample = grouped_sample(is_causal=is_causal)
    scores = sample.q @ sample.k.repeat_interleave(2, 1).transpose(2, 3) / math.sqrt(8)
    visible = torch.ones(40, 40, dtype=torch.bool).tril(0 if is_causal else 40)
    assert metrics.score_std(sample.q, sample.k, is_causal=is_causal) == pytest.approx(
        float(scores[:, :, visible].std(unbiased=False)), rel=1e-4
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_mean_of_the_values_has_the_error_of_uniform_attention(is_causal: bool) -> None:
    sample = grouped_sample(is_causal=is_causal)
    mean = metrics.mean_value_output(sample.v, 4, is_causal=is_causal)
    torch.testing.assert_close(
        mean.float(), Uniform(4, 8)(sample.q, sample.k, sample.v, is_causal=is_causal)
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_distance_of_weights_is_its_definition(is_causal: bool) -> None:
    sample = grouped_sample(is_causal=is_causal)
    found = metrics.weight_distance(Uniform(4, 8), sample.q, sample.k, is_causal=is_causal)
    variations, kept = [], []
    for head in range(4):
        exact = exact_by_loops(sample.q[0, head], sample.k[0, head // 2], is_causal)
        for i, row in enumerate(exact):
            seen = i + 1 if is_causal else 40
            uniform = [1 / seen if j < seen else 0.0 for j in range(40)]
            variations.append(sum(abs(u - float(e)) for u, e in zip(uniform, row, strict=True)) / 2)
            top = sorted(range(seen), key=lambda j, row=row: -float(row[j]))[:16]
            kept.append(min(1.0, sum(uniform[j] for j in top) / sum(float(row[j]) for j in top)))
    assert found.total_variation == pytest.approx(sum(variations) / len(variations), rel=1e-5)
    assert found.top_mass_kept == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    assert found.rows == 40


@pytest.mark.parametrize(
    "name", [name for name in attnzoo.names() if attnzoo.describe(name).spec.causal]
)
def test_sampled_rows_are_rows_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "WHOLE_LENGTH", 100)
    sample = synthetic_sample(331, is_causal=True, spread=1.0, heads=2, kv_heads=1, head_dim=8)
    attention = attnzoo.build(name, heads=2, head_dim=8, **sized(name, 331)).double()
    q, k = sample.q.double(), sample.k.double()
    whole = attention.weights(q, k, is_causal=True)
    blocks = list(metrics._weights(attention, q, k, True))
    if attention.spec.cross:  # of others, the whole is cut
        assert [rows.stop for rows, _ in blocks] == [82, 165, 248, 331]
    for rows, weights in blocks:
        wanted = whole[:, :, rows.start : rows.stop, : weights.shape[3]]
        torch.testing.assert_close(weights, wanted, rtol=1e-9, atol=1e-12)


def test_mass_on_the_future_counts_against_a_variant() -> None:
    class Leaking(Uniform):
        def weights(self, q: torch.Tensor, k: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full((*q.shape[:3], k.shape[2]), 1 / k.shape[2])

    sample = grouped_sample()
    exact = torch.stack(
        [exact_by_loops(sample.q[0, head], sample.k[0, head // 2], True) for head in range(4)]
    )
    wanted = float((1 / 40 - exact).abs().sum(-1).mean() / 2)
    found = metrics.weight_distance(Leaking(4, 8), sample.q, sample.k, is_causal=True)
    assert found.total_variation == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("length", [3, 64, 100])
def test_pooling_keeps_row_sums_and_averages_queries(length: int) -> None:
    weights = torch.rand(length, length).softmax(-1)
    cells = metrics.pooled(weights, 64)
    assert cells.shape == (min(length, 64), min(length, 64))
    torch.testing.assert_close(cells.sum(1), torch.ones(len(cells)))
    if length <= 64:
        torch.testing.assert_close(cells, weights)


def test_synthetic_scores_have_the_stated_spread() -> None:
    for spread in (1.0, 3.0):
        assert synthetic_sample(300, is_causal=False, spread=spread).score_std == pytest.approx(
            spread, rel=0.1
        )
    first, second = (
        synthetic_sample(30, is_causal=True, spread=1.0, seed=seed).q for seed in (0, 1)
    )
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="spread=0"):
        synthetic_sample(30, is_causal=True, spread=0.0)


def one(variants: list[Choice], sample: Sample | None = None, **options: Any):
    """The only row of a comparison."""
    return compare([sample or grouped_sample()], variants, rounds=3, **options).rows[0]


def test_the_exact_row_is_the_measure_of_the_others() -> None:
    row = one([Choice("standard")])
    assert row.output_error is not None and row.output_error < 1e-6
    assert row.total_variation is not None and row.total_variation < 1e-6
    assert row.top_mass_kept == pytest.approx(1.0, abs=1e-6)
    assert (row.speedup, row.promised_speedup, row.rounds, row.backend, row.note) == (
        1.0,
        1.0,
        3,
        "sdpa",
        "",
    )
    assert row.macs == row.exact_macs == 2 * 4 * 8 * 40 * 41 // 2
    assert (
        row.seconds is not None
        and row.seconds > 0
        and row.peak_bytes is not None
        and row.peak_bytes >= 4 * 40 * 8 * 4
    )


@pytest.mark.usefixtures("toys")
def test_doing_nothing_loses_to_itself() -> None:
    row = one([Choice("uniform")])
    assert row.output_error == pytest.approx(row.mean_value_error, rel=1e-5)
    assert row.exact_macs is not None and row.promised_speedup == pytest.approx(
        row.exact_macs / 1000
    )
    assert row.backend == "fast" and row.seconds is not None


@pytest.mark.usefixtures("toys")
def test_a_wrong_backend_gets_an_error_but_no_time() -> None:
    row = one([Choice("wrong")])
    assert (
        row.output_error is not None
        and row.mean_value_error is not None
        and row.output_error > row.mean_value_error
    )
    assert row.seconds is row.speedup is row.seconds_quartiles is None and row.rounds == 0
    assert (
        row.note == "not timed: backend fast is off its reference by 1 (allowed 0.0001 in float32)"
    )


@pytest.mark.usefixtures("toys")
def test_nan_is_said_and_neither_averaged_nor_timed() -> None:
    comparison = compare([grouped_sample()], [Choice("not_a_number")], rounds=1)
    row = comparison.rows[0]
    assert (
        row.output_error is row.total_variation is row.seconds is None
        and row.note == "NaN or inf in the output"
    )
    assert Comparison.from_json(comparison.to_json()) == comparison


@pytest.mark.usefixtures("toys")
def test_parameters_that_nothing_trained_are_counted() -> None:
    assert "untrained: 5 random parameters" in one([Choice("untrained")]).note


@torch.no_grad()
def test_entries_below_zero_and_missing_gates_are_said() -> None:
    """In the row, and beside the colours of the picture."""
    sample = synthetic_sample(40, is_causal=True, spread=1.0, heads=1, kv_heads=1, head_dim=8)
    names = ("gated_deltanet", "linear", "sigmoid")
    comparison = compare([sample], [Choice(name) for name in names], lengths=[40], rounds=1)
    gated, linear, sigmoid = (row for row in comparison.rows if row.variant in names)
    a = attnzoo.build("gated_deltanet", 1, 8).weights(sample.q, sample.k, is_causal=True)
    share = a.clamp(max=0).sum() / -a.abs().sum()
    assert 0.05 < share < 0.95
    assert gated.note == (
        "without log_decay, beta, which a model learns; "
        f"A has entries below 0: {share:.0%} of its mass"
    )
    assert not linear.note
    row_sum = attnzoo.build("sigmoid", 1, 8).weights(sample.q, sample.k, is_causal=True).sum(-1)
    assert abs(row_sum.mean() - 1) > 0.1
    assert sigmoid.note == f"rows of A sum to {row_sum.mean():.2g} on average, not to 1"

    def told(*labels: str) -> list[str]:
        figure = heat_map_figure([one for one in comparison.heat_maps if one.label in labels])
        return [text.get_text() for text in figure.legends[0].get_texts()]

    assert told("standard", "gated_deltanet") == ["0", "below 0"]
    assert told("standard", "linear") == ["0"]


@pytest.mark.usefixtures("toys")
def test_a_variant_that_draws_is_averaged_over_draws() -> None:
    sample = synthetic_sample(40, is_causal=False, spread=1.0, heads=1, kv_heads=1, head_dim=8)
    row = one([Choice("drawn")], sample)
    exact = metrics.exact_output(sample.q, sample.k, sample.v, is_causal=False)
    mean = metrics.mean_value_output(sample.v, 1, is_causal=False)
    errors = []
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        factor = 1.0 if draw == 0 else 1.0 + float(torch.rand(()))
        errors.append(float(metrics.relative_error(factor * mean, exact)))
    assert row.output_error == pytest.approx(sum(errors) / DRAWS, rel=1e-5)
    assert row.output_error_spread == pytest.approx(
        float(torch.tensor(errors).std(unbiased=False)), rel=1e-4
    )


def test_what_a_spec_excludes_is_a_row_with_its_reason() -> None:
    causal, bidirectional = grouped_sample(), grouped_sample(is_causal=False)
    comparison = compare([causal, bidirectional], [Choice("linformer", {"rank": 8})], rounds=1)
    refused, ran = comparison.rows
    assert refused.output_error is None and refused.note.startswith("linformer cannot be causal")
    assert (
        ran.output_error is not None
        and ran.options == {"rank": 8}
        and ran.label == "linformer rank=8"
    )


def test_the_whole_zoo_is_compared_by_default_and_the_file_reads_back(tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    samples = [grouped_sample(), *(grouped_sample(length, False) for length in (20, 40))]
    comparison = compare(
        samples, lengths=[10, 40, 4000], rounds=1, progress=lambda *stage: stages.append(stage)
    )
    assert [row.variant for row in comparison.rows] == attnzoo.names() * 2
    for name in attnzoo.names():
        lengths = [
            (row.is_causal, row.length) for row in comparison.by_length if row.variant == name
        ]
        assert sorted(lengths) == [(False, 20), (False, 40), (True, 10), (True, 40)]
    assert all(
        row.output_error is not None or row.note
        for row in (*comparison.rows, *comparison.by_length)
    )
    assert [stage[1] for stage in stages] == list(range(len(stages))) and stages[-1][1] == stages[
        -1
    ][2]
    assert comparison.heat_maps[0].label == "standard" and comparison.heat_maps[0].query_range == (
        0,
        40,
    )
    assert (
        comparison.samples[0]["score_std"] == samples[0].score_std
        and "q" not in comparison.samples[0]
    )
    assert {
        "date",
        "seed",
        "torch",
        "attnzoo",
        "cpu",
        "threads",
        "device",
        "dtype",
    } <= comparison.environment.keys()
    (tmp_path / "compare.json").write_text(comparison.to_json(), encoding="utf-8")
    assert Comparison.read(tmp_path / "compare.json") == comparison


def test_the_same_seed_gives_the_same_errors_whatever_was_drawn_before() -> None:
    variants = [
        Choice("performer", {"num_features": 16}),
        Choice("bigbird", {"block_size": 4}),
    ]
    first = compare([grouped_sample()], variants, seed=3, rounds=1)
    torch.rand(7)
    second = compare([grouped_sample()], variants, seed=3, rounds=1)
    other = compare([grouped_sample()], variants, seed=4, rounds=1)
    assert [row.output_error for row in first.rows] == [row.output_error for row in second.rows]
    assert all(
        a.output_error != b.output_error for a, b in zip(first.rows, other.rows, strict=True)
    )


def test_the_seed_goes_to_a_variant_that_takes_one_unless_it_was_given() -> None:
    sample = grouped_sample()
    given = build_for(Choice("bigbird", {"seed": 5, "block_size": 4}), sample, 40, 0)
    taken = build_for(Choice("bigbird", {"block_size": 4}), sample, 40, 5)
    assert torch.equal(given.weights(sample.q, sample.k), taken.weights(sample.q, sample.k))


def test_half_precision_is_measured_against_exact_attention_of_the_same_inputs() -> None:
    row = one([Choice("standard")], dtype=torch.bfloat16)
    assert (
        row.output_error is not None and 1e-4 < row.output_error < 1e-2 and row.seconds is not None
    )


def test_an_interrupt_returns_what_is_finished() -> None:
    def interrupt_at_the_timing(stage: str, done: int, total: int) -> None:
        if "timing" in stage:
            raise KeyboardInterrupt

    comparison = compare(
        [grouped_sample()], [Choice("standard"), Choice("linear")], progress=interrupt_at_the_timing
    )
    assert [row.variant for row in comparison.rows] == ["standard", "linear"]
    assert all(row.output_error is not None and row.seconds is None for row in comparison.rows)
    assert comparison.environment["interrupted"].startswith("after 2 of ")


@pytest.mark.parametrize(
    ("variants", "options", "said"),
    [
        ([Choice("standrad")], {}, "did you mean 'standard'"),
        ([Choice("standard", {"window": 3})], {}, "standard has no option 'window'"),
        ([Choice("standard", {"heads": 3})], {}, "heads come from the model that is compared on"),
        ([], {}, "variants is empty"),
        ([Choice("standard")], {"device": "tpux"}, "device='tpux' is unknown"),
        ([Choice("standard")], {"device": "meta"}, "device='meta' cannot be measured"),
        ([Choice("standard")], {"dtype": torch.int32}, "dtype=torch.int32 is not floating"),
    ],
)
def test_a_bad_argument_is_refused_before_any_work(
    variants: list[Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        compare(
            [grouped_sample()],
            variants,
            progress=lambda *_: pytest.fail("work was begun"),
            **options,
        )


def test_no_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="samples is empty"):
        compare([])


def test_a_broken_or_foreign_file_gives_one_sentence(tmp_path: Path) -> None:
    written = compare([grouped_sample()], [BASELINE], rounds=1).to_json()
    missing_field = json.loads(written)
    del missing_field["rows"][0]["label"]
    cases = {
        written[: len(written) // 2]: "is not a whole JSON file",
        "": "is not a whole JSON file",
        "[1, 2]": "is not a comparison of this version",
        '{"format": "another"}': "is not a comparison of this version",
        json.dumps(missing_field): "but not its fields",
        json.dumps({"format": json.loads(written)["format"]}): "but not its fields",
    }
    for text, said in cases.items():
        (tmp_path / "file.json").write_text(text)
        with pytest.raises(ValueError, match=said) as error:
            Comparison.read(tmp_path / "file.json")
        assert "file.json" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be read as a comparison"):
        Comparison.read(tmp_path / "absent.json")


def test_without_the_packages_samples_are_synthetic_and_say_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    samples = load_samples([64, 600])
    found = {(sample.model, sample.is_causal, sample.length) for sample in samples}
    assert found == {
        (f"synthetic std {spread}", *rest)
        for spread in (1, 3)
        for rest in ((True, 600), (False, 64), (False, 512))
    }
    assert all(
        "pip install" in sample.text and "score standard deviation" in sample.text
        for sample in samples
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"lengths": []}, "lengths is empty"),
        ({"lengths": [0]}, "length=0"),
        ({"models": ["MiniLM"]}, "did you mean 'MiniLM-L6'"),
    ],
)
def test_bad_lengths_and_models_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_samples(**arguments)


def test_plays_are_plain_text() -> None:
    try:
        assert len(titles()) > 30
    except packages.MissingPackageError as error:
        pytest.skip(str(error))
    text = play("hamlet")
    assert (
        text.startswith("Hamlet\n")
        and "To be, or not to be" in text
        and not set("#*_\\") & set(text)
    )
    with pytest.raises(ValueError, match="did you mean 'hamlet'"):
        play("hamlett")


def test_summaries_hold_no_tensor() -> None:
    sample = replace(grouped_sample(), text="said")
    assert json.loads(json.dumps(sample.summary()))["shape"] == {
        "q": [1, 4, 40, 8],
        "k": [1, 2, 40, 8],
        "v": [1, 2, 40, 8],
    }
