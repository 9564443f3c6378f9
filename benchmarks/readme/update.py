"""Write the tables of README.md, benchmarks/README.md and docs/counting.md from the files in
benchmarks/results: `python -m benchmarks.readme.update`."""

from __future__ import annotations

from benchmarks.readme import compared, counters, gates, measured, peers, swapped, trained
from benchmarks.readme.files import ROOT
from benchmarks.readme.regions import Table, rewritten

PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "counting.md")
TABLES: dict[str, Table] = {
    **compared.TABLES,
    **counters.TABLES,
    **trained.TABLES,
    **swapped.TABLES,
    **measured.TABLES,
    **gates.TABLES,
    **peers.TABLES,
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
