"""attnzoo report: which result files it draws, and what it says of the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from attnzoo.commands import program
from attnzoo.quality.quality_rows import Row
from attnzoo.report.quality.quality_page import page

EXACT = Row(
    "Tiny", "exact", "play", "final", 64, 1, "exact", {}, "float32", 0,
    predictions=63, perplexity=10.0, exact_perplexity=10.0,
    attention_macs=1000, exact_attention_macs=1000, model_macs=4000, exact_model_macs=4000,
    environment={"cpu": "one"},
)  # fmt: skip
SWAPPED = replace(
    EXACT,
    task="all",
    label="linear",
    mix={"0-1": ["linear", {}]},
    perplexity=12.0,
    attention_macs=100,
    environment={"cpu": "other"},
)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: str, *rows: Row) -> None:
    Path(path).write_text("".join(row.to_json() + "\n" for row in rows))


def test_a_study_of_quality_is_drawn_a_page_a_model_whatever_machine_its_rows_are_from() -> None:
    others = [replace(row, model="Other") for row in (EXACT, SWAPPED)]
    write("a.jsonl", EXACT, others[0])
    write("b.jsonl", SWAPPED, others[1])
    assert program.main(["report", "a.jsonl", "b.jsonl", "--output", "out"]) == 0
    assert Path("out/quality-tiny.html").read_text() == page([EXACT, SWAPPED])
    assert Path("out/quality-other.html").read_text() == page(others)
    assert (
        Path("out/quality-tiny-pareto.png").is_file()
        and Path("out/quality-other-pareto.png").is_file()
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "a.jsonl cannot be read: No such file or directory; give a result file"),
        ("\n", "a.jsonl holds no rows; give a result file that a command of attnzoo wrote"),
        (
            "no json",
            "a.jsonl cannot be drawn: its rows name no format of attnzoo's; give result files of "
            "one of `attnzoo bench`, ",
        ),
        ("[1]", "its rows name no format of attnzoo's"),
        (
            '{"contender": "A stored"}',
            "a study of benchmarks/ draws its own: docs/results/index.md",
        ),
        (
            '{"format": "attnzoo.peers/1"}',
            "its rows are of the format 'attnzoo.peers/1'; give result files of one of "
            "`attnzoo bench`",
        ),
        (
            '{"format": "attnzoo.quality/1"}',
            "a.jsonl, line 1 is no row of this version of `attnzoo compare --model` ('model')",
        ),
        (
            '{"format": "attnzoo.bench/1"}',
            "a.jsonl, line 1 is no row of this version of `attnzoo bench`",
        ),
    ],
)
def test_a_file_that_cannot_be_drawn_is_one_sentence(text: str | None, said: str, capsys) -> None:
    if text is not None:
        Path("a.jsonl").write_text(text)
    assert said in refused(capsys, "a.jsonl")


def test_kinds_are_not_mixed(capsys) -> None:
    write("a.jsonl", EXACT)
    Path("b.jsonl").write_text('{"format": "attnzoo.train/1"}\n')
    said = refused(capsys, "a.jsonl", "b.jsonl")
    assert (
        "a.jsonl holds results of `attnzoo compare --model` and b.jsonl holds results of `attnzoo "
        "train`; draw one kind at a time" in said
    )


def refused(capsys, *files: str) -> str:
    """The one sentence with which the files are refused."""
    code = program.main(["report", *files, "--output", "out"])
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and not Path("out").exists()
    (said,) = captured.err.strip().splitlines()
    return said
