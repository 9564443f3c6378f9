"""What the article does not compute, for every variant: costs, longest sequences and crossovers,
from `Attention.cost` alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from attnzoo.cost.hardware import GPU, Roofline, roofline
from attnzoo.cost.layer_costs import COUNTED_LENGTH, CountedVariant
from attnzoo.cost.limits import (
    ELEMENT_BYTES,
    attention_bytes,
    crossover,
    input_bytes,
    longest,
    matrix_bytes,
)
from attnzoo.cost.model_sizes import TransformerModel
from attnzoo.report.scaling.model_tables import causality, fitting
from attnzoo.report.scaling.settings import Settings
from attnzoo.results.table import Column, Table
from attnzoo.results.units import count, duration, memory, ratio

VARIANT_LIMIT = 2**20  # tokens up to which a variant's longest sequence is searched
CROSSOVER_LIMIT = 2**17
CARRIED_ON = (
    f"Kept bytes are counted up to {COUNTED_LENGTH:,} tokens; beyond, the straight line through "
    f"the counts at {COUNTED_LENGTH // 2:,} and {COUNTED_LENGTH:,} tokens is taken, and what a "
    "ragged end keeps is left out."
)
NEVER, ANY = "never", "any"


def variant_costs(
    settings: Settings, variants: Sequence[CountedVariant], baseline: CountedVariant
) -> Table:
    """What each variant executes, keeps, carries and takes at the settings' length."""
    n, is_causal, model = settings.length, settings.is_causal, settings.model
    exact = baseline.macs(n, is_causal)
    rows = []
    for variant in variants:
        row: dict[str, Any] = {
            "variant": variant.label,
            "state_bytes": _all_layers(model, variant.state_bytes(n)),
        }
        if variant.runs(is_causal):
            macs, least = (
                variant.macs(n, is_causal),
                variant_roofline(variant, n, is_causal, settings.gpu),
            )
            row |= {
                "macs": model.layers * macs,
                "gain": exact / macs,
                "support_macs": model.layers * variant.cost(n, is_causal).support_macs,
                "kept_per_token": _all_layers(model, variant.kept_bytes_per_token(is_causal)),
                "seconds": least.seconds,
                "bound": least.bound,
                "tokens_per_s": n / least.seconds,
            }
        rows.append(row)
    columns = (
        Column("variant", "variant", words=True),
        Column("macs", "MACs", count),
        Column("gain", "MAC speed-up", ratio),
        Column("support_macs", "MACs of A's support", count),
        Column("kept_per_token", "kept a token", memory),
        Column("state_bytes", "decoding state", memory),
        Column("seconds", "roofline", duration),
        Column("bound", "bound by", words=True),
        Column("tokens_per_s", "tokens/s", count),
    )
    notes = (
        "MACs: what the fast backend executes; for exact attention, what a kernel that skips "
        "masked scores executes.",
        "MACs of A's support: those of the pairs where A is not 0, if each were computed by "
        "itself.",
        "kept a token: bytes that the pure-torch backend keeps for the backward pass, counted by "
        f"attnzoo.memory between {COUNTED_LENGTH // 2:,} and {COUNTED_LENGTH:,} tokens.",
        "decoding state: what decoding carries after n tokens; a state of sums is in fp32.",
        "The roofline moves q, k, v, the output and the parameters used once, and nothing in "
        "between.",
        *skipped(variants, is_causal),
    )
    title = (
        f"Every variant at n = {n:,}: {model.title}, all layers, on {settings.gpu.title}, "
        f"{causality(settings)}"
    )
    return Table(
        "variant_costs",
        title,
        "Attention.cost and rooflines; bf16, one sample",
        columns,
        filled(rows, columns),
        {"n": n},
        notes,
    )


def variant_limits(settings: Settings, variants: Sequence[CountedVariant]) -> Table:
    """Longest sequence with each variant, in training and in decoding."""
    model, is_causal = settings.model, settings.is_causal
    budget = settings.gpu.memory_bytes * settings.share
    weights = ELEMENT_BYTES * model.parameters
    rows = []
    for variant in variants:
        row: dict[str, Any] = {"variant": variant.label}
        if variant.runs(is_causal):
            kept = partial(_kept, variant, is_causal=is_causal)
            limit = variant.known_length(is_causal, VARIANT_LIMIT)
            all_kept = longest(lambda n, kept=kept: model.layers * kept(n), budget, limit)
            one_kept = longest(
                lambda n, kept=kept: model.layers * input_bytes(model, n) + kept(n), budget, limit
            )
            row |= {
                "training": _found(all_kept, limit=limit),
                "checkpointed": _found(one_kept, limit=limit),
            }
        if variant.spec.decodes:
            carried = partial(_carried, variant)
            row["decoding"] = _found(
                longest(lambda n, carried=carried: weights + carried(n), budget, VARIANT_LIMIT),
                _grows(variant),
            )
        rows.append(row)
    columns = (
        Column("variant", "variant", words=True),
        Column("training", "training", fitting),
        Column("checkpointed", "training, checkpointed", fitting),
        Column("decoding", "decoding", fitting),
    )
    notes = (
        "training: all that attention keeps for the backward pass, all layers; checkpointed: layer "
        "inputs, and one layer's at a time.",
        CARRIED_ON,
        "decoding: the weights and the variant's state.",
        "any: the state does not grow. >: more than the tokens that were searched. none: the "
        "weights alone do not fit.",
        *skipped(variants, is_causal),
    )
    title = (
        f"Longest sequence with every variant: {model.title} on {settings.gpu.title}, "
        f"{causality(settings)}"
    )
    formula = f"largest n whose bytes fit {settings.share:.0%} of the memory; one sample, bf16"
    return Table(
        "variant_limits",
        title,
        formula,
        columns,
        filled(rows, columns),
        {"share": settings.share},
        notes,
    )


