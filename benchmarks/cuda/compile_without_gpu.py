"""Inductor's Triton kernels for an H100, compiled down to machine code on a machine that has none:
what they need, and whether it fits.

    python benchmarks/cuda/compile_without_gpu.py > benchmarks/results/sm90_compiled.jsonl
    python benchmarks/cuda/compile_without_gpu.py --only bigbird

Needs g++, torch 2.13 (a CPU build) and `pip install --no-deps triton==3.7.0`. Nothing runs on a GPU
and nothing is timed: the kernels are generated from tensors without data and compiled by Triton and
its own ptxas for sm_90a.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pretended

pretended.load_device()

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import attnzoo  # noqa: E402
from attnzoo.engines.sparse.flex import compiled_flex  # noqa: E402

BATCH, HEADS, LENGTH = 8, 16, 1024


@dataclass(frozen=True)
class Case:
    """One call, compiled. padded: with a key_mask."""

    variant: str
    backend: str
    options: dict[str, Any] = field(default_factory=dict)
    is_causal: bool = True
    padded: bool = False
    dtype: str = "bfloat16"
    kv_heads: int = HEADS
    head_dim: int = 64


WINDOW, DILATED = {"window": 256}, {"window": 256, "dilation": 2}
FLEX = [
    Case("sliding_window", "flex", WINDOW),
    Case("sliding_window", "flex", WINDOW, is_causal=False),
    Case("sliding_window", "flex", WINDOW, padded=True),
    Case("sliding_window", "flex", WINDOW, dtype="float16"),
    Case("sliding_window", "flex", WINDOW, dtype="float32"),
    Case("sliding_window", "flex", WINDOW, dtype="float32", padded=True),
    Case("sliding_window", "flex", WINDOW, kv_heads=4),
    Case("sliding_window", "flex", DILATED),
    Case("sliding_window", "flex", WINDOW, head_dim=128),
    Case("sliding_window", "flex", WINDOW, dtype="float32", head_dim=128),
    Case("sliding_window", "flex", WINDOW, head_dim=256),
    Case("longformer", "flex", WINDOW, is_causal=False),
    Case("bigbird", "flex"),
    Case("bigbird", "flex", is_causal=False, padded=True),
    Case("bigbird", "flex", {"block_size": 128}),
    Case("bigbird", "flex", dtype="float32"),
    Case("bigbird", "flex", dtype="float32", head_dim=128),
]
PLAIN = [
    Case(name, backend, is_causal=is_causal)
    for name, backend in (
        ("linear", "auto"),
        ("performer", "auto"),
        ("retention", "auto"),
        ("sliding_window", "windows"),
        ("bigbird", "blocks"),
        ("longformer", "windows"),
        ("sparse_transformer", "auto"),
    )
    for is_causal in (True, False)
    if is_causal in attnzoo.describe(name).spec.forms
]


def kernels_of(case: Case, found: list[pretended.Kernel]) -> list[pretended.Kernel]:
    """The Triton kernels of one forward and backward pass."""
    found.clear()
    torch._dynamo.reset()
    compiled_flex.cache_clear()
    dtype = getattr(torch, case.dtype)
    with FakeTensorMode():
        attn = attnzoo.build(
            case.variant, heads=HEADS, head_dim=case.head_dim, backend=case.backend, **case.options
        ).to("cuda", dtype)
        shapes = [
            (BATCH, heads, LENGTH, case.head_dim) for heads in (HEADS, case.kv_heads, case.kv_heads)
        ]
        q, k, v = (
            torch.empty(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes
        )
        key_mask = (
            torch.ones(BATCH, LENGTH, dtype=torch.bool, device="cuda") if case.padded else None
        )
        # Flex compiles what it needs by itself.
        call = attn if case.backend == "flex" else torch.compile(attn, fullgraph=True)
        try:
            call(q, k, v, key_mask=key_mask, is_causal=case.is_causal)
        except pretended.Compiled:
            return list(found)
    raise RuntimeError(f"{case} has run to its end without a compiled graph")


def compiled(kernel: pretended.Kernel) -> Iterator[dict[str, Any]]:
    """One row for each configuration of a kernel: what its machine code needs."""
    import triton  # pyright: ignore[reportMissingImports]
    from torch._inductor.codecache import PyCodeCache

    tuner = getattr(PyCodeCache.load(kernel.source), kernel.name)
    to_machine_code, binaries = triton.compile, []
    triton.compile = lambda *args, **options: (
        binaries.append(to_machine_code(*args, **options)) or binaries[-1]
    )
    try:
        for configuration in tuner.configs:
            tuner._precompile_config(configuration)
            binary = binaries[-1]
            yield {**_tiles(kernel.source, configuration.kwargs), **_needs(binary)}
    finally:
        triton.compile = to_machine_code


def _tiles(source: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The sizes of a kernel's tiles, by the names that the generated source gives them."""
    written = {
        name: int(size)
        for name, size in re.findall(
            r"^    (BLOCK_[MN][12]?) : tl.constexpr = (\d+)", source, re.MULTILINE
        )
    }
    return {"tiles": written or arguments}


def _needs(binary: Any) -> dict[str, Any]:
    """Registers a thread, spilled bytes a thread, shared bytes a block; ptxas says the first
    two."""
    from triton import knobs  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(binary.asm["ptx"])
        command = [
            knobs.nvidia.ptxas.path,
            "-v",
            "--gpu-name=sm_90a",
            str(ptx),
            "-o",
            str(ptx.with_suffix(".cubin")),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = (
        int(re.findall(found, said)[-1])
        for found in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    )
    warps, shared = binary.metadata.num_warps, binary.metadata.shared
    fits = shared <= pretended.SHARED_BYTES and registers * warps * 32 <= pretended.REGISTERS
    return {
        "warps": warps,
        "stages": binary.metadata.num_stages,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": shared,
        "machine_code_bytes": len(binary.asm["cubin"]),
        "fits": fits,
    }


def rows(cases: list[Case]) -> Iterator[dict[str, Any]]:
    """Every kernel of every case; one that does not compile is a row with its reason."""
    import triton  # pyright: ignore[reportMissingImports]

    found: list[pretended.Kernel] = []
    pretended.pretend(found.append)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "target": "sm_90a"}
    shape = {"batch_size": BATCH, "heads": HEADS, "length": LENGTH}
    for case in cases:
        setting = {**vars(case), **shape, **versions}
        try:
            kernels = kernels_of(case, found)
        except Exception as error:  # what Inductor cannot write is a result too
            yield {
                **setting,
                "compiled": False,
                "reason": f"{type(error).__name__}: {str(error).splitlines()[0]}",
            }
            continue
        for kernel in kernels:
            about = {
                **setting,
                "kernel": kernel.name,
                "direction": kernel.direction,
                "choice": kernel.choice,
            }
            try:
                for needs in compiled(kernel):
                    yield {**about, "compiled": True, **needs}
            except Exception as error:
                yield {
                    **about,
                    "compiled": False,
                    "reason": f"{type(error).__name__}: {str(error).splitlines()[0]}",
                }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Kernels for an H100 compiled without one, as JSON lines; nothing runs on a "
        "GPU."
    )
    parser.add_argument("--only", help="the cases of one variant")
    only = parser.parse_args().only
    cases = [case for case in FLEX + PLAIN if only in (None, case.variant)]
    if not cases:
        sys.exit(
            f"error: no case of {only!r}; have "
            f"{', '.join(sorted({case.variant for case in FLEX + PLAIN}))}"
        )
    for row in rows(cases):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
