"""What every test starts from: one thread, a fixed seed, a hypothesis that repeats itself."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """What was collected lives to the end: the garbage collector need not walk it again and
    again, and of what tests make there is enough memory for fewer walks than by default."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


@pytest.fixture
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures with matplotlib's default margins: to choose their own is three quarters of the time
    of drawing them. `test_report.py` and `test_style.py` draw them whole."""
    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "get_layout_engine", lambda self: None)


@pytest.fixture(autouse=True)
def only_native_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="auto" answers as on a machine where `native` has not been compiled, whatever was
    compiled on this one before; asked for by name, it runs."""
    monkeypatch.setattr("attnzoo.engines.native.library.not_compiled", lambda: "as in tests")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """The CPU's generator alone where there is no GPU: torch.manual_seed also notes the call, with
    the whole stack as text, for devices that may appear, which takes longer than a small test."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
