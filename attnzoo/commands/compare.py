"""attnzoo compare: every variant against exact attention, on the screen, as JSON, as figures and as
one HTML page."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from attnzoo.arguments import check_positive, nearest
from attnzoo.commands import INTERRUPTED
from attnzoo.commands.command import (
    DTYPES,
    Command,
    ConfigFile,
    check_dtype,
    check_seed,
    messages,
    screen,
)
from attnzoo.commands.output import Progress, check_folder, progress_on, write_text
from attnzoo.commands.variants import parse_variant
from attnzoo.registry import Choice, names, spec_of

if TYPE_CHECKING:
    from rich.console import Console

    from attnzoo.fidelity import Comparison, Sample

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Model:
    """A model as the command line names it.

    title: its name in `attnzoo.fidelity`.
    max_length: tokens that it has positions for.
    """

    title: str
    max_length: int


MODELS = {"smollm2": Model("SmolLM2-135M", 8192), "minilm": Model("MiniLM-L6", 512)}


def add_arguments(parser: ArgumentParser) -> None:
    """The settings of a comparison, from the command line or a YAML file."""
    from attnzoo.fidelity.samples import LENGTHS

    parser.add_argument(
        "--config",
        action=ConfigFile,
        help="a YAML file with any of the settings below, such as configs/compare.yaml",
    )
    parser.add_argument(
        "--model",
        type=str,
        metavar="MODEL",
        help="quality of a whole model with its attention swapped: smollm2, minilm, or a folder",
    )
    parser.add_argument(
        "--study",
        type=str,
        metavar="STUDY",
        help="with --model: quick (default), full, or a YAML file such as "
        "configs/quality/causal.yaml",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        type=str,
        metavar="NAME[:OPTION=VALUE,...]",
        help="such as performer:num_features=64 (default: the whole zoo, but for attentions with "
        "gates, which must be trained first; with --model those of the study)",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        metavar="TOKENS",
        help=f"the longest in full, the others for their error (default: {_spaced(LENGTHS)}; with "
        "--model those of the study)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        type=str,
        metavar="MODEL",
        help=f"of {', '.join(MODELS)}, {SYNTHETIC} (default: {_spaced(MODELS)})",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        type=int,
        metavar="INDEX",
        help="layers of the models, from 0 (default: first, middle, last)",
    )
    parser.add_argument(
        "--heads",
        nargs="+",
        type=int,
        metavar="INDEX",
        help="query heads, from 0 (default: first, middle, last)",
    )
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda or cuda:INDEX")
    parser.add_argument(
        "--dtype", type=str, default="float32", metavar="DTYPE", help=f"one of {', '.join(DTYPES)}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument(
        "--output",
        type=str,
        default="report",
        metavar="FOLDER",
        help="gets compare.html, compare.json and the figures; with --model quality-MODEL.html, "
        ".jsonl and its figures",
    )


def run(settings: Namespace) -> int:
    """A comparison of attentions or, with --model, of a whole model with its attention swapped."""
    if settings.model is not None:
        from attnzoo.commands.quality import run_quality

        return run_quality(settings)
    if settings.study is not None:
        raise ValueError("--study goes with --model, such as --model smollm2")
    return _compare(settings)


def _compare(settings: Namespace) -> int:
    """Check everything, then load, compare, print and write."""
    import matplotlib  # noqa: F401  (missing, it must be missed before the work, not after)

    import attnzoo.fidelity as fidelity
    from attnzoo.bench.heap import bounded_memory
    from attnzoo.fidelity.samples import LENGTHS
    from attnzoo.report.tables import comparison_view

    started = time.monotonic()
    device, dtype = fidelity.check_device(settings.device), check_dtype(settings.dtype)
    if settings.variants is None:
        variants = [Choice(name) for name in names() if not spec_of(name).has_gates]
    else:
        variants = [parse_variant(text) for text in settings.variants]
    models = list(MODELS) if settings.models is None else settings.models
    lengths = check_lengths(LENGTHS if settings.lengths is None else settings.lengths, models)
    check_seed(settings.seed)
    folder = check_folder(settings.output)
    console = messages()
    with bounded_memory(device), progress_on(console) as progress:
        samples = _samples(settings, models, lengths, progress)
    _say_cuts(console, models, lengths[-1])
    _say_stand_ins(console, models, samples)
    with bounded_memory(device), progress_on(console) as progress:
        comparison = fidelity.compare(
            samples,
            variants,
            lengths=lengths,
            seed=settings.seed,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    interrupted = comparison.environment.get("interrupted")
    if interrupted and not comparison.rows:
        raise KeyboardInterrupt
    screen().print(comparison_view(comparison))
    for path in write_results(comparison, folder):
        screen().print(f"wrote {path}", soft_wrap=True)
    if interrupted:
        console.print(f"attnzoo: interrupted {interrupted}; what was finished is written")
        return INTERRUPTED
    console.print(f"finished in {time.monotonic() - started:.0f} s")
    return 0


COMPARE = Command(
    "compare",
    "Compare variants with exact attention: on queries, keys and values of real models, or with "
    "--model in a whole model.",
    add_arguments,
    run,
)


def write_results(comparison: Comparison, folder: Path) -> list[Path]:
    """Write compare.json, compare.html and the figures; return the paths."""
    from attnzoo.report.export import write_figures
    from attnzoo.report.figures import drawings
    from attnzoo.report.page import page

    written = [
        write_text(folder / "compare.json", comparison.to_json() + "\n"),
        write_text(folder / "compare.html", page(comparison)),
    ]
    return written + write_figures(drawings(comparison), folder, "compare-")


def check_lengths(lengths: Sequence[int], models: Sequence[str]) -> list[int]:
    """The lengths in order. Raises ValueError on an unknown model, a length below 1, and one that
    no chosen model can read."""
    choices = [*MODELS, SYNTHETIC]
    for model in models:
        if model not in choices:
            raise ValueError(
                f"unknown model {model!r}{nearest(model, choices)}; choose of {', '.join(choices)}"
            )
    for length in lengths:
        check_positive("length", length)
    longest = max(lengths)
    if SYNTHETIC not in models and longest > max(MODELS[model].max_length for model in models):
        limits = " and ".join(
            f"{MODELS[model].title} reads at most {MODELS[model].max_length:,} tokens"
            for model in models
        )
        raise ValueError(
            f"length={longest} is too long: {limits}; give --lengths up to that, or --models "
            f"{SYNTHETIC}"
        )
    return sorted(set(lengths))


def _spaced(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


def _samples(
    settings: Namespace, models: list[str], lengths: list[int], progress: Progress
) -> list[Sample]:
    from attnzoo.fidelity import load_samples, synthetic_sample
    from attnzoo.fidelity.samples import STAND_IN_LENGTH, SYNTHETIC_SPREADS

    real = [MODELS[model].title for model in models if model != SYNTHETIC]
    samples: list[Sample] = []
    if real:
        samples += load_samples(
            lengths,
            models=real,
            layers=settings.layers,
            heads=settings.heads,
            seed=settings.seed,
            progress=progress,
        )
    if SYNTHETIC in models:
        short = sorted({min(length, STAND_IN_LENGTH) for length in lengths})
        for spread in SYNTHETIC_SPREADS:
            samples.append(
                synthetic_sample(lengths[-1], is_causal=True, spread=spread, seed=settings.seed)
            )
            samples += [
                synthetic_sample(length, is_causal=False, spread=spread, seed=settings.seed)
                for length in short
            ]
    return samples


def _say_cuts(console: Console, models: Sequence[str], longest: int) -> None:
    """Say which models read less than was asked of all."""
    for model in (MODELS[model] for model in models if model != SYNTHETIC):
        if model.max_length < longest:
            console.print(
                f"attnzoo: {model.title} reads at most {model.max_length:,} tokens: longer lengths "
                "are cut to that",
                soft_wrap=True,
            )


def _say_stand_ins(console: Console, models: Sequence[str], samples: Sequence[Sample]) -> None:
    """Say which samples replace a model that is not installed, why, and how far their scores
    spread."""
    asked = {MODELS[model].title for model in models if model != SYNTHETIC}
    if SYNTHETIC in models or asked >= {sample.model for sample in samples}:
        return
    for text in dict.fromkeys(
        f"{sample.text}; measured {sample.score_std:.2f}"
        for sample in samples
        if sample.model not in asked
    ):
        console.print(f"attnzoo: using {text}", soft_wrap=True)
