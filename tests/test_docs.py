"""The code of docs/*.md, run as it is printed there, one page after the other."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import attnzoo

ROOT = Path(__file__).resolve().parents[1]
#: Written by scripts, from numbers alone.
WITHOUT_CODE = {"what_a_check_finds"}
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem not in WITHOUT_CODE]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)
    told = {str(warning.message) for warning in caught if "attnzoo" in str(warning.message)}
    assert all("was saved with its attention swapped" in sentence for sentence in told), told


def test_the_variants_that_drop_entries_of_a_are_those_that_are_named() -> None:
    able = [name for name in attnzoo.names() if attnzoo.describe(name).spec.dropout]
    sentences = {
        "README.md": "call `model.eval()` first | "
        + ", ".join(f"`{name}`" for name in able)
        + " |",
        "docs/swapping.md": f"{', '.join(f'`{name}`' for name in able[:-1])} and `{able[-1]}` do "
        "that",
    }
    for page, sentence in sentences.items():
        assert sentence in (ROOT / page).read_text(encoding="utf-8").replace("\n", " "), page
