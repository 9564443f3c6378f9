"""Which backends of a variant take a call on a device, and why the others refuse it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.benchmarking.levels import gates_of
from attnzoo.call import Call
from attnzoo.registry import Choice, spec_of

HEADS, HEAD_DIM, LENGTH = 8, 64, 4096  # of the call: long enough for what serves long inputs alone
SEED = 0


class _Seen(Exception):
    """The call has reached the engine, and need not be computed."""


@dataclass(frozen=True)
class Usable:
    """What becomes of a call.

    refusals: why each backend refuses it when asked for by name; None for those that take it.
    auto: the one that backend="auto" takes.
    """

    refusals: dict[str, str | None]
    auto: str


def usable(name: str, device: torch.device, *, backward: bool) -> Usable:
    """The backends of a variant, at its default options, for a float32 call of one sample. Nothing
    is computed.

    backward: whether gradients are asked for.
    """
    spec = spec_of(name)
    attention = Choice(name).build(HEADS, HEAD_DIM, max_length=LENGTH).to(device)
    found: list[Usable] = []

    def look(engine: torch.nn.Module, arguments: tuple[Call, ...]) -> None:
        call = attention.engine.completed(arguments[0])
        refusals = {
            backend.name: backend.reason(attention.engine, call, by_name=True)
            for backend in attention.engine.backends
        }
        found.append(Usable(refusals, attention.engine.choose(call, "auto").name))
        raise _Seen

    attention.engine.register_forward_pre_hook(look)
    q, k, v = (_zeros(device, backward) for _ in range(3))
    given = gates_of(attention, q, k, SEED)
    with torch.set_grad_enabled(backward):
        try:
            attention(q, k, v, is_causal=spec.forms[0], **given)
        except _Seen:
            return found[0]
    raise AssertionError(f"{name} did not ask its engine")


def _zeros(device: torch.device, backward: bool) -> Tensor:
    return torch.zeros(1, HEADS, LENGTH, HEAD_DIM, device=device, requires_grad=backward)
