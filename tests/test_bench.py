"""The benchmark harness: rows, the rule against wrong backends, resuming, repairing, regressions
and bad input. Never how fast anything is."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import Uniform, Wrong

pytest.importorskip("jsonargparse")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import attnzoo
from attnzoo import execution
from attnzoo.benchmarking import arithmetic, machine_limits, measure_setting
from attnzoo.benchmarking.bench_rows import ResultFile, Row, read_rows
from attnzoo.benchmarking.crossover import crossover
from attnzoo.benchmarking.heap import bounded_memory, out_of_memory
from attnzoo.benchmarking.levels import core_inputs, layer_inputs, prepare
from attnzoo.benchmarking.machine_limits import Limits
from attnzoo.benchmarking.measure_setting import Bench
from attnzoo.benchmarking.plan import LEVELS, PHASES, Cell, Contender, Plan, Shape, Sweep, read_plan
from attnzoo.benchmarking.regressions import compare_runs
from attnzoo.benchmarking.sweep import run_plan
from attnzoo.benchmarking.timing import decoding_mistake
from attnzoo.commands import program
from attnzoo.public.variant_text import parse_variant
from attnzoo.registry import Choice, _registered
from attnzoo.report.bench.bench_figures import panel_title
from attnzoo.results import result_file

CPU = torch.device("cpu")
SMALL = Shape(1, 2, 8)
CONFIG = (
    "lengths: [8, 16]\nrounds: 1\nvariants: [standard, 'sliding_window:window=4']\nshapes: "
    "[{heads: 2, head_dim: 8}]\n"
)
ENVIRONMENT = {"machine": "Linux", "cpu": "a", "cores": "2", "threads": "2", "device": "cpu"}
ROW = Row(
    "core",
    "forward",
    True,
    "linear",
    {},
    "linear",
    "auto",
    64,
    "float32",
    1,
    2,
    8,
    environment=ENVIRONMENT,
)


@pytest.fixture(autouse=True)
def in_an_empty_folder_with_given_limits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure_setting, "measure_limits", lambda *_: Limits(1e11, 1e10))


@pytest.fixture
def toy(monkeypatch):
    """Registers a toy attention for one test."""

    def registered(cls):
        monkeypatch.setitem(_registered, cls.spec.name, cls)
        return Contender(Choice(cls.spec.name), "auto")

    attnzoo.names()
    return registered


def timed(seconds: float, spread: float = 0.01, **changes) -> Row:
    return replace(
        ROW,
        seconds=seconds,
        seconds_quartiles=(seconds * (1 - spread), seconds * (1 + spread)),
        rounds=5,
        **changes,
    )


def rows_of(plan: Plan, finished=frozenset()) -> list[Row]:
    return list(run_plan(plan, parse_variant, CPU, set(finished), lambda *_: None))


def cell(
    level: str = "core", phase: str = "forward", is_causal: bool = True, length: int = 12
) -> Cell:
    return Cell(level, phase, is_causal, length, "float32", SMALL)


def bench(*arguments: str) -> int:
    return program.main(["bench", *arguments])


def refused(capsys, *arguments: str) -> str:
    code = program.main(list(arguments))
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and len(captured.err.strip().splitlines()) == 1, (
        captured
    )
    return captured.err


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("phase", PHASES[:2])
def test_every_level_and_phase_gives_a_timed_row_beside_sdpa(level: str, phase: str) -> None:
    rows = rows_of(
        Plan(
            sweeps=(
                Sweep(
                    (level,),
                    (phase,),
                    (False, True),
                    ("standard", "linear"),
                    lengths=(9,),
                    shapes=(SMALL,),
                    rounds=3,
                ),
            )
        )
    )
    assert [(row.is_causal, row.label) for row in rows] == [
        (c, name) for c in (False, True) for name in ("sdpa", "standard", "linear")
    ]
    for row in rows:
        assert (
            row.reason == ""
            and row.rounds == 3
            and row.seconds
            and row.sdpa_seconds
            and row.peak_bytes
            and row.environment
        )
        assert row.macs and row.sdpa_macs
        assert (
            row.seconds_quartiles
            and row.seconds_quartiles[0] <= row.seconds <= row.seconds_quartiles[1]
        )
        assert row.kept_speedup == pytest.approx(
            row.sdpa_seconds / row.seconds * row.macs / row.sdpa_macs
        )


def test_the_derived_numbers_by_hand() -> None:
    row = timed(
        0.5,
        macs=10**9,
        sdpa_macs=4 * 10**9,
        sdpa_seconds=1.0,
        least_bytes=10**9,
        peak_flops=8e9,
        bandwidth=1e10,
        batch_size=3,
    )
    assert row.tokens_per_second == 3 * 64 / 0.5
    assert (row.flops_per_second, row.bytes_per_second) == (4e9, 2e9)
    assert (row.speedup, row.kept_speedup) == (2.0, 0.5)
    assert (row.limit_seconds, row.limit_share) == (0.25, 0.5)
    assert replace(row, peak_flops=1e12).limit_seconds == 0.1  # then the bytes take longer
    assert replace(row, phase="decode", macs=None).tokens_per_second == 6


def test_decoding_is_timed_and_causal_and_what_cannot_decode_has_a_reason() -> None:
    rows = rows_of(
        Plan(
            sweeps=(
                Sweep(
                    ("core",),
                    ("decode",),
                    (False,),
                    ("standard", "linear", "linformer", "cosformer"),
                    lengths=(9,),
                    shapes=(SMALL,),
                ),
            )
        )
    )
    found = {row.label: row for row in rows}
    assert all(row.is_causal for row in rows)
    assert found["linear"].seconds and found["standard"].seconds and found["linear"].macs is None
    assert found["cosformer"].seconds, (
        f"a variant with a max_length has room for the tokens to come: {found['cosformer'].reason}"
    )
    assert found["linformer"].seconds is None and "cannot be causal" in found["linformer"].reason


@pytest.mark.parametrize("level", LEVELS[1:])
def test_sdpa_in_the_place_of_the_module_computes_the_same(level: str) -> None:
    """With the parameters of the zoo's module, the direct baseline gives its output: so both do the
    same work."""
    from attnzoo.benchmarking.levels import DirectAttention, Layer, SelfAttention

    ours, direct = SelfAttention(16, 2, Choice("standard")), DirectAttention(16, 2)
    direct.in_proj.weight, direct.in_proj.bias = (
        ours.multihead.in_proj_weight,
        ours.multihead.in_proj_bias,
    )
    direct.out_proj = ours.multihead.out_proj
    if level == "layer":
        ours, direct = Layer(16, ours), Layer(16, direct)
        direct.feed_forward = ours.feed_forward
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(direct(x, True), ours(x, True))


def test_a_training_pass_gives_the_gradients_of_inputs_and_parameters() -> None:
    here = cell("layer", "forward+backward")
    gradients = prepare(
        Contender(Choice("linear"), "auto"), here, layer_inputs(here, 1, CPU, 0), 0
    ).run()
    assert (
        isinstance(gradients, tuple)
        and len(gradients) == 1 + 12
        and all(gradient is not None for gradient in gradients)
    )


def test_gates_are_brought_as_a_layer_would_project_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every phase, and their gradients are taken."""
    asked: list[dict[str, Tensor]] = []
    for method in ("forward", "step"):
        whole = getattr(attnzoo.Attention, method)

        def seen(self: Any, *given: Any, whole: Any = whole, **inputs: Any) -> Any:
            asked.append({name: x for name, x in inputs.items() if isinstance(x, Tensor)})
            return whole(self, *given, **inputs)

        monkeypatch.setattr(attnzoo.Attention, method, seen)
    contender = Contender(Choice("log_linear"), "auto")
    shapes = {"log_decay": (1, 2, 40), "beta": (1, 2, 40), "levels": (1, 2, 40)}
    for phase in ("forward", "forward+backward", "decode"):
        here = cell(phase=phase, length=40, is_causal=True)
        found: Any = prepare(contender, here, core_inputs(here, 1, CPU, 0), 0).run()
        assert {name: tuple(x.shape[:3]) for name, x in asked[0].items()} == shapes
        if phase == "decode":
            assert {name: x.shape[2] for name, x in asked[1].items()} == dict.fromkeys(shapes, 1)
        if phase == "forward+backward":
            assert len(found) == 6 and all(bool(x.abs().sum() > 0) for x in found)
        asked.clear()


