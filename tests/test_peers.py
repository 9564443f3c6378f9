"""The comparison with other libraries: who is wrong is told so, who is missing has a reason, and
what is measured is kept."""

from __future__ import annotations

import sys
from dataclasses import replace

import peer_bench
import peer_formulas as formulas
import pytest
import torch
import torch.nn.functional as F
from peer_bench import Entrant, PeerBench, entrants, judged, missing
from peer_list import PEERS, Peer
from peer_rows import PeerRow
from peer_settings import OURS, Ready
from peer_sparse import dense_mask, our_pattern
from peer_table import tables
from run import main

import attnzoo
from attnzoo.benchmarking import measure_setting
from attnzoo.benchmarking.bench_rows import SDPA, ResultFile
from attnzoo.benchmarking.machine_limits import Limits
from attnzoo.benchmarking.plan import Cell, Shape
from attnzoo.registry import Choice

CPU = torch.device("cpu")


def cell(length: int = 256, is_causal: bool = True, phase: str = "forward") -> Cell:
    return Cell("core", phase, is_causal, length, "float32", Shape(1, 2, 16))


def inputs(length: int = 256) -> list[torch.Tensor]:
    return list(torch.randn(3, 1, 2, length, 16))


def sdpa_peer(scale: float = 1.0, **changes) -> Peer:
    def make(cell: Cell) -> Ready:
        return Ready(
            lambda q, k, v: (
                scale * F.scaled_dot_product_attention(q, k, v, is_causal=cell.is_causal)
            ),
            formulas.softmax_over(),
        )

    return replace(Peer("exact", "toy", "torch", make), **changes)


def measured(peer: Peer, phase: str = "forward") -> dict[str, PeerRow]:
    bench = PeerBench(CPU, 0)
    return {
        row.label: row
        for row in bench.measure(cell(phase=phase), entrants(["exact"], True, [peer]), 3, 9.0)
    }


@pytest.fixture(autouse=True)
def in_an_empty_folder_with_given_limits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure_setting, "measure_limits", lambda *_: Limits(1e11, 1e10))


@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
def test_a_peer_is_timed_beside_ours_and_sdpa(phase: str) -> None:
    rows = measured(sdpa_peer(), phase)
    assert set(rows) == {SDPA, "standard", "toy"}
    toy = rows["toy"]
    assert (
        toy.seconds
        and toy.rounds == 3
        and toy.ours_seconds == rows["standard"].seconds
        and toy.sdpa_seconds == rows[SDPA].seconds
    )
    assert toy.times_ours == toy.seconds / rows["standard"].seconds  # type: ignore[operator]
    assert (
        (toy.group, toy.package, toy.fault) == ("exact", f"torch {torch.__version__}", "")
        and toy.error is not None
        and toy.error < 1e-5
    )
    assert rows["standard"].is_ours and rows["standard"].ran == "sdpa"


def test_a_wrong_peer_keeps_its_time_and_is_told_what_is_wrong() -> None:
    toy = measured(sdpa_peer(scale=1.1, known="it is a toy"))["toy"]
    assert toy.seconds is not None and toy.fault == "off its own formula by 10.0% (it is a toy)"


def test_a_causal_form_that_looks_ahead_is_said_to_leak() -> None:
    ready = Ready(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), None)
    error, fault = judged(sdpa_peer(), ready, inputs(), is_causal=True)
    assert error is None and fault.startswith("leaks: later tokens change earlier rows by")
    assert judged(sdpa_peer(), ready, inputs(), is_causal=False)[1] == ""


def test_ours_gets_no_time_when_it_is_wrong(monkeypatch) -> None:
    right = attnzoo.build("standard", heads=2, head_dim=16).engine
    backend = next(one for one in right.backends if one.name == "sdpa")
    monkeypatch.setattr(
        type(right),
        "backends",
        (
            replace(backend, run=lambda engine, call: 2 * backend.run(engine, call)),
            *right.backends,
        ),
    )
    ours = measured(sdpa_peer())["standard"]
    assert ours.seconds is None and "off its reference" in ours.reason


def test_a_peer_over_the_budget_has_a_reason_and_ours_a_time() -> None:
    rows = {
        row.label: row
        for row in PeerBench(CPU, 0).measure(
            cell(), entrants(["exact"], True, [sdpa_peer()]), 3, 1e-9
        )
    }
    assert rows["toy"].seconds is None and rows["toy"].reason.startswith("over the time budget: ")
    assert rows["standard"].seconds and rows[SDPA].seconds


def test_a_missing_package_is_a_row_that_quotes_its_failed_build(tmp_path, monkeypatch) -> None:
    def make(cell: Cell) -> Ready:
        raise ImportError("No module named 'toy'")

    assert measured(sdpa_peer(make=make, package="toy"))["toy"].reason.endswith(
        "No module named 'toy'; benchmarks/peers/setup.sh installs toy"
    )
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (tmp_path / peer_bench.BUILD_LOGS).mkdir()
    (tmp_path / peer_bench.BUILD_LOGS / "toy.txt").write_text(
        "Collecting toy\n  OSError: no compiler\nerror: metadata-generation-failed\n"
    )
    assert (
        missing("toy", ImportError("No module named 'toy'"))
        == "toy could not be built: OSError: no compiler"
    )


def test_heads_last_peers_get_their_layout() -> None:
    def make(cell: Cell) -> Ready:
        def forward(q, k, v):
            assert q.shape == (1, 256, 2, 16) and q.is_contiguous()
            out = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
            )
            return out.transpose(1, 2).flatten(2)

        return Ready(forward, formulas.softmax_over())

    toy = measured(sdpa_peer(make=make, heads_last=True))["toy"]
    assert toy.seconds and toy.fault == ""


