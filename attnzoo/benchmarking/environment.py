"""What a result depends on besides its numbers: versions, the machine, the seed."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from attnzoo.version import __version__

# Times from two machines cannot be compared.
MACHINE = ("machine", "cpu", "cores", "threads", "device", "driver")


def environment(
    *, seed: int, device: torch.device, dtype: torch.dtype | None = None
) -> dict[str, str]:
    """Date, seed, versions, machine, processor, threads, device (and its driver) and dtype, each as
    text; no host name."""
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": str(seed),
        "attnzoo": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "binding": os.environ.get("OMP_PROC_BIND", ""),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "driver": _driver(device),
        "dtype": "" if dtype is None else str(dtype).removeprefix("torch."),
    }
    return {name: value for name, value in found.items() if value}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _driver(device: torch.device) -> str:
    """The NVIDIA driver's version; "" on a CPU or where nvidia-smi is not."""
    if device.type != "cuda":
        return ""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            .stdout.splitlines()[0]
            .strip()
        )
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def _commit() -> str:
    """The commit of the checkout that attnzoo runs from, with "+" when it was changed since; ""
    when it is not a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
