"""attnzoo list and attnzoo show NAME: the zoo, and one variant."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from attnzoo.commands.command import Command, screen


def _no_arguments(parser: ArgumentParser) -> None:
    pass


def _list(settings: Namespace) -> int:
    from attnzoo.report.zoo_tables import techniques_table, zoo_table

    screen().print(zoo_table())
    screen().print()
    screen().print(techniques_table())
    return 0


def _name(parser: ArgumentParser) -> None:
    parser.add_argument("name", type=str, help="a variant of `attnzoo list`")


def _show(settings: Namespace) -> int:
    from attnzoo.report.zoo_tables import variant_view

    screen().print(variant_view(settings.name))
    return 0


LIST = Command(
    "list",
    "Print the zoo: every variant and what it can do, and the techniques that go with all of them.",
    _no_arguments,
    _list,
    is_quick=True,
)
SHOW = Command(
    "show",
    "Print one variant: equation, paper, capabilities, options and cost.",
    _name,
    _show,
    is_quick=True,
)
