"""attnzoo completion SHELL: a script with which a shell completes commands, options, variants."""

from __future__ import annotations

import argparse

from jsonargparse import ArgumentParser, Namespace

from attnzoo.arguments import nearest
from attnzoo.commands.command import CHOSEN, Command

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
#: Arguments whose words are variants' names.
OF_VARIANTS = (CHOSEN, "variants", "name", "like", "attention")
#: Arguments whose words are files or folders.
OF_FILES = (
    "config",
    "output",
    "against",
    "files",
    "json",
    "junit",
    "model_presets",
    "gpu_presets",
)


def add_arguments(parser: ArgumentParser) -> None:
    """The shell."""
    parser.add_argument(
        "shell",
        type=str,
        help=f'one of {", ".join(SHELLS)}; such as: eval "$(attnzoo completion bash)"',
    )


def completion(commands: tuple[Command, ...]) -> Command:
    """The command that completes these and itself."""

    def run(settings: Namespace) -> int:
        if settings.shell not in SHELLS:
            raise ValueError(
                f"shell {settings.shell!r} is unknown{nearest(settings.shell, SHELLS)}; choose one "
                f"of {', '.join(SHELLS)}"
            )
        print(script(settings.shell, (*commands, own)))
        return 0

    own = Command(
        "completion",
        "Print a script with which a shell completes commands, options and variants.",
        add_arguments,
        run,
        is_quick=True,
    )
    return own


def script(shell: str, commands: tuple[Command, ...]) -> str:
    """The completion script of the command line, with the variants that there are now."""
    import shtab

    from attnzoo.registry import names

    # argparse's own classes: what jsonargparse adds to an action is none of a shell's business.
    parser = argparse.ArgumentParser("attnzoo")
    chosen = parser.add_subparsers(dest="command")
    for command in commands:
        described = ArgumentParser()
        command.add_arguments(described)
        subparser = chosen.add_parser(command.name, help=command.help)
        for action in described._actions:
            if action.dest in ("help", "print_config"):
                continue
            names_of = action.option_strings or [action.dest]
            if action.nargs == 0:
                subparser.add_argument(*names_of, action="store_true", help=action.help)
                continue
            added = subparser.add_argument(*names_of, nargs=action.nargs, help=action.help)
            if action.dest in OF_VARIANTS:
                added.choices = names()
            elif action.dest == "shell":
                added.choices = SHELLS
            elif action.dest in OF_FILES:
                added.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    return shtab.complete(parser, shell=shell)
