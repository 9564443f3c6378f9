"""Plant bugs in a copy of the checkout, one at a time, and say which test catches each.

    python3 dev.py mutate [WORDS...]        those whose description or file has all of these words

Every bug is a small change that somebody might make, with the tests that should notice: a list of
files, with `-k` words where a file is long. The copy lies in a temporary folder; the checkout is
never touched. A finished row is in report/mutate.jsonl at once, and is not run again while the
bug, the library and the tests are the same. The exit code is 1 when a bug survives.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
BUGS = Path(__file__).with_suffix(".yaml")
RESULTS = ROOT / "report" / "mutate.jsonl"
COPIED = ("attnzoo", "tests", "configs", "docs", "pyproject.toml", "README.md", "benchmarks")


@dataclass(frozen=True)
class Bug:
    """One change.

    about: what is wrong then
    file: in which, below attnzoo/
    old, new: the text that is there once, and what takes its place
    tests: arguments of pytest, in a line
    """

    about: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def path(self) -> Path:
        return Path("attnzoo") / self.file

    def planted(self, text: str) -> str:
        """The file with the bug. Raises ValueError where the text is not there, or more often."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.path} has {self.old!r} {text.count(self.old)} times and not once; keep "
                f"the bug {self.about!r} true in {BUGS.name}"
            )
        return text.replace(self.old, self.new)


def bugs() -> list[Bug]:
    """All bugs, in the order of the file."""
    return [Bug(**entry) for entry in yaml.safe_load(BUGS.read_text(encoding="utf-8"))]


def main(words: list[str]) -> int:
    chosen = [bug for bug in bugs() if all(word in f"{bug.about} {bug.path}" for word in words)]
    if not chosen:
        print(f"no bug has the words {' '.join(words)}; they are in {BUGS}", file=sys.stderr)
        return 2
    RESULTS.parent.mkdir(exist_ok=True)
    finished = _finished()
    survivors = []
    with tempfile.TemporaryDirectory(prefix="attnzoo-mutate-") as folder:
        copy = Path(folder)
        _copy_to(copy)
        for place, bug in enumerate(chosen, 1):
            key = _fingerprint(bug)
            caught = finished.get(key)
            if caught is None:
                caught = catch(bug, copy)
                row = {**asdict(bug), "key": key, "caught_by": caught}
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            said = f"caught by {caught}" if caught else "SURVIVED"
            print(f"[{place}/{len(chosen)}] {bug.about}: {said}", flush=True)
            if not caught:
                survivors.append(bug)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} bugs are caught")
    return 1 if survivors else 0


def catch(bug: Bug, copy: Path) -> str:
    """The first test that fails with the bug in a copy of the checkout; "" where none does."""
    target = copy / bug.path
    clean = target.read_text(encoding="utf-8")
    target.write_text(bug.planted(clean), encoding="utf-8")
    asked = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    own = {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        ran = subprocess.run(
            [*asked, *shlex.split(bug.tests)],
            cwd=copy,
            env={**os.environ, **own},
            capture_output=True,
            text=True,
        )
    finally:
        target.write_text(clean, encoding="utf-8")
    if ran.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.MULTILINE)
    if failed is None:
        said = f"{ran.stdout[-800:]}{ran.stderr[-800:]}"
        raise RuntimeError(f"pytest {bug.tests} did not run: {said}")
    return failed[1]


def _copy_to(folder: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *COPIED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def _fingerprint(bug: Bug) -> str:
    found = hashlib.sha256(repr(bug).encode())
    for folder in ("attnzoo", "tests"):
        for path in sorted((ROOT / folder).rglob("*.*")):
            if path.suffix in (".py", ".cpp", ".h"):
                found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _finished() -> dict[str, str]:
    if not RESULTS.exists():
        return {}
    rows = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return {row["key"]: row["caught_by"] for row in rows}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
