"""The commands as functions: `bench`, `compare`, `train` and `cost_table`, what they return, and
the same names in Python, YAML and on the command line."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import attnzoo
import attnzoo.public
from attnzoo.benchmarking import measure_setting
from attnzoo.benchmarking.bench_rows import SDPA, read_rows
from attnzoo.benchmarking.machine_limits import Limits
from attnzoo.benchmarking.plan import Shape, read_plan
from attnzoo.commands import program
from attnzoo.public.variant_text import parse_variant, written
from attnzoo.registry import Choice
from attnzoo.report.result import Result

SMALL = {"lengths": [8, 16], "heads": 2, "head_dim": 8, "rounds": 1, "progress": False}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch, quick_figures):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure_setting, "measure_limits", lambda *_: Limits(1e11, 1e10))


def flags(command: str) -> set[str]:
    parser = program.make_parser()
    subparser = parser._subcommands_action.choices[command]  # pyright: ignore
    return {action.dest for action in subparser._actions} - {"help", "print_config", "variant"}


@pytest.mark.parametrize(
    ("function", "command", "of_the_command"),
    [
        (attnzoo.bench, "bench", {"against"}),
        (attnzoo.compare, "compare", {"config"}),
        (attnzoo.train, "train", set()),
        (attnzoo.cost_table, "scaling", {"config", "output"}),
    ],
)
def test_python_and_the_command_line_have_the_same_names(function, command, of_the_command):
    named = set(inspect.signature(function).parameters) - {"progress"}
    assert flags(command) - of_the_command == named


def test_bench_measures_every_combination() -> None:
    result = attnzoo.bench(
        ["linear", ("sliding_window", {"window": 4})],
        **{**SMALL, "dtype": [torch.float32, "bfloat16"], "causal": [False, True]},
    )
    assert {(row.dtype, row.is_causal, row.length) for row in result.rows} == {
        (dtype, causal, length)
        for dtype in ("float32", "bfloat16")
        for causal in (False, True)
        for length in (8, 16)
    }
    assert {row.label for row in result.rows} == {SDPA, "linear", "sliding_window window=4"}
    assert {(row.heads, row.head_dim, row.batch_size) for row in result.rows} == {(2, 8, 1)}
    assert all(row.seconds for row in result.rows)
    whole = result.table()
    assert [column.key for column in whole.columns][:3] == ["contender", "is_causal", "dtype"]
    assert len(whole.rows) == len(result.rows) and not result.interrupted
    assert [table.name for table in result.tables[1:]] == [
        *(f"setting-{number}" for number in range(1, 5)),
        "crossovers",
    ]


def test_bench_goes_on_with_the_rows_of_a_file(monkeypatch) -> None:
    first = attnzoo.bench("linear", output="b.jsonl", **SMALL)
    assert [row.key for row in read_rows("b.jsonl")] == [row.key for row in first.rows]
    monkeypatch.setattr(measure_setting.Bench, "measure", lambda *_: pytest.fail("measured again"))
    assert attnzoo.bench("linear", output="b.jsonl", **SMALL).rows == first.rows


def test_a_bench_shows_its_own_rows_and_not_all_of_the_file() -> None:
    attnzoo.bench("linear", output="b.jsonl", **SMALL)
    result = attnzoo.bench("linear", output="b.jsonl", **{**SMALL, "lengths": 16})
    assert {row.length for row in result.rows} == {16} and len(read_rows("b.jsonl")) == 4


def test_ctrl_c_returns_what_was_measured(monkeypatch) -> None:
    measure = measure_setting.Bench.measure

    def interrupted(self, cell, *arguments):
        if cell.length == 16:
            raise KeyboardInterrupt
        return measure(self, cell, *arguments)

    monkeypatch.setattr(measure_setting.Bench, "measure", interrupted)
    result = attnzoo.bench("linear", **SMALL)
    assert result.interrupted == "interrupted" and {row.length for row in result.rows} == {8}
    assert str(result).startswith("interrupted\n")


def test_the_same_bench_from_python_yaml_and_flags(capsys) -> None:
    ours = attnzoo.bench("linear", batch_size=2, dtype="bfloat16", **SMALL)
    Path("c.yaml").write_text(
        "{lengths: [8, 16], heads: 2, head_dim: [8], batch_size: 2, dtype: bfloat16, rounds: 1, "
        "variants: [linear]}"
    )
    assert program.main(["bench", "--config", "c.yaml", "--output", "y.jsonl"]) == 0
    typed = "bench linear --lengths 8 16 --heads 2 --head-dim 8 --batch-size 2 --dtype bfloat16"
    assert program.main([*typed.split(), "--rounds", "1", "--output", "f.jsonl"]) == 0
    keys = [row.key for row in ours.rows]
    assert [row.key for row in read_rows("y.jsonl")] == keys
    assert [row.key for row in read_rows("f.jsonl")] == keys
    assert "linear" in capsys.readouterr().out


def test_settings_stand_in_the_place_of_the_configuration() -> None:
    Path("c.yaml").write_text(
        "{dtypes: [bfloat16], shapes: [{heads: 4}, {heads: 8, head_dim: 32}], sweeps: [{lengths: "
        "[8]}, {lengths: [16], phases: [decode], dtypes: [float16]}], seed: 3}"
    )
    plain = read_plan(Path("c.yaml"))
    assert [sweep.dtypes for sweep in plain.sweeps] == [("bfloat16",), ("float16",)]
    changed = read_plan(Path("c.yaml"), {"dtype": "float32", "heads": 2, "variants": ["linear"]})
    for sweep in changed.sweeps:
        assert sweep.dtypes == ("float32",) and sweep.variants == ("linear",)
        assert sweep.shapes == (Shape(heads=2), Shape(heads=2, head_dim=32))
    assert [sweep.lengths for sweep in changed.sweeps] == [(8,), (16,)] and changed.seed == 3
    with pytest.raises(ValueError, match=r"^heads=0 must be"):
        read_plan(Path("c.yaml"), {"heads": 0})  # the file is right, and is not named
    Path("c.yaml").write_text("{dtypes: [bfloat16], dtype: float32}")
    with pytest.raises(ValueError, match="two names of one setting"):
        read_plan(Path("c.yaml"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lengths": "many"}, "lengths='many' must be a whole number"),
        ({"dtype": "float23"}, "'float23' is unknown"),
        ({"phases": "sideways"}, "'sideways' is unknown"),
        ({"device": "gpu"}, "device='gpu' is unknown"),
        ({"config": "quikc"}, "'quikc' is no file (did you mean 'quick'?)"),
        ({"variants": "perfomer"}, "did you mean 'performer'?"),
        ({"variants": 3}, "variants=3 must be a variant or a list"),
        ({"variants": [3]}, "variants: 3 must be text such as"),
        ({"variants": ("performer", {"num_features": object()})}, "cannot be written as text"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(wrong, said) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        attnzoo.bench(**{**SMALL, **wrong})
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "choice",
    [
        Choice("performer", {"num_features": 8, "orthogonal": False, "features": "hyperbolic"}),
        Choice("bigbird", {"block_size": 4, "seed": 3}),
        Choice("standard"),
    ],
    ids=lambda choice: choice.name,
)
def test_a_variant_is_written_and_read_back(choice) -> None:
    pair = (choice.name, choice.options)
    for given in (choice, pair, [choice], iter([pair])):
        (text,) = written(given)
        assert parse_variant(text) == choice


@pytest.mark.thorough
def test_compare_returns_tables_figures_and_files() -> None:
    result = attnzoo.compare(
        ["linear", "sliding_window:window=8"], models="synthetic", lengths=[16, 32], progress=False
    )
    table = result.table()
    assert len(table.rows) == len(result.rows) == 8
    lost = next(row for row in table.rows if row["variant"] == "linear" and row["length"] == 32)
    same = next(row for row in result.rows if row.label == "linear" and row.length == 32)
    assert lost["output_error"] == same.output_error and lost["macs"] == same.macs
    assert result.plot("error-macs").axes
    names = {path.name for path in result.save("out")}
    assert {"compare.html", "compare.json", "compare-error-macs.png"} <= names
    assert attnzoo.fidelity.Comparison.read("out/compare.json").rows == result.rows


def test_train_keeps_its_runs_in_a_folder_or_in_none() -> None:
    given = {"problem": {"length": 4}, "steps": 2, "learning_rates": 0.01, "seeds": 0}
    result = attnzoo.train("copy", "linear", **given, progress=False)
    assert not list(Path().iterdir())
    assert {row.label for row in result.rows if not row.is_baseline} == {"linear"}
    assert result.table().values("label")[-1] == "linear"
    attnzoo.train("copy", "linear", **given, output="here", progress=False)
    assert (Path("here") / "train-copy.jsonl").is_file()
    assert json.loads(result.texts["train-copy.json"]())[0]["task"] == "copy"


def test_cost_table_costs_what_the_attention_says() -> None:
    result = attnzoo.cost_table(["linear", "standard"], length=512, causal=True)
    row = result.table().rows[0]
    attention = attnzoo.build("linear", heads=12, head_dim=64)
    assert row["variant"] == "linear"
    assert row["macs"] == 12 * attention.cost(1, 512, is_causal=True).kernel_macs
    assert result.table("crossovers").rows and result.rows == ()


@pytest.fixture(scope="module")
def costs() -> Result:
    return attnzoo.cost_table("linear", length=64)


def test_a_result_shows_itself(costs) -> None:
    text, html = str(costs), costs._repr_html_()
    assert "linear" in text and "MAC speed-up" in text and "\x1b" not in text
    assert html.count("<table>") == 1 and "crossovers" in html and "<script" not in html
    assert "Result(scaling: 0 rows" in repr(costs)
    with pytest.raises(ValueError, match=r"no table 'crossover' \(did you mean 'crossovers'\?\)"):
        costs.table("crossover")
    with pytest.raises(ValueError, match="no figure 'varaints'"):
        costs.plot("varaints")


def test_a_frame_holds_the_exact_values(costs) -> None:
    pytest.importorskip("pandas")
    frame = costs.to_frame()
    assert list(frame.columns) == [column.key for column in costs.table().columns]
    assert frame["macs"].tolist() == costs.table().values("macs")
    assert costs.to_frame("crossovers").shape[0] == len(costs.table("crossovers").rows)


def test_without_pandas_a_frame_says_what_to_install(costs, monkeypatch) -> None:
    monkeypatch.setattr("attnzoo.packages.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install pandas"):
        costs.to_frame()


def test_importing_attnzoo_imports_no_torch() -> None:
    code = (
        "import sys, attnzoo; assert 'torch' not in sys.modules; from attnzoo import build, "
        "oracles; assert 'torch' in sys.modules; from attnzoo import *; assert names() and swap; "
        "assert not {'matplotlib', 'rich', 'jsonargparse', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_every_public_name_is_there() -> None:
    assert set(attnzoo.public.__all__) <= set(dir(attnzoo))
    for name in attnzoo.public.__all__:
        assert getattr(attnzoo, name) is getattr(attnzoo.public, name)
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        attnzoo.biuld  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "run",
    [
        attnzoo.bench,
        attnzoo.compare,
        attnzoo.cost_table,
        lambda variants: attnzoo.train("mqar", variants),
    ],
)
def test_an_attention_that_is_unknown_or_missing_is_told_in_the_same_words(run) -> None:
    known = r"^unknown attention 'perfomer' \(did you mean 'performer'\?\); the zoo has standard, "
    with pytest.raises(ValueError, match=known):
        run("perfomer")
    with pytest.raises(ValueError, match=r"^variants is empty; give at least one, such as 'perf"):
        run([])


@pytest.mark.parametrize("name", ["lengths", "models", "layers", "heads"])
def test_an_empty_list_is_refused_before_any_work(name: str) -> None:
    nothing: dict[str, Any] = {name: []}
    with pytest.raises(ValueError, match=f"^{name} is empty; list at least one value$"):
        attnzoo.compare("linear", **nothing)


def test_a_name_that_the_library_lacks_gets_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'buld' \(did you mean 'build'\?\)"):
        attnzoo.buld  # noqa: B018