def test_decoding_goes_on_from_the_state_it_left() -> None:
    """Each run is one more token of the same sequence: the third equals the last row of one forward
    over length + 3 tokens."""
    here = cell(phase="decode")
    q, k, v = core_inputs(here, 1, CPU, 0)[0]
    for contender in (Contender(Choice("standard"), "auto"), None):
        run = prepare(contender, here, [(q, k, v)], 0).run
        found = [run() for _ in range(3)][-1]
        longer = [torch.cat([x, x[:, :, -1:].expand(-1, -1, 3, -1)], 2) for x in (q, k, v)]
        torch.testing.assert_close(
            found,
            torch.nn.functional.scaled_dot_product_attention(
                longer[0], longer[1], longer[2], is_causal=True
            )[:, :, -1:],
        )


@pytest.mark.parametrize("phase", PHASES[:2])
@pytest.mark.parametrize("level", LEVELS)
def test_a_wrong_backend_gets_a_row_with_its_reason_and_no_time(
    level: str, phase: str, toy
) -> None:
    found = {
        row.label: row
        for row in Bench(CPU, 0).measure(cell(level, phase), [toy(Wrong), toy(Uniform)], 2, 9.0)
    }
    assert (
        found["wrong"].seconds is None
        and "off its reference" in found["wrong"].reason
        and found["wrong"].ran == "fast"
    )
    assert found[Uniform.spec.name].seconds is not None and found["sdpa"].seconds is not None


