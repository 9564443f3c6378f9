"""attnzoo scaling: what an attention costs, on the screen, as CSV and JSON, as figures and as one
HTML page."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from attnzoo.commands.command import Command, ConfigFile, messages, screen
from attnzoo.commands.output import check_folder, write_text
from attnzoo.commands.variants import parse_variant

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnzoo.report.scaling.scaling_report import Progress, Scaling


def add_arguments(parser: ArgumentParser) -> None:
    """The model, the GPU and the variants whose cost is asked for."""
    parser.add_argument(
        "--config", action=ConfigFile, help="a YAML file with any of the settings below"
    )
    parser.add_argument(
        "--model",
        type=str,
        default="gpt2",
        help="a preset of configs/models.yaml, or d=4096,heads=32,kv_heads=8,layers=32",
    )
    parser.add_argument(
        "--gpu",
        type=str,
        default="h100",
        help="a preset of configs/gpus.yaml, or memory_gb=48,tflops=150,bandwidth_gb=700",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        type=str,
        metavar="NAME[:OPTION=VALUE,...]",
        help="such as performer:num_features=64 (default: the whole zoo)",
    )
    parser.add_argument(
        "--length", type=int, default=16384, metavar="TOKENS", help="where variants are compared"
    )
    parser.add_argument(
        "--causal",
        action="store_true",
        help="count causal attention (default: every token sees every token, as the article "
        "counts)",
    )
    parser.add_argument(
        "--share", type=float, default=0.7, help="part of a GPU's memory that may be filled"
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=150.0,
        help="a rate of your own for the time table, in 10^12 FLOPs a second",
    )
    parser.add_argument(
        "--model-presets",
        type=str,
        metavar="FILE",
        help="YAML with models of your own, beside the shipped ones",
    )
    parser.add_argument(
        "--gpu-presets",
        type=str,
        metavar="FILE",
        help="YAML with GPUs of your own, beside the shipped ones",
    )
    parser.add_argument(
        "--output",
        type=str,
        default="report",
        metavar="FOLDER",
        help="gets scaling.html, scaling.json, a CSV a table, and the figures",
    )


def run(settings: Namespace) -> int:
    """Check everything, then compute, print and write."""
    import matplotlib  # noqa: F401  (missing, it must be missed before the work, not after)

    from attnzoo.cost.hardware import find_gpu, gpu_presets
    from attnzoo.cost.model_sizes import find_model, model_presets
    from attnzoo.report.scaling.scaling_report import scaling
    from attnzoo.report.scaling.settings import Settings

    started = time.monotonic()
    models, gpus = (
        model_presets(_path(settings.model_presets)),
        gpu_presets(_path(settings.gpu_presets)),
    )
    model, gpu = find_model(settings.model, models), find_gpu(settings.gpu, gpus)
    chosen = Settings(model, gpu, settings.length, settings.causal, settings.share, settings.tflops)
    variants = (
        None if settings.variants is None else [parse_variant(text) for text in settings.variants]
    )
    folder = check_folder(settings.output)
    with _one_thread(), _progress() as progress:
        found = scaling(chosen, models, gpus, variants, progress)
    screen().print(scaling_view(found))
    with _one_thread(), _progress() as progress:
        progress("figures and page")
        written = write_results(found, folder)
    for path in written:
        screen().print(f"wrote {path}", soft_wrap=True)
    messages().print(f"finished in {time.monotonic() - started:.0f} s")
    return 0


SCALING = Command(
    "scaling",
    "What attention costs: MACs, memory, time, paths and crossovers, of models, GPUs and the zoo.",
    add_arguments,
    run,
)


def write_results(found: Scaling, folder: Path) -> list[Path]:
    """Write scaling.json, scaling.html, one CSV a table and the figures; return the paths."""
    from attnzoo.report.export import write_figures
    from attnzoo.report.scaling.scaling_figures import drawings
    from attnzoo.report.scaling.scaling_page import page

    written = [
        write_text(folder / "scaling.json", found.to_json() + "\n"),
        write_text(folder / "scaling.html", page(found)),
    ]
    written += [
        write_text(folder / f"scaling-{table.name}.csv", table.to_csv()) for table in found.tables
    ]
    return written + write_figures(drawings(found), folder, "scaling-")


def scaling_view(found: Scaling) -> RenderableType:
    """Every table with its formula and notes, and what the article's prose says otherwise."""
    from rich.console import Group
    from rich.text import Text

    from attnzoo.report.scaling.scaling_headlines import headlines
    from attnzoo.report.scaling.scaling_report import CONVENTION
    from attnzoo.report.tables import rich_table

    parts: list[RenderableType] = [Text(CONVENTION), Text()]
    said = [Text(f"- {sentence}") for sentence in headlines(found)]
    for table in found.tables:
        parts += [
            Text(table.title, style="bold"),
            Text(table.formula, style="dim"),
            rich_table(table),
            *(Text(note, style="dim") for note in table.notes),
            Text(),
        ]
    parts.append(
        Text("Where the article's prose and its tables part, the tables are right", style="bold")
    )
    parts += [
        Text(f'- "{contradiction.prose}": {contradiction.table}')
        for contradiction in found.contradictions
    ]
    title = f"What it says of {found.settings.model.title} on {found.settings.gpu.title}"
    return Group(
        *parts,
        *(Text(remark) for remark in found.remarks),
        Text(),
        Text(title, style="bold"),
        *said,
        Text(),
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tensors here are small: waking a second thread for each costs more than it brings."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _progress() -> Iterator[Progress]:
    """What is being computed, on standard error when that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda stage: None
        return
    with messages().status("starting") as status:
        yield lambda stage: status.update(stage)
