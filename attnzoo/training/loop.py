"""One run: a model trained on a task with one learning rate and one seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.arguments import check_count, check_positive
from attnzoo.benchmarking.peak_memory import peak_bytes
from attnzoo.tasks.task import IGNORED, STEPS, TEST, VALIDATION, Batch, Task
from attnzoo.training import checkpoints
from attnzoo.training.contenders import Contender
from attnzoo.training.devices import PRECISIONS, Devices
from attnzoo.training.model import Sizes, Transformer

Report = Callable[[int, float], None]  # steps done, the loss of the last
CURVE_POINTS = 100  # of the curve in a result row: means over as many stretches


@dataclass(frozen=True)
class Budget:
    """What every contender gets.

    evaluate_every: steps between two validations, at which a checkpoint is written too.
    """

    steps: int = 500
    batch_size: int = 64
    warmup_steps: int = 50
    weight_decay: float = 0.1
    evaluate_every: int = 100
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every"):
            check_positive(name, getattr(self, name))
        if self.steps > STEPS:
            raise ValueError(
                f"steps={self.steps} is more than {STEPS}, after which examples of the next seed "
                "would come; give fewer"
            )
        check_count("warmup_steps", self.warmup_steps)
        if not isinstance(self.weight_decay, int | float) or not 0 <= self.weight_decay < 1:
            raise ValueError(f"weight_decay={self.weight_decay!r} must be a number in [0, 1)")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision={self.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}"
            )

    def factor(self, step: int) -> float:
        """Of the learning rate: linear warm-up, then a cosine to 0. A function of the step alone,
        so that a checkpoint need not hold it."""
        return (
            min(1.0, (step + 1) / (self.warmup_steps + 1))
            * (1 + math.cos(math.pi * step / self.steps))
            / 2
        )


@dataclass(frozen=True)
class Setup:
    """What a run depends on.

    held_out: sequences of validation, and of test.
    """

    task: Task
    contender: Contender
    sizes: Sizes
    budget: Budget
    held_out: int
    learning_rate: float
    seed: int

    def configuration(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        return {
            "task": self.task.name,
            "problem": asdict(self.task),  # type: ignore[call-overload]  # every task is a dataclass
            "layers": [[part.name, dict(part.options)] for part in self.contender.parts],
            "model": self.sizes.to_json(),
            "budget": asdict(self.budget),
            "held_out": self.held_out,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }


@dataclass
class Outcome:
    """What a run found.

    curve: the loss of every step.
    validations: (steps done, score).
    seconds: of the training steps.
    stopped_at: the step, from 0, whose loss or gradient was not finite, before it moved a weight,
    or after which the loss on held-out examples was not; the run ended there.
    """

    curve: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    validation: float | None = None
    validation_loss: float | None = None
    test: float | None = None
    stopped_at: int | None = None

    def shown_curve(self) -> list[tuple[int, float]]:
        """The curve in at most CURVE_POINTS stretches: (steps done at its end, mean loss)."""
        length = max(1, math.ceil(len(self.curve) / CURVE_POINTS))
        stretches = [
            (start, self.curve[start : start + length])
            for start in range(0, len(self.curve), length)
        ]
        return [(start + len(stretch), sum(stretch) / len(stretch)) for start, stretch in stretches]


def train(setup: Setup, devices: Devices, checkpoint: Path, report: Report) -> Outcome:
    """Run to the end, from the checkpoint where there is one; the curve is the same, bit for bit on
    one machine.

    Raises ValueError on a checkpoint of another configuration, UnsupportedError when the contender
    cannot do the task.
    """
    configuration, found = setup.configuration(), Outcome()
    model = Transformer(setup.task, setup.contender, setup.sizes, setup.seed)
    held = checkpoints.read(checkpoint, configuration)
    if held is not None:
        model.load_state_dict(held["model"])
        found = Outcome(**held["outcome"])
    placed = devices.place(model)
    optimizer = _optimizer(model, setup)
    if held is not None:
        optimizer.load_state_dict(held["optimizer"])
    validation = setup.task.held_out(VALIDATION, setup.held_out)
    for step in range(len(found.curve), setup.budget.steps):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = setup.learning_rate * setup.budget.factor(step)
        loss, norm = _gradients(
            placed,
            model,
            setup.task.training_batch(setup.budget.batch_size, setup.seed, step),
            devices,
        )
        if not math.isfinite(loss) or not math.isfinite(norm):
            found.stopped_at = step
            return found
        optimizer.step()
        optimizer.zero_grad()
        found.curve.append(loss)
        found.seconds += time.perf_counter() - started
        done = step + 1
        if done % setup.budget.evaluate_every == 0 or done == setup.budget.steps:
            found.validation, found.validation_loss = evaluate(
                placed, setup.task, validation, setup.budget.batch_size, devices
            )
            if not math.isfinite(found.validation_loss):
                found.stopped_at = step
                return found
            found.validations.append((done, found.validation))
            if devices.is_main:
                state = {
                    "configuration": configuration,
                    "outcome": vars(found),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                checkpoints.write(checkpoint, state)
        report(done, loss)
    test, loss = evaluate(
        placed,
        setup.task,
        setup.task.held_out(TEST, setup.held_out),
        setup.budget.batch_size,
        devices,
    )
    if math.isfinite(loss):
        found.test = test
    else:
        found.stopped_at = setup.budget.steps - 1
    return found


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, batch: Batch, batch_size: int, devices: Devices
) -> tuple[float, float]:
    """Score on a batch, in the task's metric, and mean loss in nats."""
    model.eval()
    # Loss, right answers, asked answers.
    totals = torch.zeros(3, dtype=torch.float64, device=devices.device)
    mine = devices.share(batch)
    for start in range(0, len(mine.inputs), batch_size):
        part = mine[slice(start, start + batch_size)]
        with devices.autocast():
            logits = model(part)
        right = (logits.argmax(-1) == part.targets).sum()
        totals += torch.stack(
            [
                _loss(logits, part.targets).double(),
                right.double(),
                (part.targets != IGNORED).sum().double(),
            ]
        )
    model.train()
    loss, right, asked = devices.sum(totals).tolist()
    return (loss / asked / math.log(2) if task.lower_is_better else right / asked), loss / asked


