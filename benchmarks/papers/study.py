"""What the studies of this folder share: their options, their result files and how a figure is
made."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnzoo.benchmarking.environment import environment
from attnzoo.packages import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent.parent
RESULTS, FIGURES = ROOT / "benchmarks" / "results" / "papers", ROOT / "docs" / "figures" / "papers"
QUICK = ROOT / "report" / "papers"  # ignored by git: a quick run must not replace what was recorded
MIB = 2**20

Row = dict[str, Any]


def run(
    name: str, measure: Callable[[bool], Iterable[Row]], draw: Callable[[Sequence[Row], Path], None]
) -> None:
    """The command line of a study: measure, record <name>.jsonl, draw <name>.png. What cannot be
    done ends in one sentence.

    measure: yields rows as they finish; its argument asks for small sizes. draw: makes the figure
    from rows.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.papers.{name}",
        description="One claim of a paper, rerun on a CPU.",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small sizes, seconds instead of minutes, written to report/papers",
    )
    parser.add_argument(
        "--redraw", action="store_true", help="draw the recorded rows again, measure nothing"
    )
    arguments = parser.parse_args()
    results, figures = (QUICK, QUICK) if arguments.quick else (RESULTS, FIGURES)
    path = results / f"{name}.jsonl"
    try:
        rows = read(path) if arguments.redraw else record(path, measure(arguments.quick))
        figures.mkdir(parents=True, exist_ok=True)
        draw(rows, figures / f"{name}.png")
    except (MissingPackageError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{error.name} is not installed: pip install 'attnzoo[cli,models]'"
        ) from None


def record(path: Path, rows: Iterable[Row]) -> list[Row]:
    """Write rows, each with the environment, as they come; a study that stops half-way leaves the
    older file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    unfinished, kept = path.with_suffix(".unfinished"), []
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for row in rows:
                print(
                    "  ".join(
                        f"{key}={_short(value)}"
                        for key, value in row.items()
                        if not isinstance(value, list)
                    ),
                    flush=True,
                )
                file.write(json.dumps({**row, "environment": where}, ensure_ascii=False) + "\n")
                file.flush()
                kept.append(row)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    os.replace(unfinished, path)
    return kept


def read(path: Path) -> list[Row]:
    """The recorded rows. Raises FileNotFoundError, one sentence, where nothing was recorded."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run the study without --redraw first")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stored_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exact attention that stores A, (batch, heads, length, head_dim): what the papers before
    FlashAttention measured themselves against."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


@contextmanager
def panels(path: Path, columns: int = 2, rows: int = 1) -> Iterator[list[Axes]]:
    """Axes in the house's style, row by row; the figure is saved at the end, with one legend below
    for what any of them labels."""
    import matplotlib

    from attnzoo.report.style import RC, new_figure

    with matplotlib.rc_context({**RC, "figure.facecolor": "white"}):
        figure = new_figure(4.4 * columns, 3.6 * rows + 0.4)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        yield axes
        labelled = {
            label: handle
            for one in axes
            for handle, label in zip(*one.get_legend_handles_labels(), strict=True)
        }
        if labelled:
            figure.legend(
                list(labelled.values()),
                list(labelled),
                loc="outside lower center",
                ncols=min(len(labelled), 4),
            )
        figure.savefig(path, dpi=120)


def length_axis(axes: Axes, lengths: Iterable[int], label: str) -> None:
    """A logarithmic axis with the lengths themselves as its ticks."""
    found = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    axes.set_xticks(found, [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in found])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
