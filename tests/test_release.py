"""What is released: a wheel and a source archive, built, installed into an environment of its own
and used there."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("hatchling")

import attnzoo

ROOT = Path(__file__).resolve().parents[1]


class Release(NamedTuple):
    """The two files."""

    wheel: Path
    source: Path


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, target: Path) -> Release:
    run(sys.executable, "-m", "hatchling", "build", "-d", target, cwd=source)
    (wheel,), (archive,) = target.glob("*.whl"), target.glob("*.tar.gz")
    return Release(wheel, archive)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return build(ROOT, tmp_path_factory.mktemp("dist"))


def files_of(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as found:
        return {name: found.read(name) for name in found.namelist()}


def test_the_wheel_holds_the_library_and_nothing_else(release: Release) -> None:
    names = set(files_of(release.wheel))
    folders = {name.split("/")[0] for name in names}
    assert folders == {"attnzoo", f"attnzoo-{attnzoo.__version__}.dist-info"}
    here = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "attnzoo").rglob("*")
        if path.suffix in (".py", ".cpp", ".h")
    }
    here |= {f"attnzoo/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert {name for name in names if name.startswith("attnzoo/")} == here | {"attnzoo/py.typed"}


@pytest.mark.thorough
def test_the_source_archive_builds_the_same_wheel(release: Release, tmp_path: Path) -> None:
    with tarfile.open(release.source) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    assert (folder / "tests" / Path(__file__).name).is_file() and (folder / "LICENSE").is_file()
    assert files_of(build(folder, tmp_path / "dist").wheel) == files_of(release.wheel)


def test_version_changelog_and_metadata_agree(release: Release) -> None:
    headings = [
        line.removeprefix("## ").split()[0]
        for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("## ")
    ]
    assert attnzoo.__version__ in headings
    metadata = files_of(release.wheel)[f"attnzoo-{attnzoo.__version__}.dist-info/METADATA"].decode()
    assert f"\nVersion: {attnzoo.__version__}\n" in metadata
    assert "\nClassifier: Typing :: Typed\n" in metadata
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in project["optional-dependencies"]:
        assert f"\nProvides-Extra: {extra}\n" in metadata


def test_the_description_is_the_readme_without_links_into_the_checkout(release: Release) -> None:
    metadata = files_of(release.wheel)[f"attnzoo-{attnzoo.__version__}.dist-info/METADATA"].decode()
    assert "\nDescription-Content-Type: text/markdown\n" in metadata
    told = metadata.split("\n\n", 1)[1]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](" in readme and "](" not in told and "<!--" not in told
    assert "| exact softmax | `standard` `flash` |" in told
    for line in readme.splitlines():
        assert "](" in line or line.startswith("<!--") or line in told


@pytest.mark.thorough
def test_an_installed_wheel_works_without_the_checkout(release: Release, tmp_path: Path) -> None:
    """Torch and the other packages come from here, by a path file: attnzoo from the wheel alone."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    paths = sysconfig.get_paths(vars={"base": str(tmp_path / "env")})
    packages = Path(paths["purelib"])
    installing = ("install", "--no-deps", "--no-index", "--quiet")
    run(
        *(sys.executable, "-m", "pip", "--python", python, *installing, release.wheel), cwd=tmp_path
    )
    # The environment may lie in the checkout, whose own files must not be found.
    own = {ROOT, ROOT / "tests"}
    others = [path for path in sys.path if path and Path(path).resolve() not in own]
    (packages / "others.pth").write_text("\n".join(others), encoding="utf-8")
    code = (
        "import attnzoo, sys; from attnzoo.configuration import configs_folder; "
        "print(attnzoo.__file__, configs_folder()); attnzoo.build('linear', heads=2, head_dim=8); "
        "print(attnzoo.cost_table('linear', length=64).table().rows[0]['variant'])"
    )
    work = tmp_path / "work"
    work.mkdir()
    said = run(python, "-c", code, cwd=work, PYTHONPATH="").split()
    assert all(Path(path).is_relative_to(packages) for path in said[:2]) and said[2] == "linear"
    command = tmp_path / "env" / "bin" / "attnzoo"
    assert run(command, "--version", cwd=work, PYTHONPATH="").split()[-1] == attnzoo.__version__
    assert "sliding_window" in run(command, "list", cwd=work, PYTHONPATH="")
