"""The C++ of the engines: compiled once on a machine, kept in a folder of the user, and loaded."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.call import UnsupportedError

ENGINES = Path(__file__).parent.parent
COMPILED = (
    "softmax/native/attention.cpp",
    "softmax/native/one_row.cpp",
    "linear/native/recurrence.cpp",
    "linear/native/tree.cpp",
    "linear/native/exponential_features.cpp",
    "sparse/selected/native/best_blocks.cpp",
    "sparse/selected/native/plan_of_blocks.cpp",
    "sparse/selected/native/of_one_row.cpp",
    "sparse/selected/native/hash_buckets.cpp",
)
INCLUDED = (
    "native/products.h",
    "softmax/native/scores.h",
    "softmax/native/tile_plan.h",
    "linear/native/chunk_gates.h",
    "linear/native/chunk.h",
    "linear/native/one_token.h",
    "sparse/selected/native/candidates.h",
)
#: What a compiler is told for each kind of processor that torch knows and the code is made for.
INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
}


def cannot_compile() -> str | None:
    """Why the code is not compiled here and cannot be; None where it is or can be."""
    return _found_missing()


# What torch.compiler.assume_constant_result sets: a compiled graph takes the answer as a constant.
cannot_compile._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@lru_cache(maxsize=1)
def _found_missing() -> str | None:
    kind = torch.backends.cpu.get_cpu_capability()
    if sys.platform != "linux" or kind not in INSTRUCTIONS:
        return f"it is for Linux and AVX2 or AVX-512, got {sys.platform} and {kind}"
    if is_compiled():
        return None
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return (
            "it is compiled at first use, and there is no C++ compiler (c++, or the one CXX names)"
        )
    if shutil.which("ninja") is None and find_spec("ninja") is None:
        return "it is compiled at first use, which needs ninja (pip install 'attnzoo[native]')"
    return None


def is_compiled() -> bool:
    """Whether the code has been compiled on this machine, for this torch and this processor."""
    try:
        return compiled_file().exists()
    except (OSError, RuntimeError):  # a folder that may not be read, or that no user has
        return False


@lru_cache(maxsize=1)
def compiled_file() -> Path:
    """Where the compiled code is kept: below TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions, by
    a name that tells torch's version, the processor and the source."""
    texts = [(ENGINES / name).read_bytes() for name in (*COMPILED, *INCLUDED)]
    kind = torch.backends.cpu.get_cpu_capability()
    digest = hashlib.sha256(b"\0".join([*texts, torch.__version__.encode(), kind.encode()]))
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    return Path(root).expanduser() / f"attnzoo_native_{digest.hexdigest()[:16]}.so"


def not_compiled() -> str | None:
    """Why backend="auto" passes over the code, which it never compiles."""
    was_loaded = _is_loaded.cache_info().currsize > 0  # which spares asking for the file each time
    if not was_loaded and not is_compiled():
        return "it is not compiled on this machine: attnzoo doctor --compile does that"
    if not _is_loaded():
        return "its compiled file is damaged: attnzoo doctor --compile makes it anew"
    return None


@lru_cache(maxsize=1)
def _is_loaded() -> bool:
    """Whether the compiled file can be loaded, which it is then."""
    try:
        torch.ops.load_library(compiled_file())
    except OSError:
        return False
    return True


def compile_native() -> None:
    """Compile the code for this machine, unless that has been done.

    Raises UnsupportedError where it cannot be compiled.
    """
    reason = cannot_compile()
    if reason is not None:
        raise UnsupportedError(f"the backend native cannot be compiled here: {reason}")
    operators()


@lru_cache(maxsize=1)
def operators() -> Any:
    """The namespace of torch.ops that holds the operators `native_...`.

    Compiles the code where that has not been done, a minute or two; raises UnsupportedError where
    the compiler fails.
    """
    try:
        file = compiled_file()
    except RuntimeError as error:  # ~ of a user that there is none of
        raise UnsupportedError(
            f"backend='native' has no folder to be compiled in: {error}; set TORCH_EXTENSIONS_DIR "
            "to one, or use backend='auto', which does without it"
        ) from error
    if not is_compiled() or not _is_loaded():
        with suppress(OSError):  # a damaged file must not be taken for compiled again
            file.unlink(missing_ok=True)
        _compile_and_load(file)
        _is_loaded.cache_clear()
    torch.library.register_fake("attnzoo::native_attention", _shapes)
    torch.library.register_fake("attnzoo::native_attention_backward", _shapes_backward)
    torch.library.register_fake("attnzoo::native_row", _shape_of_row)
    torch.library.register_fake("attnzoo::native_best_blocks", _shapes_of_blocks)
    torch.library.register_fake("attnzoo::native_plan_of_blocks", _shapes_of_plan)
    torch.library.register_fake("attnzoo::native_best_means", _shape_of_choice)
    torch.library.register_fake("attnzoo::native_best_keys", _shape_of_choice_of_keys)
    torch.library.register_fake("attnzoo::native_pooled_row", _shapes_of_pooled_row)
    torch.library.register_fake("attnzoo::native_bucket_codes", _shape_of_codes)
    torch.library.register_fake("attnzoo::native_bucket_keys", _shape_of_shown)
    torch.library.register_fake("attnzoo::native_recurrence", _shapes_of_recurrence)
    torch.library.register_fake("attnzoo::native_tree_step", _shapes_of_tree_step)
    torch.library.register_fake("attnzoo::native_exponential_features", _shapes_of_features)
    torch.library.register_fake(
        "attnzoo::native_recurrence_backward", _shapes_of_recurrence_backward
    )
    return torch.ops.attnzoo


