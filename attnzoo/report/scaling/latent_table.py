"""Latent attention beside a layer of exact attention that keeps keys and values: MACs, the state,
and one step of decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnzoo.cost.hardware import Roofline, roofline
from attnzoo.cost.layer_costs import DTYPE
from attnzoo.cost.limits import crossover
from attnzoo.cost.model_sizes import TransformerModel
from attnzoo.engines.engine import Cost
from attnzoo.layers.latent.latent_attention import LatentAttention
from attnzoo.registry import build
from attnzoo.report.scaling.model_tables import causality
from attnzoo.report.scaling.settings import Settings
from attnzoo.results.table import Column, Table
from attnzoo.results.units import count, duration, memory, ratio

SEARCHED = 2**20  # tokens up to which a crossover is searched


@dataclass(frozen=True)
class Layer:
    """One layer with its projections, for one sample.

    whole: the cost of n tokens. step: of a token behind n - 1 others. weights: numbers of its
    projections, which a step reads.
    """

    label: str
    whole: Callable[[int], Cost]
    step: Callable[[int], Cost]
    projected: Callable[[int], int]
    weights: int

    def macs(self, n: int) -> int:
        return self.whole(n).kernel_macs + self.projected(n)

    def step_macs(self, n: int) -> int:
        return self.step(n).kernel_macs + self.projected(1)

    def step_bytes(self, n: int) -> int:
        return self.step(n).moved_bytes + self.weights * DTYPE.itemsize

    def step_time(self, n: int, settings: Settings) -> Roofline:
        layers = settings.model.layers
        return roofline(layers * self.step_macs(n), layers * self.step_bytes(n), settings.gpu)


def latent_costs(settings: Settings) -> Table:
    """What a model's exact attention and latent attention of the same width cost."""
    model, n = settings.model, settings.length
    exact, latent = _exact(model, settings.is_causal), _latent(model, settings.is_causal)
    rows: list[dict[str, Any]] = []
    for layer in (exact, latent):
        least = layer.step_time(n, settings)
        row: dict[str, Any] = {
            "layer": layer.label,
            "macs": model.layers * layer.macs(n),
            "gain": exact.macs(n) / layer.macs(n),
            "state_token": model.layers * layer.step(n).state_growth,
            "state_bytes": model.layers * layer.step(n).state_bytes,
            "step_macs": model.layers * layer.step_macs(n),
            "step_bytes": model.layers * layer.step_bytes(n),
            "step_seconds": least.seconds,
            "step_gain": exact.step_time(n, settings).seconds / least.seconds,
            "from_state": None,
            "from_step": None,
        }
        if layer is latent:
            row["from_state"] = _from(lambda m: latent.step(m).state_bytes, exact, "state")
            row["from_step"] = _from(
                lambda m: latent.step_time(m, settings).seconds, exact, settings
            )
        rows.append(row)
    columns = (
        Column("layer", "layer", words=True),
        Column("macs", "MACs", count),
        Column("gain", "MAC speed-up", ratio),
        Column("state_token", "state a token", memory),
        Column("state_bytes", "state at n", memory),
        Column("step_macs", "MACs of a step", count),
        Column("step_bytes", "bytes of a step", memory),
        Column("step_seconds", "roofline of a step", duration),
        Column("step_gain", "its speed-up", ratio),
        Column("from_state", "smaller state from n"),
        Column("from_step", "faster step from n"),
    )
    return Table(
        "latent",
        f"Latent attention at n = {n:,}: {model.title}, all layers, on {settings.gpu.title}, "
        f"{causality(settings)}",
        "projections included; a step is one token behind n - 1 others; bf16, one sample",
        columns,
        tuple(rows),
        {"n": n},
        (
            f"Latent attention: kv_lora_rank={4 * model.head_dim}, "
            f"qk_rope_head_dim={_turned(model)}, the defaults of attnzoo.LatentAttention; keys and "
            "values expanded for whole sequences, absorbed for a step where that takes fewer "
            "MACs.",
            "Bytes of a step: the state and the weights, each read once.",
            f"From n: the smallest n from which on it needs less; never: not at {SEARCHED:,}.",
        ),
    )


def _from(latent: Callable[[int], float], exact: Layer, by: Settings | str) -> int | str:
    def of_exact(m: int) -> float:
        if isinstance(by, Settings):
            return exact.step_time(m, by).seconds
        return exact.step(m).state_bytes

    found = crossover(latent, of_exact, SEARCHED)
    return "never" if found is None else found


def _turned(model: TransformerModel) -> int:
    """Features that are rotated by position: half of a head, in pairs."""
    return max(2, model.head_dim // 4 * 2)


def _exact(model: TransformerModel, is_causal: bool) -> Layer:
    core = build("standard", heads=model.heads, head_dim=model.head_dim)
    sizes: Any = {"kv_heads": model.kv_heads, "dtype": DTYPE}
    return Layer(
        f"exact, {model.kv_heads} key heads",
        lambda n: core.cost(1, n, is_causal=is_causal, **sizes),
        lambda n: core.cost(1, 1, n, is_causal=True, **sizes),
        lambda tokens: tokens * model.projection_parameters,
        model.projection_parameters,
    )


def _latent(model: TransformerModel, is_causal: bool) -> Layer:
    layer = LatentAttention(
        model.d,
        model.heads,
        qk_nope_head_dim=model.head_dim,
        qk_rope_head_dim=_turned(model),
        kv_lora_rank=4 * model.head_dim,
        bias=False,
        device="meta",
    )
    core = layer.attention
    inner = layer.cost(1, 1).macs - core.cost(1, 1).macs  # what makes and ends one token
    return Layer(
        "latent",
        lambda n: core.cost(1, n, is_causal=is_causal, dtype=DTYPE),
        lambda n: core.cost(1, 1, n, is_causal=True, dtype=DTYPE),
        lambda tokens: tokens * inner,
        inner,
    )
