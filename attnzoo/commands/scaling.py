"""attnzoo scaling: what an attention costs, on the screen, as CSV and JSON, as figures and as one
HTML page."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from attnzoo.commands.command import Command, ConfigFile, add_variants, screen, variants_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnzoo.report.scaling.scaling_report import Progress, Scaling

#: Flags that are settings of `attnzoo.cost_table` by the same name.
SETTINGS = (
    "model",
    "gpu",
    "length",
    "causal",
    "share",
    "tflops",
    "model_presets",
    "gpu_presets",
)


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
    add_variants(parser, "the whole zoo")
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

    from attnzoo.public.run_cost_table import compute_costs, one_thread
    from attnzoo.report.scaling.scaling_page import scaling_result
    from attnzoo.results.output import check_folder
    from attnzoo.results.progress import say

    started = time.monotonic()
    check_folder(settings.output)
    with _progress() as progress:
        found = compute_costs(
            variants_of(settings), **{name: settings[name] for name in SETTINGS}, progress=progress
        )
    screen().print(scaling_view(found))
    with one_thread(), _progress() as progress:
        progress("figures and page")
        written = scaling_result(found).save(settings.output)
    for path in written:
        screen().print(f"wrote {path}", soft_wrap=True)
    say(f"finished in {time.monotonic() - started:.0f} s")
    return 0


SCALING = Command(
    "scaling",
    "What attention costs: MACs, memory, time, paths and crossovers, of models, GPUs and the zoo.",
    add_arguments,
    run,
)


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


@contextmanager
def _progress() -> Iterator[Progress]:
    """What is being computed, on standard error when that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda stage: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda stage: status.update(stage)
