"""A of the first Mamba's selective scan, a matrix for every channel, from what its layer projects.

With Δ = softplus(W dt + b) of every channel and token, and rates A < 0 of every channel and state,
a row is (Gu and Dao 2023, arXiv:2312.00752, equation 2)

    y_i = Σ_{j ≤ i} A_ij u_j,    A_ij = Σ_s C_i[s] exp(A[s] (Δ_{j+1} + ... + Δ_i)) B_j[s] Δ_j

beside its own value times D, and before the gate of the output; neither is part of A.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIXERS = ("FalconMambaMixer", "JambaMambaMixer", "MambaMixer")


def scans(part: nn.Module) -> list[str]:
    """The paths of the layers of transformers that run a selective scan."""
    return [path for path, module in part.named_modules() if _is_scan(module)]


def watch_scans(
    part: nn.Module, keep: Callable[[str, Callable[[], Tensor]], None]
) -> Iterator[Any]:
    """Hooks that give A of every scan, to `keep`, with the path of its layer. One that reads from a
    decoding state gives none."""
    for path in scans(part):
        layer: Any = part.get_submodule(path)
        told: dict[str, Any] = {}

        def begin(
            layer: Any, args: Any, kwargs: Any, told: dict[str, Any] = told
        ) -> None:  # of this layer
            names = inspect.signature(layer.forward).parameters
            told.update({"cache_params": None, "attention_mask": None})
            told.update(zip(names, args, strict=False))
            told.update(kwargs)

        def projected(
            _: Any,
            __: Any,
            out: Tensor,
            layer: Any = layer,
            path: str = path,
            told: dict[str, Any] = told,
        ) -> None:
            cache, mask = told["cache_params"], told["attention_mask"]
            continues = cache is not None and cache.get_recurrent_state(layer.layer_idx) is not None
            if not continues:
                keep(path, lambda: scan_weights(*_parts(layer, out), mask))

        yield layer.register_forward_pre_hook(begin, with_kwargs=True)
        yield layer.x_proj.register_forward_hook(projected)


def scan_weights(
    delta: Tensor, rates: Tensor, b: Tensor, c: Tensor, mask: Tensor | None = None
) -> Tensor:
    """A, (batch, channels, length, length), in float32.

    delta: (batch, length, channels), above 0
    rates: (channels, states), below 0
    b, c: (batch, length, states)
    mask: (batch, length), 0 = padding, whose rows and columns are 0; None: there is none
    """
    passed = delta.cumsum(1).mT  # (batch, channels, length)
    between = passed[..., :, None] - passed[..., None, :]
    future = torch.ones(between.shape[-2:], dtype=torch.bool, device=delta.device).triu(1)
    between = between.masked_fill(future, float("inf"))  # which every rate fades to 0
    weights = torch.zeros_like(between)
    for state in range(rates.shape[1]):  # one at a time: a matrix of each is as large as A
        pairs = c[:, None, :, None, state] * b[:, None, None, :, state]
        weights += pairs * (rates[:, state, None, None] * between).exp()
    weights = weights * delta.mT[..., None, :]
    if mask is None:
        return weights
    real = mask.bool()
    return weights * (real[:, None, :, None] & real[:, None, None])


def _parts(layer: Any, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Δ, rates, B and C of what a layer's x_proj gives."""
    states = layer.ssm_state_size
    parts = projected.split([layer.time_step_rank, states, states], -1)
    names = ("dt_layernorm", "b_layernorm", "c_layernorm")  # which two of the families have
    normed = [getattr(layer, name, nn.Identity())(x) for name, x in zip(names, parts, strict=True)]
    step, b, c = (x.float() for x in normed)
    bias = layer.dt_proj.bias
    delta = F.linear(step, layer.dt_proj.weight.float(), None if bias is None else bias.float())
    return F.softplus(delta), -layer.A_log.float().exp(), b, c


def _is_scan(module: nn.Module) -> bool:
    own = type(module)
    return own.__module__.startswith("transformers.models.") and own.__name__ in MIXERS