def test_a_wrong_gradient_is_found_out_only_where_it_is_timed(toy, monkeypatch) -> None:
    from attnzoo.benchmarking.timing import mistake

    class Lying(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *gradients):
            return 2 * gradients[0]

    attention = attnzoo.build("standard", heads=2, head_dim=8)
    backends = type(attention.engine).backends
    q, k, v = core_inputs(cell(), 1, CPU, 0)[0]
    attention(q, k, v)
    honest = next(one for one in backends if one.name == attention.last_backend)
    lying = replace(
        honest, run=lambda engine, call: honest.run(engine, replace(call, k=Lying.apply(call.k)))
    )
    monkeypatch.setattr(type(attention.engine), "backends", (lying, *backends))
    assert mistake(attention, q, k, v, is_causal=True) is None
    assert "gradient of k" in (mistake(attention, q, k, v, is_causal=True, backward=True) or "")


@pytest.mark.parametrize("phase", PHASES[:2])
def test_packed_rows_are_measured_beside_the_batch_of_their_pieces(phase: str, monkeypatch) -> None:
    """Counted as such a batch is; the pieces of a row that meet get no time."""
    sweep = Sweep(
        phases=(phase,),
        causal=(True,),
        variants=("standard", "linear"),
        lengths=(24,),
        segments=(1, 4),
        shapes=(SMALL,),
        rounds=3,
    )
    rows = rows_of(Plan(sweeps=(sweep,)))
    assert len({row.key for row in rows}) == 6 and all(row.seconds for row in rows), rows
    packed = {row.label: row for row in rows if row.segments == 4}
    assert packed["standard"].sdpa_macs == arithmetic.macs(
        attnzoo.build("standard", heads=2, head_dim=8),
        replace(cell(phase=phase, length=6), shape=replace(SMALL, batch_size=4 * SMALL.batch_size)),
    )
    assert panel_title(packed["linear"]).endswith(", 4 pieces a row")
    asked: list[tuple[int, ...]] = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    with monkeypatch.context() as patched:
        patched.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda q, *rest, **options: asked.append(tuple(q.shape)) or kernel(q, *rest, **options),
        )
        here = replace(cell(phase=phase, length=24), segments=4)
        prepare(None, here, core_inputs(here, 1, CPU, 0), 0).run()
    assert asked == [(4 * SMALL.batch_size, SMALL.heads, 6, SMALL.head_dim)]
    # An attention that forgets its segments is found out.
    run, given = execution.run, []

    def forgetting(core: Any, call: Any) -> torch.Tensor:
        given.append(call.segments)
        return run(core, call if core.backend == "reference" else replace(call, segments=None))

    monkeypatch.setattr(execution, "run", forgetting)
    prepare(Contender(Choice("linear"), "auto"), here, core_inputs(here, 1, CPU, 0), 0).run()
    assert given[0][0].unique(return_counts=True)[1].tolist() == [6, 6, 6, 6]
    forgot = rows_of(Plan(sweeps=(replace(sweep, segments=(4,)),)))
    assert sum("off its reference" in row.reason for row in forgot) == 2


def test_a_file_of_before_there_were_packed_rows_can_be_read() -> None:
    written = json.loads(timed(0.5).to_json())
    assert written.pop("segments") == 1
    assert Row.from_fields(written) == timed(0.5)


def test_a_wrong_decoding_step_is_found_out(monkeypatch) -> None:
    attention = attnzoo.build("linear", heads=2, head_dim=8)
    q, k, v = core_inputs(cell(), 1, CPU, 0)[0]
    assert decoding_mistake(attention, q, k, v) is None
    step = attention.step

    def wrong_step(*arguments, **options):
        out, state = step(*arguments, **options)
        return 1.01 * out, state

    monkeypatch.setattr(attention, "step", wrong_step)
    assert "0.01" in (decoding_mistake(attention, q, k, v) or "")


def test_running_out_of_memory_is_a_row_and_the_sweep_goes_on(monkeypatch) -> None:
    real = measure_setting.prepare

    def hungry(contender, *arguments):
        if contender is not None and contender.choice.name == "linear":
            torch.empty(2**60)
        return real(contender, *arguments)

    monkeypatch.setattr(measure_setting, "prepare", hungry)
    rows = rows_of(
        Plan(sweeps=(Sweep(variants=("linear", "standard"), lengths=(8,), shapes=(SMALL,)),))
    )
    found = {row.label: row for row in rows}
    assert found["linear"].seconds is None and found["linear"].reason.startswith("out of memory: ")
    assert found["standard"].seconds is not None


