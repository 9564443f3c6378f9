"""Heal a swapped model: train its attention, and nothing else, to imitate the exact attention that it replaced.

    python benchmarks/heal/heal.py --config benchmarks/heal/cpu.yaml [--variant linear] [--output healed] [--record heal.jsonl]

Stage 1, matching: every swapped attention block is given the hidden states that the exact model's block was given, and must reproduce its
output; all layers learn at once from one forward of the exact model, none waits for another. Stage 2, distillation: the whole swapped model
must predict what the exact model predicts (Kullback-Leibler divergence of the next-token distributions). There is no loss on the text
itself, which would teach the model its author and pass for healing. (Zhang et al. 2024, arXiv:2410.10254, heal in two such stages.)

A run that was interrupted goes on from its last checkpoint and gives the same curve, bit for bit on one machine. `load_healed` reads a
checkpoint into the model that it was made from. `attnzoo.unswap` takes the attention out but leaves the trained projections: for the
model before healing, load it anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import pickle
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

import attnzoo
from attnzoo.arguments import check_count, check_positive, check_seed
from attnzoo.commands.progress import Progress, progress_on
from attnzoo.configuration import check_mapping, read_yaml
from attnzoo.environment import environment
from attnzoo.fidelity.models import load as load_pretrained
from attnzoo.fidelity.text import play, titles
from attnzoo.integrations.healed import load_healed, save_healed
from attnzoo.integrations.matching import attention_parameters, matching_loss, recorded_calls
from attnzoo.registry import nearest, spec_of

__all__ = ["Recipe", "heal", "load_healed", "read_recipes"]
SHAKESPEARE, PROSE = "Hamlet", "Python's reference"


@dataclass(frozen=True)
class Recipe:
    """What is healed and how. length: tokens of a training sequence; evaluation_sequences: as long, from each held-out text."""

    variant: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "SmolLM2-135M"
    layers: str | None = None
    length: int = 256
    batch_size: int = 2
    matching_steps: int = 100
    matching_learning_rate: float = 1e-3
    distillation_steps: int = 100
    distillation_learning_rate: float = 3e-4
    warmup_steps: int = 10
    evaluation_sequences: int = 8
    evaluate_every: int = 50
    checkpoint_every: int = 25
    mixed_precision: str = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        spec_of(self.variant)
        for name in ("length", "batch_size", "evaluation_sequences", "evaluate_every", "checkpoint_every"):
            check_positive(name, getattr(self, name))
        for name in ("matching_steps", "distillation_steps", "warmup_steps"):
            check_count(name, getattr(self, name))
        for name in ("matching_learning_rate", "distillation_learning_rate"):
            rate = getattr(self, name)
            if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate < math.inf:
                raise ValueError(f"{name}={rate!r} must be a positive number; in YAML write 1.0e-3, not 1e-3, which is text there")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision={self.mixed_precision!r} must be 'no' or 'bf16'")
        check_seed(self.seed)

    @property
    def steps(self) -> int:
        return self.matching_steps + self.distillation_steps


def read_recipes(path: Path) -> dict[str, Recipe]:
    """A recipe for every variant of a YAML file. Raises ValueError, one sentence, on what it must not hold."""
    found, what = read_yaml(path, f"--config {path}"), f"--config {path}"
    check_mapping(what, found, {"variants", *(item.name for item in fields(Recipe))} - {"variant", "options"})
    variants = found.pop("variants", None)
    if not isinstance(variants, dict) or not variants or not all(isinstance(options, dict) for options in variants.values()):
        raise ValueError(f"{what}: variants={variants!r} must map names to options, such as {{linear: {{}}, sliding_window: {{window: 64}}}}")
    return {name: Recipe(variant=name, options=options, **found) for name, options in variants.items()}


def heal(
    model: Any, recipe: Recipe, train: Tensor, held_out: dict[str, Tensor], folder: Path, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Swap the recipe's attention into the model and heal it, in place. Returns the state of the last checkpoint: recipe, curve, evaluations.

    model: a transformers language model, not swapped. train: (tokens,) ids to draw sequences from. held_out: (sequences, length) ids by name
    of the text. folder: of the checkpoints; a run of the same recipe goes on from its last one. Raises ValueError on a folder with
    checkpoints of another recipe (they stay), FloatingPointError, naming the step, when a loss or gradient is not finite.
    """
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    if accelerator.num_processes > 1:
        raise ValueError(f"num_processes={accelerator.num_processes}: this recipe trains in one process; start it without a launcher")
    if len(train) <= recipe.length:
        raise ValueError(f"the training text has {len(train)} tokens and length={recipe.length}; give a longer text or a smaller length")
    state, found = _read_checkpoint(folder, asdict(recipe))
    model.to(accelerator.device).eval().requires_grad_(False)
    exact = attnzoo.swap(copy.deepcopy(model), "standard", layers=recipe.layers)
    if found:
        load_healed(model, found)
    else:
        attnzoo.swap(model, recipe.variant, layers=recipe.layers, **recipe.options)
    parameters = {name: parameter.requires_grad_() for name, parameter in attention_parameters(model).items()}
    optimizer = None

    def evaluate() -> None:
        state["evaluations"].append(_evaluate(accelerator, exact, model, held_out, recipe, state["step"]))

    if not found:
        state["exact"] = {name: _perplexity(accelerator, exact, ids, recipe.batch_size) for name, ids in held_out.items()}
        state["parameters"] = sum(parameter.numel() for parameter in parameters.values())
        evaluate()
    started = time.perf_counter() - state["seconds"]
    for step in range(state["step"], recipe.steps):
        is_matching = step < recipe.matching_steps
        begins = step in (0, recipe.matching_steps)  # a stage, with moments of its own
        if optimizer is None or begins:
            optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.0)
            if found and not begins:
                _read_optimizer(optimizer, found)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(recipe, step)
        ids = _batch(train, recipe, step).to(accelerator.device)
        loss = (_match if is_matching else _distil)(accelerator, exact, model, ids)
        norm = nn.utils.clip_grad_norm_(parameters.values(), 1.0).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            kept = f"the last good checkpoint is {found}" if found else "there is no checkpoint yet"
            raise FloatingPointError(f"step {step}: the loss is {loss} and its gradient's norm {norm}; lower the learning rate; {kept}")
        optimizer.step()
        optimizer.zero_grad()
        state["curve"].append(loss)
        done = step + 1
        state["step"] = done
        stage = "matching" if is_matching else "distillation"
        progress(f"{recipe.variant}: {stage}, loss {loss:.4f}", done, recipe.steps)
        last = done in (recipe.matching_steps, recipe.steps)
        if last or done % recipe.evaluate_every == 0:
            evaluate()
        if last or done % recipe.checkpoint_every == 0:
            state["seconds"] = time.perf_counter() - started
            found = _write_checkpoint(folder, model, optimizer, state)
    return state


