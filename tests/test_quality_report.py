"""Tables, sentences and figures of a quality study, from rows with known numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from attnzoo.quality.quality_rows import Row, in_order
from attnzoo.report.export import write_figures
from attnzoo.report.quality.quality_figures import GUESSING, drawings, knobs, pareto_front
from attnzoo.report.quality.quality_headlines import headlines
from attnzoo.report.quality.quality_page import page
from attnzoo.report.quality.quality_tables import change_of, signed, tables

EXACT = Row(
    "tiny", "exact", "play", "final", 64, 1, "exact", {}, "float32", 0,
    predictions=63, perplexity=10.0, exact_perplexity=10.0,
    attention_macs=1000, exact_attention_macs=1000, model_macs=4000, exact_model_macs=4000,
    environment={"seed": "0"},
)  # fmt: skip


def swept(window: int, perplexity: float, macs: int) -> Row:
    label = f"sliding_window window={window}"
    mix = {"0-1": ["sliding_window", {"window": window}]}
    return replace(
        EXACT,
        task="all",
        label=label,
        mix=mix,
        perplexity=perplexity,
        attention_macs=macs,
        model_macs=3000 + macs,
    )


SWEPT = [swept(4, 40.0, 100), swept(8, 10.4, 300), swept(16, 10.05, 500), swept(64, 10.0, 2000)]
ALONE = [
    replace(
        swept(4, perplexity, 550),
        task="layer",
        part="choosing",
        layer=layer,
        mix={str(layer): ["sliding_window", {"window": 4}]},
    )
    for layer, perplexity in enumerate([10.02, 13.0])
]
MIXES = [
    replace(EXACT, task="mix", tolerance=0.01),
    replace(
        EXACT,
        task="mix",
        tolerance=0.05,
        label="0: linear",
        mix={"0": ["linear", {}]},
        perplexity=10.3,
        attention_macs=600,
        model_macs=3600,
    ),
]
REFUSED = replace(
    EXACT,
    task="all",
    label="linformer",
    mix={"0-1": ["linformer", {}]},
    perplexity=None,
    reason="linformer cannot be causal",
)
ROWS = [EXACT, *SWEPT, REFUSED, *ALONE, *MIXES]


def test_every_layer_has_its_change_and_savings_and_a_refusal_is_a_note():
    table = tables(ROWS)[0]
    assert table.values("label") == ["exact", *(row.label for row in SWEPT)]
    assert [cells[1:] for cells in table.cells()][1] == ["40.00", "4x", "100", "90%", "22%"]
    assert table.notes == ("linformer: linformer cannot be causal",)


def test_one_layer_at_a_time_says_which_layers_tolerate_it():
    table = tables(ROWS)[1]
    assert table.cells() == [
        ["sliding_window window=4", "1 of 2", "+15.1%", "0 (+0.2%)", "1 (+30.0%)"]
    ]


def test_the_mixes_have_a_row_a_tolerance_and_their_layers_in_a_note():
    table = tables(ROWS)[2]
    assert [cells[:2] + cells[4:] for cells in table.cells()] == [
        ["1%", "play", "+0.0%", "1.00 k", "0%", "0%"],
        ["5%", "play", "+3.0%", "600", "40%", "10%"],
    ]
    assert table.notes == ("within 1%: exact", "within 5%: 0: linear")


def test_the_sentences_name_the_cheapest_attention_within_each_tolerance():
    said = headlines(ROWS)
    assert (
        "play, 64 tokens, within 1% of exact perplexity: in every layer sliding_window window=16 "
        "(+0.5%) saves 50%" in said[0]
    )
    assert (
        "within 5% of exact perplexity: in every layer sliding_window window=8 (+4.0%) saves 70%"
        in said[1]
    )
    assert "changes less than 1% in 1 of 2 layers, and most in layer 1 (+30.0%)" in said[2]
    assert "within 1% of exact perplexity: no mix that saves MACs was found" in said[3]
    assert (
        "on unseen text: at 64 tokens +3.0% on play, where it saves 40% of the attention's MACs "
        "and 10.0% of the model's" in said[4]
    )
    longer, between = (
        replace(MIXES[1], length=length, perplexity=11.0, attention_macs=500)
        for length in (256, 128)
    )
    assert (
        "at 64 tokens +3.0% on play; at 256 tokens +10.0% on play, where it saves 50% of"
        in headlines([*ROWS, between, longer])[4]
    )


def test_nothing_within_the_tolerance_is_said_so():
    said = headlines([EXACT, SWEPT[0], SWEPT[3]])
    assert (
        "no attention that saves MACs can be put into every layer; nearest is sliding_window "
        "window=4 (4x)" in said[0]
    )
    # As a window of everything.
    assert headlines([EXACT, SWEPT[3]])[0].endswith("none of these attentions saves MACs")


def test_rows_that_were_measured_late_stand_with_their_variant():
    linear = replace(SWEPT[0], label="linear", mix={"0-1": ["linear", {}]})
    late = [
        EXACT,
        SWEPT[2],
        linear,
        MIXES[1],
        swept(128, 10.0, 2000),
        SWEPT[0],
        replace(SWEPT[0], label="sliding_window window=inf"),
    ]
    labels = [row.label for row in in_order(late)]
    assert labels == [
        "exact",
        "0: linear",
        *(f"sliding_window window={window}" for window in (4, 16, 128, "inf")),
        "linear",
    ]


def test_a_knob_is_what_the_rows_of_a_variant_differ_in():
    given = [{"window": 16, "global_tokens": 4}, {"window": 64, "global_tokens": 4}]
    assert knobs(
        [replace(SWEPT[0], mix={"0-1": ["longformer", options]}) for options in given]
    ) == ["16", "64"]
    assert knobs(SWEPT[:1]) == [""]


def test_the_front_keeps_what_nothing_beats_in_both():
    beaten = swept(5, 50.0, 200)
    # Exact attention beats a window of everything.
    assert [macs for macs, _ in pareto_front([*SWEPT, beaten])] == [100, 300, 500, 1000]


def test_shares_are_signed_and_large_ones_are_ratios():
    assert [signed(share) for share in (-0.012, 0.0, 0.5, 3.0, 74.4, 42_830_000.0)] == [
        "-1.2%",
        "+0.0%",
        "+50.0%",
        "4x",
        "75.4x",
        "4.3e7x",
    ]
    assert change_of(replace(EXACT, perplexity=None, cosine=0.9774)) == "cosine 0.977"
    assert change_of(REFUSED) == "no number"


def test_every_figure_is_drawn_and_the_same_every_time(tmp_path):
    longer = [replace(row, length=128) for row in ROWS if row.task in ("exact", "all")]
    found = drawings([*ROWS, *longer])
    assert [drawing.name for drawing in found] == ["pareto", "length", "layers"]
    first = [path.read_bytes() for path in write_figures(found, tmp_path, "a-")]
    again = [
        path.read_bytes() for path in write_figures(drawings([*ROWS, *longer]), tmp_path, "b-")
    ]
    assert first == again and page(ROWS) == page(ROWS)


def test_a_study_that_was_stopped_early_still_has_a_page():
    for rows in ([EXACT], [EXACT, REFUSED], [EXACT, *SWEPT], [EXACT, *ALONE]):
        assert "Where it ran" in page(rows)


def test_what_only_guesses_does_not_squeeze_the_others():
    lost = swept(2, 1e12, 50)
    assert pareto_front([EXACT, *SWEPT, lost])[0] == (50, GUESSING)
    assert "over 100,000% are drawn there" in page([EXACT, *SWEPT, lost])
