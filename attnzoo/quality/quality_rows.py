"""One line of a quality study: what a model with swapped attention still does as well as with its
own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from attnzoo.results.result_file import fields_of

Key = tuple[Any, ...]
EXACT = "exact"  # the label of the model's own attention in every layer


@dataclass(frozen=True)
class Row:
    """A model with a mix of attentions on one part of one text. None where there is no number;
    `reason` then says why.

    task: "exact" (nothing swapped), "all" (every layer), "layer" (only `layer`), "search" (a mix
    that the search tried) or "mix" (what it chose for `tolerance`).
    part: of the text, "final", "choosing" or "checking": parts share no token.
    length: tokens that the model sees, at most.
    sequences: how many of them (an encoder: passages).
    mix: attention by layers, as `attnzoo.swap` takes it.
    perplexity: of a causal model, over `predictions` tokens.
    cosine: mean cosine of an encoder's embeddings to its exact ones.
    top1: share of queries whose nearest passage is the exact one's.
    top10: mean share of the ten nearest that are.
    attention_macs: of all layers for one sequence of this length, as executed (exact attention: its
    support).
    model_macs: with all linear layers.
    """

    FORMAT: ClassVar[str] = "attnzoo.quality/1"
    COMMAND: ClassVar[str] = "attnzoo compare --model"

    model: str
    task: str
    text: str
    part: str
    length: int
    sequences: int
    label: str
    mix: dict[str, list[Any]]
    dtype: str
    seed: int
    layer: int | None = None
    tolerance: float | None = None
    predictions: int | None = None
    perplexity: float | None = None
    exact_perplexity: float | None = None
    cosine: float | None = None
    top1: float | None = None
    top10: float | None = None
    attention_macs: int | None = None
    exact_attention_macs: int | None = None
    model_macs: int | None = None
    exact_model_macs: int | None = None
    reason: str = ""
    environment: dict[str, str] | None = None

    @property
    def key(self) -> Key:
        """What the row is about: two rows with one key measure the same."""
        what = (self.model, self.task, self.text, self.part, self.length, self.sequences)
        return (*what, self.dtype, self.seed, self.label, self.layer, self.tolerance)

    @property
    def change(self) -> float | None:
        """How far from exact, 0 being equal: the logarithm of the perplexity ratio, or 1 -
        cosine."""
        if self.cosine is not None:
            return 1 - self.cosine
        return (
            None
            if self.perplexity is None or self.exact_perplexity is None
            else math.log(self.perplexity / self.exact_perplexity)
        )

    @property
    def variant(self) -> str:
        """The attention's name, of a row whose mix has one; "" of exact and of mixes."""
        names = {name for name, _ in self.mix.values()}
        return names.pop() if len(names) == 1 else ""

    def to_json(self) -> str:
        """One line of the result file."""
        return json.dumps(
            {"format": self.FORMAT, **asdict(self)}, allow_nan=False, ensure_ascii=False
        )

    @classmethod
    def from_fields(cls, found: dict[str, Any]) -> Row:
        """The row of a parsed line."""
        return cls(**fields_of(cls, found))


def page_name(row: Row) -> str:
    """The name of the page, figures and result file that the row belongs to: a model has its
    own."""
    return f"quality-{row.model.lower()}"


def by_page(rows: Iterable[Row]) -> dict[str, Sequence[Row]]:
    """The rows by the name of their page, each page's in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(page_name(row), []).append(row)
    return {name: in_order(own) for name, own in found.items()}


def in_order(rows: Sequence[Row]) -> list[Row]:
    """The rows in the order of the tables: those of single choices by variant, as the study names
    them, and by rising knob, whenever they were measured; all others before them."""
    variants = list(dict.fromkeys(row.variant for row in rows))

    def place(row: Row) -> tuple[int, list[int | str]]:
        if row.task not in ("all", "layer"):
            return -1, []
        parts = re.split(r"(\d+)", row.label)
        return variants.index(row.variant), [
            int(part) if part.isdigit() else part for part in parts
        ]

    return sorted(rows, key=place)