def _match(accelerator: Accelerator, exact: Any, model: Any, ids: Tensor) -> float:
    """Mean matching loss of the layers, with its gradients; layer by layer, so that one layer's graph is held at a time."""
    with torch.no_grad(), accelerator.autocast(), recorded_calls(exact) as calls:
        exact.base_model(input_ids=ids, use_cache=False)
    total = 0.0
    for call in calls:
        with accelerator.autocast():
            loss = matching_loss(model, call) / len(calls)
        accelerator.backward(loss)
        total += loss.item()
    return total


def _distil(accelerator: Accelerator, exact: Any, model: Any, ids: Tensor) -> float:
    """Kullback-Leibler divergence of the exact model's next-token distributions from the swapped one's, in nats per token, with its gradients."""
    with torch.no_grad(), accelerator.autocast():
        target = exact(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    with accelerator.autocast():
        logits = model(input_ids=ids, use_cache=False).logits
    loss = F.kl_div(logits.float().log_softmax(-1).flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean")
    accelerator.backward(loss)
    return loss.item()


def _learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to 0, in each stage: a function of the step alone, so that a checkpoint need not hold it."""
    if step < recipe.matching_steps:
        highest, steps = recipe.matching_learning_rate, recipe.matching_steps
    else:
        highest, steps, step = recipe.distillation_learning_rate, recipe.distillation_steps, step - recipe.matching_steps
    return highest * min(1.0, (step + 1) / (recipe.warmup_steps + 1)) * (1 + math.cos(math.pi * step / steps)) / 2


def _batch(train: Tensor, recipe: Recipe, step: int) -> Tensor:
    """(batch_size, length) ids from places drawn by seed and step alone."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    starts = torch.randint(len(train) - recipe.length + 1, (recipe.batch_size,), generator=generator)
    return torch.stack([train[start : start + recipe.length] for start in starts])


@torch.no_grad()
def _evaluate(accelerator: Accelerator, exact: Any, model: Any, held_out: dict[str, Tensor], recipe: Recipe, step: int) -> dict[str, Any]:
    """Perplexity on each text, and every layer's matching loss on the first sequences of the first."""
    perplexity = {name: _perplexity(accelerator, model, ids, recipe.batch_size) for name, ids in held_out.items()}
    with accelerator.autocast(), recorded_calls(exact) as calls:
        exact.base_model(input_ids=next(iter(held_out.values()))[: recipe.batch_size].to(accelerator.device), use_cache=False)
    with accelerator.autocast():
        layers = [matching_loss(model, call).item() for call in calls]
    return {"step": step, "perplexity": perplexity, "matching_loss": layers}


@torch.no_grad()
def _perplexity(accelerator: Accelerator, model: Any, sequences: Tensor, batch_size: int) -> float:
    """exp of the mean cross-entropy of every token but the first of its sequence."""
    total = 0.0
    for ids in sequences.to(accelerator.device).split(batch_size):
        with accelerator.autocast():
            logits = model(input_ids=ids, use_cache=False).logits
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / sequences[:, 1:].numel())


def _read_checkpoint(folder: Path, recipe: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """The state of the last checkpoint in the folder and where it is, or a first state and None."""
    for path in sorted(folder.glob("step-" + "[0-9]" * 6), reverse=True):
        try:
            state = json.loads((path / "state.json").read_text())
            other = {key for key in recipe.keys() | state["recipe"].keys() if recipe.get(key) != state["recipe"].get(key)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path}/state.json is missing or damaged; remove {path} to go on from the checkpoint before, or to start anew"
            ) from None
        if other:
            raise ValueError(f"{folder} holds checkpoints of another recipe ({', '.join(sorted(other))} differ); give another --output or remove it")
        return state, path
    return {"recipe": recipe, "step": 0, "seconds": 0.0, "curve": [], "evaluations": []}, None


def _write_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write a checkpoint under another name first: one that has its name is whole. The one before it goes, older ones are gone."""
    path = folder / f"step-{state['step']:06d}"
    partial, before = folder / "partial", list(folder.glob("step-*"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_healed(model, partial)
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    (partial / "state.json").write_text(json.dumps(state))
    partial.rename(path)
    for old in before:
        shutil.rmtree(old)
    return path


def _read_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    path = checkpoint / "optimizer.pt"
    try:
        optimizer.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not an optimizer's state of this recipe ({str(error).splitlines()[0]}); remove {checkpoint}") from None


def _texts(tokenizer: Any, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Training ids, Shakespeare's other plays, and the sequences of both held-out texts."""

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, verbose=False).input_ids)

    wanted = recipe.evaluation_sequences * recipe.length
    held_out = {}
    for name, text in ((SHAKESPEARE, play("hamlet")), (PROSE, "\n".join(topics[key] for key in sorted(topics)))):
        ids = encode(text)
        if len(ids) < wanted:
            raise ValueError(f"{name} has {len(ids)} tokens; evaluation_sequences={recipe.evaluation_sequences} of {recipe.length} are more")
        held_out[name] = ids[:wanted].view(-1, recipe.length)
    return torch.cat([encode(play(title)) for title in titles() if title != "hamlet"]), held_out


