"""attnzoo flops: what one attention, one layer or a whole model costs by component, and what
another attention would save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from attnzoo.arguments import check_kv_heads, check_positive
from attnzoo.commands.command import Command, ConfigFile, screen
from attnzoo.results.output import check_folder, write_text

if TYPE_CHECKING:
    from attnzoo.cost.model_flops import Subject
    from attnzoo.registry import Choice
    from attnzoo.results.table import Table

LENGTHS = (512, 4096, 32768)
LAYER = "layer:"


def add_arguments(parser: ArgumentParser) -> None:
    """What is counted, with which attention, at which lengths."""
    parser.add_argument(
        "model",
        type=str,
        help="performer[:OPTION=VALUE,...], layer:gpt2, or bert[:ENTRY=VALUE,...], or a folder "
        "with config.json",
    )
    parser.add_argument(
        "--config", action=ConfigFile, help="a YAML file with any of the settings below"
    )
    parser.add_argument(
        "--attention",
        type=str,
        metavar="NAME[:OPTION=VALUE,...]",
        help="the attention to put into a layer or a model",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        metavar="TOKENS",
        help=f"of a sequence (default: {' '.join(map(str, LENGTHS))}, as far as the model reads)",
    )
    parser.add_argument("--heads", type=int, default=8, help="of one attention")
    parser.add_argument("--head-dim", type=int, default=64, help="of one attention")
    parser.add_argument(
        "--kv-heads", type=int, metavar="HEADS", help="of one attention (default: heads)"
    )
    parser.add_argument(
        "--causal",
        action="store_true",
        help="count one attention or one layer causally; a model is as it is",
    )
    parser.add_argument(
        "--modules", action="store_true", help="print the count of every module too"
    )
    parser.add_argument(
        "--operators", action="store_true", help="print the count of every operator too"
    )
    parser.add_argument(
        "--output", type=str, metavar="FOLDER", help="gets flops.json and a CSV a table"
    )


def run(settings: Namespace) -> int:
    """Count, print and, where asked, write."""
    from rich.text import Text

    from attnzoo.cost.model_flops import breakdown
    from attnzoo.report.flops_tables import CONVENTION, module_table, operator_table, saved_table
    from attnzoo.report.tables import rich_table

    subject, chosen = _subject(settings)
    lengths = [check_positive("length", n) for n in settings.lengths or _readable(subject)]
    lengths = sorted(set(lengths))
    folder = None if settings.output is None else check_folder(settings.output)
    counts = {
        n: [(label, breakdown(subject, n, one)) for label, one in _sides(subject, chosen)]
        for n in lengths
    }
    tables = [saved_table(subject, counts)]
    tables += [module_table(counts)] if settings.modules else []
    tables += [operator_table(counts)] if settings.operators else []
    console = screen()
    console.print(CONVENTION)
    for table in tables:
        console.print(Text(table.title, style="bold"))
        console.print(rich_table(table))
        for note in table.notes:
            console.print(Text(note, style="dim"))
    if folder is not None:
        for path in write_results(tables, folder):
            console.print(f"wrote {path}", soft_wrap=True)
    return 0


FLOPS = Command(
    "flops",
    "Count one attention, one layer or a whole model by component, and what another attention "
    "saves.",
    add_arguments,
    run,
)


def write_results(tables: list[Table], folder: Path) -> list[Path]:
    """Write flops.json and one CSV a table; return the paths."""
    content = {table.name: {"title": table.title, "rows": list(table.rows)} for table in tables}
    written = [write_text(folder / "flops.json", json.dumps(content, indent=1) + "\n")]
    return written + [
        write_text(folder / f"flops-{table.name}.csv", table.to_csv()) for table in tables
    ]


def _subject(settings: Namespace) -> tuple[Subject, Choice | None]:
    """What is counted, and the attention that is put into it. Raises ValueError on what does not go
    together."""
    from attnzoo.cost.huggingface_flops import whole_model
    from attnzoo.cost.model_flops import one_attention, one_layer
    from attnzoo.cost.model_sizes import find_model, model_presets
    from attnzoo.public.variant_text import parse_variant
    from attnzoo.registry import names

    text = settings.model
    chosen = None if settings.attention is None else parse_variant(settings.attention)
    if text.startswith(LAYER):
        return one_layer(
            find_model(text.removeprefix(LAYER), model_presets()), settings.causal
        ), chosen
    head, values = _split(text)
    if head in names():
        if chosen is not None:
            raise ValueError(
                f"{head} is an attention itself; --attention goes with a layer or a model"
            )
        heads, head_dim = (
            check_positive("heads", settings.heads),
            check_positive("head_dim", settings.head_dim),
        )
        subject = one_attention(
            heads, head_dim, check_kv_heads(settings.kv_heads, heads), settings.causal
        )
        variant = parse_variant(text)
        return subject, None if head == subject.exact else variant
    if settings.causal:
        raise ValueError(
            "--causal goes with one attention or one layer; a whole model is causal or not by "
            "itself"
        )
    return whole_model(head, values), chosen


def _split(text: str) -> tuple[str, dict[str, Any]]:
    """MODEL and the entries of MODEL:ENTRY=VALUE,ENTRY=VALUE."""
    from attnzoo.public.variant_text import read_value, split_options
    from attnzoo.registry import names

    head, _, rest = text.partition(":")
    if not rest or Path(text).is_dir():
        return text, {}
    if head in names():  # whose options `parse_variant` reads
        return head, {}
    pairs = [part.partition("=") for part in split_options(rest)]
    if not all(key and equals for key, equals, _ in pairs):
        raise ValueError(f"{text!r} is not of the form MODEL:ENTRY=VALUE,ENTRY=VALUE; write it so")
    return head, {key.strip(): read_value(value) for key, _, value in pairs}


def _readable(subject: Subject) -> list[int]:
    """The usual lengths that the subject has positions for, or all of its positions."""
    return [n for n in LENGTHS if subject.longest is None or n <= subject.longest] or [
        subject.longest or LENGTHS[0]
    ]


def _sides(subject: Subject, chosen: Choice | None) -> list[tuple[str, Choice | None]]:
    exact: list[tuple[str, Choice | None]] = [(subject.exact, None)]
    return exact if chosen is None else [*exact, (chosen.label, chosen)]
