"""The worked example of CONTRIBUTING.md, run as it is printed there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

# In a process of its own: a variant registered here would be one that other tests do not expect.
COMPARE = """
import torch
import mean_oracle, mean_variant, attnzoo

q, k, v = torch.randn(3, 2, 4, 70, 8, dtype=torch.float64).unbind()
key_mask = torch.rand(2, 70) > 0.3
attn = attnzoo.build("mean", heads=4, head_dim=8)
for is_causal in (False, True):
    masks = {"key_mask": key_mask, "is_causal": is_causal}
    out, weights = attnzoo.oracles.ORACLES["mean"](q, k, v, **masks)
    torch.testing.assert_close(attn(q, k, v, **masks), out)
    torch.testing.assert_close(attn.weights(q, k, **masks), weights)
    masks["chosen"] = torch.rand(2, 70) > 0.5
    out, weights = attnzoo.oracles.ORACLES["mean"](q, k, v, **masks)
    torch.testing.assert_close(attn(q, k, v, **masks), out)
    torch.testing.assert_close(attn.weights(q, k, **masks), weights)
rows, _ = attn.step(q, k, v, attn.init_state(2), key_mask=key_mask)
torch.testing.assert_close(rows, attn(q, k, v, key_mask=key_mask, is_causal=True))
assert "mean" in attnzoo.names()
"""


def printed() -> list[str]:
    """The variant and its oracle."""
    blocks = re.findall(
        r"```python\n(.*?)```",
        (TESTS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert len(blocks) == 2
    return blocks


def test_the_worked_example_equals_its_oracle(tmp_path: Path) -> None:
    for name, block in zip(("mean_variant.py", "mean_oracle.py"), printed(), strict=True):
        (tmp_path / name).write_text(block, encoding="utf-8")
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(TESTS)!r}, "
        f"{str(TESTS.parent)!r}]\n{COMPARE}"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


#: The contract of a variant, and two of the places that take any; `-m slow` runs every file.
CONTRACT = [
    f"tests/test_{name}.py"
    for name in (
        *("rules", "oracles", "padding", "decoding", "empty", "inputs", "arguments"),
        *("multihead_cores", "transforms"),
    )
]


@pytest.mark.parametrize(
    ("files", "least"),
    [
        pytest.param(CONTRACT, 100, marks=pytest.mark.thorough),
        pytest.param([], 300, marks=pytest.mark.slow),
    ],
    ids=["contract", "everything"],
)
def test_the_worked_example_passes_its_own_command(
    files: list[str], least: int, tmp_path: Path
) -> None:
    """Pasted where CONTRIBUTING.md says, and tested as it says, but for tests of other variants
    that have its name in theirs. No test here has it, or it would start itself."""
    for name in ("attnzoo", "tests"):
        # Compiled files come along; those being written have their process behind the name
        shutil.copytree(
            TESTS.parent / name, tmp_path / name, ignore=shutil.ignore_patterns("*.pyc.*")
        )
    for path in TESTS.parent.iterdir():
        if path.name not in ("attnzoo", "tests") and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    variant, oracle = printed()
    (tmp_path / "attnzoo" / "variants" / "mean.py").write_text(variant, encoding="utf-8")
    (tmp_path / "attnzoo" / "oracles" / "mean.py").write_text(oracle, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "[mean or -mean", *files]
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    assert int(re.findall(r"(\d+) passed", result.stdout)[-1]) > least


def run_beside(folder: Path, program: str) -> str:
    """What a Python says that finds the folder's packages."""
    path = os.pathsep.join([str(folder), str(TESTS.parent)])
    # Of a table that wraps no title.
    variables = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=variables, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def package(folder: Path, entries: str) -> None:
    """What pip leaves of a package with the variant and with these entry points."""
    (folder / "mypackage").mkdir()
    (folder / "mypackage" / "__init__.py").touch()
    (folder / "mypackage" / "mean.py").write_text(printed()[0], encoding="utf-8")
    installed = folder / "mypackage-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mypackage\nVersion: 1.0\n", encoding="utf-8"
    )
    (installed / "entry_points.txt").write_text(entries, encoding="utf-8")


ENTRY = '[project.entry-points."attnzoo.variants"]\nmean = "mypackage.mean"'


@pytest.mark.thorough
def test_a_variant_of_another_package_is_known_everywhere(tmp_path: Path) -> None:
    assert ENTRY in (TESTS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package(tmp_path, "[attnzoo.variants]\nmean = mypackage.mean\n")
    program = """
import attnzoo, attnzoo.commands.program, torch
assert "mean" in attnzoo.names() and attnzoo.build("mean", 2, 8).spec.name == "mean"
attnzoo.swap(torch.nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True), "mean")
compare = ["compare", "--models", "synthetic", "--lengths", "16", "--variants", "mean"]
for command in (["show", "mean"], ["list"], compare):
    assert attnzoo.commands.program.main(command) == 0
"""
    assert run_beside(tmp_path, program).count("Mean attention") >= 2


@pytest.mark.thorough
def test_a_variant_that_cannot_be_loaded_is_left_out_and_said(tmp_path: Path) -> None:
    package(tmp_path, "[attnzoo.variants]\nbroken = mypackage.absent\nmean = mypackage.mean\n")
    said = run_beside(tmp_path, "import attnzoo; print(attnzoo.names())")
    assert (
        "'mean'" in said
        and "the variant 'broken' (mypackage.absent, an entry point of the group attnzoo.variants) "
        "cannot be loaded"
        in said
    )