def step_bytes(setup: Setup, devices: Devices) -> int:
    """Highest sum of allocations of one forward and backward pass, its gradients included, beside
    the weights and the batch."""
    model = Transformer(setup.task, setup.contender, setup.sizes, setup.seed).to(devices.device)
    batch = setup.task.training_batch(setup.budget.batch_size, setup.seed, 0)[
        slice(0, None, devices.count)
    ].to(devices.device)

    def step() -> Tensor:
        with devices.autocast():
            loss = _loss(model(batch), batch.targets)
        loss.backward()
        return loss

    return peak_bytes(step, devices.device)


def _gradients(
    placed: Any, model: nn.Module, batch: Batch, devices: Devices
) -> tuple[float, float]:
    """Mean loss over the answers of the whole batch, and the norm of its gradient, which is left
    clipped to 1."""
    mine, asked = devices.share(batch), batch.asked
    with devices.autocast():
        logits = placed(mine)
    loss = _loss(logits, mine.targets) / asked
    # Several processes take the mean of their gradients, where the sum is wanted.
    (loss * devices.count).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return devices.sum(loss.detach()).item(), norm.item()


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropy over the asked answers, in nats."""
    return F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def _optimizer(model: nn.Module, setup: Setup) -> torch.optim.Optimizer:
    """AdamW; vectors (norms, biases) and embeddings do not decay."""
    kept = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [
        p
        for n, p in model.named_parameters()
        if p.dim() > 1 and id(p) not in kept and n != "positions"
    ]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    groups = [
        {"params": matrices, "weight_decay": setup.budget.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=setup.learning_rate, betas=(0.9, 0.98))
