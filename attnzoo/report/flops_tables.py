"""The tables of `attnzoo flops`."""

from __future__ import annotations

from typing import Any

from attnzoo.cost.model_flops import COMPONENTS, Breakdown, Subject
from attnzoo.results.table import Column, Table
from attnzoo.results.units import count, percent

CONVENTION = (
    "One MAC is two FLOPs. Counted is what runs, for one sample: a causal exact attention computes "
    "all its scores. "
    "Elementwise: exponentials, divisions, normalisations."
)
TOGETHER = "together"
# By length: (name, count) of exact attention, and of the other where there is one.
Counts = dict[int, list[tuple[str, Breakdown]]]


def saved_table(subject: Subject, counts: Counts) -> Table:
    """By length and component: MACs, FLOPs and elementwise operations of both, and what is
    saved."""
    rows: list[dict[str, Any]] = []
    for n, sides in counts.items():
        for component in (*COMPONENTS, TOGETHER):
            macs, elementwise = [], []
            for _, found in sides:
                whole = component == TOGETHER
                macs.append(found.report.macs if whole else found.macs[component])
                elementwise.append(
                    found.report.elementwise if whole else found.elementwise[component]
                )
            if any(macs) or any(elementwise):
                rows.append({"n": n, "component": component} | _cells(macs, elementwise))
    columns = [Column("n", "n"), Column("component", "component", words=True)]
    for side, label in zip(("exact", "other"), _labels(counts), strict=False):
        columns += [
            Column(f"{side}_macs", f"{label}, MACs", count),
            Column(f"{side}_flops", "FLOPs", count),
        ]
        columns += [Column(f"{side}_elementwise", "elementwise", count)]
    columns += [Column("saved", "MACs saved", _saved)] if len(_labels(counts)) > 1 else []
    return Table("components", subject.title, "", tuple(columns), tuple(rows))


def module_table(counts: Counts) -> Table:
    """MACs of every module that has any."""
    return _each(
        "modules", "MACs by module", "module", counts, lambda found: found.report.by_module
    )


def operator_table(counts: Counts) -> Table:
    """MACs of products and operations of the elementwise, by operator."""
    return _each(
        "operators", "MACs and elementwise operations by operator", "operator", counts, _operators
    )


def _operators(found: Breakdown) -> dict[str, int]:
    elementwise = {
        f"{name} (elementwise)": number
        for name, number in found.report.elementwise_by_operator.items()
    }
    return found.report.by_operator | elementwise


def _each(name: str, title: str, what: str, counts: Counts, of: Any) -> Table:
    rows = []
    for n, sides in counts.items():
        found = [of(side) for _, side in sides]
        for key in dict.fromkeys(key for one in found for key in one):
            numbers = [one.get(key, 0) for one in found]
            if any(numbers):
                rows.append(
                    {"n": n, what: key or "the whole"}
                    | dict(zip(("exact", "other"), numbers, strict=False))
                )
    sides = zip(("exact", "other"), _labels(counts), strict=False)
    columns = (
        Column("n", "n"),
        Column(what, what, words=True),
        *(Column(side, label, count) for side, label in sides),
    )
    return Table(name, title, "", columns, tuple(rows))


def _saved(share: float) -> str:
    """In whole percent; 0 has no sign."""
    return percent(round(share, 2) + 0.0)


def _cells(macs: list[int], elementwise: list[int]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for side, number, others in zip(("exact", "other"), macs, elementwise, strict=False):
        cells |= {
            f"{side}_macs": number,
            f"{side}_flops": 2 * number,
            f"{side}_elementwise": others,
        }
    if len(macs) > 1:
        cells["saved"] = 1 - macs[1] / macs[0] if macs[0] else None
    return cells


def _labels(counts: Counts) -> list[str]:
    return [label for label, _ in next(iter(counts.values()))]