def test_memory_beyond_what_is_free_is_refused_while_bounded() -> None:
    with bounded_memory(CPU), pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(2**46, dtype=torch.int8)
    assert out_of_memory(caught.value)


def scripted(seconds: dict[str, float]):
    """A stopwatch that says what each kernel took, by the name under which torch is called."""

    def stopwatch(call) -> float:
        return next(time for name, time in seconds.items() if name in call.__code__.co_names)

    return stopwatch


def test_the_peak_is_the_best_of_several_kernels(monkeypatch) -> None:
    """Where a dtype has no fast product, SDPA, which computes in another, sets the limit; and a sum
    the bandwidth, where it beats a copy."""
    monkeypatch.setattr(machine_limits, "GEMM", {"cpu": 8})
    monkeypatch.setattr(machine_limits, "ATTENTION", {"cpu": (2, 16)})
    monkeypatch.setattr(machine_limits, "COPY_BYTES", {"cpu": 4096})
    monkeypatch.setattr(machine_limits, "CACHED_BYTES", (64, 1024))
    times = {"mm": 1.0, "scaled_dot_product_attention": 0.5, "copy_": 0.25, "sum": 0.125}
    found = machine_limits.measure_limits(CPU, torch.bfloat16, scripted(times))
    assert found == Limits(
        2 * 2 * 2 * 2 * 16 * 16 * 128, 4096 / 0.125, ((64, 64 / 0.125), (1024, 1024 / 0.125))
    )
    found = machine_limits.measure_limits(
        CPU, torch.bfloat16, scripted({**times, "mm": 1e-9, "copy_": 0.0625})
    )
    assert found.peak_flops == 2 * 8**3 / 1e-9 and found.bandwidth == 4096 / 0.0625


def test_what_a_cache_holds_moves_faster() -> None:
    found = Limits(1.0, 10.0, ((64, 300.0), (1024, 200.0), (4096, 250.0)))
    assert [found.bandwidth_of(moved) for moved in (1, 64, 1023, 1024, 5000)] == [
        300.0,
        300.0,
        300.0,
        250.0,
        250.0,
    ]
    assert Limits(1.0, 10.0).bandwidth_of(64) == 10.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("phase", PHASES)
def test_no_row_is_beyond_its_limit(phase: str, dtype: str) -> None:
    """Under limits that are far too low, too: a row raises them to what it reached."""
    shapes = (Shape(1, 2, 16),)
    rows = rows_of(
        Plan(
            sweeps=(
                Sweep(
                    variants=("standard", "linear"),
                    lengths=(64,),
                    phases=(phase,),
                    dtypes=(dtype,),
                    shapes=shapes,
                    rounds=1,
                ),
            )
        )
    )
    for row in rows:
        low = replace(row, peak_flops=1.0, bandwidth=1.0).within_limits()
        assert (
            row.limit_share is not None
            and row.limit_share <= 1.0
            and low.limit_share == pytest.approx(1.0)
        )
        assert (low.peak_flops, low.bandwidth) == (
            max(1.0, row.flops_per_second or 0),
            row.bytes_per_second,
        )


def test_rows_over_the_time_budget_are_tried_again(tmp_path) -> None:
    config, output = tmp_path / "sweep.yaml", tmp_path / "rows.jsonl"
    command = ["bench", "--config", str(config), "--output", str(output)]
    config.write_text(CONFIG + "budget: 1.0e-9\n")
    assert program.main(command) == 0
    assert all(row.is_late and row.seconds is None for row in read_rows(output))
    config.write_text(CONFIG)
    assert program.main(command) == 0
    rows = ResultFile(output).rows()
    assert len(rows) == 6 and all(row.seconds and not row.reason for row in rows)
    size = len(read_rows(output))
    assert program.main(command) == 0 and len(read_rows(output)) == size


def test_the_time_budget_is_a_row_and_longer_lengths_are_not_even_tried(monkeypatch) -> None:
    tried: list[int] = []
    real = measure_setting.prepare

    def counted(contender, here, *arguments):
        tried.append(here.length)
        return real(contender, here, *arguments)

    monkeypatch.setattr(measure_setting, "prepare", counted)
    rows = rows_of(
        Plan(sweeps=(Sweep(variants=("standard",), lengths=(8, 64), shapes=(SMALL,), budget=1e-9),))
    )
    assert [(row.label, row.length) for row in rows] == [
        ("sdpa", 8),
        ("standard", 8),
        ("sdpa", 64),
        ("standard", 64),
    ]
    assert all(
        row.seconds is None and row.reason.startswith("over the time budget: ") for row in rows
    )
    assert tried == [8, 8]


