"""`attnzoo doctor` and `attnzoo completion`: what is here, what is missing, and words for a
shell."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("rich")

import attnzoo
from attnzoo.commands import program
from attnzoo.commands.completion import SHELLS
from attnzoo.report.doctor import doctor_tables
from attnzoo.report.doctor.usable_backends import usable


@pytest.fixture(scope="module")
def tables() -> dict:
    return {table.name: table for table in doctor_tables.doctor_tables()}


def test_doctor_prints_versions_devices_packages_and_backends(capsys) -> None:
    assert program.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and attnzoo.__version__ in printed
    assert "Backends on cpu" in printed and "attnzoo[cuda]" in printed and "\x1b" not in printed


def test_every_variant_has_a_backend_here(tables) -> None:
    found = {row["variant"]: row for row in tables["backends-cpu"].rows}
    assert list(found) == attnzoo.names()
    assert all(row["auto"] and row["training"] for row in found.values())


@pytest.mark.parametrize("name", ["standard", "sliding_window", "linear"])
def test_what_auto_is_said_to_take_runs(name) -> None:
    """On the call that is asked about, in the reference's place: two heads are as good as eight."""
    said = usable(name, torch.device("cpu"), backward=False)
    attention = attnzoo.build(name, heads=8, head_dim=64)
    q, k, v = (torch.zeros(1, 8, 4096, 64) for _ in range(3))
    with torch.no_grad():
        attention(q, k, v, is_causal=attention.spec.forms[0])
    assert attention.last_backend == said.auto
    refused = next((backend for backend, reason in said.refusals.items() if reason), None)
    if refused is not None:
        attention.backend = refused
        with pytest.raises(attnzoo.UnsupportedError) as caught, torch.no_grad():
            attention(q, k, v, is_causal=attention.spec.forms[0])
        assert str(said.refusals[refused]) in str(caught.value)


def test_a_missing_package_comes_with_its_command(monkeypatch) -> None:
    real = doctor_tables.find_spec
    monkeypatch.setattr(
        doctor_tables, "find_spec", lambda name: None if name == "sklearn" else real(name)
    )
    rows = {row["package"]: row for row in doctor_tables._packages().rows}
    assert rows["scikit-learn"]["found"] is None
    assert rows["scikit-learn"]["command"] == "pip install 'attnzoo[tasks]'"
    assert rows["rich"]["found"] and rows["rich"]["command"] is None


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_names_commands_options_and_variants(shell, capsys) -> None:
    pytest.importorskip("shtab")
    assert program.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("compare", "doctor", "sliding_window", "head-dim"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
def test_bash_completes_a_variant(capsys, tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    program.main(["completion", "bash"])
    file = tmp_path / "attnzoo.sh"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    asked = (
        f"source {file}; COMP_WORDS=(attnzoo show sliding_w); COMP_CWORD=2; "
        "_shtab_attnzoo; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
    assert done.stdout.split() == ["sliding_window"], done.stderr


def test_an_unknown_shell_is_refused(capsys) -> None:
    assert program.main(["completion", "bsh"]) == 2
    assert "did you mean 'bash'?" in capsys.readouterr().err
