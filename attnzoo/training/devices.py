"""Where a run happens: on one device by torch alone, or on those that `accelerate launch` started a
process for."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.tasks.task import Batch

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


class Devices:
    """Where a run happens.

    device: of a single process; of several, whether they take GPUs (cuda) or not (cpu).
    precision: a key of PRECISIONS, for autocast.
    Raises ImportError, naming the extra, when several processes were launched and accelerate is
    missing.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self.accelerator: Any = (
            _accelerator(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
        )
        self.device: torch.device = self.accelerator.device if self.accelerator else device
        self.count: int = self.accelerator.num_processes if self.accelerator else 1
        self.rank: int = self.accelerator.process_index if self.accelerator else 0
        self.autocast_dtype = PRECISIONS[precision]

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and talks."""
        return self.rank == 0

    def check_shares(self, **rows: int) -> None:
        """Raise ValueError when a process would be left without a row of a batch."""
        for name, count in rows.items():
            if count < self.count:
                raise ValueError(
                    f"{name}={count} is less than one row for each of {self.count} processes; give "
                    "more, or launch fewer processes"
                )

    def place(self, model: nn.Module) -> Any:
        """The model on its device; of several processes, with gradients that are means over
        them."""
        model = model.to(self.device)
        return self.accelerator.prepare_model(model) if self.accelerator else model

    def share(self, batch: Batch) -> Batch:
        """This process's rows of a batch, on its device."""
        return batch[slice(self.rank, None, self.count)].to(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass."""
        return torch.autocast(
            self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None
        )

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.accelerator.reduce(numbers, "sum") if self.accelerator else numbers

    def wait(self) -> None:
        """Until every process is here."""
        if self.accelerator:
            self.accelerator.wait_for_everyone()


def _accelerator(device: torch.device) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError:
        raise ImportError(
            "training in several processes needs accelerate; install it with: pip install "
            "'attnzoo[tasks]'"
        ) from None
    return Accelerator(cpu=device.type == "cpu")