def test_macs_and_bytes_of_the_levels_by_hand() -> None:
    exact = arithmetic.exact(cell())
    core, width, n = 2 * 16 * 12 * 13 // 2, 16, 12
    assert arithmetic.macs(exact, cell()) == core
    assert arithmetic.macs(exact, cell("multihead")) == core + 4 * n * width**2
    assert arithmetic.macs(exact, cell("layer", "forward+backward")) == 3 * (
        core + 12 * n * width**2
    )
    assert arithmetic.macs(exact, cell(phase="decode")) is None
    assert arithmetic.least_bytes(exact, cell()) == 4 * n * width * 4
    assert arithmetic.least_bytes(exact, cell("multihead")) == (2 * n * width + 4 * width**2) * 4
    assert arithmetic.least_bytes(exact, cell(phase="decode")) == (2 * n + 4) * width * 4


def test_rows_round_trip_and_a_cut_file_is_repaired(tmp_path) -> None:
    file = ResultFile(tmp_path / "rows.jsonl")
    rows = [timed(0.1), timed(0.2, length=128)]
    for row in rows:
        file.append(row)
    assert file.rows() == rows and file.repair() is None
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-20])
    assert file.rows() == rows[:1]
    said = file.repair()
    assert said is not None and "half line is dropped, the 1 whole ones are kept" in said
    file.append(rows[1])
    assert file.path.read_bytes() == whole
    file.path.write_bytes(whole[:-1])  # only the newline is missing: nothing is lost
    assert file.repair() is None and file.path.read_bytes() == whole
    file.path.write_bytes(whole[:30])  # a first line that was cut
    assert (
        file.rows() == []
        and "the 0 whole ones" in (file.repair() or "")
        and file.path.read_bytes() == b""
    )


def test_a_file_cut_inside_a_letter_keeps_its_whole_rows(tmp_path, capsys) -> None:
    """The files are ASCII as they are written, but not after every tool that has copied rows."""
    file = ResultFile(tmp_path / "rows.jsonl")
    file.append(timed(0.1))
    whole = file.path.read_bytes()
    for cut in ('{"format": "attnzoo.bench/1", "label": "é'.encode()[:-1], b'{"form'):
        file.path.write_bytes(whole + cut)
        assert file.rows() == [timed(0.1)]
        assert program.main(["report", str(file.path), "--output", "out"]) == 0
        assert (
            "the 1 whole ones are kept" in (file.repair() or "") and file.path.read_bytes() == whole
        )
    file.path.write_bytes(b"\xff\x00" + whole)
    capsys.readouterr()
    assert "line 1 is no JSON" in refused(capsys, "bench", "--output", str(file.path))


@pytest.mark.parametrize(
    ("field", "value"),
    [("length", "64"), ("length", True), ("seconds", [1.0]), ("label", None), ("options", 3)],
)
def test_a_row_whose_number_is_none_is_named(field: str, value: object, capsys) -> None:
    Path("a.jsonl").write_text(
        json.dumps({**json.loads(timed(0.1).to_json()), field: value}) + "\n"
    )
    assert f"line 1 is no row of this version of `attnzoo bench` ({field} is {value!r})" in refused(
        capsys, "report", "a.jsonl"
    )


def test_an_interrupted_sweep_resumes(monkeypatch, capsys) -> None:
    Path("c.yaml").write_text(CONFIG)
    real = Bench.measure

    def interrupted(self, here, *arguments):
        if here.length == 16:
            raise KeyboardInterrupt
        return real(self, here, *arguments)

    monkeypatch.setattr(Bench, "measure", interrupted)
    assert bench("--config", "c.yaml", "--output", "r/b.jsonl") == 130
    assert "interrupted; 3 new rows are in r/b.jsonl" in capsys.readouterr().err
    first = Path("r/b.jsonl").read_text()
    with Path("r/b.jsonl").open("a") as file:
        file.write('{"format": "attnzoo.be')
    monkeypatch.setattr(Bench, "measure", real)
    assert bench("--config", "c.yaml", "--output", "r/b.jsonl") == 0
    captured = capsys.readouterr()
    assert (
        "cut in the middle" in captured.err
        and "holds 3 rows, which are kept" in captured.err
        and "wrote 3 rows" in captured.out
    )
    assert Path("r/b.jsonl").read_text().startswith(first)
    assert [(row.label, row.length) for row in read_rows("r/b.jsonl")] == [
        (label, length)
        for length in (8, 16)
        for label in ("sdpa", "standard", "sliding_window window=4")
    ]
    assert bench("--config", "c.yaml", "--output", "r/b.jsonl") == 0
    assert "wrote 0 rows" in capsys.readouterr().out


