"""configs/variants: each paper's own settings build the variant that the file is named after, and
it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import possible

import attnzoo
from attnzoo.registry import options_of, spec_of

yaml = pytest.importorskip("yaml")
FILES = sorted((Path(__file__).resolve().parent.parent / "configs" / "variants").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_papers_settings_build_and_run(path: Path) -> None:
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    attn = attnzoo.build(path.stem, heads=4, head_dim=16, **settings)
    length = settings.get("max_length", 700)
    out = attn(*torch.randn(3, 1, 4, length, 16).unbind(), **possible(attn.spec))
    assert out.shape == (1, 4, length, 16)
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_papers_settings_name_their_paper(path: Path) -> None:
    comment = path.read_text(encoding="utf-8").partition("\n")[0]
    assert comment.startswith("# ")
    assert spec_of(path.stem).paper.rpartition("arXiv:")[2] in comment


def test_the_files_give_no_option_that_is_left_to_the_model() -> None:
    for path in FILES:
        given = set(yaml.safe_load(path.read_text(encoding="utf-8")))
        assert given <= {option.name for option in options_of(path.stem)} - {
            "heads",
            "head_dim",
            "backend",
        }
