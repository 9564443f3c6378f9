"""`attnzoo train` and its report: what they print and write, how a study goes on after an
interrupt, and one sentence for what cannot be done."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jsonargparse")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from attnzoo.commands import program
from attnzoo.configuration import configs_folder, read_yaml
from attnzoo.public.variant_text import parse_variant
from attnzoo.report.style import INK
from attnzoo.report.training.train_figures import drawings, level_lines, pareto_front, turned_knob
from attnzoo.report.training.train_page import page
from attnzoo.report.training.train_tables import matrix, problem_tables
from attnzoo.results.result_file import read_rows
from attnzoo.tasks.task_names import TASKS
from attnzoo.training import loop
from attnzoo.training.summary import summed_up
from attnzoo.training.training_rows import Row
from attnzoo.training.training_study import read_study

STUDY = """
problem: {length: 16, pairs: [1, 2], vocabulary: 8}
model: {width: 16, layers: 2, heads: 1}
budget: {steps: 6, batch_size: 4, warmup_steps: 2, evaluate_every: 3}
held_out: 16
learning_rates: [0.001, 0.01]
seeds: [0, 1]
variants: [standard, linear+standard, gru, linformer]
sizes:
  quick: {}
  larger: {model: {layers: 4}, seeds: [7]}
"""
TRAIN = ("train", "--task", "mqar", "--config", "study.yaml")
FILE = Path("report/train-mqar.jsonl")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, quick_figures):
    """An empty folder with a study."""
    monkeypatch.chdir(tmp_path)
    Path("study.yaml").write_text(STUDY)


def refused(capsys, *arguments: str) -> str:
    """The one sentence with which a command line is refused."""
    code = program.main(list(arguments))
    captured = capsys.readouterr()
    said = captured.err.strip().splitlines()
    assert code == 2 and captured.out == "", captured
    assert len(said) == 1 and said[0].startswith("attnzoo: "), captured.err
    return said[0]


def test_a_study_prints_tables_and_writes_rows_and_a_summary(capsys, monkeypatch):
    # How wide a time is depends on the machine, and labels fold on a narrow screen.
    monkeypatch.setenv("COLUMNS", "160")
    assert program.main(list(TRAIN)) == 0
    captured = capsys.readouterr()
    for said in (
        "mqar, length=16 pairs=1 vocabulary=8",
        "chance",
        "majority answer",
        "linear + standard",
        "gru",
        "linformer: linformer cannot be causal",
    ):
        assert said in captured.out, said
    assert (
        re.search(r"\[\d+/192\] mqar .*: loss \d\.\d+, .* left", captured.err)
        and "[192/192] done" in captured.err
    )
    rows = read_rows(FILE, Row)
    assert len(rows) == 2 * (2 + 3 * 4 + 1)
    assert json.loads(Path("report/train-mqar.json").read_text())[1]["contenders"][2]["seeds"] == 2
    assert all(row.environment and "torch" in row.environment for row in rows)


def test_an_interrupted_study_goes_on_where_it_was(capsys, monkeypatch):
    evaluate, calls = loop.evaluate, []

    def interrupted(*arguments: Any) -> tuple[float, float]:
        calls.append(None)
        if len(calls) == 8:  # after the first checkpoint of the third run
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    arguments = [*TRAIN, "--variants", "standard", "--problem", "pairs=2", "--seeds", "0", "1", "2"]
    assert program.main(arguments) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    broken = FILE.read_text()
    assert len(list(Path("report/checkpoints").iterdir())) == 1
    monkeypatch.setattr(loop, "evaluate", evaluate)
    with FILE.open("a") as file:
        file.write('{"format": "attnzoo.tr')
    assert program.main(arguments) == 0
    said = capsys.readouterr().err
    assert "half line is dropped" in said and "which are kept" in said
    assert FILE.read_text().startswith(broken) and not list(Path("report/checkpoints").iterdir())
    resumed = read_rows(FILE, Row)
    assert program.main([*arguments, "--output", "other"]) == 0
    whole = read_rows("other/train-mqar.jsonl", Row)
    assert [(row.key, row.curve, row.test) for row in resumed] == [
        (row.key, row.curve, row.test) for row in whole
    ]


def test_a_checkpoint_of_another_configuration_is_refused(capsys, monkeypatch):
    # As if interrupted before the row was written.
    monkeypatch.setattr("attnzoo.training.training_run.Path.unlink", lambda path, missing_ok: None)
    arguments = [
        *TRAIN,
        "--variants",
        "standard",
        "--problem",
        "pairs=2",
        "--learning-rates",
        "0.01",
        "--seeds",
        "0",
    ]
    assert program.main(arguments) == 0
    (checkpoint,) = Path("report/checkpoints").iterdir()
    before = checkpoint.read_bytes()
    capsys.readouterr()
    assert program.main([*arguments, "--steps", "9"]) == 2
    assert "checkpoint of another configuration (budget differ" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--task", "mquar"), "unknown task 'mquar' (did you mean 'mqar'?)"),
        (("--variants", "linaer"), "unknown attention 'linaer' (did you mean 'linear'?)"),
        (("--variants", "linear:heads=2"), "heads comes from the model"),
        (("--variants", "gru:width=2"), "gru has no options"),
        (("--variants", "linear", "linear"), "variants names the same one twice"),
        (("--variants", "linear+standard+gru"), "3 parts and the model layers=2"),
        (("--size", "qiuck"), "no size 'qiuck' (did you mean 'quick'?)"),
        (("--problem", "pears=2"), "unknown key 'pears' (did you mean 'pairs'?)"),
        (("--problem", "pairs"), "'pairs' is not of the form knob=number"),
        (("--problem", "pairs=9"), "length=16 is too small"),
        (("--steps", "0"), "steps=0 must be a whole number of at least 1"),
        (("--steps", "1000004"), "steps=1000004 is more than 1000003"),
        (("--seeds", "-1"), "seed=-1 must be a whole number"),
        (("--seeds", "4294"), "seed=4294 is out of range; use 0 to 4293"),
        (("--learning-rates", "2"), "learning_rates: 2.0 must be a number between 0 and 1"),
        (("--device", "tpu"), "device='tpu'"),
        (("--config", "no.yaml"), "--config no.yaml cannot be read"),
        (("--output", "study.yaml"), "is a file"),
    ],
)
def test_bad_input_is_one_sentence(changes, said, capsys):
    sentence = refused(capsys, *TRAIN, *changes)
    assert said in sentence and not FILE.exists()
    assert ("--config" in sentence) == (changes[0] in ("--size", "--config")), (
        "the file is not to blame for what the command line says"
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("held_out: 16", "held_out: 0", "held_out=0 must be a whole number"),
        ("held_out: 16", "held: 16", "unknown key 'held' (did you mean 'held_out'?)"),
        ("held_out: 16", "", "held_out must be given"),
        ("width: 16", "width: 15", "width=15 must be an even multiple"),
        ("heads: 1}", "heads: 1, head: 2}", "model has the unknown key 'head'"),
        ("seeds: [0, 1]", "seeds: 0", "seeds=0 must be a list"),
        ("0.001", "1e-3", "YAML reads 1e-3 as text"),
        ("quick: {}", "quick: {modle: {}}", "unknown key 'modle' (did you mean 'model'?)"),
        ("quick: {}", "quick: {model: 3}", "model=3 must be a mapping"),
        ("batch_size: 4", "precision: half", "precision='half' is unknown"),
    ],
)
def test_a_bad_study_is_one_sentence_that_names_the_file(old, new, said, capsys):
    Path("study.yaml").write_text(STUDY.replace(old, new, 1))
    sentence = refused(capsys, *TRAIN)
    assert said in sentence and "--config study.yaml" in sentence


def test_a_size_changes_what_it_names_and_nothing_else():
    small, larger = (
        read_study(Path("study.yaml"), size, TASKS["mqar"], {}, parse_variant)
        for size in ("quick", "larger")
    )
    (sizes,) = small.models
    assert (larger.models, larger.seeds) == ((replace(sizes, layers=4),), (7,))
    assert replace(larger, models=small.models, seeds=small.seeds) == small


def test_a_list_in_the_model_is_a_model_for_each():
    Path("study.yaml").write_text(
        STUDY.replace("{width: 16, layers: 2", "{width: [16, 32], layers: 2")
    )
    assert [
        sizes.width
        for sizes in read_study(
            Path("study.yaml"), "quick", TASKS["mqar"], {}, parse_variant
        ).models
    ] == [16, 32]


@pytest.mark.parametrize("size", ["quick", "cpu", "gpu"])
@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_has_a_study_in_three_sizes(task, size):
    study = read_study(
        configs_folder() / "tasks" / f"{task}.yaml", size, TASKS[task], {}, parse_variant
    )
    labels = [contender.label for contender in study.contenders]
    assert (
        len(labels) >= 7
        and "standard" in labels
        and "gru" in labels
        and len(study.learning_rates) >= 2
    )
    assert size == "quick" or len(study.seeds) >= 3


@pytest.mark.parametrize("task", list(TASKS))
def test_every_size_is_a_study_that_its_variants_can_do(task):
    path = configs_folder() / "tasks" / f"{task}.yaml"
    for size in read_yaml(path, task)["sizes"]:
        study = read_study(path, size, TASKS[task], {}, parse_variant)
        assert all(
            sizes.short_convolution == 0 or problem.form == "decoder"
            for sizes in study.models
            for problem in study.problems
        )


def test_recall_by_state_repeats_the_cpu_study_at_its_width():
    """So that the runs of one serve the other: their rows have the same keys."""
    cpu, state = (
        read_study(configs_folder() / "tasks" / "mqar.yaml", size, TASKS["mqar"], {}, parse_variant)
        for size in ("cpu", "state")
    )
    assert set(cpu.models) < set(state.models) and set(state.problems) < set(cpu.problems)
    assert (state.budget, state.held_out) == (cpu.budget, cpu.held_out)
    assert set(state.seeds) < set(cpu.seeds) and set(cpu.learning_rates) < set(state.learning_rates)


# The report.

BLANK = Row(
    "mqar", {"length": 64, "pairs": 8}, {"width": 16}, {"steps": 4}, 32, "accuracy",
    "standard", [["standard", {}]], 0.01, 0, 0.9, 0.2, 1.0,
    [[2, 1.0], [4, 0.5]], [[2, 0.5], [4, 0.9]], None, 1.5, 2000, 9000, 4096, 100,
    environment={"torch": "2", "seed": "0"},
)  # fmt: skip


def rows(pairs: int, linear: float) -> list[Row]:
    first = replace(BLANK, problem={"length": 64, "pairs": pairs})
    return [
        replace(
            first,
            label="chance",
            layers=[],
            learning_rate=None,
            seed=None,
            test=0.25,
            curve=None,
            validations=None,
            macs=None,
            state_bytes=None,
        ),
        first,
        replace(
            first, label="linear", layers=[["linear", {}]], test=linear, macs=1000, state_bytes=512
        ),
        replace(
            first,
            label="linear",
            layers=[["linear", {}]],
            test=linear - 0.2,
            seed=1,
            macs=1000,
            state_bytes=512,
        ),
    ]


def test_the_matrix_has_a_row_a_contender_and_a_column_a_problem():
    skipped = replace(
        BLANK,
        label="linformer",
        layers=[["linformer", {}]],
        learning_rate=None,
        seed=None,
        test=None,
        reason="cannot be causal",
    )
    table = matrix(summed_up([*rows(4, 0.9), *rows(8, 0.5), skipped]))
    assert [column.heading for column in table.columns] == [
        "attention",
        "mqar pairs=4",
        "mqar pairs=8",
    ]
    wanted = [
        ["chance", "25.0%", "25.0%"],
        ["standard", "100.0% *", "100.0% *"],
        ["linear", "80.0%", "40.0%"],
        ["linformer", "-", "-"],
    ]
    assert table.cells() == wanted


def test_a_problem_with_two_budgets_is_two_columns_and_two_charts():
    longer = [replace(row, budget={"steps": 8, "batch_size": 2}) for row in rows(4, 0.7)]
    problems = summed_up([*rows(4, 0.9), *longer, *rows(8, 0.5)])
    # Batch_size is another too, and need not be told.
    headings = ["mqar pairs=4 steps=4", "mqar pairs=4 steps=8", "mqar pairs=8"]
    assert [column.heading for column in matrix(problems).columns[1:]] == headings
    assert [axes.get_title(loc="left") for axes in drawings(problems)[0].whole().axes] == headings


def test_baselines_of_any_task_stand_first_in_the_matrix():
    gram = replace(rows(4, 0.9)[0], task="shakespeare", label="3-gram")
    assert [row[0] for row in matrix(summed_up([*rows(4, 0.9), gram])).cells()] == [
        "chance",
        "3-gram",
        "standard",
        "linear",
    ]


def test_the_best_of_a_column_is_marked_whichever_way_the_metric_points():
    near = [
        replace(row, metric="bits per character", test=test)
        for row, test in zip(rows(4, 0.9)[:3], (1.0, 2.01, 2.0), strict=True)
    ]
    far = [*near[:2], replace(near[2], test=1.9)]
    assert [row[1] for row in matrix(summed_up(near)).cells()] == ["1.000", "2.010 *", "2.000 *"], (
        "a baseline is no attention to choose"
    )
    assert [row[1] for row in matrix(summed_up(far)).cells()] == ["1.000", "2.010", "1.900 *"]
    assert [row[1] for row in matrix(summed_up(near[:1])).cells()] == ["1.000"]


def test_points_that_coincide_are_rings_around_one_another():
    twin = replace(BLANK, problem={"length": 64, "pairs": 4}, label="flash", layers=[["flash", {}]])
    axes = (
        next(
            drawing
            for drawing in drawings(summed_up([*rows(4, 0.9), twin]))
            if drawing.name == "state"
        )
        .whole()
        .axes[0]
    )
    lines: Any = axes.lines
    sizes = {
        line.get_color(): line.get_markersize()
        for line in lines
        if line.get_linestyle() == "None" and len(line.get_xdata())
    }
    assert len(sizes) == 3 and sorted(sizes.values())[0] == sorted(sizes.values())[1] < sizes[INK]


def test_figures_are_drawn_for_what_there_is():
    assert [drawing.name for drawing in drawings(summed_up(rows(4, 0.9)))] == [
        "state",
        "macs",
        "curves",
    ]
    both = summed_up([*rows(4, 0.9), *rows(8, 0.5)])
    assert [drawing.name for drawing in drawings(both)] == ["state", "macs", "knob", "curves"]
    axes = next(drawing for drawing in drawings(both) if drawing.name == "knob").whole().axes[0]
    drawn: Any = axes.lines
    lines = {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in drawn
    }
    assert (
        lines["linear"] == [(4, pytest.approx(0.8)), (8, pytest.approx(0.4))]
        and axes.get_xlabel() == "pairs"
    )
    assert turned_knob(both) == "pairs"


def test_models_of_several_sizes_show_what_more_state_buys():
    """Of each attention the points of all sizes and options, and a line through those that no
    smaller state of its own reaches."""
    wide = [
        replace(row, model={"width": 32}, state_bytes=row.state_bytes and 4 * row.state_bytes)
        for row in rows(4, 0.7)
    ]
    window = [
        replace(
            BLANK,
            problem={"length": 64, "pairs": 4},
            label=f"sliding_window window={w}",
            layers=[["sliding_window", {"window": w}]],
            test=t,
            state_bytes=w,
        )
        for w, t in ((16, 0.3), (32, 0.2), (64, 0.6))
    ]
    problems = summed_up([*rows(4, 0.9), *wide, *window])
    assert [drawing.name for drawing in drawings(problems)] == [
        "state",
        "state-by-variant",
        "macs",
        "curves",
    ]
    axes = (
        next(drawing for drawing in drawings(problems) if drawing.name == "state-by-variant")
        .whole()
        .axes[0]
    )
    drawn: Any = axes.lines
    points = {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in drawn
        if line.get_linestyle() == "None"
    }
    assert points["sliding_window"] == [(16, 0.3), (32, 0.2), (64, 0.6)]
    assert points["linear"] == [(512, pytest.approx(0.8)), (2048, pytest.approx(0.6))]
    (line,) = [
        line
        for line in drawn
        if len(line.get_xdata()) == 2 and line.get_linestyle() == "-" and line.get_xdata()[0] == 16
    ]
    assert list(line.get_ydata()) == [0.3, 0.6]


def test_bars_do_not_leave_what_an_accuracy_can_be():
    """0.98 and 0.5 have a standard deviation of 0.34 around 0.74."""
    for metric, high in (("accuracy", 1.0), ("bits per character", 0.74 + 0.48 / 2**0.5)):
        found = summed_up(
            [
                replace(row, metric=metric, test={0: 0.98, 1: 0.5}[row.seed or 0])
                for row in rows(4, 0.9)[1:]
            ]
        )
        axes = (
            next(drawing for drawing in drawings(found) if drawing.name == "state").whole().axes[0]
        )
        collections: Any = axes.collections
        (bar,) = [bar.get_segments()[0] for bar in collections]
        assert bar[:, 1].tolist() == [pytest.approx(0.74 - 0.48 / 2**0.5), pytest.approx(high)]


def test_every_study_with_a_knob_that_turns_has_its_chart_whatever_else_the_page_holds():
    longer = [
        replace(row, budget={"steps": 8, "batch_size": 2}, problem={"length": 128, "pairs": pairs})
        for pairs in (4, 8)
        for row in rows(4, 0.7)
    ]
    alone = [replace(row, model={"width": 32}) for row in rows(16, 0.3)]
    (drawing,) = [
        drawing
        for drawing in drawings(summed_up([*rows(4, 0.9), *rows(8, 0.5), *longer, *alone]))
        if drawing.name == "knob"
    ]
    assert [axes.get_title(loc="left") for axes in drawing.whole().axes] == [
        "mqar steps=4",
        "mqar steps=8",
    ]


def test_titles_tell_problems_apart_and_no_more():
    small = summed_up(
        [
            *rows(4, 0.9),
            *[
                replace(row, problem={"length": 128, "pairs": 8, "vocabulary": 128})
                for row in rows(8, 0.5)
            ],
        ]
    )
    assert [column.heading for column in matrix(small).columns[1:]] == [
        "mqar length=64",
        "mqar length=128",
    ]


def test_tables_of_two_models_are_told_apart():
    wide = [replace(row, model={"width": 32}) for row in rows(4, 0.7)]
    titles = [
        table.title for table in problem_tables(summed_up([*rows(4, 0.9), *wide, *rows(8, 0.5)]))
    ]
    assert titles == [
        "mqar, length=64 pairs=4 width=16",
        "mqar, length=64 pairs=4 width=32",
        "mqar, length=64 pairs=8",
    ]


def test_level_lines_do_not_press_the_models_together():
    # Standard 1.0, linear 2.4.
    bits = [replace(row, metric="bits per character") for row in rows(4, 2.5)]
    chance, gram = (
        replace(bits[0], label=label, test=test)
        for label, test in (("chance", 6.4), ("3-gram", 3.0))
    )
    (problem,) = summed_up([chance, gram, *bits[1:]])
    assert [one.label for one in level_lines(problem)] == ["3-gram"], "2.4 + 1.4 at most"
    (problem,) = summed_up(rows(4, 0.9))
    assert [one.label for one in level_lines(problem)] == ["chance"], "accuracy starts from it"


def test_no_point_of_the_front_is_beaten_in_both():
    points = [(1, 0.2), (2, 0.1), (3, 0.6), (3, 0.7), (4, 0.65)]
    assert pareto_front(points, lower_is_better=False) == [(1, 0.2), (3, 0.7)]
    assert pareto_front(points, lower_is_better=True) == [(1, 0.2), (2, 0.1)]


@pytest.mark.thorough
def test_report_makes_a_page_that_needs_nothing_else():
    assert program.main([*TRAIN, "--variants", "standard", "gru"]) == 0
    assert program.main(["report", str(FILE), "--output", "out"]) == 0
    text = Path("out/train.html").read_text()
    assert (
        text.count("<svg") == 7
        and "<script" not in text
        and "http" not in re.sub(r"http://www.w3.org\S*", "", text)
    )
    assert "Which attention for which task" in text and Path("out/train-state.png").is_file()
    assert page(read_rows(FILE, Row)) == text


def test_one_page_holds_tasks_of_two_machines_but_no_table_does(capsys):
    here, there = {"threads": "1", "device": "cpu"}, {"threads": "2", "device": "cpu"}
    for name, pairs, machine in (("a", 4, here), ("b", 8, there), ("c", 4, there)):
        lines = [replace(row, environment=machine).to_json() for row in rows(pairs, 0.9)]
        Path(f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    assert program.main(["report", "a.jsonl", "b.jsonl", "--output", "out"]) == 0
    text = Path("out/train.html").read_text()
    assert (
        "mqar pairs=4" in text
        and "mqar pairs=8" in text
        and "<dt>threads</dt><dd>1; 2</dd>" in text
    )
    capsys.readouterr()
    assert "a.jsonl and c.jsonl are from different machines (threads: 1 and 2)" in refused(
        capsys, "report", "a.jsonl", "b.jsonl", "c.jsonl"
    )