def test_an_interrupt_right_after_a_row_counts_it(monkeypatch, capsys) -> None:
    append = result_file.ResultFile.append

    def interrupted(self, row):
        append(self, row)
        raise KeyboardInterrupt

    Path("c.yaml").write_text(CONFIG)
    monkeypatch.setattr(result_file.ResultFile, "append", interrupted)
    assert bench("--config", "c.yaml", "--output", "b.jsonl") == 130
    assert "interrupted; 1 new rows are in b.jsonl" in capsys.readouterr().err


def test_a_lost_device_is_told_and_keeps_the_rows(monkeypatch, capsys) -> None:
    from attnzoo.benchmarking.cuda_timing import DeviceLost

    def lost(self, here, *_):
        yield replace(ROW, length=here.length)
        raise DeviceLost("an illegal memory access")

    Path("c.yaml").write_text(CONFIG)
    monkeypatch.setattr(Bench, "measure", lost)
    # Which benchmarks/cuda/run.sh goes on from.
    assert bench("--config", "c.yaml", "--output", "b.jsonl") == 3
    assert (
        "the device was lost (an illegal memory access); 1 new rows are in b.jsonl, and the same "
        "command goes on" in capsys.readouterr().err
    )
    assert len(read_rows("b.jsonl")) == 1


def test_slower_is_what_grew_by_a_twentieth_beyond_the_quartiles() -> None:
    old = [timed(1.0, length=length) for length in (1, 2, 3, 4, 5)]
    new = [
        timed(1.04, 0.001, length=1),  # beyond the quartiles, but within 5%
        timed(1.5, 0.4, length=2),  # 50% more, but the quartiles overlap
        timed(1.2, length=3),
        timed(0.5, length=4),
        replace(ROW, length=5, reason="off its reference"),
        timed(9.0, length=6),  # nothing to compare with
    ]
    slowdowns, compared = compare_runs(old, new, what="new", against="old")
    assert compared == 5 and [slowdown.new.length for slowdown in slowdowns] == [3, 5]
    assert (
        "1000 ms -> 1200 ms (+20%)" in slowdowns[0].sentence()
        and "no longer timed (off its reference)" in slowdowns[1].sentence()
    )


def test_a_slow_machine_is_no_slowdown() -> None:
    """What grew as SDPA grew in the same rounds is the machine's; what grew beyond that is told, as
    it is where the machine got faster."""
    old = [timed(1.0, length=length, sdpa_seconds=2.0) for length in (1, 2, 3, 4)]
    new = [
        timed(1.5, length=1, sdpa_seconds=3.0),
        timed(1.7, length=2, sdpa_seconds=3.0),
        timed(1.2, length=3, sdpa_seconds=1.0),  # beside a faster SDPA
        timed(0.9, length=4, sdpa_seconds=1.0),  # faster itself, if less so
    ]
    slowdowns, _ = compare_runs(old, new, what="new", against="old")
    assert [slowdown.new.length for slowdown in slowdowns] == [2, 3]
    assert "+70%; SDPA in the same rounds +50%" in slowdowns[0].sentence()
    direct = [replace(row, variant="sdpa", label="sdpa") for row in (old[0], new[0])]
    with pytest.raises(ValueError, match="no timed setting in common"):
        compare_runs(direct[:1], direct[1:], what="new", against="old")


def test_against_an_older_file_exits_with_1_when_something_got_slower(capsys) -> None:
    Path("c.yaml").write_text(CONFIG)
    assert bench("--config", "c.yaml", "--output", "new.jsonl") == 0
    rows = read_rows("new.jsonl")
    for name, factor in (("faster.jsonl", 0.01), ("slower.jsonl", 100.0)):
        file = ResultFile(name)
        for row in rows:
            assert row.seconds and row.seconds_quartiles
            low, high = row.seconds_quartiles
            file.append(
                replace(
                    row,
                    seconds=row.seconds * factor,
                    seconds_quartiles=(low * factor, high * factor),
                )
            )
    assert bench("--config", "c.yaml", "--output", "new.jsonl", "--against", "faster.jsonl") == 1
    said = capsys.readouterr().out
    assert (
        "4 of 4 rows got slower than in faster.jsonl (slower: the median grew by more than 5%"
        in said
    )
    assert "SDPA, called directly, takes 100.00 times as long as then" in said
    assert bench("--config", "c.yaml", "--output", "new.jsonl", "--against", "slower.jsonl") == 0
    assert "0 of 4 rows got slower" in capsys.readouterr().out
    assert "the file that gets the rows" in refused(
        capsys, "bench", "--config", "c.yaml", "--output", "new.jsonl", "--against", "./new.jsonl"
    )


