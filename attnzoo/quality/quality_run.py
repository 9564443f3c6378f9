"""Running a study: every measurement is one row, written as it finishes, and none is made that the
file already holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch

from attnzoo.quality.mixes import Mix, as_json, label_of
from attnzoo.quality.quality_rows import EXACT, Key, Row
from attnzoo.quality.quality_study import Study
from attnzoo.quality.search import Trial, cheapest, moves
from attnzoo.quality.subject import Excerpt, Scores, Subject
from attnzoo.registry import Choice
from attnzoo.texts.text_parts import CHECKING, CHOOSING, FINAL

Progress = Callable[[str, int, int], None]
Write = Callable[[Row], None]


class Run:
    """One study of one model.

    make_subject: loads the model, when something is to be measured.
    write: gets every new row.
    held: rows of an earlier run, which are not measured again.
    facts: the environment, kept in every new row.
    """

    def __init__(
        self,
        study: Study,
        model: str,
        sources: Sequence[str],
        make_subject: Callable[[], Subject],
        held: Iterable[Row],
        write: Write,
        *,
        dtype: str,
        seed: int,
        facts: dict[str, str],
    ) -> None:
        self.study, self.model, self.sources, self.dtype, self.seed, self.facts = (
            study,
            model,
            sources,
            dtype,
            seed,
            facts,
        )
        self.make_subject, self.write = make_subject, write
        self.held: dict[Key, Row] = {row.key: row for row in held}
        self.rows: dict[Key, Row] = {}

    @cached_property
    def subject(self) -> Subject:
        """The model, its texts seen to be long enough for the whole study."""
        subject, study = self.make_subject(), self.study
        for source in self.sources:
            subject.check(
                self._excerpt(source, FINAL),
                max(study.lengths + (study.mixes.lengths if study.mixes else ())),
            )
            if study.layers is not None:
                for part in (CHOOSING, CHECKING) if study.mixes else (CHOOSING,):
                    subject.check(self._excerpt(source, part), study.layers.length)
        return subject

    def run(self, progress: Progress) -> list[Row]:
        """All rows of the study, in the order in which it asks for them.

        progress: called with (what comes, steps done, steps at most).
        """
        steps, mixes = list(self._steps()), self.study.mixes
        searching = (
            0 if mixes is None else len(mixes.tolerances) * (mixes.evaluations + len(self.sources))
        )
        total = len(steps) + searching
        for done, (stage, step) in enumerate(steps):
            progress(stage, done, total)
            step()
        if mixes is not None:
            self._find_mixes(lambda stage, done, _: progress(stage, len(steps) + done, total))
        progress("done", total, total)
        return list(self.rows.values())

    def _steps(self) -> Iterator[tuple[str, Callable[[], object]]]:
        study = self.study
        for source in self.sources:
            place = self._excerpt(source, FINAL)
            yield f"{source}: exact", lambda p=place: self._measure("exact", {}, p, study.lengths)
            for one in study.variants:
                yield (
                    f"{source}: every layer {one.label}",
                    lambda p=place, c=one: self._measure("all", c, p, study.lengths),
                )
        if study.layers is None:
            return
        for source in self.sources:
            place = self._excerpt(source, CHOOSING)
            for one in study.layers.variants:
                title = f"{source}: one layer at a time {one.label}"
                yield title, lambda p=place, c=one: self._try_layers(p, c)

    def _try_layers(self, excerpt: Excerpt, choice: Choice) -> None:
        assert self.study.layers is not None
        lengths = (self.study.layers.length,)
        self._measure("exact", {}, excerpt, lengths)
        for layer in range(self._layer_count()):
            self._measure(
                "layer", {layer: choice}, excerpt, lengths, label=choice.label, layer=layer
            )

    def _layer_count(self) -> int:
        """From the file when it knows, so that a finished study needs no model."""
        return self.layers_held if self.layers_held is not None else self.subject.layers

    @cached_property
    def layers_held(self) -> int | None:
        counts = {
            row.environment.get("layers")
            for row in self.held.values()
            if row.environment and row.model == self.model
        }
        return int(counts.pop() or 0) or None if len(counts) == 1 else None

    def _find_mixes(self, progress: Progress) -> None:
        """Search within each tolerance, going on from the mix of the last, and measure what was
        found on text that was not used to find it."""
        mixes = self.study.mixes
        assert mixes is not None
        steps = mixes.evaluations + len(self.sources)  # of each tolerance, at most
        waiting, mix = moves(self._trials()), {}
        for number, tolerance in enumerate(mixes.tolerances):
            tried = itertools.count(number * steps)

            def change_of(
                mix: Mix, said: str = f"search within {tolerance:.0%}", tried: Iterator[int] = tried
            ) -> float:
                progress(f"{said}: {label_of(mix)}", next(tried), steps)
                return self._change_of(mix)

            mix, waiting = cheapest(
                waiting, change_of, self.limit(tolerance), mixes.evaluations, mix
            )
            for place, source in enumerate(self.sources):
                progress(
                    f"{source}: the mix within {tolerance:.0%}",
                    number * steps + mixes.evaluations + place,
                    steps,
                )
                excerpt = self._excerpt(source, FINAL)
                self._measure("exact", {}, excerpt, mixes.lengths)
                self._measure(
                    "mix", mix, excerpt, mixes.lengths, label=label_of(mix), tolerance=tolerance
                )

    def limit(self, tolerance: float) -> float:
        """The greatest change within a tolerance: of log perplexity, or 1 - cosine."""
        any_row = next(iter(self.rows.values()))
        return tolerance if any_row.cosine is not None else math.log1p(tolerance)

    def _trials(self) -> Iterator[Trial]:
        """The trials of one layer that gave numbers; the change is the mean over the texts of its
        size."""
        found: dict[tuple[int, str], list[Row]] = {}
        for row in self.rows.values():
            if row.task == "layer" and row.layer is not None and row.change is not None:
                found.setdefault((row.layer, row.label), []).append(row)
        assert self.study.layers is not None
        by_label = {choice.label: choice for choice in self.study.layers.variants}
        for (layer, label), rows in found.items():
            if len(rows) == len(self.sources):
                change = sum(abs(row.change or 0.0) for row in rows) / len(rows)
                yield Trial(
                    layer,
                    by_label[label],
                    (rows[0].exact_attention_macs or 0) - (rows[0].attention_macs or 0),
                    change,
                )

    def _change_of(self, mix: Mix) -> float:
        """The change of a whole mix on the text to check against, the greatest of all texts. Its
        sign does not count."""
        assert self.study.layers is not None
        changes = []
        for source in self.sources:
            excerpt, lengths = self._excerpt(source, CHECKING), (self.study.layers.length,)
            self._measure("exact", {}, excerpt, lengths)
            (row,) = self._measure("search", mix, excerpt, lengths, label=label_of(mix))
            changes.append(math.inf if row.change is None else abs(row.change))
        return max(changes)

    def _excerpt(self, source: str, part: str) -> Excerpt:
        return Excerpt(source, part, self.study.sequences)

    def _measure(
        self,
        task: str,
        swapped: Mix | Choice,
        excerpt: Excerpt,
        lengths: Sequence[int],
        *,
        label: str | None = None,
        layer: int | None = None,
        tolerance: float | None = None,
    ) -> list[Row]:
        """The rows of one mix, or of one choice in every layer, at all lengths: from the file,
        or measured and written."""
        label = label or (swapped.label if isinstance(swapped, Choice) else EXACT)
        blank = [
            Row(
                self.model,
                task,
                excerpt.text,
                excerpt.part,
                length,
                excerpt.sequences,
                label,
                {},
                self.dtype,
                self.seed,
                layer=layer,
                tolerance=tolerance,
            )
            for length in lengths
        ]
        missing = [
            row.length for row in blank if row.key not in self.held and row.key not in self.rows
        ]
        if missing:
            mix = (
                dict.fromkeys(range(self.subject.layers), swapped)
                if isinstance(swapped, Choice)
                else swapped
            )
            self._fill([row for row in blank if row.length in missing], mix, excerpt)
        for row in blank:
            self.rows[row.key] = self.rows.get(row.key) or self.held[row.key]
        return [self.rows[row.key] for row in blank]

    def _fill(self, blank: list[Row], mix: Mix, excerpt: Excerpt) -> None:
        facts = {**self.facts, "layers": str(self.subject.layers)}
        blank = [replace(row, mix=as_json(mix), environment=facts) for row in blank]
        scores: Mapping[int, Scores] = {}
        reason = ""
        try:
            scores = self.subject.measure(mix, excerpt, [row.length for row in blank])
        except (ValueError, torch.OutOfMemoryError) as error:
            reason = str(error).splitlines()[0]
        for row in blank:
            found = (
                _with_scores(row, scores[row.length], self.subject)
                if row.length in scores
                else replace(row, reason=reason)
            )
            if row.task != "exact":
                found = replace(found, exact_perplexity=self._exact_perplexity(row))
            self.rows[found.key] = found
            self.write(found)

    def _exact_perplexity(self, row: Row) -> float | None:
        """Of the row's own tokens, which were read before it."""
        key = replace(row, task="exact", label=EXACT, layer=None, tolerance=None).key
        found = self.rows.get(key) or self.held.get(key)
        return None if found is None else found.perplexity


def _with_scores(row: Row, scores: Scores, subject: Subject) -> Row:
    exact = subject.macs_of_mix({}, row.length)
    row = replace(
        row,
        attention_macs=scores.attention_macs,
        model_macs=scores.model_macs,
        exact_attention_macs=exact,
        exact_model_macs=subject.model_macs(exact, row.length),
    )
    numbers = (scores.perplexity, scores.cosine, scores.top1, scores.top10)
    if not all(number is None or math.isfinite(number) for number in numbers):
        return replace(row, reason="NaN or inf in the output")
    perplexity = scores.perplexity
    exact_perplexity = perplexity if row.task == "exact" else None
    return replace(
        row,
        predictions=scores.predictions,
        perplexity=perplexity,
        exact_perplexity=exact_perplexity,
        cosine=scores.cosine,
        top1=scores.top1,
        top10=scores.top10,
    )