@pytest.mark.parametrize(
    ("name", "options", "formula", "is_causal"),
    [
        ("standard", {}, formulas.softmax_over(), False),
        ("standard", {}, formulas.softmax_over(), True),
        ("sliding_window", {"window": 9}, formulas.softmax_over(formulas.within(8)), False),
        ("sliding_window", {"window": 9}, formulas.softmax_over(formulas.within(8)), True),
        ("linear", {}, formulas.kernel(formulas.elu_features, formulas.elu_features), False),
        ("linear", {}, formulas.kernel(formulas.elu_features, formulas.elu_features), True),
        ("linear", {"feature_map": "softmax"}, formulas.efficient(1.0), False),
    ],
)
def test_formulas_agree_with_the_references(
    name: str, options: dict, formula: formulas.Formula, is_causal: bool
) -> None:
    q, k, v = (x.double() for x in inputs(40))
    rows = torch.tensor([0, 7, 39])
    wanted = attnzoo.build(name, heads=2, head_dim=16, backend="reference", **options)(
        q, k, v, is_causal=is_causal
    )
    torch.testing.assert_close(formula(q, k, v, rows, is_causal), wanted[:, :, rows])


def test_the_formulas_of_features_projections_and_landmarks() -> None:
    q, k, v = (x.double() for x in inputs(32))
    rows = torch.arange(32)
    performer = attnzoo.build(
        "performer", heads=2, head_dim=16, num_features=24, backend="reference"
    ).double()
    features = formulas.positive_features(
        dict(performer.named_buffers())["engine.feature_map.projection"]
    )
    torch.testing.assert_close(
        formulas.kernel(features, features)(q, k, v, rows, True), performer(q, k, v, is_causal=True)
    )
    linformer = attnzoo.build(
        "linformer",
        heads=2,
        head_dim=16,
        max_length=32,
        rank=8,
        sharing="headwise",
        backend="reference",
    ).double()
    weights = [parameter.detach()[0] for parameter in linformer.parameters()]
    torch.testing.assert_close(
        formulas.projected(*weights)(q, k, v, rows, False), linformer(q, k, v).detach()
    )
    # As many landmarks as tokens leave nothing to approximate.
    exact = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(formulas.nystrom(32, 40)(q, k, v, rows, False), exact)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("group", ["window", "bigbird"])
def test_a_dense_mask_is_our_pattern(group: str, is_causal: bool) -> None:
    here, tensors = cell(640, is_causal), inputs(640)
    choice = OURS[group]
    ours = attnzoo.build(choice.name, heads=2, head_dim=16, **choice.options)
    ready = dense_mask(group)(here)
    torch.testing.assert_close(ready.forward(*tensors), ours(*tensors, is_causal=is_causal))
    assert our_pattern(group, here)[1].is_causal is is_causal
    peer = next(peer for peer in PEERS if peer.label == f"SDPA dense {group}")
    assert judged(peer, ready, tensors, is_causal)[1] == ""


def test_a_run_writes_rows_resumes_and_prints_tables(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "x_transformers.attend", None)
    asked = [
        "--groups",
        "exact",
        "--lengths",
        "1024",
        "--phases",
        "forward",
        "--form",
        "causal",
        "--rounds",
        "3",
        "--output",
        "r/p.jsonl",
    ]
    assert main(asked) == 0
    first = ResultFile("r/p.jsonl", PeerRow).rows()
    assert {row.label: row.seconds is not None for row in first} == {
        SDPA: True,
        "standard": True,
        "x-transformers flash=True": False,
        "x-transformers": False,
    }
    assert all(row.environment for row in first)
    said = capsys.readouterr().out
    assert (
        "exact: attnzoo's standard and x-transformers" in said
        and "benchmarks/peers/setup.sh installs x-transformers" in said
    )
    assert main(asked) == 0 and ResultFile("r/p.jsonl", PeerRow).rows() == first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--lengths", "1000"],
            "--lengths 1000 must be a multiple of 1024: some peers take nothing else",
        ),
        (["--rounds", "2"], "--rounds 2 must be at least 3"),
        (["--budget", "0"], "--budget 0 must be a number of seconds above 0"),
        (["--groups", "reformer"], "invalid choice: 'reformer'"),
        (["--table", "--output", "none.jsonl"], "none.jsonl does not exist"),
        (
            ["--output", "other.jsonl"],
            "other.jsonl, line 1 is no row of this version of `benchmarks/peers/run.py`",
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], said: str, capsys) -> None:
    with open("other.jsonl", "w") as file:
        file.write('{"format": "attnzoo.bench/1"}\n')
    assert main(arguments) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.startswith("run.py: ") and complaint.count("\n") == 1


def test_the_table_names_the_best_peer_and_marks_a_wrong_one() -> None:
    base = PeerBench(CPU, 0).blank(Entrant(Choice("standard"), "auto", "exact"), cell())
    assert isinstance(base, PeerRow)
    common = {"sdpa_seconds": 8.0, "ours_seconds": 2.0, "macs": 10, "sdpa_macs": 80, "rounds": 3}
    ours = replace(base, seconds=2.0, **common)
    slow, wrong = (
        replace(base, package="p 1", variant=name, label=name, seconds=seconds, **common)
        for name, seconds in (("slow", 6.0), ("quick", 3.0))
    )
    (table,) = tables([ours, slow, replace(wrong, fault="off its own formula by 9%")])
    assert table.rows[0]["best"] == "quick !" and table.rows[0]["times"] == 1.5
    assert table.rows[0]["kept"] == 0.5 and table.rows[0]["best_kept"] == pytest.approx(1 / 3)
    assert any("off its own formula by 9%" in note for note in table.notes)
