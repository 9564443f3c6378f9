"""The tables of README.md and of the pages in docs/ say what the result files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import draw_results
from benchmarks.readme import (
    compared,
    files,
    gates,
    measured,
    peers,
    recorded,
    swapped,
    trained,
    useful,
)
from benchmarks.readme.regions import markdown_table, rewritten
from benchmarks.readme.update import PAGES, TABLES


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_table_is_what_the_files_say(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert "<!-- table: " in page
    assert page == rewritten(page, TABLES), "run python -m benchmarks.readme.update"


def test_a_changed_digit_is_written_over_and_the_text_around_it_stays() -> None:
    page = "above 1\n<!-- table: two a b -->\n\n| 7 |\n\n<!-- end -->\nbelow 2\n"
    tables = {"two": lambda first, second: f"| {first}{second} |"}
    assert (
        rewritten(page, tables)
        == "above 1\n<!-- table: two a b -->\n\n| ab |\n\n<!-- end -->\nbelow 2\n"
    )


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("<!-- table: other -->\n<!-- end -->", "table 'other' is unknown; there are one"),
        ("<!-- table: one -->\n| 1 |\n", "the region of table 'one' has no end"),
        (
            "<!-- table: one -->\n<!-- table: one -->\n<!-- end -->",
            "the region of table 'one' has no end",
        ),
    ],
)
def test_a_wrong_mark_is_an_error(page: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        rewritten(page, {"one": lambda: "| 1 |"})


def test_markdown_keeps_empty_cells_apart() -> None:
    assert markdown_table(["", "b"], [["1", ""]]) == "| | b |\n|---|---|\n| 1 | |"


def results(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    rows: list[dict[str, Any]] | dict[str, Any],
) -> None:
    """Put rows where the tables look for them."""
    text = (
        json.dumps(rows)
        if isinstance(rows, dict)
        else "".join(json.dumps(row) + "\n" for row in rows)
    )
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    for module in (files, compared):
        monkeypatch.setattr(module, "RESULTS", folder)
    monkeypatch.setattr(trained, "TASKS", folder / "tasks")


def test_compare_marks_who_lost_and_says_why_one_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "model": "toy",
        "is_causal": False,
        "length": 2048,
        "mean_value_error": 0.5,
        "total_variation": 0.25,
        "top_mass_kept": 0.5,
        "note": "",
    }
    row |= {"macs": 2_000_000, "promised_speedup": 4.0, "speedup": 1.0, "peak_bytes": 3 * 2**20}
    lost = {**row, "variant": "linear", "output_error": 0.75}
    missing = {
        **row,
        "variant": "retention",
        "output_error": None,
        "note": "retention is causal only; use linear or standard",
    }
    results(tmp_path, monkeypatch, "compare.json", {"rows": [lost, missing]})
    said = compared.compare("toy")
    assert said.startswith(
        "**toy on Shakespeare, bidirectional, 2,048 tokens** (baseline: answering the average "
        "of the values errs by 0.500)"
    )
    assert "| `linear` | 0.750 ✗ | 0.250 | 50% | 2.00 M | 4.00× | 1.00× | 25% | 3.00 MiB |" in said
    assert said.endswith("| `retention` | is causal only | | | | | | | |")


def test_peers_take_the_fastest_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(
        label: str, seconds: float | None, length: int, package: str = "other 1.0"
    ) -> dict[str, Any]:
        same = {
            "phase": "forward",
            "is_causal": False,
            "group": "linear",
            "variant": label.split()[0],
            "kept_speedup": 0.5,
            "ours_seconds": 2.0,
        }
        fault = "off its own formula by 9.0%" if label.startswith("slow") else ""
        return {
            **same,
            "label": label,
            "package": package,
            "seconds": seconds,
            "length": length,
            "fault": fault,
        }

    found = [
        row("linear", 2.0, 8, "attnzoo"),
        row("sdpa", 0.1, 8),
        row("slow linear", 30.0, 8),
        row("quick linear", 1.0, 8),
        row("quick linear", 1.0, 4),
        row("sdpa", 9.0, 16),
    ]
    results(
        tmp_path,
        monkeypatch,
        "peers.jsonl",
        [
            *found,
            row("linear", 2.0, 16, "attnzoo"),
            row("slow linear", 50.0, 16),
            row("quick linear", None, 16),
        ],
    )
    line = next(
        line
        for line in peers.others("peers", "8", "16").splitlines()
        if line.startswith("| linear, elu")
    )
    assert line == "| linear, elu + 1 | quick, slow | **0.50** / 25† | | | | 0.50 / 0.50 | |"


def test_generation_is_the_better_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(contender: str, length: int, seconds: float) -> dict[str, Any]:
        return {
            "contender": contender,
            "length": length,
            "median_seconds": seconds,
            "held_bytes": 2**21,
            "needed_bytes": 2**20,
        }

    passes = [
        row(one, length, seconds)
        for one in measured.GENERATORS
        for length in measured.PASTS
        for seconds in (0.5, 0.25)
    ]
    results(tmp_path, monkeypatch, "generation.jsonl", passes)
    assert "| `standard`, state | 250 ms | 250 ms | 2.0 | 1.0 |" in measured.generation()


def test_perplexity_and_mixes_are_of_text_that_chose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = {
        "length": swapped.LENGTH,
        "text": swapped.TEXT,
        "exact_perplexity": 8.0,
        "attention_macs": 60,
        "exact_attention_macs": 100,
        "tolerance": None,
    }
    whole = [
        {**same, "task": "all", "part": "final", "label": label, "perplexity": 128.4}
        for label in swapped.SHOWN.values()
    ]
    mix = {**same, "task": "mix", "label": "0: linear", "tolerance": 0.05, "perplexity": 9.0}
    results(
        tmp_path,
        monkeypatch,
        swapped.FILE,
        [*whole, {**mix, "part": "final"}, {**mix, "part": "choice", "perplexity": 80.0}],
    )
    assert "| `linear` | 128 | |" in swapped.perplexity()
    assert "| 5% | 12.5% | 40% |" in swapped.mixes()


def test_every_page_of_results_says_when_and_where_it_was_recorded() -> None:
    pages = {path.stem: path.read_text(encoding="utf-8") for path in PAGES}
    for path in (files.ROOT / "docs" / "results").glob("*.md"):
        if path.stem not in ("index", "cuda", "what_a_check_finds"):
            assert "<!-- table: recorded " in pages[path.stem], path
            assert "```sh\n" in pages[path.stem] or path.stem == "papers", path


def test_every_study_has_a_figure_that_is_there() -> None:
    for path in (files.ROOT / "docs" / "results").glob("*.md"):
        if path.stem not in ("index", "cuda", "what_a_check_finds"):
            shown = re.findall(r"!\[[^\]]{30,}\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
            assert shown, path
            assert all((path.parent / one).is_file() for one in shown), path


def test_figures_show_what_the_tables_say() -> None:
    speeds = draw_results.gates_speed()["linear"]
    table = gates.speeds().split("| `linear` |")[1].splitlines()[0]
    assert f"| {speeds['forward']:.2f}× |" in table
    assert f"| {speeds['forward+backward']:.2f}× |" in table
    assert f"| {speeds['forward'] / speeds['by MACs']:.0%} |" in table
    others = draw_results.peers_speed()["window of 256"]
    assert f"| {others['forward']:.2f} / " in peers.others("peers", "4096", "16384")
    parity = draw_results.scores("parity-study")()["deltanet allow_neg_eigval=True"]
    assert min(parity.values()) > 0.999


def test_bars_and_lines_are_drawn(tmp_path: Path) -> None:
    draw_results.draw_bars(
        {"a": {"x": 2.0, "y": 0.5}}, "times", tmp_path / "b.png", are_ratios=True
    )
    draw_results.draw_lines({"linear": {8: 1.0, 64: 3.0}}, "ratio", tmp_path / "l.png", str, 1)
    assert all((tmp_path / name).stat().st_size > 2000 for name in ("b.png", "l.png"))


def test_every_result_file_is_on_the_page_of_all() -> None:
    page = (files.ROOT / "docs" / "results" / "index.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w*-]+\.jsonl?", page))
    for path in files.RESULTS.glob("**/*.json*"):
        assert any(path.match(pattern) for pattern in named), path.name


def test_recorded_tells_days_and_processors_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(day: str, cpu: str, **more: str) -> dict[str, Any]:
        return {"environment": {"date": f"{day}T01:00:00", "cpu": cpu, "torch": "2.13.0", **more}}

    rows = [row("2026-11-25", "AMD EPYC", threads="2"), row("2026-11-24", "Intel(R) Xeon(R)")]
    results(tmp_path, monkeypatch, "one.jsonl", rows)
    results(tmp_path, monkeypatch, "none.jsonl", [{"seconds": 1.0}])
    assert recorded.recorded("o*.jsonl").splitlines()[-1] == (
        "| `one.jsonl` | 2026-11-24 to 2026-11-25 | AMD EPYC, Intel Xeon | 2, not recorded | "
        "2.13.0 |"
    )
    with pytest.raises(ValueError, match=r"no file of benchmarks/results is called 'two\.jsonl'"):
        recorded.recorded("two.jsonl")
    with pytest.raises(ValueError, match=r"a row of none\.jsonl does not say its environment"):
        recorded.recorded("none.jsonl")


def test_the_five_that_a_user_can_use_are_what_was_measured() -> None:
    lines = useful.useful().splitlines()
    assert len(lines) == 2 + 5
    exact, window, blocks, kernel, delta = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]
    )
    assert exact[1] == "31.6" and exact[4:] == ["100%", "1.0×", "128 MiB"]
    assert float(window[1]) < float(blocks[1]) < 40 and window[6] == "1.02 MiB"
    assert float(delta[2]) < float(kernel[2]) and delta[3] == "92%"
    assert kernel[6] == "130 KiB" and delta[6] == "128 KiB"
