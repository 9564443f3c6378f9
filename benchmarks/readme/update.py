"""Write the tables of README.md and of the pages in docs/ from the files in benchmarks/results:
`python -m benchmarks.readme.update`."""

from __future__ import annotations

from benchmarks.readme import (
    answers,
    choices,
    compared,
    compiled,
    costs,
    counters,
    decoding,
    gates,
    measured,
    peers,
    recorded,
    short,
    swapped,
    trained,
    useful,
)
from benchmarks.readme.files import ROOT
from benchmarks.readme.regions import MARK, Table, rewritten

PAGES = tuple(
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if MARK in path.read_text(encoding="utf-8")
)
TABLES: dict[str, Table] = {
    **compared.TABLES,
    **compiled.TABLES,
    **counters.TABLES,
    **decoding.TABLES,
    **trained.TABLES,
    **swapped.TABLES,
    **measured.TABLES,
    **gates.TABLES,
    **peers.TABLES,
    **recorded.TABLES,
    **useful.TABLES,
    **choices.TABLES,
    **answers.TABLES,
    **costs.TABLES,
    **short.TABLES,
}


def main() -> None:
    """Rewrite the pages, and say which of them changed."""
    for path in PAGES:
        before = path.read_text(encoding="utf-8")
        after = rewritten(before, TABLES)
        path.write_text(after, encoding="utf-8")
        print(
            f"{path.relative_to(ROOT)}: "
            f"{'rewritten' if after != before else 'as the result files say'}"
        )


if __name__ == "__main__":
    main()
