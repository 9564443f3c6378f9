"""Timing on CUDA, on a device that is not there: in which order things are asked of it, and what a
sweep survives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stages import in_turn

import attnzoo
from attnzoo.benchmarking import cuda_timing, levels, measure_setting
from attnzoo.benchmarking.bench_rows import Row
from attnzoo.benchmarking.cuda_timing import DeviceLost, EventClock, captured
from attnzoo.benchmarking.levels import Work, prepare
from attnzoo.benchmarking.machine_limits import Limits
from attnzoo.benchmarking.measure_setting import Bench
from attnzoo.benchmarking.plan import Cell, Contender, Shape
from attnzoo.fidelity import check_device
from attnzoo.registry import Choice

DEVICE = torch.device("cuda:0")
HERE = Cell("core", "forward", True, 12, "float32", Shape(2, 2, 8))
LINEAR, STANDARD = (Contender(Choice(name), "auto") for name in ("linear", "standard"))


class Device:
    """What `torch.cuda` is asked for, in order; its tensors lie in the processor's memory."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.lost = False
        self.graphs_held = self.most_graphs = 0

    def synchronize(self, *_: Any) -> None:
        self.asked.append("synchronize")
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def set_device(self, device: torch.device) -> None:
        assert device.index is not None, "as torch.cuda.set_device, which refuses a bare cuda"
        self.asked.append(f"set {device}")

    def event(self, **_: Any) -> Any:
        name = "stop" if self.asked and self.asked[-1].startswith("made") else "start"
        self.asked.append(f"made {name}")
        return SimpleNamespace(
            record=lambda: self.asked.append(name),
            synchronize=self.synchronize,
            elapsed_time=lambda _: 2.0,
        )

    @contextmanager
    def recording(self, name: str) -> Iterator[None]:
        self.asked.append(f"{name} begins")
        yield
        self.asked.append(f"{name} ends")


class Graph:
    def __init__(self, device: Device) -> None:
        self.device = device
        device.graphs_held += 1
        device.most_graphs = max(device.most_graphs, device.graphs_held)

    def replay(self) -> None:
        self.device.asked.append("replay")

    def __del__(self) -> None:
        self.device.graphs_held -= 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()

    def empty(*sizes: Any, device: Any = None, **options: Any) -> Any:
        return SimpleNamespace(zero_=lambda: found.asked.append("flush"), sizes=sizes, **options)

    stream = SimpleNamespace(wait_stream=lambda _: None)
    replaced: dict[str, Any] = {
        "synchronize": found.synchronize,
        "Event": found.event,
        "device": lambda _: nullcontext(),
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=64),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: found.recording("warm-up"),
        "CUDAGraph": lambda: Graph(found),
        "graph": lambda _: found.recording("capture"),
        "set_device": found.set_device,
        "empty_cache": lambda: found.asked.append("empty_cache"),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(
        cuda_timing, "torch", SimpleNamespace(cuda=torch.cuda, empty=empty, int8=torch.int8)
    )
    return found