def in_rows(x: Tensor) -> Tensor:
    """x with the numbers of a row in one piece, as compiled code reads them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])


def _shapes_backward(
    sent: Tensor, out: Tensor, log_sums: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _shape_of_row(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def _shapes_of_blocks(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    choosers, _, width = others[-3:]
    sizes = q.shape[0], choosers, q.shape[2], width
    blocks = q.new_empty(sizes, dtype=torch.int64)
    return blocks, q.new_empty((q.shape[0], q.shape[2]), dtype=torch.bool)


def _shapes_of_plan(
    blocks: Tensor,
    choice_of: Tensor | None,
    positions: Tensor | None,
    like: Tensor,
    rows: int,
    keys: int,
    block_size: int,
) -> list[Tensor]:
    """As where every tile of 64 rows meets each block, and no two tiles share a cap."""
    samples, choosers = blocks.shape[:2]
    tiles = samples * choosers * -(-rows // 64)
    met = tiles * -(-keys // block_size)
    sizes = ((tiles, 6), (met, 3), (met, 5), (met, 2))
    tables = [like.new_empty(size, dtype=torch.int32) for size in sizes]
    ranges = like.new_empty((samples * choosers, 2), dtype=torch.int32)
    return [*tables, like.new_empty(met * 64), ranges]


def _shape_of_choice(q: Tensor, *others: Any) -> Tensor:
    return q.new_empty((*q.shape[:2], others[-1]), dtype=torch.int64)


def _shape_of_choice_of_keys(q: Tensor, *others: Any) -> Tensor:
    choosers, _, width = others[-3:]
    return q.new_empty((q.shape[0], choosers, width), dtype=torch.int64)


def _shapes_of_pooled_row(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    width = others[-4]
    blocks = q.new_empty((*k.shape[:2], width), dtype=torch.int64)
    return q.new_empty(*q.shape[:3], v.shape[3]), blocks


def _shape_of_codes(k: Tensor, rotations: Tensor, *_: Any) -> Tensor:
    sizes = k.shape[0], k.shape[1] * rotations.shape[0], 1
    return k.new_empty(sizes, dtype=torch.int64)


def _shape_of_shown(q: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:2], codes.shape[2]), dtype=torch.bool)


def _shapes_of_features(
    q: Tensor, k: Tensor, directions: Tensor, scale: float, is_signed: bool, earlier: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = directions.shape[0] * (1 + is_signed)
    of_keys = k.new_empty(*k.shape[:3], width), k.new_empty(k.shape[:3]), k.new_empty(k.shape[:2])
    return q.new_empty(*q.shape[:3], width), *of_keys


def _shapes_of_tree_step(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    buckets = (others[-5] + 1).bit_length()
    sizes = *k.shape[:2], buckets, k.shape[3], v.shape[3]
    return q.new_empty(*q.shape[:3], v.shape[3]), k.new_empty(sizes)


def _shapes_of_recurrence(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> list[Tensor]:
    *_, normalizes, _, _, _, span = others
    (batch, heads, length, width), columns = q.shape, v.shape[3] + normalizes
    spans = -(-length // span) if span else 0
    return [
        q.new_empty(batch, heads, length, v.shape[3]),
        q.new_empty(batch, heads, length if normalizes else 0),
        q.new_empty(batch, k.shape[1], spans, width, columns),
        q.new_empty(batch, k.shape[1], width, columns),
    ]


def _shapes_of_recurrence_backward(*given: Any) -> list[Tensor]:
    _, _, _, states, _, *tensors = given[:12]  # and then the mask of keys
    found = [x.new_empty(x.shape) for x in tensors if x is not None]
    return [*found, states.new_empty(*states.shape[:2], *states.shape[3:])]


def _compile_and_load(file: Path) -> None:
    from torch.utils import cpp_extension  # slow to import, and needs setuptools

    kind = torch.backends.cpu.get_cpu_capability()
    capability = (f"-DCPU_CAPABILITY={kind}", f"-DCPU_CAPABILITY_{kind}", *INSTRUCTIONS[kind])
    warnings.warn(
        "backend='native' is compiled once on this machine, which takes a minute or two",
        stacklevel=2,
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Compiled in a folder of its own and moved in one step: an interrupted compiler leaves
        # nothing that others would wait for or load.
        with tempfile.TemporaryDirectory(dir=file.parent) as folder, _ninja_found():
            cpp_extension.load(
                file.stem,
                [str(ENGINES / name) for name in COMPILED],
                extra_include_paths=[str(ENGINES)],
                extra_cflags=["-O3", "-fopenmp", *capability],
                extra_ldflags=["-fopenmp"],
                build_directory=folder,
                is_python_module=False,
            )
            os.replace(Path(folder) / file.name, file)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        first = next((line for line in str(error).splitlines() if "error" in line), str(error))
        raise UnsupportedError(
            f"backend='native' could not be compiled: {first.strip()}; use backend='auto', which "
            "does without it"
        ) from error


@contextmanager
def _ninja_found() -> Iterator[None]:
    """Inside, torch finds ninja where pip put it, which is on PATH only in an environment that has
    been activated."""
    before = os.environ.get("PATH", "")
    if shutil.which("ninja") is None:
        import ninja  # pyright: ignore[reportMissingImports]

        os.environ["PATH"] = os.pathsep.join([before, ninja.BIN_DIR])
    try:
        yield
    finally:
        os.environ["PATH"] = before
