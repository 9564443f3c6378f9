"""Quality of whole models with swapped attention: identities that must hold, the search, and runs
that go on where they were cut."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from quality_models import TEXTS, causal, encoder

from attnzoo.engines.sparse import reference
from attnzoo.quality.mixes import label_of, ranges
from attnzoo.quality.quality_rows import Row
from attnzoo.quality.quality_run import Run
from attnzoo.quality.quality_study import Layers, Mixes, Study
from attnzoo.quality.search import Trial, cheapest, moves
from attnzoo.quality.subject import Excerpt, Subject
from attnzoo.registry import Choice
from attnzoo.results.result_file import ResultFile


@pytest.fixture(autouse=True)
def _hidden_keys_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """On these short texts too, as they are on long ones: else windows and blocks would cost what
    exact attention costs, and no mix would be cheaper."""
    monkeypatch.setattr(reference, "SHORT", 0)


PLACE = Excerpt("hamlet", "final", 2)
NARROW, LINEAR = Choice("sliding_window", {"window": 4}), Choice("linear")
EVERYWHERE = Choice("sliding_window", {"window": "inf"})
STUDY = Study(
    ("hamlet", "macbeth"),
    (16, 48),
    2,
    (EVERYWHERE, NARROW, LINEAR, Choice("linformer", {"rank": 4})),
    Layers(200, (NARROW, Choice("bigbird", {"block_size": 4}))),
    Mixes((0.0, 0.01, 10.0), 4, (48,)),
)


def everywhere(subject: Subject, choice: Choice) -> dict[int, Choice]:
    return dict.fromkeys(range(subject.layers), choice)


def perplexity(
    subject: Subject, mix: dict[int, Choice], length: int = 48, place: Excerpt = PLACE
) -> float:
    found = subject.measure(mix, place, [length])[length].perplexity
    assert found is not None
    return found


def study_of(subject: Subject, held: list[Row], write, study: Study = STUDY) -> Run:
    sources = subject.sources_of(TEXTS)
    return Run(
        study,
        "tiny",
        sources,
        lambda: subject,
        held,
        write,
        dtype="float64",
        seed=0,
        facts={"seed": "0"},
    )


def silent(stage: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def test_perplexity_is_that_of_the_models_own_loss():
    subject = causal()
    ids = subject.tokens(PLACE, 48)
    with torch.no_grad():
        loss = sum(
            subject.model(input_ids=row[None], labels=row[None]).loss.item() for row in ids
        ) / len(ids)
    assert perplexity(subject, {}) == pytest.approx(math.exp(loss), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_window_as_long_as_the_text_is_exact(family):
    subject = causal(family)
    exact = perplexity(subject, {})
    assert perplexity(subject, everywhere(subject, EVERYWHERE)) == pytest.approx(exact, rel=1e-9)
    assert perplexity(
        subject, everywhere(subject, Choice("sliding_window", {"window": 48}))
    ) == pytest.approx(exact, rel=1e-9)
    assert abs(math.log(perplexity(subject, everywhere(subject, NARROW)) / exact)) > 1e-6


def test_standard_in_one_layer_changes_nothing():
    subject = causal()
    exact = perplexity(subject, {})
    for layer in range(subject.layers):
        assert perplexity(subject, {layer: Choice("standard")}) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize(
    "choice",
    [
        NARROW,
        LINEAR,
        Choice("bigbird", {"block_size": 4}),
        Choice("performer", {"num_features": 16}),
    ],
    ids=str,
)
def test_one_reading_holds_the_shorter_ones(choice):
    subject = causal()
    mix = everywhere(subject, choice)
    together = subject.measure(mix, PLACE, [16, 48])
    ids = subject.tokens(PLACE, 48)[:, :16]
    with torch.no_grad():
        alone = subject._losses(mix, PLACE, ids).mean().exp().item()
    assert together[16].perplexity == pytest.approx(alone, rel=1e-6)
    assert together[16].predictions == 30 and together[48].predictions == 94


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_layers_before_the_swapped_one_are_computed_once_and_nothing_differs(layer):
    subject = causal()
    assert len(subject.blocks) == subject.layers == 3
    place = Excerpt("hamlet", "choosing", 2)
    batches = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
        for row in subject.tokens(place, 48)
    ]
    with torch.no_grad(), subject.swapped({layer: NARROW}, 48):
        wanted = [subject._read(batch) for batch in batches]
    perplexity(subject, {2: LINEAR}, place=place)  # keeps what every block gives
    ran: list[int] = []  # by whole sequences: swap itself lets the model read a few tokens
    handles = [
        block.get_submodule("self_attn").register_forward_hook(
            lambda module, inputs, output, n=n: ran.extend([n] * (output[0].shape[1] == 48))  # pyright: ignore
        )
        for n, block in enumerate(subject.blocks)
    ]
    with torch.no_grad():
        found = list(subject.hidden({layer: NARROW}, place, 48, batches))
    for handle in handles:
        handle.remove()
    assert ran == 2 * list(range(layer, 3))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert not any("forward" in vars(block) for block in subject.blocks)


def test_what_was_kept_of_one_text_is_not_used_for_another():
    subject = causal()
    first, second = (Excerpt(text, "choosing", 2) for text in ("hamlet", "macbeth"))
    fresh = perplexity(causal(), {2: NARROW}, place=second)
    perplexity(subject, {2: NARROW}, place=first)
    assert perplexity(subject, {2: NARROW}, place=second) == fresh


def test_model_macs_are_attention_and_every_weight_that_each_token_meets():
    subject = causal()
    weights = sum(
        module.weight.numel()
        for module in subject.model.modules()
        if isinstance(module, torch.nn.Linear)
    )
    scores = subject.measure({}, PLACE, [48])[48]
    # Layers × (scores, values) × heads × head_dim × visible pairs.
    assert scores.attention_macs == 3 * 2 * 4 * 8 * (48 * 49 // 2)
    assert scores.model_macs - scores.attention_macs == weights * 48
    pooled = encoder()
    assert pooled.other_macs_per_token == sum(
        p.numel()
        for n, p in pooled.model.named_parameters()
        if n.endswith("weight") and "encoder" in n and p.dim() == 2
    )


def test_exact_embeddings_agree_with_themselves_and_with_a_full_window():
    subject = encoder()
    place = Excerpt("hamlet+macbeth", "final", 40)
    for mix in ({}, everywhere(subject, EVERYWHERE)):
        scores = subject.measure(mix, place, [24])[24]
        assert (scores.cosine, scores.top1, scores.top10) == pytest.approx(
            (1.0, 1.0, 1.0), abs=1e-9
        )
    worse = subject.measure(everywhere(subject, Choice("linformer", {"rank": 4})), place, [24])[24]
    assert worse.cosine is not None and worse.cosine < 1 - 1e-4


def test_embeddings_do_not_depend_on_the_padding_of_their_batch():
    subject = encoder()
    place = Excerpt("hamlet+macbeth", "final", 40)
    together = subject._embed({}, place, 64)
    batch = subject._tokens(place, 64)[0]
    lengths = batch["attention_mask"].sum(1)
    row = int(lengths.argmin())
    ids = batch["input_ids"][row : row + 1, : int(lengths[row])]
    with torch.no_grad():
        alone = (
            subject.model(input_ids=ids, attention_mask=torch.ones_like(ids))
            .last_hidden_state[0]
            .mean(0)
        )
    torch.testing.assert_close(together[row], alone / alone.norm())


def test_moves_follow_the_lower_hull_of_each_layer():
    a, b, c = Choice("a"), Choice("b"), Choice("c")
    found = moves(
        [
            Trial(0, a, 10, 1.0),
            Trial(0, b, 20, 1.0),
            Trial(0, c, 30, 4.0),
            Trial(1, a, 10, 0.1),
            Trial(1, b, 5, 0.5),
            Trial(2, a, 0, 0.0),
        ]
    )
    assert [(move.layer, move.choice.name, round(move.price, 3)) for move in found] == [
        (1, "a", 0.01),
        (0, "b", 0.05),
        (0, "c", 0.3),
    ]


@pytest.mark.parametrize("evaluations", [1, 2, 3, 5, 8, 20])
def test_the_search_ends_on_a_mix_that_was_measured_within_the_limit(evaluations):
    cost = dict(enumerate([0.1, 0.1, 0.1, 0.9, 0.2, 0.2, 0.9, 0.3]))
    trials = [Trial(layer, LINEAR, 10, change) for layer, change in cost.items()]
    measured: dict[str, float] = {"exact": 0.0}

    def change_of(mix) -> float:
        measured[label_of(mix)] = sum(cost[layer] for layer in mix)
        return measured[label_of(mix)]

    mix, left = cheapest(moves(trials), change_of, 0.75, evaluations)
    assert measured[label_of(mix)] <= 0.75
    assert len(measured) - 1 <= evaluations
    assert {move.layer for move in left} == set(cost) - set(mix)
    if evaluations == 20:
        assert set(mix) == {0, 1, 2, 4, 5}


def test_a_move_that_breaks_the_limit_is_dropped_and_cheaper_ones_behind_it_still_made():
    trials = [Trial(0, LINEAR, 10, 0.1), Trial(1, LINEAR, 10, 0.2), Trial(2, LINEAR, 10, 0.3)]
    mix, left = cheapest(moves(trials), lambda mix: 9.0 if 1 in mix else 0.0, 0.5, 20)
    assert set(mix) == {0, 2} and [move.layer for move in left] == [1]


def test_within_nothing_the_mix_is_exact_everywhere():
    rows = study_of(causal(), [], lambda row: None).run(silent)
    nothing = [row for row in rows if row.tolerance == 0.0]
    assert len(nothing) == 2
    for row in nothing:
        assert (
            row.label == "exact"
            and row.mix == {}
            and row.change == 0.0
            and row.attention_macs == row.exact_attention_macs
        )
    anything = [row for row in rows if row.tolerance == 10.0]
    assert all((row.attention_macs or 0) < (row.exact_attention_macs or 0) for row in anything)


def test_a_study_has_a_row_for_everything_and_the_reason_where_there_is_no_number():
    rows = study_of(causal(), [], lambda row: None).run(silent)
    swept = {(row.text, row.length, row.label) for row in rows if row.task == "all"}
    assert swept == {
        (text, length, choice.label)
        for text in TEXTS
        for length in STUDY.lengths
        for choice in STUDY.variants
    }
    refused = [row for row in rows if row.reason]
    assert {row.label for row in refused} == {"linformer rank=4"} and all(
        "cannot be causal" in row.reason for row in refused
    )
    assert {row.layer for row in rows if row.task == "layer"} == {0, 1, 2}
    parts = {row.task: {other.part for other in rows if other.task == row.task} for row in rows}
    assert (
        parts["layer"] == {"choosing"}
        and parts["search"] == {"checking"}
        and parts["mix"] == parts["all"] == {"final"}
    )
    for row in rows:
        if row.task == "all" and row.label == EVERYWHERE.label:
            assert row.change == pytest.approx(0.0, abs=1e-9)


def test_an_encoder_study_searches_by_cosine():
    study = Study(
        tuple(TEXTS), (120,), 16, (LINEAR,), Layers(120, (LINEAR,)), Mixes((0.0, 0.5), 3, (120,))
    )
    rows = study_of(encoder(), [], lambda row: None, study).run(silent)
    assert {row.text for row in rows} == {"hamlet+macbeth"}
    assert [row.label for row in rows if row.task == "mix"] == ["exact", "0-2: linear"]


def test_a_finished_study_is_read_from_its_file_without_the_model(tmp_path):
    file = ResultFile(tmp_path / "rows.jsonl", Row)
    first = study_of(causal(), [], file.append).run(silent)

    def no_model() -> Subject:
        raise AssertionError("the model was loaded")

    sources = list(TEXTS)
    again = Run(
        STUDY,
        "tiny",
        sources,
        no_model,
        file.rows(),
        file.append,
        dtype="float64",
        seed=0,
        facts={},
    ).run(silent)
    assert again == first


def test_an_interrupted_study_goes_on_where_it_stopped(tmp_path):
    whole = study_of(causal(), [], lambda row: None).run(silent)
    file = ResultFile(tmp_path / "rows.jsonl", Row)

    def write(row: Row) -> None:
        file.append(row)
        if len(file.rows()) == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study_of(causal(), [], write).run(silent)
    file.path.write_bytes(file.path.read_bytes()[:-40])
    assert file.repair() is not None
    held = file.rows()
    assert len(held) == 12
    fresh: list[Row] = []
    rows = study_of(causal(), held, fresh.append).run(silent)
    assert not {row.key for row in fresh} & {row.key for row in held}
    assert [(row.key, row.perplexity) for row in rows] == [
        (row.key, row.perplexity) for row in whole
    ]


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_of_dropout_where_nothing_is_trained():
    with causal(attention_dropout=0.1).swapped({0: LINEAR}, 64):
        pass


def test_other_seeds_and_dtypes_are_other_rows():
    row = Row("m", "all", "t", "final", 16, 1, "linear", {}, "float32", 0)
    assert (
        len(
            {
                row.key,
                Row(**{**vars(row), "seed": 1}).key,
                Row(**{**vars(row), "dtype": "bfloat16"}).key,
                Row(**{**vars(row), "sequences": 2}).key,
            }
        )
        == 4
    )


def test_layers_are_written_as_swap_reads_them():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert label_of({0: LINEAR, 1: NARROW, 2: LINEAR}) == "0,2: linear; 1: sliding_window window=4"


def test_a_text_shorter_than_the_length_is_refused_before_any_work():
    study = Study(tuple(TEXTS), (250,), 40, (LINEAR,))
    with pytest.raises(ValueError, match=r"hamlet.*has [\d,]+ tokens.*40 × 250 are asked for"):
        study_of(causal(), [], lambda row: None, study).run(silent)
    with pytest.raises(ValueError, match=r"length=300 is not one.*give 2 to 256"):
        causal().check(PLACE, 300)
    with pytest.raises(ValueError, match="passages of 24 tokens"):
        encoder().check(Excerpt("hamlet+macbeth", "final", 3), 24)


def test_nan_in_the_output_is_a_reason_not_a_number(monkeypatch):
    subject = causal()
    monkeypatch.setattr(
        subject,
        "_losses",
        lambda mix, place, ids: torch.full((2, ids.shape[1] - 1), math.nan).double(),
    )
    rows = study_of(subject, [], lambda row: None, Study(tuple(TEXTS), (16,), 2, (LINEAR,))).run(
        silent
    )
    assert all(row.perplexity is None and "NaN" in row.reason for row in rows)
