"""What every test starts from: one thread, a fixed seed, a hypothesis that repeats itself."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

torch.set_num_threads(1)
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")
# Hypothesis would also try the constants of all modules that happen to be loaded: seconds of
# reading, for examples that depend on which files a process runs.
providers._get_local_constants = lambda: providers._local_constants


def pytest_collection_finish() -> None:
    """What was collected lives to the end: the garbage collector need not walk it again and
    again, and of what tests make there is enough memory for fewer walks than by default."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


@pytest.fixture
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures with matplotlib's default margins, half the dots and letters that are not outlines:
    the rest is most of the time of drawing them. `test_report.py` and `test_style.py` draw them
    whole."""
    from attnzoo.report.style import RC

    figure = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(figure.Figure, "get_layout_engine", lambda self: None)
    monkeypatch.setattr("attnzoo.report.export.DOTS_PER_INCH", 80)
    monkeypatch.setitem(RC, "svg.fonttype", "none")


@pytest.fixture(scope="session", autouse=True)
def only_native_by_name() -> Iterator[None]:
    """backend="auto" answers as on a machine where `native` has not been compiled, whatever was
    compiled on this one before; asked for by name, it runs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("attnzoo.engines.native.library.not_compiled", lambda: "as in tests")
        yield


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """The CPU's generator alone where there is no GPU: torch.manual_seed also notes the call, with
    the whole stack as text, for devices that may appear, which takes longer than a small test."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
