"""The report of a comparison: numbers as they are written, sentences that follow from them, figures
and the page."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from rich.console import Console

from attnzoo.fidelity.comparison_rows import Comparison, HeatMap, Row
from attnzoo.registry import names
from attnzoo.report.axes import ticks
from attnzoo.report.comparison_columns import COLUMNS, folded, kept, lost
from attnzoo.report.export import write_figures
from attnzoo.report.figures import drawings, pareto_front
from attnzoo.report.headlines import headlines
from attnzoo.report.page import page
from attnzoo.report.style import INK, styles
from attnzoo.report.tables import RowsTable, comparison_view
from attnzoo.results.units import count, duration, memory, number, ratio

EXACT_MACS = 10_000_000_000


def row(
    variant: str,
    error: float | None,
    macs_share: float = 0.1,
    speedup: float | None = 2.0,
    **changes,
) -> Row:
    whole = Row(
        variant=variant,
        options={},
        label=variant,
        model="Model <A>",
        is_causal=True,
        length=4096,
        output_error=error,
        mean_value_error=0.8,
        total_variation=0.5,
        top_mass_kept=0.25,
        macs=int(EXACT_MACS * macs_share),
        exact_macs=EXACT_MACS,
        seconds=0.0123,
        rounds=7,
        speedup=speedup,
        promised_speedup=1 / macs_share,
        peak_bytes=3 * 2**20,
        backend="blocks",
    )
    return replace(whole, **changes)


ROWS = (
    row("standard", 2e-7, macs_share=1.0, speedup=1.0, backend="sdpa"),
    row("linear", 0.9, macs_share=0.02, speedup=4.0, note="lost to mean(v)"),
    row(
        "performer",
        4.0,
        macs_share=0.3,
        label="performer num_features=64 features=hyperbolic",
        note="lost to mean(v)",
    ),
    row("sliding_window", 0.3),
    Row(
        "linformer",
        {},
        "linformer",
        "Model <A>",
        True,
        4096,
        note="linformer cannot be causal; use <another>",
    ),
)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    cells = tuple(tuple(0.5 if key <= query else 0.0 for key in range(4)) for query in range(4))
    maps = tuple(
        HeatMap(name, "Model <A>", True, 512, "layer 3", 0, (0, 512), (0, 512), cells)
        for name in ("standard", "linear")
    )
    shorter = tuple(
        replace(row, length=length, output_error=row.output_error * length / 4096)
        for length in (1024, 2048, 4096)
        for row in ROWS
        if row.output_error is not None
    )
    sample = {
        "model": "Model <A>",
        "is_causal": True,
        "length": 4096,
        "layers": ["layer 3"],
        "heads": [0, 4],
        "score_std": 2.345,
        "text": "Hamlet & co",
    }
    environment = {"seed": "0", "torch": "2.13.0", "cpu": "A <fast> one"}
    return Comparison(ROWS, maps, shorter, environment, (sample,))


@pytest.fixture(scope="module")
def html(comparison: Comparison) -> str:
    return page(comparison)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (number(0.12345), "0.123"),
        (number(0.9996), "1.00"),
        (number(4.0), "4.00"),
        (number(2e-7), "2e-07"),
        (number(0), "0"),
        (number(None), "-"),
        (ratio(0.0921), "0.092x"),
        (ratio(16.66), "16.7x"),
        (count(999), "999"),
        (count(999_900), "1.00 M"),
        (count(1_073_741_824), "1.07 G"),
        (memory(512), "512 B"),
        (memory(3 * 2**20), "3.00 MiB"),
        (duration(0.0123), "12.3 ms"),
        (duration(2.5e-5), "25.0 us"),
        (duration(61.0), "61.0 s"),
    ],
)
def test_numbers_have_three_digits_and_a_unit(written, expected):
    assert written == expected


def test_a_variant_that_only_equals_mean_value_has_lost():
    assert (
        lost(row("linear", 0.8))
        and not lost(row("linear", 0.799))
        and not lost(row("linear", None))
    )


def test_kept_is_measured_over_promised():
    assert kept(row("linear", 0.5, macs_share=0.1, speedup=2.5)) == pytest.approx(0.25)
    assert kept(row("linear", 0.5, speedup=None)) is None


def test_headlines_follow_from_the_rows(comparison):
    said = "\n".join(headlines(comparison)["Model <A>, causal, 4,096 tokens"])
    assert "2 of 3 approximations lost" in said and "linear (error 0.900, baseline 0.800)" in said
    assert (
        "Closest to exact attention with fewer MACs: sliding_window, error 0.300 with 10% of the "
        "MACs." in said
    )
    assert (
        "Fastest: linear, 4.00x the speed of exact attention, 8% of the 50.0x that its MACs "
        "promise." in said
    )


def test_headlines_when_nothing_lost_and_nothing_was_faster():
    rows = (row("linear", 0.5, speedup=0.5), row("sliding_window", 1e-7))
    said = "\n".join(headlines(Comparison(rows, (), (), {}, ()))["Model <A>, causal, 4,096 tokens"])
    assert "All 1 approximations" not in said and "The one approximation comes closer" in said
    assert "Exact at this length, where nothing is left out: sliding_window." in said
    assert "No approximation was faster than exact attention" in said


def test_exact_attention_in_half_precision_is_no_approximation():
    rows = (row("standard", 4e-3), row("linear", 0.5))
    comparison = Comparison(rows, (), (), {}, ())
    assert "The one approximation" in headlines(comparison)["Model <A>, causal, 4,096 tokens"][0]


def rendered(comparison: Comparison, width: int) -> str:
    console = Console(width=width, color_system=None, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_view(comparison))
    return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_no_number_is_cut_at_any_width(comparison, width):
    printed = rendered(comparison, width)
    for each in ROWS:
        assert all(column.text(each) in printed for column in COLUMNS[1:])
    assert "…" not in printed and "0.900 !" in printed and "4.00 !" in printed
    assert all(len(line.rstrip()) <= width for line in printed.splitlines())


def test_usual_labels_fit_one_table_at_100_columns():
    rows = [row(name, 0.12) for name in ("standard", "sliding_window")]
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(RowsTable(rows))
    assert capture.get().count("variant") == 1


def test_notes_are_printed_once_for_all_that_share_them(comparison):
    printed = rendered(comparison, 160)
    assert "linear, performer num_features=64 features=hyperbolic: lost to mean(v)" in printed
    assert "linformer: linformer cannot be causal; use <another>" in printed
    assert (
        "layer 3; heads 0, 4; score standard deviation 2.35; Hamlet & co" in printed
        and "torch 2.13.0" in printed
    )


def test_labels_fold_at_spaces():
    assert (
        folded("performer num_features=64 features=relu", 26)
        == "performer num_features=64\nfeatures=relu"
    )
    assert folded("performer num_features=64", 5) == "performer\nnum_features=64"


def test_the_pareto_front_keeps_only_what_nothing_beats():
    rows = [
        row("linear", 0.9, 0.02),
        row("performer", 4.0, 0.3),
        row("sliding_window", 0.3, 0.1),
        row("bigbird", 0.3, 0.2),
    ]
    assert [error for _, error in pareto_front(rows)] == [0.9, 0.3]


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.35), (-0.2, 0.6), (7.0, 8.1), (-3.0, 1.0), (-8.0, 6.0)]
)
def test_logarithmic_axes_have_enough_labels_and_not_too_many(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 8 and found == sorted(found)


def test_every_variant_keeps_its_colour_and_marker():
    alone = styles([("performer", "performer")])["performer"]
    assert alone == styles((name, name) for name in names())["performer"]
    looks = {
        (style.color, style.marker) for style in styles((name, name) for name in names()).values()
    }
    assert len(looks) == len(names())
    assert styles([("standard", "standard")])["standard"].color == INK
    twins = styles([("performer", "a"), ("performer", "b")])
    assert twins["a"].color == twins["b"].color and twins["a"] != twins["b"]


def test_figures_are_written_twice_alike(comparison, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        written = write_figures(drawings(comparison), folder, "compare-")
        assert {path.suffix for path in written} == {".png", ".svg"} and len(written) == 8
    assert all(path.read_bytes() == (second / path.name).read_bytes() for path in first.iterdir())


def test_the_page_is_the_same_for_the_same_comparison(comparison, html):
    assert page(comparison) == html


def test_the_page_asks_for_nothing_from_outside(html):
    addresses = re.findall(r"""(?:src|href)=["']([^"']*)|url\(([^)]*)\)""", html)
    assert all(
        found.startswith(("#", "data:image/png;base64"))
        for pair in addresses
        for found in pair
        if found
    )
    assert not re.search(r"<script|<link|@import|@font-face|https?://(?!www\.w3\.org)", html)
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_ids_of_the_pages_figures_do_not_collide(comparison, html):
    ids = re.findall(r'\bid="([^"]+)"', html)
    used = {
        found
        for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)
        for found in pair
        if found
    }
    assert len(ids) == len(set(ids)) and used <= set(ids)
    assert html.count("<svg") == sum(len(drawing.parts) for drawing in drawings(comparison)) == 4


