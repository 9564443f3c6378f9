"""What the article does not compute, for a model: the longest sequence that fits any GPU by any
account of memory, and rooflines of its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from attnzoo.cost.hardware import GPU
from attnzoo.cost.limits import (
    ACCOUNTS,
    attention_macs,
    attention_roofline,
    decoding_roofline,
    forward_roofline,
    longest,
)
from attnzoo.cost.model_sizes import TransformerModel
from attnzoo.report.scaling.settings import Settings
from attnzoo.results.table import Column, Table
from attnzoo.results.units import count, duration

TIME_LENGTHS = tuple(2**power for power in range(9, 18, 2))


def limits_by_gpu(settings: Settings, gpus: Sequence[GPU]) -> Table:
    """Longest sequence of the settings' model on every GPU, under every account of memory."""
    rows = [
        {
            "gpu": gpu.title,
            "memory_gb": gpu.memory_gb,
            **_limits(settings.model, gpu, settings.share),
        }
        for gpu in gpus
    ]
    first = (Column("gpu", "GPU", words=True), Column("memory_gb", "memory, GB", ",g"))
    return _limits_table(
        "limits_by_gpu",
        f"Longest sequence of {settings.model.title}, by GPU",
        first,
        rows,
        settings,
    )


def limits_by_model(settings: Settings, models: Sequence[TransformerModel]) -> Table:
    """Longest sequence of every model on the settings' GPU, under every account of memory."""
    rows = [
        {
            "model": model.title,
            "parameters": model.parameters,
            **_limits(model, settings.gpu, settings.share),
        }
        for model in models
    ]
    first = (Column("model", "model", words=True), Column("parameters", "parameters", count))
    table = _limits_table(
        "limits_by_model",
        f"Longest sequence on {settings.gpu.title}, by model",
        first,
        rows,
        settings,
    )
    return replace(
        table,
        notes=(
            "The columns are those of the table by GPU; none: not even one token fits beside the "
            "weights.",
        ),
    )


def _limits(model: TransformerModel, gpu: GPU, share: float) -> dict[str, int | None]:
    return {
        account.name: longest(partial(account.bytes_at, model), gpu.memory_bytes * share)
        for account in ACCOUNTS
    }


def _limits_table(
    name: str, title: str, first: tuple[Column, ...], rows: list[dict[str, Any]], settings: Settings
) -> Table:
    columns = first + tuple(Column(account.name, account.heading, fitting) for account in ACCOUNTS)
    notes = tuple(f"{account.heading}: {account.meaning}." for account in ACCOUNTS)
    formula = (
        f"largest n whose bytes fit {settings.share:.0%} of the memory; one sample, 2 bytes an "
        "element"
    )
    return Table(name, title, formula, columns, tuple(rows), {"share": settings.share}, notes)


def fitting(n: int) -> str:
    """A longest sequence; 0 means that the weights alone do not fit."""
    return f"{n:,}" if n else "none"


def model_time(settings: Settings) -> Table:
    """Time of attention and of the whole model: at a given rate, and as a roofline."""
    model, gpu = settings.model, settings.gpu
    rows = []
    for n in sorted({*TIME_LENGTHS, settings.length}):
        macs = attention_macs(model, n, settings.is_causal)
        attention, forward = (
            f(model, n, gpu, settings.is_causal) for f in (attention_roofline, forward_roofline)
        )
        decoding = decoding_roofline(model, n, gpu)
        rows.append(
            {
                "n": n,
                "attention_macs": macs,
                "attention_flops": 2 * macs,
                "at_rate_s": 2 * macs / (settings.tflops * 1e12),
                "attention_s": attention.seconds,
                "attention_bound": attention.bound,
                "model_s": forward.seconds,
                "model_bound": forward.bound,
                "model_tokens_per_s": n / forward.seconds,
                "decoding_tokens_per_s": 1 / decoding.seconds,
            }
        )
    columns = (
        Column("n", "n"),
        Column("attention_macs", "MACs", count),
        Column("attention_flops", "FLOPs", count),
        Column("at_rate_s", f"at {settings.tflops:,g} TFLOP/s", duration),
        Column("attention_s", "roofline", duration),
        Column("attention_bound", "bound", words=True),
        Column("model_s", "model", duration),
        Column("model_bound", "bound", words=True),
        Column("model_tokens_per_s", "read, tokens/s", count),
        Column("decoding_tokens_per_s", "written, tokens/s", count),
    )
    notes = (
        f"A roofline is the least time, max(FLOPs / {gpu.tflops:,g} TFLOP/s, bytes / "
        f"{gpu.bandwidth_gb:,g} GB/s) by datasheet: a bound, no forecast.",
        "MACs to roofline: attention alone, all layers, its matrices never written to memory. "
        "model, read: the whole model over n tokens at once.",
        "written: one token at a time after n, for one sample; all weights and the whole cache are "
        "read for each.",
    )
    title = f"Time of {model.title} on {gpu.title}, {causality(settings)}"
    return Table(
        "model_time",
        title,
        "roofline = max(2·MACs / peak, bytes / bandwidth)",
        columns,
        tuple(rows),
        {},
        notes,
    )


def causality(settings: Settings) -> str:
    """How a title says whether tokens see later ones."""
    return "causal" if settings.is_causal else "not causal"
