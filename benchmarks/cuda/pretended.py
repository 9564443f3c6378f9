"""An H100 that is not there: a CPU build of torch made to generate Inductor's code for one, on
tensors without data. Nothing can run on it.

Reaches into torch's private parts, as they are in torch 2.13 with triton 3.7. Only for
`compile_without_gpu.py`, in a process of its own.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

CAPABILITY = (9, 0)
REGISTERS = 65536  # of a multiprocessor, so of a block of threads
SHARED_BYTES = 227 * 1024  # the most that a block may ask for
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    regs_per_multiprocessor=REGISTERS,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=SHARED_BYTES,
    shared_memory_per_multiprocessor=228 * 1024,
    L2_cache_size=50 * 2**20,
    total_memory=80 * 2**30,
)


class Kernel(NamedTuple):
    """One Triton kernel that Inductor wrote. direction: forward or backward. choice: one of
    several, which only a GPU could choose among."""

    name: str
    source: str
    direction: str
    choice: bool


class Compiled(Exception):
    """Raised where generated code would start to run: all of it has been written by then, backward
    too."""


class Driver:
    """What triton asks of a driver before it compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]

        return GPUTarget("cuda", CAPABILITY[0] * 10 + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0


def load_device() -> None:
    """Registers the device of pretended.cpp with torch. Must come before `import torch`, which
    looks for one once."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise ImportError("torch is not installed here")
    root = Path(spec.origin).parent
    library = Path(tempfile.mkdtemp()) / "pretended.so"
    include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    linked = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    source = str(Path(__file__).with_name("pretended.cpp"))
    subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-O1",
            "-fPIC",
            "-shared",
            *include,
            source,
            "-o",
            str(library),
            *linked,
        ],
        check=True,
    )
    ctypes.CDLL(str(library))


def pretend(write: Callable[[Kernel], None]) -> None:
    """Inductor sees an H100, hands every kernel it writes to `write`, and stops with `Compiled`
    before running any."""
    import torch
    from torch._dynamo import device_interface

    torch.version.cuda = "12.8"  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda._lazy_init = lambda: None
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *_: CAPABILITY
    torch.cuda._get_device_properties = lambda *_: PROPERTIES  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.get_device_properties = lambda *_: PROPERTIES
    torch.cuda._exchange_device = _stop
    torch._C._cuda_getCurrentRawStream = lambda *_: 0  # pyright: ignore[reportAttributeAccessIssue]
    device_interface.CudaInterface.is_bf16_supported = staticmethod(lambda *_, **__: True)  # pyright: ignore[reportAttributeAccessIssue]
    _pretend_to_triton()
    _capture(write)


def _stop(*_: object) -> int:
    raise Compiled


def _pretend_to_triton() -> None:
    import torch.utils._triton
    from torch._inductor.runtime import triton_helpers
    from triton.runtime.driver import driver  # pyright: ignore[reportMissingImports]

    torch.utils._triton.has_triton = lambda: True
    triton_helpers.set_driver_to_gpu = lambda: None
    driver.set_active(Driver())


def _capture(write: Callable[[Kernel], None]) -> None:
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.select_algorithm import AlgorithmSelectorCache
    from torch._inductor.virtualized import V

    functorch.force_non_lazy_backward_lowering = True  # pyright: ignore[reportAttributeAccessIssue]
    inductor.force_disable_caches = True  # pyright: ignore[reportAttributeAccessIssue]
    inductor.compile_threads = 1  # pyright: ignore[reportAttributeAccessIssue]
    # These two passes make tensors on the device, the second to time a padded product.
    inductor.joint_graph_constant_folding = False  # pyright: ignore[reportAttributeAccessIssue]
    inductor.shape_padding = False  # pyright: ignore[reportAttributeAccessIssue]
    choose = AlgorithmSelectorCache.__call__

    def direction() -> str:
        return "backward" if V.graph.is_backward else "forward"

    def written(_: object, name: str, source: str, device_str: str = "cuda") -> None:
        write(Kernel(name, source, direction(), False))

    def chosen(cache: Any, name: str, choices: list[Any], *args: Any, **options: Any) -> Any:
        """The first choice; every one is kept. One alone is not timed, which only a GPU could."""
        if len(choices) > 1:
            for choice in choices:
                request = choice.bmreq
                write(
                    Kernel(
                        request.kernel_name,
                        Path(request.module_path).read_text(),
                        direction(),
                        True,
                    )
                )
        return choose(cache, name, choices[:1], *args, **options)

    AsyncCompile.triton = written  # pyright: ignore[reportAttributeAccessIssue]
    AlgorithmSelectorCache.__call__ = chosen  # pyright: ignore[reportAttributeAccessIssue]
