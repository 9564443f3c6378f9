"""`attnzoo.compare`: attentions against exact attention, on queries, keys and values of real models
or in a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnzoo.arguments import check_list, check_positive, nearest
from attnzoo.public.run_quality import measure_quality
from attnzoo.public.setting_checks import check_dtype, check_seed, listed
from attnzoo.public.variant_text import Variant, parse_variant, written
from attnzoo.registry import Choice, names, spec_of
from attnzoo.results.progress import Progress, progress_bar, say

if TYPE_CHECKING:
    import torch

    from attnzoo.fidelity import Comparison, Sample
    from attnzoo.report.result import Result

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Model:
    """A model as it is asked for.

    title: its name in `attnzoo.fidelity`.
    max_length: tokens that it has positions for.
    """

    title: str
    max_length: int


MODELS = {"smollm2": Model("SmolLM2-135M", 8192), "minilm": Model("MiniLM-L6", 512)}


def compare(
    variants: Variant | Iterable[Variant] | None = None,
    *,
    models: str | Iterable[str] | None = None,
    lengths: int | Iterable[int] | None = None,
    layers: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    seed: int = 0,
    model: str | None = None,
    study: str | Path | None = None,
    output: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Compare variants with exact attention on queries, keys and values of real models or, with
    `model`, in a whole model whose attention is swapped.

    variants: such as "performer:num_features=64", ("performer", {"num_features": 64}), or a list;
    default: the whole zoo, but for attentions with gates, which must be trained first.
    models: of smollm2, minilm (both by default) and synthetic, which needs no package.
    lengths: tokens; the longest is measured in full, the others for their error.
    layers, heads: indices into the models; default first, middle and last.
    device: cpu, cuda or cuda:INDEX.
    dtype: float32, float64, bfloat16 or float16.
    seed: of every random choice.
    model: smollm2, minilm or the folder of a model: its quality with the attention swapped.
    study: with model: quick (default), full, or a YAML file.
    output: with model: a folder whose quality-MODEL.jsonl gets each row as soon as it is measured;
    what it holds is not measured again.
    progress: say on standard error what is measured.

    Ctrl-C ends it early with what was finished, which `Result.interrupted` says.

    Raises ValueError, one sentence, before any work, on a setting that is not allowed; ImportError,
    which says what to install, where a whole model's package is missing.
    """
    texts = None if variants is None else written(variants)
    chosen = None if lengths is None else check_list("lengths", listed(lengths))
    sampled = {
        name: None if value is None else check_list(name, listed(value))
        for name, value in (("models", models), ("layers", layers), ("heads", heads))
    }
    if model is not None:
        return measure_quality(
            model,
            None if study is None else str(study),
            texts,
            chosen,
            sampled,
            device=device,
            dtype=dtype,
            seed=seed,
            output=output,
            progress=progress,
        )[0]
    if study is not None:
        raise ValueError("study goes with model, such as model='smollm2'")
    if output is not None:
        raise ValueError("output goes with model; without it, save() of the result writes files")
    from attnzoo.report.page import comparison_result

    prepared = prepare_samples(texts, chosen, sampled, device=device, dtype=dtype, seed=seed)
    return comparison_result(measure_samples(prepared, progress))


@dataclass(frozen=True)
class Prepared:
    """A comparison whose settings have been checked.

    layers, heads: indices into the models; None: first, middle and last.
    """

    choices: list[Choice]
    models: list[str]
    lengths: list[int]
    layers: list[int] | None
    heads: list[int] | None
    device: torch.device
    dtype: torch.dtype
    seed: int


def prepare_samples(
    variants: list[str] | None,
    lengths: list[int] | None,
    sampled: dict[str, Any],
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    seed: int,
) -> Prepared:
    """Check everything. Raises ValueError as `compare` does.

    sampled: models, layers and heads.
    """
    import attnzoo.fidelity as fidelity
    from attnzoo.fidelity.samples import LENGTHS

    target, kind = fidelity.check_device(device), check_dtype(dtype)
    if variants is None:
        choices = [Choice(name) for name in names() if not spec_of(name).has_gates]
    else:
        choices = [parse_variant(text) for text in variants]
    models = list(MODELS) if sampled["models"] is None else sampled["models"]
    chosen = check_lengths(LENGTHS if lengths is None else lengths, models)
    check_seed(seed)
    return Prepared(
        choices, models, chosen, sampled["layers"], sampled["heads"], target, kind, seed
    )


