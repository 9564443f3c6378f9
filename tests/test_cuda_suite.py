"""The script of the CUDA suite on a box that is not there: what it runs, in which order, for how
long, and what it survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "cuda" / "run.sh"
PYTHON = """#!/usr/bin/env bash
# A python3 that notes what it was asked for, and fails where it is told to.
echo "$*" >> "$NOTES"
case "$*" in
    *find_spec*)
        [ -z "${NO_TORCH:-}" ] || { echo "error: python3 has no torch here" >&2; exit 1; } ;;
    *is_available*)
        [ -z "${NO_CUDA:-}" ] || { echo "error: torch sees no CUDA device here" >&2; exit 1; } ;;
    *"pip install"*) case "$*" in *cp310*) exit 1 ;; esac ;;
    *"triton.__version__"*) echo "torch 2.11" ;;
    *limits.py*) echo '{"limit": 1}' ;;
    *"attnzoo bench"*)
        [ -z "${SLOW:-}" ] || {
            trap 'echo interrupted >> "$NOTES"; exit 130' INT
            for _ in {1..200}; do sleep 0.1; done
        }
        echo '{"row": 1}' >> "$OUT/bench.jsonl"
        read -r code < "$CODES" && sed -i 1d "$CODES"
        exit "${code:-0}" ;;
    *xdist*) [ -n "${XDIST:-}" ] || exit 1 ;;
    *pytest*) echo "3 failed"; exit 1 ;;
    *shielding.py*) echo '{"shield": 1}' ;;
esac
"""
TIMEOUT = """#!/usr/bin/env bash
# A timeout that notes its seconds and lets the command run.
options=()
while [[ "$1" == --* ]]; do options+=("$1"); shift; done
echo "timeout ${options[*]} $1" >> "$NOTES"
shift
exec "$@"
"""


class Box:
    """A folder of stand-ins at the head of PATH, wheels, and a place for results."""

    def __init__(self, folder: Path) -> None:
        self.notes, self.codes, self.out, self.wheels = (
            folder / name for name in ("notes", "codes", "out", "wheels")
        )
        self.bin = folder / "bin"
        for made in (self.bin, self.wheels):
            made.mkdir()
        for name, text in (("python3", PYTHON), ("timeout", TIMEOUT)):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        (self.wheels / "einops-0.8.2-py3-none-any.whl").touch()
        self.codes.write_text("0\n")
        self.notes.touch()

    def start(self, *budget: str, **more: str) -> subprocess.Popen[str]:
        paths = {"NOTES": str(self.notes), "CODES": str(self.codes), "OUT": str(self.out)}
        environment = {**os.environ, **paths, "PATH": f"{self.bin}:{os.environ['PATH']}", **more}
        command = ["bash", str(SCRIPT), str(self.wheels), str(self.out), *budget]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    def run(self, *budget: str, **more: str) -> tuple[int, str]:
        started = self.start(*budget, **more)
        said = started.communicate(timeout=60)
        return started.returncode, "".join(said)

    def noted(self, part: str) -> list[str]:
        return [line for line in self.notes.read_text().splitlines() if part in line]


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.mark.parametrize("seconds", [540, 360])
def test_everything_runs_in_order_within_its_time(box: Box, seconds: int) -> None:
    code, said = box.run(*([] if seconds == 540 else [str(seconds)]))
    assert code == 0, said
    order = [
        "find_spec",
        "is_available",
        "pip install",
        "triton.__version__",
        "limits.py --gpu h100",
        "-m pytest",
        "shielding.py",
        "attnzoo bench --config configs/bench/cuda",
    ]
    places = [
        next(place for place, line in enumerate(box.notes.read_text().splitlines()) if part in line)
        for part in order
    ]
    assert places == sorted(places)
    tests, sweep = (int(line.split()[-1]) for line in box.noted("timeout"))
    # The sweep gets what the tests have left.
    assert tests == seconds * 2 // 5 and seconds - 30 <= sweep <= seconds - 15
    assert sweep + 10 < seconds  # 10: what a hanging kernel is given before it is killed
    assert " -n " not in box.noted("-m pytest")[0]
    assert {path.name for path in box.out.iterdir()} == {
        "box.txt",
        "limits.jsonl",
        "bench.jsonl",
        "shielding.jsonl",
        "tests.txt",
    }
    assert "the tests ended with 1" in said and "3 failed" in said


def test_tests_run_side_by_side_where_they_can(box: Box) -> None:
    assert box.run(XDIST="1", WORKERS="7")[0] == 0
    assert "-m cuda -n 7 tests/test_cuda.py" in box.noted("-m pytest")[0]


@pytest.mark.parametrize("seconds", ["20", "soon"])
def test_a_budget_that_is_none_is_told_so(box: Box, seconds: str) -> None:
    code, said = box.run(seconds)
    assert code == 1 and f"SECONDS is '{seconds}'" in said and not box.noted("pip")


def test_a_lost_device_is_gone_on_from_and_other_failures_are_not_tried_again(box: Box) -> None:
    box.codes.write_text("3\n3\n2\n")
    code, said = box.run()
    assert code == 0 and len(box.noted("attnzoo bench")) == 3
    assert "the sweep ended with 2" in said and (box.out / "tests.txt").read_text() == "3 failed\n"
    assert (box.out / "bench.jsonl").read_text().count("row") == 3


def test_a_wheel_for_another_python_does_not_cost_the_rest(box: Box) -> None:
    (box.wheels / "hypothesis-6-cp310-cp310-linux_x86_64.whl").touch()
    code, said = box.run()
    assert code == 0 and "left out: " in said and "hypothesis-6-cp310" in said
    assert (
        len(
            [
                line
                for line in box.noted("pip install")
                if "einops" in line and "hypothesis" not in line
            ]
        )
        == 1
    )
    assert (box.out / "bench.jsonl").exists()


@pytest.mark.parametrize(
    ("lacks", "said"), [("NO_TORCH", "has no torch"), ("NO_CUDA", "sees no CUDA device")]
)
def test_a_box_that_is_none_is_told_so_at_once(box: Box, lacks: str, said: str) -> None:
    code, found = box.run(**{lacks: "1"})
    assert code == 1 and said in found and not box.noted("pip") and not box.noted("attnzoo bench")


def test_an_empty_folder_of_wheels_is_told_so(box: Box) -> None:
    for wheel in box.wheels.iterdir():
        wheel.unlink()
    code, said = box.run()
    assert code == 1 and "no wheels in" in said and not box.noted("pip")


@pytest.mark.skipif(
    sys.platform != "linux", reason="reads a terminal's signals as Linux gives them"
)
def test_an_interrupt_reaches_the_sweep(box: Box) -> None:
    """As Ctrl-C does: to every process of the terminal's group. The real timeout would leave that
    group, had it not been told to stay."""
    (box.bin / "timeout").unlink()
    started = box.start(SLOW="1")
    deadline = time.monotonic() + 30
    while not box.noted("attnzoo bench") and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(started.pid, signal.SIGINT)
    started.communicate(timeout=15)
    assert box.noted("interrupted")
