"""Backend `native`: when it is compiled and taken, and what the tests of every backend do not try.
Where nothing can be compiled, backends are tested without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.commands import program
from attnzoo.engines.native import library

compiled = pytest.mark.skipif(
    library.cannot_compile() is not None, reason=str(library.cannot_compile())
)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("sliding_window", {"window": 100}),
    ("sliding_window", {"window": 20, "sinks": 5, "sink_logits": True}),
    ("bigbird", {"block_size": 24, "num_random_blocks": 2}),
    ("longformer", {"window": 60, "global_tokens": 3}),
]


def qkv(
    length: int, width: int = 20, value_dim: int = 28, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Two samples, four heads that share two of keys, and widths that fill no vector."""
    shapes = ((4, width), (2, width), (2, value_dim))
    return [torch.randn(2, h, length, w, dtype=dtype, requires_grad=True) for h, w in shapes]


@compiled
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_float32_is_as_exact_as_tiles(name: str, options: dict[str, Any], is_causal: bool) -> None:
    """More than one chunk of keys and one tile of rows, in vectors that are not full."""
    inputs, found = qkv(230), {}
    precise = [x.detach().double().requires_grad_() for x in inputs]
    for backend, tensors in (("native", inputs), ("tiles", inputs), ("reference", precise)):
        torch.manual_seed(1)
        attn = attnzoo.build(name, heads=4, head_dim=20, backend=backend, **options)
        attn = attn.to(tensors[0].dtype)
        out = attn(*tensors, is_causal=is_causal)
        learned = [*tensors, *attn.parameters()]
        found[backend] = [out, *torch.autograd.grad(out.square().sum(), learned)]
    for one, other, exact in zip(*found.values(), strict=True):
        mistake, usual = ((x.double() - exact).abs().max() for x in (one, other))
        assert mistake <= 2 * usual + 1e-6 * exact.abs().max()