def measure_samples(prepared: Prepared, progress: bool = True) -> Comparison:
    """Load and compare. Raises KeyboardInterrupt when nothing was finished before Ctrl-C."""
    import attnzoo.fidelity as fidelity
    from attnzoo.benchmarking.heap import bounded_memory

    with bounded_memory(prepared.device), progress_bar(progress) as shown:
        samples = _samples(prepared, shown)
    _say_cuts(prepared.models, prepared.lengths[-1])
    _say_stand_ins(prepared.models, samples)
    with bounded_memory(prepared.device), progress_bar(progress) as shown:
        comparison = fidelity.compare(
            samples,
            prepared.choices,
            lengths=prepared.lengths,
            seed=prepared.seed,
            device=prepared.device,
            dtype=prepared.dtype,
            progress=shown,
        )
    if comparison.environment.get("interrupted") and not comparison.rows:
        raise KeyboardInterrupt
    return comparison


def check_lengths(lengths: Sequence[int], models: Sequence[str]) -> list[int]:
    """The lengths in order. Raises ValueError on an unknown model, a length below 1, and one that
    no chosen model can read."""
    choices = [*MODELS, SYNTHETIC]
    for model in models:
        if model not in choices:
            raise ValueError(
                f"unknown model {model!r}{nearest(model, choices)}; choose one of "
                f"{', '.join(choices)}"
            )
    for length in lengths:
        check_positive("length", length)
    longest = max(lengths)
    if SYNTHETIC not in models and longest > max(MODELS[model].max_length for model in models):
        limits = " and ".join(
            f"{MODELS[model].title} reads at most {MODELS[model].max_length:,} tokens"
            for model in models
        )
        raise ValueError(
            f"length={longest} is too long: {limits}; give --lengths up to that, or --models "
            f"{SYNTHETIC}"
        )
    return sorted(set(lengths))


def _samples(prepared: Prepared, progress: Progress) -> list[Sample]:
    from attnzoo.fidelity import load_samples, synthetic_sample
    from attnzoo.fidelity.samples import STAND_IN_LENGTH, SYNTHETIC_SPREADS

    lengths, seed = prepared.lengths, prepared.seed
    real = [MODELS[model].title for model in prepared.models if model != SYNTHETIC]
    samples: list[Sample] = []
    if real:
        samples += load_samples(
            lengths,
            models=real,
            layers=prepared.layers,
            heads=prepared.heads,
            seed=seed,
            progress=progress,
        )
    if SYNTHETIC in prepared.models:
        short = sorted({min(length, STAND_IN_LENGTH) for length in lengths})
        for spread in SYNTHETIC_SPREADS:
            samples.append(synthetic_sample(lengths[-1], is_causal=True, spread=spread, seed=seed))
            samples += [
                synthetic_sample(length, is_causal=False, spread=spread, seed=seed)
                for length in short
            ]
    return samples


def _say_cuts(models: Sequence[str], longest: int) -> None:
    """Say which models read less than was asked of all."""
    for model in (MODELS[model] for model in models if model != SYNTHETIC):
        if model.max_length < longest:
            say(
                f"attnzoo: {model.title} reads at most {model.max_length:,} tokens: longer lengths "
                "are cut to that"
            )


def _say_stand_ins(models: Sequence[str], samples: Sequence[Sample]) -> None:
    """Say which samples replace a model that is not installed, why, and how far their scores
    spread."""
    asked = {MODELS[model].title for model in models if model != SYNTHETIC}
    if SYNTHETIC in models or asked >= {sample.model for sample in samples}:
        return
    for text in dict.fromkeys(
        f"{sample.text}; measured {sample.score_std:.2f}"
        for sample in samples
        if sample.model not in asked
    ):
        say(f"attnzoo: using {text}")