class Tags(HTMLParser):
    """Complains about a tag that closes another than the last opened."""

    VOID = ("meta", "wbr", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_escapes_what_it_is_given(html):
    parser = Tags()
    parser.feed(html)
    assert parser.open == []
    assert (
        "Model &lt;A&gt;" in html
        and "use &lt;another&gt;" in html
        and "A &lt;fast&gt; one" in html
        and "Hamlet &amp; co" in html
    )
    assert "<A>" not in html and "<another>" not in html and "<fast>" not in html


def test_the_page_has_what_the_screen_has(comparison, html):
    text = re.sub(r"<[^>]+>", "", html)
    assert all(column.meaning.replace("'", "&#x27;") in text for column in COLUMNS)
    assert (
        "2 of 3 approximations lost" in text
        and "4.00 !" in text
        and "seed" in text
        and "2.13.0" in text
    )


def test_a_comparison_without_results_still_makes_a_page():
    empty = Comparison((), (), (), {"seed": "0"}, ())
    assert drawings(empty) == [] and "<h1>" in page(empty)


def test_rows_without_numbers_make_no_empty_figure():
    refused = Comparison((ROWS[-1],), (), (), {}, ())
    assert drawings(refused) == [] and "linformer" in page(refused)


def test_a_variant_that_is_no_longer_registered_is_still_drawn(tmp_path):
    old = Comparison((row("removed", 0.4), row("linear", 0.5)), (), (), {}, ())
    assert write_figures(drawings(old), tmp_path, "compare-")
