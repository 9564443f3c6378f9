"""The bugs that `python3 dev.py mutate` plants are true: each text is there once, and its tests
are."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import planted_bugs
import pytest
from planted_bugs import ROOT, Bug, bugs


def test_there_are_many_and_none_twice() -> None:
    found = bugs()
    assert len(found) >= 60
    assert len({bug.about for bug in found}) == len({(b.file, b.old, b.new) for b in found})
    assert len({bug.about for bug in found}) == len(found)


@pytest.mark.parametrize("bug", bugs(), ids=lambda bug: bug.about)
def test_a_bug_can_be_planted(bug: Bug) -> None:
    text = (ROOT / bug.path).read_text(encoding="utf-8")
    planted = bug.planted(text)
    assert planted != text
    if bug.path.suffix == ".py":
        compile(planted, str(bug.path), "exec")
    files = [word for word in shlex.split(bug.tests) if word.startswith("tests/")]
    assert files and all((ROOT / name.partition("::")[0]).is_file() for name in files)


def test_a_planted_bug_is_caught_and_a_harmless_change_is_not(tmp_path: Path) -> None:
    (tmp_path / "attnzoo").mkdir()
    (tmp_path / "attnzoo" / "__init__.py").touch()
    (tmp_path / "attnzoo" / "one.py").write_text("ONE = 1\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(
        "from attnzoo.one import ONE\n\ndef test_one():\n    assert ONE == 1\n"
    )
    wrong = Bug("two", "one.py", "ONE = 1", "ONE = 2", "tests/test_one.py")
    assert planted_bugs.catch(wrong, tmp_path) == "tests/test_one.py::test_one"
    harmless = Bug("spaces", "one.py", "ONE = 1", "ONE  =  1", "tests/test_one.py -k one")
    assert planted_bugs.catch(harmless, tmp_path) == ""
    assert (tmp_path / "attnzoo" / "one.py").read_text() == "ONE = 1\n"
    with pytest.raises(ValueError, match="0 times and not once; keep the bug 'gone' true"):
        planted_bugs.catch(Bug("gone", "one.py", "TWO", "", ""), tmp_path)
    with pytest.raises(RuntimeError, match="did not run"):
        planted_bugs.catch(
            Bug("none", "one.py", "ONE = 1", "ONE = 3", "tests/nowhere.py"), tmp_path
        )


def test_words_that_no_bug_has_are_said() -> None:
    ran = subprocess.run(
        [sys.executable, str(planted_bugs.__file__), "nothing", "like", "this"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ran.returncode == 2 and "no bug has the words nothing like this" in ran.stderr