@compiled
def test_threads_change_no_bit() -> None:
    attn = attnzoo.build("sliding_window", heads=4, head_dim=20, window=50, backend="native")
    inputs, found, before = qkv(300), [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = attn(*inputs)
            found.append([out, *torch.autograd.grad(out.sum(), inputs)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@compiled
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_spoils_its_rows_alone(wrong: float) -> None:
    """The exponential that the kernel uses answers NaN with a finite number."""
    q, k, v = (torch.randn(1, 1, 200, 16, requires_grad=True) for _ in range(3))
    attn = attnzoo.build("sliding_window", heads=1, head_dim=16, window=10, backend="native")
    with torch.no_grad():
        q[0, 0, 120, 3] = wrong
    out = attn(q, k, v)
    lost = [x[0, 0].isnan().any(-1).nonzero().flatten().tolist() for x in (out, *_slopes(out, q))]
    assert lost == [[120], [120]]
    (to_v,) = _slopes(out, v)
    assert to_v[0, 0, 111:130].isnan().all() and not to_v[0, 0, 192:].isnan().any()


def _slopes(out: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.sum(), x, retain_graph=True)


@compiled
def test_other_strides() -> None:
    attn = attnzoo.build("sliding_window", heads=4, head_dim=16, window=9, backend="native")
    packed = torch.randn(2, 150, 3, 4, 16)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
    assert torch.equal(attn(q, k, v), attn(*(x.contiguous() for x in (q, k, v))))
    assert torch.equal(attn(q.mT.contiguous().mT, k, v), attn(q, k, v))


def test_auto_takes_it_where_it_is_compiled_and_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.cannot_compile() is not None:
        pytest.skip(str(library.cannot_compile()))
    library.operators()

    def taken(length: int, dtype: torch.dtype = torch.float32, **options: Any) -> str | None:
        attn = attnzoo.build("sliding_window", heads=4, head_dim=20, **options)
        attn(*qkv(length, dtype=dtype))
        return attn.last_backend

    assert taken(300, window=9) == "tiles"  # the tests' machine has not compiled it
    monkeypatch.setattr(library, "not_compiled", lambda: None)
    assert taken(300, window=9) == taken(100, window=9) == taken(300, window=300) == "native"
    assert taken(31, window=9) == "dense"
    assert taken(300, window=9, sinks=2) == taken(600, window=9, sinks=2) == "native"
    assert taken(600, window=9, softcap=2.0) == "tiles"


def test_what_is_missing_is_said_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    attn = attnzoo.build("sliding_window", heads=4, head_dim=20, window=9, backend="native")
    monkeypatch.setattr(library, "is_compiled", lambda: False)
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    monkeypatch.setattr(library.torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for path, said in (("", "no C\\+\\+ compiler"), (str(tmp_path), "pip install 'attnzoo\\[nat")):
        compiler = tmp_path / "c++"
        compiler.touch(mode=0o755)
        monkeypatch.setenv("PATH", path)
        monkeypatch.delenv("CXX", raising=False)
        library._found_missing.cache_clear()
        with pytest.raises(attnzoo.UnsupportedError, match=said):
            attn(*qkv(300))
    monkeypatch.setattr(library.torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    library._found_missing.cache_clear()
    with pytest.raises(attnzoo.UnsupportedError, match="for Linux and AVX2 or AVX-512"):
        attn(*qkv(300))
    monkeypatch.undo()
    library._found_missing.cache_clear()


@compiled
def test_doctor_compiles_or_says_why_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program.main(["doctor", "--compile"]) == 0
    assert library.is_compiled()
    monkeypatch.setattr(library, "cannot_compile", lambda: "there is no compiler")
    capsys.readouterr()
    assert program.main(["doctor", "--compile"]) != 0
    said = capsys.readouterr().err
    assert "cannot be compiled here: there is no compiler" in said and "Traceback" not in said


def printed(code: str, **variables: str) -> list[str]:
    """The words that a program of its own prints."""
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-c", CALL + code],
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


CALL = """
import attnzoo, torch
from attnzoo.engines.native import library
x = torch.randn(1, 2, 300, 16)
def taken(backend):
    attn = attnzoo.build("sliding_window", heads=2, head_dim=16, window=9, backend=backend)
    attn(x, x, x)
    return attn.last_backend
"""


@compiled
@pytest.mark.thorough
def test_a_damaged_file_is_compiled_anew_by_name(tmp_path: Path) -> None:
    code = """
library.compiled_file().write_text("damaged")
print(taken("auto"), library.compiled_file().stat().st_size)
print(taken("native"), library.compiled_file().stat().st_size > 10_000, taken("auto"))
"""
    found = printed(code, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert found == ["tiles", "7", "native", "True", "native"]


@compiled
@pytest.mark.thorough
def test_a_folder_that_cannot_be_used_stops_no_call(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    code = """
print(taken("auto"))
try:
    taken("native")
except attnzoo.UnsupportedError as error:
    print("refused", len(str(error).splitlines()))
"""
    for folder in (str(file), "~nobody-of-this-name/folder", str(tmp_path / ("long" * 80))):
        assert printed(code, TORCH_EXTENSIONS_DIR=folder) == ["tiles", "refused", "1"]


@compiled
def test_a_compiler_that_fails(tmp_path: Path) -> None:
    """It leaves nothing behind, and the next call without it works."""
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text(
        "#!/bin/sh\n"
        "case $1 in -v|--version) echo gcc version 12; exit;; -dump*) echo 12; exit;; esac\n"
        "echo 'error: this is no compiler' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    path = os.pathsep.join([str(compiler.parent), os.environ["PATH"]])
    code = """
import attnzoo, torch
x = torch.randn(1, 2, 300, 16)
try:
    attnzoo.build("sliding_window", heads=2, head_dim=16, window=9, backend="native")(x, x, x)
except attnzoo.UnsupportedError as error:
    print(error)
attn = attnzoo.build("sliding_window", heads=2, head_dim=16, window=9)
attn(x, x, x)
print(attn.last_backend)
"""
    kept = tmp_path / "kept"
    environment = {**os.environ, "PATH": path, "TORCH_EXTENSIONS_DIR": str(kept)}
    environment.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said, backend = done.stdout.strip().splitlines()
    assert "could not be compiled: error: this is no compiler" in said
    assert backend == "tiles" and not list(kept.iterdir())
