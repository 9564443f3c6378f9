"""Two processes of torch.distributed on one machine, over gloo."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

PROCESSES = 2


def in_two_processes(check: Callable[..., list[str]], *arguments: Any) -> list[str]:
    """What check(*arguments) finds wrong, run as both ranks of a group of two."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_run, (folder, check, arguments), nprocs=PROCESSES)  # pyright: ignore[reportPrivateImportUsage]
        return [
            line
            for rank in range(PROCESSES)
            for line in (Path(folder) / f"{rank}").read_text().splitlines()
        ]


def _run(
    rank: int, folder: str, check: Callable[..., list[str]], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    try:
        wrong = check(*arguments)
    except Exception:
        wrong = [traceback.format_exc().replace("\n", " | ")]
        (Path(folder) / f"{rank}").write_text("\n".join(wrong))
        raise
    finally:
        dist.destroy_process_group()
    (Path(folder) / f"{rank}").write_text("\n".join(f"rank {rank}: {line}" for line in wrong))
