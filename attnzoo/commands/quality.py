"""attnzoo compare --model: quality of a whole model with its attention swapped, row by row into a
result file, then tables, figures, a page."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from attnzoo.commands import INTERRUPTED
from attnzoo.commands.command import check_dtype, check_seed, messages, screen
from attnzoo.commands.output import check_folder, open_results, progress_on, write_text
from attnzoo.commands.variants import check_variant, parse_variant

if TYPE_CHECKING:
    from attnzoo.quality.quality_rows import Row
    from attnzoo.quality.quality_study import Study

SHIPPED = {"quick": "{kind}-quick.yaml", "full": "{kind}.yaml"}
# Settings of a comparison of attentions that a whole model has no use for.
SAMPLED_ONLY = ("models", "layers", "heads")


def run_quality(settings: Namespace) -> int:
    """Check everything, measure what the result file does not hold, print and write."""
    import matplotlib  # noqa: F401  (missing, it must be missed before the work, not after)

    from attnzoo.bench.environment import environment
    from attnzoo.bench.heap import bounded_memory
    from attnzoo.fidelity import check_device
    from attnzoo.packages import require
    from attnzoo.quality.model_kinds import find_model
    from attnzoo.quality.quality_rows import Row
    from attnzoo.quality.quality_run import Run
    from attnzoo.texts.text_parts import TEXT_MODULES, read_text

    started, console = time.monotonic(), messages()
    for name in SAMPLED_ONLY:
        if settings[name] is not None:
            raise ValueError(
                f"--{name} does not go with --model, which swaps every layer, one layer at a time, "
                "and mixes of them"
            )
    check_seed(settings.seed)
    device, dtype = check_device(settings.device), check_dtype(settings.dtype)
    model = find_model(settings.model)
    study = _study(settings, model.kind)
    require(
        f"--model {settings.model}",
        [
            *model.modules,
            *(module for name in study.texts for module in TEXT_MODULES.get(name, ())),
        ],
    )
    texts: Mapping[str, Mapping[str, str]] = {name: read_text(name) for name in study.texts}
    folder = check_folder(settings.output)
    results = open_results(folder / f"quality-{model.name.lower()}.jsonl", Row)
    held = results.rows()
    if held:
        console.print(
            f"attnzoo: {results.path} holds {len(held)} rows, which are kept", soft_wrap=True
        )
    work = Run(
        study,
        model.name,
        model.sources(texts),
        lambda: model.subject(texts, device=device, dtype=dtype, seed=settings.seed),
        held,
        results.append,
        dtype=settings.dtype,
        seed=settings.seed,
        facts=environment(seed=settings.seed, device=device, dtype=dtype),
    )
    try:
        with bounded_memory(device), progress_on(console) as progress:
            rows, interrupted = work.run(progress), False
    except KeyboardInterrupt:
        rows, interrupted = list(work.rows.values()), True
        if not rows:
            raise
    _show(rows, folder)
    if interrupted:
        console.print(
            f"attnzoo: interrupted; finished rows are in {results.path}, and the same command goes "
            "on from there",
            soft_wrap=True,
        )
        return INTERRUPTED
    console.print(f"finished in {time.monotonic() - started:.0f} s")
    return 0


def _study(settings: Namespace, kind: str) -> Study:
    """The study, with the variants and lengths of the command line in place of its own."""
    from attnzoo.arguments import check_positive, nearest
    from attnzoo.configuration import configs_folder
    from attnzoo.quality.quality_study import read_study

    name = settings.study or "quick"
    path = Path(name)
    if name in SHIPPED and not path.is_file():
        path = configs_folder() / "quality" / SHIPPED[name].format(kind=kind)
    elif not path.exists():
        raise ValueError(
            f"there is no study {name!r}{nearest(name, SHIPPED)}; give {' or '.join(SHIPPED)}, or "
            "the path of a YAML file"
        )
    study = read_study(path, check_variant)
    if settings.lengths is not None:
        study = replace(
            study,
            lengths=tuple(
                sorted({check_positive("length", length) for length in settings.lengths})
            ),
        )
    if settings.variants is not None:
        study = replace(study, variants=tuple(map(parse_variant, settings.variants)))
    return study


def _show(rows: list[Row], folder: Path) -> None:
    """Print the tables, and write the page and the figures."""
    from rich.text import Text

    from attnzoo.quality.quality_rows import in_order, page_name
    from attnzoo.report.export import write_figures
    from attnzoo.report.quality.quality_figures import drawings
    from attnzoo.report.quality.quality_page import page
    from attnzoo.report.quality.quality_tables import tables
    from attnzoo.report.tables import rich_table

    rows = in_order(rows)
    for table in tables(rows):
        screen().print(Text(table.title, style="bold"))
        screen().print(rich_table(table))
        for note in table.notes:
            screen().print(Text(note, style="dim"))
        screen().print()
    name = page_name(rows[0])
    for path in [
        write_text(folder / f"{name}.html", page(rows)),
        *write_figures(drawings(rows), folder, f"{name}-"),
    ]:
        screen().print(f"wrote {path}", soft_wrap=True)
