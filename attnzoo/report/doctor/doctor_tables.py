"""What `attnzoo doctor` says: versions and devices, packages or what installs them, and for every
variant the backends that run here and why the others do not."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from attnzoo.benchmarking.environment import environment
from attnzoo.packages import CARRIERS, DISTRIBUTIONS, EXTRAS, how_to_install
from attnzoo.registry import names
from attnzoo.report.doctor.usable_backends import HEAD_DIM, HEADS, LENGTH, usable
from attnzoo.results.table import Column, Table
from attnzoo.results.units import memory

NOT_SAID = ("date", "seed", "device", "dtype")  # facts of a run, and not of a machine


def doctor_tables() -> list[Table]:
    """All tables, in the order of the screen."""
    return [_machine(), _packages(), *map(_backends, devices())]


def devices() -> list[torch.device]:
    """The devices that attentions are measured on: the processor, and a GPU of each kind."""
    kinds = {
        torch.cuda.get_device_name(index): torch.device("cuda", index)
        for index in reversed(range(torch.cuda.device_count()))
    }
    return [torch.device("cpu"), *kinds.values()]


def _machine() -> Table:
    facts = environment(seed=0, device=torch.device("cpu"))
    told = {name: text for name, text in facts.items() if name not in NOT_SAID}
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        told[f"cuda:{index}"] = f"{found.name}, {memory(found.total_memory)}"
    told.setdefault("cuda:0", _why_no_gpu())
    columns = (Column("name", "name", words=True), Column("value", "value", words=True))
    rows = tuple({"name": name, "value": text} for name, text in told.items())
    return Table("machine", "Versions and devices", "", columns, rows)


def _why_no_gpu() -> str:
    if not torch.backends.cuda.is_built():
        return "none: this torch is built without CUDA"
    return "none: torch is built with CUDA and sees no GPU"


def _packages() -> Table:
    columns = (
        Column("package", "package", words=True),
        Column("extra", "extra", words=True),
        Column("found", "version", words=True),
        Column("command", "to install", words=True),
    )
    rows = []
    for module in (*EXTRAS, *CARRIERS):
        distribution = DISTRIBUTIONS.get(module, module)
        here = find_spec(module) is not None
        rows.append(
            {
                "package": distribution,
                "extra": EXTRAS.get(module),
                "found": _version(distribution) if here else None,
                "command": None if here else how_to_install([module]),
            }
        )
    rows.sort(key=lambda row: row["extra"] or "~")
    return Table("packages", "Packages beside torch and einops", "", columns, tuple(rows))


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of unknown version"


def _backends(device: torch.device) -> Table:
    """A row a variant, and every reason once, with the backends that give it."""
    columns = (
        Column("variant", "variant", words=True),
        Column("auto", "auto takes", words=True),
        Column("others", "by name", words=True),
        Column("training", "auto, training", words=True),
        Column("refused", "refused", words=True),
    )
    rows, reasons = [], {}
    for name in names():
        forward, training = (usable(name, device, backward=grad) for grad in (False, True))
        refused = [backend for backend, reason in forward.refusals.items() if reason]
        for backend in refused:
            reasons.setdefault((backend, forward.refusals[backend]), []).append(name)
        others = [one for one in forward.refusals if one not in (*refused, forward.auto)]
        rows.append(
            {
                "variant": name,
                "auto": forward.auto,
                "others": ", ".join(others) or None,
                "training": training.auto,
                "refused": ", ".join(refused) or None,
            }
        )
    return Table(
        f"backends-{device.type}",
        f"Backends on {device}: one sample of {LENGTH:,} tokens, {HEADS} heads of {HEAD_DIM}, "
        "float32",
        "auto: what backend='auto' takes; by name: what takes this call when it is asked for",
        columns,
        tuple(rows),
        notes=tuple(
            f"{backend} ({', '.join(found)}): {reason}"
            for (backend, reason), found in reasons.items()
        ),
    )