def test_a_file_with_nothing_in_common_is_refused_before_the_sweep(capsys) -> None:
    """SDPA called directly, which every file has, is no setting of a contender's."""
    Path("c.yaml").write_text(CONFIG)
    assert bench("--config", "c.yaml", "--output", "old.jsonl") == 0
    Path("longer.yaml").write_text(CONFIG.replace("[8, 16]", "[9]"))
    arguments = (
        "bench",
        "--config",
        "longer.yaml",
        "--output",
        "new.jsonl",
        "--against",
        "old.jsonl",
    )
    capsys.readouterr()
    assert "have no timed setting in common" in refused(capsys, *arguments)
    assert not Path("new.jsonl").exists() or not read_rows("new.jsonl")
    assert bench("--config", "c.yaml", "--output", "fresh.jsonl", "--against", "old.jsonl") in (
        0,
        1,
    ), "what is planned counts, not only what is held"
    capsys.readouterr()
    Path("old.jsonl").rename("new.jsonl")
    file = ResultFile("older.jsonl")
    for row in read_rows("new.jsonl"):
        file.append(row)
    assert (
        bench("--config", "longer.yaml", "--output", "new.jsonl", "--against", "older.jsonl") == 0
    ), "the file that gets the rows has some in common"


def test_more_rounds_than_a_decoding_state_has_room_for_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds=512 is more than the 511"):
        Sweep(phases=("decode",), rounds=512)
    assert Sweep(phases=("decode",), rounds=511).rounds == 511 and Sweep(rounds=512).rounds == 512


def test_files_of_two_machines_are_refused(capsys) -> None:
    for name, processor in (("a.jsonl", "one"), ("b.jsonl", "another")):
        ResultFile(name).append(timed(1.0, environment={**ENVIRONMENT, "cpu": processor}))
    Path("c.yaml").write_text(CONFIG)
    for arguments in (
        ["bench", "--config", "c.yaml", "--against", "a.jsonl"],
        ["bench", "--config", "c.yaml", "--output", "a.jsonl"],
    ):
        assert "different machines" in refused(capsys, *arguments)
    assert "a.jsonl and b.jsonl are from different machines (cpu: one and another)" in refused(
        capsys, "report", "a.jsonl", "b.jsonl"
    )


@pytest.mark.parametrize(
    ("points", "text"),
    [
        ([(100, 0.5), (400, 2.0)], "200"),
        ([(100, 2.0), (200, 0.5), (400, 0.5), (1600, 2.0)], "800"),
        ([(100, 2.0), (400, 3.0)], "≤ 100"),
        ([(100, 2.0), (400, 0.9)], "> 400"),
    ],
)
def test_the_crossover_is_interpolated_on_logarithmic_scales(points, text: str) -> None:
    found = crossover(points)
    assert found is not None and found.text() == text


def test_report_writes_figures_and_one_page(capsys) -> None:
    Path("c.yaml").write_text(CONFIG)
    assert bench("--config", "c.yaml", "--output", "b.jsonl") == 0
    assert program.main(["report", "b.jsonl", "--output", "out"]) == 0
    page = Path("out/bench.html").read_text()
    # Text is drawn as paths.
    assert (
        page.count("<svg") == 4
        and "sliding_window window=4" in page
        and "length n (tokens)" not in page
    )
    assert not any(part in page for part in ("<script", "http-equiv", "src="))
    assert {path.name for path in Path("out").iterdir()} == {"bench.html"} | {
        f"bench-{name}.{ending}"
        for name in ("time", "memory", "kept", "limit")
        for ending in ("png", "svg")
    }


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("lenghts: [8]", "unknown key 'lenghts' (did you mean 'lengths'?)"),
        ("sweeps: [{phase: [forward]}]", "unknown key 'phase' (did you mean 'phases'?)"),
        ("shapes: [{batch: 2}]", "unknown key 'batch'"),
        ("lengths: 8", "lengths=8 must be a list, such as [8]"),
        ("lengths: [0]", "lengths=0 must be a whole number of at least 1"),
        ("phases: [backward]", "phases: 'backward' is unknown"),
        ("levels: [layer]\nphases: [decode]", "decode is a matter of the core"),
        ("lengths: [12]\nsegments: [5]", "segments=5 does not divide lengths=12 into equal pieces"),
        ("lengths: [12]\nsegments: [0]", "segments=0 must be a whole number of at least 1"),
        ("lengths: [12]\nsegments: [4]\nlevels: [layer]", "segments=4 is for the core's forward"),
        ("lengths: [12]\nsegments: [4]\nphases: [decode]", "segments=4 is for the core's forward"),
        ("dtypes: [float23]", "dtypes: 'float23' is unknown (did you mean 'float32'?)"),
        ("causal: [maybe]", "causal: 'maybe' must be true or false"),
        ("budget: -1", "budget=-1 must be a number of seconds above 0"),
        ("variants: [performr]", "unknown attention 'performr' (did you mean 'performer'?)"),
        ("variants: ['performer:features_num=3']", "performer has no option 'features_num'"),
        ("backends: [warp]", "'warp'"),
        ("device: cuda:99", "device='cuda:99' is not there"),
        ("", "is empty"),
        ("- a", "is a list"),
    ],
)
def test_a_config_that_cannot_be_meant_is_one_sentence(config: str, said: str, capsys) -> None:
    Path("bad.yaml").write_text(config)
    assert said in refused(capsys, "bench", "--config", "bad.yaml")
    assert not Path("report/bench.jsonl").exists()