def _record(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a JSONL file in the place of an earlier one of the same recipe."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [old for old in rows if old["recipe"] != row["recipe"]] + [row]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a swapped attention to imitate the exact one.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file: see cpu.yaml beside this file")
    parser.add_argument("--variant", help="one of the file's variants (default: all, one after the other)")
    parser.add_argument("--output", type=Path, default=Path("healed"), help="folder of the checkpoints, one folder a variant")
    parser.add_argument("--record", type=Path, help="JSONL file for the results, one row a variant")
    args = parser.parse_args()
    try:
        recipes = read_recipes(args.config)
        if args.variant is not None and args.variant not in recipes:
            raise ValueError(
                f"--variant {args.variant}: {args.config} has no such variant{nearest(args.variant, recipes)}; it has {', '.join(recipes)}"
            )
        for recipe in [recipes[args.variant]] if args.variant else recipes.values():
            _run(recipe, args.output / recipe.variant, args.record)
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(recipe: Recipe, folder: Path, record: Path | None) -> None:
    pretrained = load_pretrained(recipe.model)
    train, held_out = _texts(pretrained.tokenizer, recipe)
    with progress_on(Console(stderr=True)) as progress:
        state = heal(pretrained.model, recipe, train, held_out, folder, progress)
    if record is not None:
        _record(record, {**state, "environment": environment(seed=recipe.seed, device=pretrained.model.device, dtype=torch.float32)})
    print(f"{recipe.variant} {recipe.options}, exact: {_said(state['exact'])}")
    for evaluation in state["evaluations"]:
        print(f"  step {evaluation['step']:5}: {_said(evaluation['perplexity'])}")


def _said(perplexity: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in perplexity.items())


if __name__ == "__main__":
    sys.exit(main())
