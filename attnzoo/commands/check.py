"""attnzoo check: whether a callable of yours is the attention that it should be, rule by rule."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from attnzoo.arguments import nearest
from attnzoo.commands import BROKEN
from attnzoo.commands.command import Command, screen
from attnzoo.results.output import check_folder, write_text

if TYPE_CHECKING:
    from attnzoo.conformance import Report


def add_arguments(parser: ArgumentParser) -> None:
    """What is checked, against what, and where the findings go."""
    parser.add_argument(
        "callable",
        type=str,
        help="MODULE:NAME or FILE.py:NAME of a function or a module instance, such as "
        "torch.nn.functional:scaled_dot_product_attention",
    )
    parser.add_argument(
        "--like",
        type=str,
        metavar="NAME[:OPTION=VALUE,...]",
        help="the variant that it should equal; without it, only the rules that hold for every "
        "attention are asked",
    )
    parser.add_argument(
        "--dialect",
        type=str,
        default="attnzoo",
        help="how it is called: attnzoo, sdpa, transformers, "
        "transformers_layer, fla, fla_head_first or flash_attn",
    )
    parser.add_argument(
        "--rules", nargs="+", type=str, metavar="RULE", help="the rules to ask (default: all)"
    )
    parser.add_argument("--heads", type=int, help="where the callable takes this number alone")
    parser.add_argument("--head-dim", type=int, help="where the callable takes this width alone")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda or cuda:INDEX")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--json", type=str, metavar="FILE", help="gets the findings as JSON")
    parser.add_argument(
        "--junit", type=str, metavar="FILE", help="gets the findings as a JUnit test suite"
    )


def run(settings: Namespace) -> int:
    """Check, print, write; 4 where a rule fails or none holds."""
    from attnzoo.conformance import check
    from attnzoo.fidelity import check_device
    from attnzoo.public.setting_checks import check_seed
    from attnzoo.public.variant_text import parse_variant
    from attnzoo.results.progress import say

    check_seed(settings.seed)
    check_device(settings.device)
    files = {name: settings[name] for name in ("json", "junit") if settings[name] is not None}
    for name, path in files.items():
        check_folder(Path(path).parent, f"--{name}")
    choice = None if settings.like is None else parse_variant(settings.like)
    function = find_callable(settings.callable)
    report = check(
        function,
        choice,
        dialect=settings.dialect,
        rules=settings.rules,
        heads=settings.heads,
        head_dim=settings.head_dim,
        device=settings.device,
        seed=settings.seed,
        progress=lambda rule: say(f"attnzoo: {rule}"),
    )
    for name, path in files.items():
        write_text(Path(path), report.to_json() if name == "json" else report.to_junit())
    show(report)
    return 0 if report.holds else BROKEN


def show(report: Report) -> None:
    """The table, and in a sentence what it comes to."""
    from attnzoo.report.tables import rich_table

    console = screen()
    failing = [one.rule for one in report.findings if one.status == "fails"]
    if not (failing or report.holds):
        console.print(refusal(report))
        return
    console.print(rich_table(report.table()))
    if failing:
        console.print(f"{len(failing)} of {len(report.findings)} rules fail: {', '.join(failing)}")
    else:
        console.print("every rule that applies holds")


def refusal(report: Report) -> str:
    """Why nothing could be checked, in a sentence."""
    from attnzoo.conventions.dialects.spoken import find_dialect

    refused = [one.found for one in report.findings if one.status == "refused"]
    reason = (refused or [report.findings[0].found])[0]
    called = find_dialect(report.dialect).meaning.split(". ")[0]
    return (
        f"nothing could be checked: {reason}; it was called as {report.dialect} ({called}): name "
        "another dialect with --dialect, or a function of yours that calls it so"
    )


def find_callable(text: str) -> Callable[..., Any]:
    """What MODULE:NAME or FILE.py:NAME names; the folder of the call is searched first.

    Raises ValueError, one sentence, on another form, a module that cannot be imported, and a name
    that it does not have.
    """
    module_name, colon, name = text.rpartition(":")
    if not (colon and module_name and name):
        raise ValueError(
            f"{text!r} is not of the form MODULE:NAME or FILE.py:NAME; write "
            "my_kernels:attention, or kernels/mine.py:attention"
        )
    module = _imported(module_name)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [one for one in dir(found) if not one.startswith("_")]
            raise ValueError(f"{module_name} has no {name!r}{nearest(part, public)}")
        found = getattr(found, part)
    return found


def _imported(name: str) -> Any:
    path = Path(name)
    here = str(Path.cwd() if path.suffix != ".py" else path.parent)
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        if path.suffix != ".py":
            return importlib.import_module(name)
        if not path.is_file():
            raise ValueError(f"{name} is no file")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None  # of a name that ends in .py
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    except ValueError:
        raise
    except BaseException as error:  # whatever a stranger's module raises as it is imported
        if isinstance(error, KeyboardInterrupt):
            raise
        text = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be imported: {type(error).__name__}: {text}") from None


CHECK = Command("check", "Check any attention against rules and an oracle.", add_arguments, run)
