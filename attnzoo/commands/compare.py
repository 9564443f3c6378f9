"""attnzoo compare: every variant against exact attention, on the screen, as JSON, as figures and as
one HTML page."""

from __future__ import annotations

import time
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from attnzoo.commands import INTERRUPTED
from attnzoo.commands.command import (
    Command,
    ConfigFile,
    add_variants,
    print_tables,
    screen,
    variants_of,
)


def add_arguments(parser: ArgumentParser) -> None:
    """The settings of a comparison, from the command line or a YAML file."""
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
    add_variants(
        parser,
        "the whole zoo, but for attentions with gates, which must be trained first; with --model "
        "those of the study",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        metavar="TOKENS",
        help="the longest is measured in full, the others for their error (default: 128 256 512 "
        "1024 2048 4096; with --model those of the study)",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        type=str,
        metavar="MODEL",
        help="smollm2, minilm or synthetic, or several (default: smollm2 minilm)",
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
        "--dtype",
        type=str,
        default="float32",
        metavar="DTYPE",
        help="float32, float64, bfloat16 or float16",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
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
    import matplotlib  # noqa: F401  (missing, it must be missed before the work, not after)

    sampled = {name: settings[name] for name in ("models", "layers", "heads")}
    shared = {name: settings[name] for name in ("device", "dtype", "seed")}
    if settings.model is not None:
        return _whole_model(settings, sampled, shared)
    if settings.study is not None:
        raise ValueError("--study goes with --model, such as --model smollm2")
    return _compare(settings, sampled, shared)


def _compare(settings: Namespace, sampled: dict[str, Any], shared: dict[str, Any]) -> int:
    """Compare, print and write."""
    from attnzoo.public.run_compare import measure_samples, prepare_samples
    from attnzoo.report.page import comparison_result
    from attnzoo.report.tables import comparison_view
    from attnzoo.results.output import check_folder
    from attnzoo.results.progress import say

    started = time.monotonic()
    prepared = prepare_samples(variants_of(settings), settings.lengths, sampled, **shared)
    check_folder(settings.output)
    comparison = measure_samples(prepared)
    screen().print(comparison_view(comparison))
    result = comparison_result(comparison)
    for path in result.save(settings.output):
        screen().print(f"wrote {path}", soft_wrap=True)
    if result.interrupted:
        say(f"attnzoo: {result.interrupted}; what was finished is written")
        return INTERRUPTED
    say(f"finished in {time.monotonic() - started:.0f} s")
    return 0


def _whole_model(settings: Namespace, sampled: dict[str, Any], shared: dict[str, Any]) -> int:
    """Measure what the result file does not hold, print and write."""
    from attnzoo.public.run_quality import measure_quality
    from attnzoo.results.progress import say

    started = time.monotonic()
    result, path = measure_quality(
        settings.model,
        settings.study,
        variants_of(settings),
        settings.lengths,
        sampled,
        **shared,
        output=settings.output,
        progress=True,
    )
    print_tables(result.tables)
    for written in result.save(settings.output):
        screen().print(f"wrote {written}", soft_wrap=True)
    if result.interrupted:
        say(
            f"attnzoo: interrupted; finished rows are in {path}, and the same command goes on from "
            "there"
        )
        return INTERRUPTED
    say(f"finished in {time.monotonic() - started:.0f} s")
    return 0


COMPARE = Command(
    "compare",
    "Compare variants with exact attention: on queries, keys and values of real models, or with "
    "--model in a whole model.",
    add_arguments,
    run,
)