def crossovers(
    settings: Settings, variants: Sequence[CountedVariant], baseline: CountedVariant
) -> Table:
    """Length from which on each variant costs less than standard, found by search, causal and
    not."""
    model = settings.model
    rows = []
    for variant in variants:
        if variant == baseline:
            continue
        for is_causal in filter(variant.runs, (False, True)):
            kept, limit = (
                partial(_kept, variant, is_causal=is_causal),
                variant.known_length(is_causal, CROSSOVER_LIMIT),
            )
            rows.append(
                {
                    "variant": variant.label,
                    "causal": "yes" if is_causal else "no",
                    "macs": _cheaper(
                        partial(variant.macs, is_causal=is_causal),
                        partial(baseline.macs, is_causal=is_causal),
                    ),
                    "stored": _cheaper(
                        kept, lambda n: attention_bytes(model, n) + matrix_bytes(model, n), limit
                    ),
                    "flash": _cheaper(kept, partial(_kept, baseline, is_causal=is_causal), limit),
                    "state": _cheaper(partial(_state, variant), partial(_state, baseline))
                    if variant.spec.decodes
                    else None,
                    "seconds": _cheaper(
                        lambda n, v=variant, c=is_causal: (
                            variant_roofline(v, n, c, settings.gpu).seconds
                        ),
                        lambda n, c=is_causal: (
                            variant_roofline(baseline, n, c, settings.gpu).seconds
                        ),
                    ),
                }
            )
    columns = (
        Column("variant", "variant", words=True),
        Column("causal", "causal", words=True),
        Column("macs", "MACs"),
        Column("stored", "kept bytes, stored matrices"),
        Column("flash", "kept bytes, FlashAttention"),
        Column("state", "decoding state"),
        Column("seconds", f"roofline, {settings.gpu.title}"),
    )
    notes = (
        "The smallest n from which on the variant needs less than standard attention; -: it does "
        "not decode.",
        "kept bytes: beside a standard attention that stores its matrices, and beside "
        "FlashAttention.",
        CARRIED_ON,
        f"Searched down the powers of two from {CROSSOVER_LIMIT:,} and halved to the token; never: "
        f"not less at {CROSSOVER_LIMIT:,}.",
    )
    title = f"Crossover with standard attention, in tokens: heads of {model.title}"
    return Table(
        "crossovers",
        title,
        "smallest n with cost(variant, n) < cost(standard, n) from there on",
        columns,
        tuple(rows),
        {},
        notes,
    )


def variant_roofline(variant: CountedVariant, n: int, is_causal: bool, gpu: GPU) -> Roofline:
    """Least time of the variant in every layer of its model."""
    layers = variant.model.layers
    return roofline(layers * variant.macs(n, is_causal), layers * variant.moved_bytes(n), gpu)


def _cheaper(
    variant: Callable[[int], float], standard: Callable[[int], float], limit: int = CROSSOVER_LIMIT
) -> int | str:
    found = crossover(variant, standard, limit)
    return NEVER if found is None else found


def _kept(variant: CountedVariant, n: int, is_causal: bool) -> int:
    kept = variant.kept_bytes(n, is_causal)
    assert kept is not None  # asked of variants that run so, and no further than it is known
    return kept


def _state(variant: CountedVariant, n: int) -> int:
    state = variant.state_bytes(n)
    assert state is not None  # asked of variants that decode
    return state


def _carried(variant: CountedVariant, n: int) -> int:
    return variant.model.layers * _state(variant, n)


def _grows(variant: CountedVariant) -> bool:
    return _state(variant, VARIANT_LIMIT) > _state(variant, VARIANT_LIMIT // 2)


def _found(n: int | None, grows: bool = True, limit: int = VARIANT_LIMIT) -> int | str:
    if n is None:
        return f"> {limit:,}" if grows else ANY
    return n


def _all_layers(model: TransformerModel, value: float | None) -> float | None:
    return None if value is None else model.layers * value


def filled(rows: list[dict[str, Any]], columns: tuple[Column, ...]) -> tuple[dict[str, Any], ...]:
    """The rows with None under every column that they lack."""
    return tuple({column.key: row.get(column.key) for column in columns} for row in rows)


def skipped(variants: Sequence[CountedVariant], is_causal: bool) -> tuple[str, ...]:
    """A note on the variants that cannot be called so; none where all can."""
    unable = [variant.label for variant in variants if not variant.runs(is_causal)]
    return (
        (f"{', '.join(unable)}: cannot be {'causal' if is_causal else 'bidirectional'}.",)
        if unable
        else ()
    )
