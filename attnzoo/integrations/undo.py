"""What takes a swap back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

#: A partial of a function of a module, so that it is copied and pickled with the model.
Step = Callable[[nn.Module], None]


class Undo:
    """Takes a swap back, or refuses to.

    checks: each raises ValueError where something that was put in since would be lost.
    steps: each takes back one thing that was done; the last thing done goes first.
    """

    def __init__(self, checks: Sequence[Step] = (), steps: Sequence[Step] = ()) -> None:
        self.checks = list(checks)
        self.steps = list(steps)

    def __call__(self, model: nn.Module) -> None:
        """Undo all of it, or nothing and raise ValueError."""
        for check in self.checks:
            check(model)
        for step in reversed(self.steps):
            step(model)
