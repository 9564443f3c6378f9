"""A swapped model as a whole, saved, loaded in a process that knows nothing of it, sent to a
worker; and copies of its config."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from swap_models import make, tokens

import attnzoo

pytest.importorskip("transformers", reason="needs transformers: pip install 'attnzoo[models]'")

LOAD = """
import sys, torch
import attnzoo
models, ids, answers, exact = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    for model, answer in zip(models, answers, strict=True):
        torch.testing.assert_close(model(ids)[0], answer)
    torch.testing.assert_close(attnzoo.unswap(models[0])(ids)[0], exact)
"""

BUILD = """
import pickle, sys, torch
config = pickle.load(open(sys.argv[1], "rb"))
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_config(config).eval()
ids = torch.arange(12)[None]
with torch.no_grad():
    found = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(found, model(ids).logits)
"""


def run(script: str, path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens())[0]


@pytest.mark.thorough
def test_a_saved_model_its_copy_and_a_part_of_it_run_in_a_fresh_process(tmp_path: Path) -> None:
    first, second = make("llama").eval(), make("llama").eval()
    exact = answer(first)
    for model in (first, second):
        attnzoo.swap(model, "performer", num_features=8)
    models = [first, copy.deepcopy(first), second.model]
    torch.save(
        (models, tokens(), [answer(model) for model in models], exact), tmp_path / "models.pt"
    )
    run(LOAD, tmp_path / "models.pt")


def _answer_in_worker(model: Any, ids: torch.Tensor, path: str) -> None:
    with torch.no_grad():
        torch.save(model(ids)[0], path)


@pytest.mark.thorough
def test_a_spawned_worker_runs_a_swapped_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A worker inherits sys.path, and where timm's tests ran before, their torchvision, which beside
    # a CPU torch breaks transformers.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).name != "timm"])
    model = attnzoo.swap(make("bert").eval(), "linear")
    path = tmp_path / "answer.pt"
    worker = torch.multiprocessing.get_context("spawn").Process(
        target=_answer_in_worker, args=(model, tokens(), str(path))
    )
    worker.start()
    worker.join(240)
    assert worker.exitcode == 0
    torch.testing.assert_close(torch.load(path), answer(model))


@pytest.mark.thorough
def test_a_copied_config_builds_models_of_its_own(tmp_path: Path) -> None:
    model = make("llama").eval()
    attnzoo.swap(model, "sliding_window", window=4)
    swapped, config = answer(model), copy.deepcopy(model.config)
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(config))
    run(BUILD, tmp_path / "config.pkl")
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(answer(other), swapped)  # exact
    attnzoo.swap(other, "sliding_window", window=4)
    torch.testing.assert_close(answer(other), swapped)
    # A model that shares the config itself.
    beside = attnzoo.swap(type(model)(model.config).eval(), "linear")
    attnzoo.unswap(other)
    assert not torch.allclose(answer(other), swapped)
    attnzoo.unswap(model)
    assert answer(beside).isfinite().all()
