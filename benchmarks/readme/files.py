"""The result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


def read_lines(name: str) -> list[Row]:
    """The rows of a JSONL file below benchmarks/results."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]
