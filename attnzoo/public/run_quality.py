"""`attnzoo.compare(model=...)`: the quality of a whole model with its attention swapped, row by row
into a result file where one is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo.arguments import check_positive, nearest
from attnzoo.configuration import configs_folder
from attnzoo.packages import require
from attnzoo.public.setting_checks import check_dtype, check_seed, dtype_name
from attnzoo.public.variant_text import check_variant, parse_variant
from attnzoo.results.output import check_folder, open_results
from attnzoo.results.progress import progress_bar, say

if TYPE_CHECKING:
    import torch

    from attnzoo.quality.quality_study import Study
    from attnzoo.report.result import Result

SHIPPED = {"quick": "{kind}-quick.yaml", "full": "{kind}.yaml"}


def measure_quality(
    model: str,
    study: str | None,
    variants: list[str] | None,
    lengths: list[int] | None,
    sampled: Mapping[str, object],
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    seed: int,
    output: str | Path | None,
    progress: bool,
) -> tuple[Result, Path | None]:
    """Check everything and measure what the result file does not hold; the rows, and that file.

    sampled: settings of a comparison of attentions, which a whole model has no use for.
    Raises KeyboardInterrupt when nothing was finished before Ctrl-C.
    """
    from attnzoo.benchmarking.environment import environment
    from attnzoo.benchmarking.heap import bounded_memory
    from attnzoo.fidelity import check_device
    from attnzoo.quality.model_kinds import find_model
    from attnzoo.quality.quality_rows import Row
    from attnzoo.quality.quality_run import Run
    from attnzoo.report.quality.quality_page import quality_result
    from attnzoo.texts.text_parts import TEXT_MODULES, read_text

    for name, value in sampled.items():
        if value is not None:
            raise ValueError(
                f"--{name} does not go with --model, which swaps every layer, one layer at a time, "
                "and mixes of them"
            )
    check_seed(seed)
    target, kind = check_device(device), check_dtype(dtype)
    found = find_model(model)
    plan = _study(study or "quick", found.kind, variants, lengths)
    require(
        f"--model {model}",
        [
            *found.modules,
            *(module for name in plan.texts for module in TEXT_MODULES.get(name, ())),
        ],
    )
    texts: Mapping[str, Mapping[str, str]] = {name: read_text(name) for name in plan.texts}
    file = (
        None
        if output is None
        else open_results(check_folder(output) / f"quality-{found.name.lower()}.jsonl", Row)
    )
    held = [] if file is None else file.rows()
    if file is not None and held:
        say(f"attnzoo: {file.path} holds {len(held)} rows, which are kept")
    work = Run(
        plan,
        found.name,
        found.sources(texts),
        lambda: found.subject(texts, device=target, dtype=kind, seed=seed),
        held,
        (lambda row: None) if file is None else file.append,
        dtype=dtype_name(dtype),
        seed=seed,
        facts=environment(seed=seed, device=target, dtype=kind),
    )
    cut = ""
    try:
        with bounded_memory(target), progress_bar(progress) as shown:
            rows = work.run(shown)
    except KeyboardInterrupt:
        rows, cut = list(work.rows.values()), "interrupted"
        if not rows:
            raise
    return quality_result(rows, cut), None if file is None else file.path


def _study(name: str, kind: str, variants: list[str] | None, lengths: list[int] | None) -> Study:
    """The study, with the variants and lengths that are given in place of its own."""
    from attnzoo.quality.quality_study import read_study

    path = Path(name)
    if name in SHIPPED and not path.is_file():
        path = configs_folder() / "quality" / SHIPPED[name].format(kind=kind)
    elif not path.exists():
        raise ValueError(
            f"there is no study {name!r}{nearest(name, SHIPPED)}; give {' or '.join(SHIPPED)}, or "
            "the path of a YAML file"
        )
    study = read_study(path, check_variant)
    if lengths is not None:
        chosen = {check_positive("length", length) for length in lengths}
        study = replace(study, lengths=tuple(sorted(chosen)))
    if variants is not None:
        study = replace(study, variants=tuple(map(parse_variant, variants)))
    return study