def test_bad_files_and_options_are_one_sentence_and_lose_nothing(capsys) -> None:
    Path("other.jsonl").write_text('{"a": 1}\n')
    Path("c.yaml").write_text(CONFIG)
    assert "line 1 is no row" in refused(
        capsys, "bench", "--config", "c.yaml", "--output", "other.jsonl"
    )
    assert Path("other.jsonl").read_text() == '{"a": 1}\n'
    assert "cannot be read" in refused(capsys, "report", "missing.jsonl")
    assert "cannot be read" in refused(
        capsys, "bench", "--config", "c.yaml", "--against", "missing.jsonl"
    )
    assert "did you mean '--against'" in refused(capsys, "bench", "--agianst", "x")
    assert (
        "'quikc' is no file (did you mean 'quick'?); give a YAML file of sweeps, or one of cpu, "
        "cuda, five, gates, quick" in refused(capsys, "bench", "--config", "quikc")
    )
    assert "config missing.yaml cannot be read" in refused(
        capsys, "bench", "--config", "missing.yaml"
    )


@pytest.mark.parametrize("name", ["quick", "cpu", "cuda", "five", "gates"])
def test_the_shipped_configurations_can_be_read(name: str) -> None:
    from attnzoo.public.run_bench import config_path

    plan = read_plan(config_path(name))
    assert all(sweep.contenders(parse_variant) and list(sweep.cells()) for sweep in plan.sweeps)
    assert plan.device == ("cuda" if name == "cuda" else "cpu")


def test_a_gpu_measures_the_whole_zoo() -> None:
    """Every variant, forward and backward, in each form it has, at every length from 1k to 128k;
    the most telling rows come first."""
    from attnzoo.public.run_bench import config_path

    plan = read_plan(config_path("cuda"))
    planned = {
        (contender.choice.name, cell.phase, cell.is_causal, cell.length)
        for sweep in plan.sweeps
        for cell in sweep.cells()
        for contender in sweep.contenders(parse_variant)
        if cell.level == "core" and cell.dtype == "bfloat16" and cell.shape == Shape(8, 16, 64)
    }
    lengths = [1024 * 2**i for i in range(8)]
    assert planned >= set(
        product(attnzoo.names(), ("forward", "forward+backward"), (True, False), lengths)
    )
    first = plan.sweeps[0]
    assert {"standard", "sliding_window", "bigbird", "linear", "performer"} <= set(first.variants)
    assert first.lengths == (4096, 16384) and first.levels == ("core",)
    assert set(first.backends) == {"auto", "windows", "blocks", "chunked"}


def test_a_file_holds_the_derived_numbers_too(tmp_path) -> None:
    file = ResultFile(tmp_path / "rows.jsonl")
    file.append(timed(0.5, macs=100, sdpa_macs=400, sdpa_seconds=1.0))
    assert json.loads(file.path.read_text())["kept_speedup"] == 0.5


@pytest.mark.thorough
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other allocators keep what they like"
)
def test_a_settled_heap_keeps_what_is_freed() -> None:
    script = """
import ctypes, sys, torch
from attnzoo.benchmarking.heap import settle_heap
class Account(ctypes.Structure):  # of malloc, see mallinfo(3)
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_int) for name in names.split()]
libc = ctypes.CDLL(None)
libc.mallinfo.restype = Account
if sys.argv[1] == "settled":
    settle_heap()
before = libc.mallinfo().hblks
three = [torch.empty(2**21) for _ in range(3)]  # of 8 MiB each, as three gradients
print(libc.mallinfo().hblks - before)
"""
    # Blocks that go back to the system when they are freed, and whose pages are new every time
    returned = {}
    for how in ("fresh", "settled"):
        ran = subprocess.run(
            [sys.executable, "-c", script, how], capture_output=True, text=True, check=True
        )
        returned[how] = int(ran.stdout)
    assert returned == {"fresh": 3, "settled": 0}
