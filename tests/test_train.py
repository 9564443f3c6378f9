"""The training loop and the study: repeatable, resumable, fair to every contender, and whatever
cannot be done is a row with its reason."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_two_processes
from small import of_each_family
from stages import only
from torch import nn

from attnzoo.call import UnsupportedError
from attnzoo.public.variant_text import parse_variant
from attnzoo.registry import build, names, spec_of
from attnzoo.tasks.copying import Copy
from attnzoo.tasks.listops import ListOps
from attnzoo.tasks.lookup import Lookup
from attnzoo.tasks.mqar import MQAR
from attnzoo.tasks.needle import Needle
from attnzoo.tasks.task import TEST, Task
from attnzoo.training import loop
from attnzoo.training.contenders import GRU, Contender, parse_contender
from attnzoo.training.devices import Devices
from attnzoo.training.loop import Budget, Outcome, Setup, evaluate, train
from attnzoo.training.model import Sizes, Transformer
from attnzoo.training.summary import Summary, best_rate, summed_up
from attnzoo.training.training_rows import Row
from attnzoo.training.training_run import Run
from attnzoo.training.training_study import Study

CPU = torch.device("cpu")
TINY = Sizes(width=16, layers=2, heads=2)
BUDGET = Budget(steps=8, batch_size=4, warmup_steps=2, evaluate_every=3)
LISTOPS = ListOps(24, 4, 3, 4, 200)
TASKS: list[Task] = [MQAR(16, 2, 8), LISTOPS, Lookup(16, 3, 4)]


def contender(text: str) -> Contender:
    return parse_contender(text, parse_variant)


def setup(task: Task = TASKS[0], text: str = "standard", **changes: Any) -> Setup:
    return replace(
        Setup(task, contender(text), TINY, BUDGET, held_out=32, learning_rate=0.01, seed=3),
        **changes,
    )


def trained(chosen: Setup, folder: Path, report=lambda steps, loss: None) -> Outcome:
    return train(chosen, Devices(CPU, chosen.budget.precision), folder / "run.pt", report)


class Interrupted(Exception):
    pass


def interrupt_at(wanted: int):
    def report(steps: int, loss: float) -> None:
        if steps == wanted:
            raise Interrupted

    return report


@pytest.mark.parametrize("text", ["standard", "linear+standard", GRU])
def test_a_seed_gives_the_same_curve_twice_and_another_one_another(text, tmp_path):
    chosen = setup(text=text)
    first, again = trained(chosen, tmp_path / "a"), trained(chosen, tmp_path / "b")
    assert (first.curve, first.validations, first.test) == (
        again.curve,
        again.validations,
        again.test,
    )
    assert trained(replace(chosen, seed=4), tmp_path / "c").curve != first.curve


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_run_that_goes_on_from_its_checkpoint_equals_one_without_a_break(task, tmp_path):
    chosen = setup(task)
    whole = trained(chosen, tmp_path / "whole")
    with pytest.raises(Interrupted):
        trained(chosen, tmp_path / "broken", interrupt_at(5))
    held = torch.load(tmp_path / "broken" / "run.pt", weights_only=True)
    assert len(held["outcome"]["curve"]) == 3, "the last checkpoint is the one of step 3"
    steps: list[int] = []
    resumed = trained(chosen, tmp_path / "broken", lambda done, loss: steps.append(done))
    assert steps == [4, 5, 6, 7, 8]
    assert (resumed.curve, resumed.validations, resumed.test) == (
        whole.curve,
        whole.validations,
        whole.test,
    )


def test_a_checkpoint_of_another_configuration_is_refused_and_stays(tmp_path):
    trained(setup(), tmp_path)
    before = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(
        ValueError, match=r"checkpoint of another configuration \(budget, learning_rate differ\)"
    ):
        trained(setup(learning_rate=0.02, budget=replace(BUDGET, steps=9)), tmp_path)
    assert (tmp_path / "run.pt").read_bytes() == before
    (tmp_path / "run.pt").write_bytes(before[:100])
    with pytest.raises(ValueError, match="no checkpoint of `attnzoo train`, or a damaged one"):
        trained(setup(), tmp_path)


def test_every_contender_starts_from_the_same_weights_but_the_attention():
    def start(text: str) -> dict[str, torch.Tensor]:
        model = Transformer(LISTOPS, contender(text), TINY, 5)
        return {
            name: value
            for name, value in model.state_dict().items()
            if ".attention.attention." not in name and ".gru." not in name
        }

    standard = start("standard")
    for text in (
        "performer:num_features=8",
        "linformer:rank=4",
        "linear+standard",
        "bigbird:block_size=4",
    ):
        other = start(text)
        assert other.keys() == standard.keys()
        assert all(torch.equal(other[name], standard[name]) for name in standard), text
    shared = start(GRU)
    assert len(shared) > 10 and all(torch.equal(shared[name], standard[name]) for name in shared)


@pytest.mark.parametrize("task", [MQAR(32, 4, 16), Needle(16, 8)], ids=lambda task: task.name)
@pytest.mark.parametrize("text", ["standard", "sliding_window:window=4", "linear", GRU])
def test_a_decoder_does_not_look_ahead(task, text):
    model = Transformer(task, contender(text), replace(TINY, convolution=3), 0).eval()
    batch = task.held_out(TEST, 2)
    changed = replace(batch, inputs=batch.inputs.clone())
    changed.inputs[:, 10:] = 1 - changed.inputs[:, 10:].clamp(max=1)
    with torch.no_grad():
        before, after = model(batch), model(changed)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-6) and not torch.allclose(
        before[:, 10:], after[:, 10:]
    )


@pytest.mark.parametrize("text", ["standard", "linear", "linformer:rank=4", GRU])
def test_padding_changes_no_answer_of_an_encoder(text):
    model = Transformer(LISTOPS, contender(text), replace(TINY, convolution=3), 0).eval()
    batch = LISTOPS.held_out(TEST, 20)
    assert batch.mask is not None and not batch.mask.all()
    longest = int(batch.mask.sum(1).min())
    row = int(batch.mask.sum(1).argmin())
    with torch.no_grad():
        padded = model(batch)[row]
        alone = batch[slice(row, row + 1)]
        short = model(replace(alone, inputs=alone.inputs[:, :longest], mask=None))[0]
    assert torch.allclose(padded, short, atol=1e-5)


def test_queries_of_a_cross_task_see_the_memory_and_not_one_another():
    task = Lookup(16, 4, 5)
    model, batch = Transformer(task, contender("standard"), TINY, 0).eval(), task.held_out(TEST, 2)
    assert batch.memory is not None
    order = [2, 0, 3, 1]
    with torch.no_grad():
        before = model(batch)
        turned = model(replace(batch, inputs=batch.inputs[:, order]))
        forgotten = model(replace(batch, memory=batch.memory.flip(1)))
    assert torch.allclose(before[:, order], turned, atol=1e-6) and not torch.allclose(
        before, forgotten, atol=1e-3
    )


def test_the_score_is_the_share_of_right_answers_and_bits_are_of_base_2():
    class Always(nn.Module):
        def forward(self, batch):
            logits = torch.zeros(*batch.inputs.shape, 3)
            logits[..., 1] = 2.0
            return logits

    batch = Copy(4, 2).held_out(TEST, 50)
    task, share = Copy(4, 2), (batch.targets == 1).sum().item() / batch.asked
    score, loss = evaluate(Always(), task, batch, 16, Devices(CPU, "float32"))
    assert score == pytest.approx(share) and 0 < share < 1
    normalizer = torch.tensor([0.0, 2.0, 0.0]).logsumexp(0).item()
    assert loss == pytest.approx(share * (normalizer - 2) + (1 - share) * normalizer, rel=1e-6)

    class Characters(Copy):
        metric = "bits per character"

    assert evaluate(Always(), Characters(4, 2), batch, 16, Devices(CPU, "float32"))[
        0
    ] == pytest.approx(loss / 0.6931471805599453)


@pytest.mark.parametrize(
    ("task", "sizes", "steps", "rate"),
    [
        (Copy(8, 4), Sizes(width=32, layers=2, heads=2), 150, 0.005),
        (MQAR(16, 2, 8), Sizes(width=32, layers=2, heads=1, convolution=3), 150, 0.01),
    ],
    ids=["copy", "mqar"],
)
def test_exact_attention_learns_what_no_guess_reaches(task, sizes, steps, rate, tmp_path):
    found = trained(
        setup(
            task,
            sizes=sizes,
            budget=Budget(steps, 32, 10, evaluate_every=steps),
            learning_rate=rate,
            held_out=128,
        ),
        tmp_path,
    )
    assert found.test is not None and found.test > 0.9 > 3 * max(task.baselines(128).values())


def test_bfloat16_is_another_run_than_float32(tmp_path):
    low = trained(setup(budget=replace(BUDGET, precision="bfloat16")), tmp_path / "low")
    full = trained(setup(), tmp_path / "full")
    assert low.curve != full.curve and low.curve == pytest.approx(full.curve, rel=0.05)


def in_parts(folder: str, wanted: list[float]) -> list[str]:
    """What is wrong with a run as one of two processes."""
    rank = str(torch.distributed.get_rank())
    os.environ.update(
        WORLD_SIZE="2",
        RANK=rank,
        LOCAL_RANK=rank,
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="localhost",
        MASTER_PORT="0",
    )
    chosen = setup(LISTOPS)
    found = train(
        chosen, Devices(CPU, "float32"), Path(folder) / "run.pt", lambda steps, loss: None
    )
    return (
        [f"{found.curve} is not {wanted}"] if found.curve != pytest.approx(wanted, rel=1e-4) else []
    )


@pytest.mark.thorough
def test_two_processes_train_what_one_does(tmp_path):
    pytest.importorskip("accelerate")
    assert (
        in_two_processes(in_parts, str(tmp_path), trained(setup(LISTOPS), tmp_path / "alone").curve)
        == []
    )


@pytest.mark.parametrize(
    "changes",
    [{"budget": replace(BUDGET, batch_size=1)}, {"held_out": 1}],
    ids=["batch", "held out"],
)
def test_more_processes_than_rows_are_refused(changes, tmp_path):
    devices = Devices(CPU, "float32")
    devices.count = 2
    with pytest.raises(
        ValueError,
        match=r"=1 is less than one row for each of 2 processes; give more, or launch fewer",
    ):
        Run(study("standard", **changes), devices, (), lambda row: None, tmp_path, {})


# The study.


def study(*texts: str, **changes: Any) -> Study:
    made = Study(
        (TASKS[0],), (TINY,), BUDGET, 16, (0.001, 0.01), (3, 4), tuple(map(contender, texts))
    )
    return replace(made, **changes)


def rows_of(chosen: Study, folder: Path, held: tuple[Row, ...] = ()) -> tuple[list[Row], list[Row]]:
    """All rows of a study, and those that were written."""
    written: list[Row] = []
    work = Run(chosen, Devices(CPU, "float32"), held, written.append, folder, {"torch": "2"})
    return work.run(lambda said, done, total: None), written


def test_a_study_tries_every_rate_with_every_seed(tmp_path):
    rows, written = rows_of(study("standard", GRU), tmp_path)
    assert rows == written and [row.label for row in rows if row.is_baseline] == [
        "chance",
        "majority answer",
    ]
    for label in ("standard", GRU):
        runs = [row for row in rows if row.label == label]
        assert [(row.seed, row.learning_rate) for row in runs] == [
            (3, 0.001),
            (3, 0.01),
            (4, 0.001),
            (4, 0.01),
        ]
        assert all(
            row.seconds
            and row.macs
            and row.peak_bytes
            and row.state_bytes
            and row.parameters
            and row.test is not None
            for row in runs
        )
    assert not list(tmp_path.iterdir()), "a finished run needs no checkpoint"
    assert [Row.from_fields(vars(row)) for row in rows] == rows


def test_what_the_file_holds_is_not_trained_again(tmp_path, monkeypatch):
    first, _ = rows_of(study("standard"), tmp_path)
    monkeypatch.setattr(
        "attnzoo.training.training_run.train", lambda *_: pytest.fail("trained again")
    )
    again, written = rows_of(study("standard"), tmp_path, tuple(first))
    assert again == first and written == []


def test_another_budget_is_another_row(tmp_path):
    first, _ = rows_of(study("standard"), tmp_path)
    _, written = rows_of(study("standard", budget=replace(BUDGET, steps=5)), tmp_path, tuple(first))
    assert len([row for row in written if not row.is_baseline]) == 4


def test_a_loss_that_is_not_finite_ends_its_run_and_not_the_study(tmp_path, monkeypatch):
    gradients = loop._gradients

    def explode(placed, model, batch, devices):
        loss, norm = gradients(placed, model, batch, devices)
        calls["steps"] += 1
        return (
            (float("nan"), norm) if calls["rate"] == 0.01 and calls["steps"] == 3 else (loss, norm)
        )

    calls: dict[str, Any] = {"rate": None, "steps": 0}

    def watched(chosen, *rest):
        calls.update(rate=chosen.learning_rate, steps=0)
        return train(chosen, *rest)

    monkeypatch.setattr(loop, "_gradients", explode)
    monkeypatch.setattr("attnzoo.training.training_run.train", watched)
    rows, _ = rows_of(study("standard", "linear"), tmp_path)
    bad = [row for row in rows if row.learning_rate == 0.01]
    assert [row.label for row in bad] == ["standard", "standard", "linear", "linear"]
    assert {(row.stopped_at, row.test, row.validation) for row in bad} == {(2, None, None)}
    assert "not finite at step 2" in bad[0].reason and len(bad[0].curve or []) == 2
    (problem,) = summed_up(rows)
    summaries = {summary.label: summary for summary in problem.contenders}
    assert summaries["standard"].learning_rate == 0.001 and summaries["standard"].seeds == 2
    assert (
        summaries["standard"].validations[0.01] is None
        and "rate 0.01, seed 3" in summaries["standard"].reason
    )


@pytest.mark.parametrize(("part", "stopped_at"), [("validation", 2), (TEST, 7)])
def test_a_held_out_loss_that_is_not_finite_ends_its_run_and_not_the_study(
    part, stopped_at, tmp_path, monkeypatch
):
    """Its score would be no number that a result file may hold."""
    held_out = TASKS[0].held_out(part, 16)

    def explode(model, task, batch, *rest):
        found = evaluate(model, task, batch, *rest)
        return (float("nan"), float("nan")) if torch.equal(batch.inputs, held_out.inputs) else found

    monkeypatch.setattr(loop, "evaluate", explode)
    rows, _ = rows_of(study("standard", "linear", learning_rates=(0.01,), seeds=(3,)), tmp_path)
    runs = [row for row in rows if not row.is_baseline]
    assert [(row.label, row.stopped_at, row.test, row.validation) for row in runs] == [
        (x, stopped_at, None, None) for x in ("standard", "linear")
    ]
    assert all(
        f"not finite at step {stopped_at}" in row.reason and "NaN" not in row.to_json()
        for row in runs
    )


@pytest.mark.parametrize(
    ("task", "text", "reason"),
    [
        (TASKS[0], "linformer:rank=4", "linformer cannot be causal"),
        (TASKS[2], GRU, "a GRU reads one sequence"),
        (LISTOPS, "linformer:max_length=8", "longer than max_length=8"),
    ],
    ids=["causal", "cross", "length"],
)
def test_who_cannot_do_the_task_is_a_row_with_its_reason(task, text, reason, tmp_path):
    rows, _ = rows_of(study(text, "standard", problems=(task,)), tmp_path)
    (skipped,) = [row for row in rows if row.label.startswith(text.split(":")[0])]
    assert reason in skipped.reason and skipped.test is None and skipped.learning_rate is None
    assert any(row.label == "standard" and row.test is not None for row in rows)


def test_causal_listops_hide_later_tokens_from_every_layer():
    """So that what is causal only can be trained on it, and its answers stay the same."""
    task = replace(LISTOPS, causal=True)
    model = Transformer(task, contender("path"), TINY, 0)
    batch = task.held_out(TEST, 20)
    assert torch.equal(batch.targets, LISTOPS.held_out(TEST, 20).targets)
    assert model(batch).shape == (20, 10)
    x = torch.randn(1, task.length, TINY.width)
    later = x.clone()
    later[:, 9:] += 1
    for one, sees in ((task, False), (LISTOPS, True)):
        block = Transformer(one, contender("standard"), TINY, 0).eval().blocks[0]
        assert torch.equal(block(x, None, None)[:, :9], block(later, None, None)[:, :9]) != sees


@pytest.mark.parametrize("name", only(of_each_family(), names()))
def test_every_variant_trains_on_the_tasks_that_its_spec_allows(name, tmp_path):
    spec = spec_of(name)
    for task, able in zip(
        TASKS, (spec.causal, spec.bidirectional, spec.bidirectional and spec.cross), strict=True
    ):
        rows, _ = rows_of(
            study(
                name,
                problems=(task,),
                learning_rates=(0.01,),
                seeds=(0,),
                budget=replace(BUDGET, steps=2),
            ),
            tmp_path,
        )
        (row,) = [row for row in rows if not row.is_baseline]
        assert (row.test is not None) == able, (task.name, row.reason)
        assert bool(row.state_bytes) == (able and spec.decodes and task.form != "encoder")


def summary_of(*runs: tuple[float, int, float | None, float]) -> Summary:
    """What runs of (rate, seed, validation, test) come to; a validation of None is that of a run
    that was stopped."""
    blank = Row(
        "mqar",
        {"length": 4},
        {},
        {},
        8,
        "accuracy",
        "standard",
        [["standard", {}]],
        validation_loss=1.0,
        seconds=2.0,
        curve=[[1, 0.5]],
    )
    rows = [
        replace(blank, learning_rate=r, seed=s, validation=v, test=None if v is None else t)
        for r, s, v, t in runs
    ]
    (problem,) = summed_up(
        [*rows, replace(blank, label="chance", layers=[], test=0.25, curve=None)]
    )
    chance, standard = problem.contenders
    assert (chance.label, chance.is_baseline, chance.test) == ("chance", True, 0.25)
    assert standard.learning_rate is None or len(problem.best_rows("standard")) == standard.seeds
    return standard


def test_test_scores_have_a_mean_and_a_standard_deviation():
    found = summary_of(
        (0.1, 0, 0.5, 0.4), (0.2, 0, 0.9, 0.8), (0.1, 1, 0.5, 0.2), (0.2, 1, 0.8, 0.6)
    )
    assert (found.learning_rate, found.seeds, found.seconds) == (0.2, 2, 2.0)
    assert found.test == pytest.approx(0.7) and found.spread == pytest.approx(0.02**0.5)
    assert found.validations == pytest.approx({0.1: 0.5, 0.2: 0.85})


def test_the_rate_is_the_best_over_all_seeds_and_not_over_one():
    """Of exact attention on induction two rates solve the task with one seed, and only one of them
    with another."""
    found = summary_of(
        (0.1, 0, 0.9, 0.91), (0.2, 0, 1.0, 1.0), (0.1, 1, 0.9, 0.89), (0.2, 1, 0.1, 0.1)
    )
    assert found.learning_rate == 0.1 and found.test == pytest.approx(0.9)


def test_a_rate_at_which_a_run_was_stopped_is_behind_one_at_which_none_was():
    found = summary_of(
        (0.1, 0, 0.5, 0.4), (0.2, 0, 1.0, 1.0), (0.1, 1, 0.5, 0.4), (0.2, 1, None, 0.0)
    )
    assert found.learning_rate == 0.1 and found.validations == {0.1: 0.5, 0.2: None}
    found = summary_of((0.1, 0, None, 0.0), (0.2, 0, 0.3, 0.2))
    assert (found.learning_rate, found.test, found.seeds) == (0.2, 0.2, 1)
    found = summary_of((0.1, 0, None, 0.0), (0.2, 0, None, 0.0))
    assert (found.learning_rate, found.test, found.validations) == (
        None,
        None,
        {0.1: None, 0.2: None},
    )


def test_of_equal_scores_the_smaller_loss_is_better():
    rows = [
        Row("copy", {}, {}, {}, 8, "accuracy", "standard", [], rate, 0, 1.0, loss)
        for rate, loss in ((0.1, 0.3), (0.2, 0.1))
    ]
    assert best_rate({0.1: rows[:1], 0.2: rows[1:]}, lower_is_better=False) == 0.2
    rows = [replace(row, validation=bits) for row, bits in zip(rows, (2.0, 3.0), strict=True)]
    assert best_rate({0.1: rows[:1], 0.2: rows[1:]}, lower_is_better=True) == 0.1


def test_the_rate_is_chosen_with_the_seeds_that_tried_them_all():
    """Of a study that was interrupted, and of a file that began with one run of another seed."""
    other, first, second, later = (
        (0.1, 5, 0.99, 0.3),
        (0.1, 0, 0.5, 0.4),
        (0.2, 0, 0.9, 0.8),
        (0.2, 6, 0.8, 0.6),
    )
    for order in ((other, first, second), (second, first, other)):
        found = summary_of(*order)
        assert (found.learning_rate, found.test, found.validations) == (
            0.2,
            0.8,
            {0.1: 0.5, 0.2: 0.9},
        )
    found = summary_of(first, second, other, later)
    assert (found.learning_rate, found.test) == (0.2, pytest.approx(0.7))


def test_models_of_several_sizes_are_studies_of_one_file(tmp_path):
    """Rows of one size are held, those of the other trained, and neither takes the other's
    checkpoint."""
    chosen = study("standard", learning_rates=(0.01,), seeds=(3,))
    first, _ = rows_of(chosen, tmp_path)
    wider = replace(TINY, width=2 * TINY.width)
    told: list[str] = []
    work = Run(
        replace(chosen, models=(TINY, wider)),
        Devices(CPU, "float32"),
        first,
        lambda row: None,
        tmp_path,
        {},
    )
    rows = work.run(lambda said, done, total: told.append(said))
    assert [row.model["width"] for row in rows if not row.is_baseline] == [TINY.width, wider.width]
    assert [row for row in rows if row.model["width"] == TINY.width] == first and len(
        summed_up(rows)
    ) == 2
    assert any(f"width={wider.width}:" in said for said in told)


def test_layers_take_turns_and_parts_must_come_out_even():
    assert [part.name for part in contender("linear+standard").layers(4)] == [
        "linear",
        "standard",
        "linear",
        "standard",
    ]
    with pytest.raises(ValueError, match="2 parts and the model layers=3"):
        contender("linear+standard").layers(3)


def test_costs_are_those_of_the_cost_module():
    task, sizes = MQAR(32, 4, 16), Sizes(width=16, layers=2, heads=2)
    model = Transformer(task, contender("linear+standard"), sizes, 0)
    mixers: list[Any] = [block.mixer for block in model.blocks]
    cores = [mixer.attention.attention for mixer in mixers]
    costs = [core.cost(1, 32, is_causal=True) for core in cores]
    assert model.macs(32) == 2 * 4 * 32 * 16**2 + costs[0].macs + costs[1].support_macs
    assert (
        model.state_bytes()
        == costs[0].state_bytes + costs[1].state_bytes
        == costs[0].state_bytes + 2 * 32 * 16 * 4
    )
    assert Transformer(LISTOPS, contender("linformer:rank=4"), sizes, 0).state_bytes() is None, (
        "it does not decode"
    )
    assert Transformer(LISTOPS, contender("standard"), sizes, 0).state_bytes() is None, (
        "nor does an encoder of what does"
    )


def test_what_a_layers_options_and_gates_cost():
    plain, more = (
        Sizes(width=16, layers=2, heads=2, **options)
        for options in ({}, {"short_convolution": 4, "output_norm": True})
    )
    mqar, made = TASKS[0], contender("gated_deltanet")
    bare, whole = (Transformer(mqar, made, sizes, 0) for sizes in (plain, more))
    core = build("gated_deltanet", 2, 8).cost(1, 16, is_causal=True)
    assert bare.macs(16) == 2 * (16 * (4 * 16**2 + 2 * 2 * 16) + core.kernel_macs)
    assert whole.macs(16) - bare.macs(16) == 2 * 16 * (4 * 3 * 16 + 16**2)
    assert bare.state_bytes() == 2 * core.state_bytes
    assert whole.state_bytes() == 2 * (core.state_bytes + 3 * 3 * 16 * 4)
    batch = mqar.training_batch(4, 0, 0)
    whole(batch).square().sum().backward()
    assert all(parameter.grad is not None for parameter in whole.parameters())
    assert plain.to_json() == {
        "width": 16,
        "layers": 2,
        "heads": 2,
        "expansion": 4,
        "convolution": 0,
    }
    assert more.to_json() == {**plain.to_json(), "short_convolution": 4, "output_norm": True}
    with pytest.raises(UnsupportedError, match="short_convolution=4 is causal and this"):
        Transformer(LISTOPS, contender("standard"), more, 0)