@pytest.fixture
def bench(device: Device, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A sweep's bench on that device, whose inputs lie in the processor's memory."""
    normal = levels._normal
    monkeypatch.setattr(
        levels,
        "_normal",
        lambda shape, number, dtype, _, seed: normal(
            shape, number, dtype, torch.device("cpu"), seed
        ),
    )
    monkeypatch.setattr(measure_setting, "environment", lambda **_: {"device": "pretended"})
    monkeypatch.setattr(measure_setting, "measure_limits", lambda *_: Limits(1e11, 1e10))
    monkeypatch.setattr(measure_setting, "peak_bytes", lambda call, _: call() is None or 1)
    return Bench(DEVICE, 0)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, fail: Callable[[], Any]) -> None:
    """Has the passes of one variant run `fail`."""
    real = measure_setting.prepare

    def prepared(contender: Contender | None, *arguments: Any) -> Work:
        work = real(contender, *arguments)
        return (
            Work(fail, work.attention)
            if contender is not None and contender.choice.name == name
            else work
        )

    monkeypatch.setattr(measure_setting, "prepare", prepared)


def test_the_cache_is_flushed_before_the_events_and_the_device_awaited_before_they_are_read(
    device: Device,
) -> None:
    clock = EventClock(DEVICE)
    assert vars(clock.flush)["sizes"] == (2 * 64,)
    assert clock(lambda: device.asked.append("call")) == 2e-3
    assert device.asked == [
        "made start",
        "made stop",
        "flush",
        "start",
        "call",
        "stop",
        "synchronize",
    ]


def test_a_pass_is_warmed_up_beside_the_stream_and_then_captured_once(device: Device) -> None:
    replay = captured(lambda: device.asked.append("call"), DEVICE)
    warm = ["warm-up begins", *["call"] * cuda_timing.CAPTURE_WARMUPS, "warm-up ends"]
    assert replay is not None and device.asked == [*warm, "capture begins", "call", "capture ends"]


def test_a_pass_that_cannot_be_captured_has_no_replay(device: Device) -> None:
    def waits() -> None:
        if "capture begins" in device.asked:
            raise RuntimeError("operation not permitted when stream is capturing")

    assert captured(waits, DEVICE) is None and device.asked[-1] == "synchronize"


def test_the_device_is_the_current_one_before_anything_runs(bench: Bench, device: Device) -> None:
    assert device.asked[0] == "set cuda:0" and device.asked.count("set cuda:0") == 1


def test_a_device_that_is_asked_for_without_an_index_gets_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert check_device("cuda") == torch.device("cuda:1")
    assert check_device("cuda:0") == torch.device("cuda:0")
    assert check_device("cpu") == torch.device("cpu")


def test_rows_have_eager_and_graph_times_and_graphs_are_held_one_at_a_time(
    bench: Bench, device: Device
) -> None:
    rows = list(bench.measure(HERE, [STANDARD, LINEAR], 3, 9.0))
    assert [(row.label, row.seconds, row.graph_seconds, row.rounds) for row in rows] == [
        (n, 2e-3, 2e-3, 3) for n in ("sdpa", "standard", "linear")
    ]
    assert device.most_graphs == 1 and device.asked.count("replay") == 3 * (3 + 1)
    flushes = [place for place, what in enumerate(device.asked) if what == "flush"]
    assert all(device.asked[place + 1] == "start" for place in flushes)


class KernelDoesNotCompile(Exception):
    """Of no kind that Python knows, as Triton's errors are."""


def test_an_error_of_any_kind_is_a_row_and_the_sweep_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise KernelDoesNotCompile("out of shared memory")

    failing(monkeypatch, "linear", fail)
    rows = {row.label: row for row in bench.measure(HERE, [LINEAR, STANDARD], 3, 9.0)}
    assert (
        rows["linear"].seconds is None
        and rows["linear"].reason == "failed with KernelDoesNotCompile: out of shared memory"
    )
    assert rows["standard"].seconds


def test_a_graph_that_fails_leaves_the_eager_times(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("capture has broken")

    monkeypatch.setattr(measure_setting, "captured", fail)
    rows = list(bench.measure(HERE, [STANDARD], 3, 9.0))
    assert [(row.seconds, row.graph_seconds, row.reason) for row in rows] == [(2e-3, None, "")] * 2


def test_a_lost_device_ends_the_sweep_behind_the_row_that_lost_it(
    bench: Bench, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every later row would be called wrong, and skipped when the sweep is resumed."""

    def fail() -> None:
        device.lost = True
        device.synchronize()

    failing(monkeypatch, "linear", fail)
    rows: list[Row] = []
    with pytest.raises(DeviceLost, match="illegal memory access"):
        rows.extend(bench.measure(HERE, [LINEAR, STANDARD], 3, 9.0))
    assert [row.label for row in rows] == ["linear"] and "illegal memory access" in rows[0].reason


@pytest.mark.parametrize(
    ("name", "phase"), in_turn(attnzoo.names(), ["forward+backward", "forward"])
)
def test_no_pass_waits_for_the_device_or_copies_to_it(name: str, phase: str) -> None:
    """What a CUDA graph cannot hold. On the meta device reading a number fails, and a copy shows as
    an operation on two devices."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            devices = {
                x.device.type
                for x in tree_leaves((args, kwargs, out))
                if isinstance(x, torch.Tensor)
            }
            assert len(devices) <= 1, f"{func} on {sorted(devices)}"
            return out

    for is_causal in attnzoo.describe(name).spec.forms:
        cell = Cell("core", phase, is_causal, 300, "bfloat16", Shape(2, 2, 16))
        inputs = [
            tuple(torch.empty(2, 2, 300, 16, dtype=torch.bfloat16, device="meta") for _ in range(3))
        ]
        run = prepare(Contender(Choice(name), "auto"), cell, inputs, 0).run
        run()  # tables are made at the first
        with Watch():
            run()
