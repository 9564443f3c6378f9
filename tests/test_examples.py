"""Every script of examples/ runs: its quick setting here, whole ones with -m slow, each in under
two minutes; and the notebooks keep the outputs of their own code."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from attnzoo import registry
from attnzoo.packages import MissingPackageError

pytest.importorskip("transformers", reason="needs transformers: pip install 'attnzoo[models]'")
pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'attnzoo[tasks]'")
ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples"
#: What a line of each quick run says.
SAID = {
    "character_model": r"gated_deltanet: [4-7]\.\d\d bits per character on Hamlet, after 3 steps",
    "check_your_kernel": r"right: WINDOW keys.*\n  holds: outputs, causality, padding",
    "finetune_bert": r"longformer: \d+% of 16 passages that were held out",
    "generate_past_the_window": r"window of 16, 4 sinks: perplexity \d\d\.\d\n24 tokens read and 4",
    "several_processes": r"epoch 0: \d\d\.\d% of 64 right, 1 process",
    "vision_transformer": r"swapped to linear: \d+\.\d%\nand fine-tuned for 2 steps",
    "your_own_variant": r"row 99 sees 20 keys: 0 to 15 and 96 to 99\n(.*\n){2}2 rules hold, 0 fail",
}
#: Read models and plays that are packages of their own.
READERS = ("character_model", "finetune_bert", "generate_past_the_window")
#: Reads a model of 135 million weights from a file that has to be unpacked.
SLOW = ("generate_past_the_window",)
LIMIT = 120  # seconds


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_is_here_and_on_the_page() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SAID)
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"[`{name}.py`]({name}.py)" in page for name in SAID)
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert not [link for link in links if not (FOLDER / link).exists()]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SAID]
)
def test_a_quick_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.names()  # all are found before the copy is made
    # A variant that an example adds is gone afterwards.
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    try:
        loaded(name).main(["--quick"])
    except MissingPackageError as error:
        if name not in READERS:
            raise
        pytest.skip(str(error))
    assert re.search(SAID[name], capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_a_whole_run_takes_less_than_two_minutes(name: str) -> None:
    started = time.monotonic()
    subprocess.run([sys.executable, FOLDER / f"{name}.py"], check=True, env=_environment())
    assert time.monotonic() - started < LIMIT


@pytest.mark.slow
def test_two_processes() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launch, "--standalone", FOLDER / "several_processes.py", "--quick"]
    told = subprocess.run(command, check=True, env=_environment(), capture_output=True, text=True)
    assert "of 64 right, 2 process(es)" in told.stdout


NOTEBOOKS = sorted((FOLDER / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_executed_whole_and_is_light(path: Path) -> None:
    cells = [
        cell
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert kinds and "error" not in kinds
    assert path.stat().st_size < 600_000
    text = path.read_text(encoding="utf-8")
    assert "image/png" in text and "/site-packages/" not in text and str(ROOT) not in text


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
