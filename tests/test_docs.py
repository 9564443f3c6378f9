"""The code of README.md and of every page in docs/, run as it is printed there, one page after the
other; and pages that scripts write say what those write."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import attnzoo
from docs import docstrings, example_pages, reference_pages, zoo_pages, zoo_pictures

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
#: Made when the site is built, from docstrings and from examples/, which have tests of their own.
BUILT = {DOCS / "reference", DOCS / "examples"}
#: The README promises its words, and a page of ten lines.
MOST_WORDS = 900


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in PAGES if not BUILT & {*page.parents}]
WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=f"{page.parent.name}-{page.stem}",
            marks=pytest.mark.thorough if page.parent.name == "guides" else (),
        )
        for page in WITH_CODE
    ],
)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for block in blocks(page):
            exec(compile(block, str(page), "exec"), names)
    told = {str(warning.message) for warning in caught if "attnzoo" in str(warning.message)}
    assert all("was saved with its attention swapped" in sentence for sentence in told), told


def test_every_guide_and_every_variant_has_code() -> None:
    with_code = {page.stem for page in WITH_CODE}
    written = {page.stem for page in (DOCS / "guides").glob("*.md")} - {"index", "adding"}
    assert written <= with_code
    assert set(attnzoo.names()) <= with_code
    assert {"README", "start", "index", "rules", "conventions"} <= with_code


def test_the_variants_that_drop_entries_of_a_are_those_that_are_named() -> None:
    able = [name for name in attnzoo.names() if attnzoo.describe(name).spec.dropout]
    page = (DOCS / "guides/swapping.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"{', '.join(f'`{name}`' for name in able[:-1])} and `{able[-1]}` do that" in page
    listed = ", ".join(f"`{name}`" for name in able)
    assert f"call `model.eval()` first | {listed} |" in page


def test_the_readme_is_one_page_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= MOST_WORDS
    for command in ("python3 dev.py compare ", "python3 dev.py test "):
        assert f"    {command}" in text
    first = blocks(ROOT / "README.md")[0].strip().splitlines()
    assert len([line for line in first if line]) <= 10
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) > 40
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("page", ["README.md", "docs/zoo/index.md"])
def test_the_zoo_is_listed_whole(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    folder = "docs/zoo/" if page == "README.md" else ""
    named = re.findall(rf"\[`(\w+)`\]\({folder}(\w+)\.md\)", text)
    assert all(name == link for name, link in named)
    assert sorted(name for name, _ in named) == sorted(attnzoo.names())


@pytest.mark.parametrize("name", attnzoo.names())
def test_the_page_of_a_variant_is_current(name: str) -> None:
    page = (zoo_pages.FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert page == zoo_pages.page(name), "run python -m docs.zoo_pages"
    assert (zoo_pictures.FOLDER / f"{name}.png").exists(), "run python -m docs.zoo_pictures"


def test_no_page_of_a_variant_is_left_over() -> None:
    pages = {page.stem for page in zoo_pages.FOLDER.glob("*.md")}
    assert pages == {*attnzoo.names(), "index"}
    assert {picture.stem for picture in zoo_pictures.FOLDER.glob("*.png")} == set(attnzoo.names())


def test_a_picture_is_a_of_the_variant() -> None:
    drawn = zoo_pictures.drawn("sliding_window")
    seen = [[weight > 0 for weight in row] for row in drawn.weights]
    assert all(
        seen[i][j] == (0 <= i - j < zoo_pictures.SMALL["window"])
        for i in range(zoo_pictures.LENGTH)
        for j in range(zoo_pictures.LENGTH)
    )


def test_the_reference_has_every_public_name_once() -> None:
    pages = {name: reference_pages.page(name) for name in reference_pages.PAGES}
    found = [one for name in pages for one in reference_pages.members(name)]
    assert sorted(found) == sorted(attnzoo.__all__)
    for name, text in pages.items():
        for one in reference_pages.members(name):
            assert re.search(rf"}} {one}\(|^## attnzoo\.{one}$", text, re.MULTILINE), one


def test_a_docstring_becomes_a_list_of_its_arguments_and_an_equation() -> None:
    text = "Does *it*.\n\n    y = x\n\nx, y: (batch, n),\nlonger: words\nRaises ValueError on 0."
    assert docstrings.markdown(text, ["x", "y"]).split("\n") == [
        r"Does \*it\*.",
        "",
        "```text",
        "y = x",
        "```",
        "",
        "",
        "- **x, y**: (batch, n),",
        "  longer: words",
        "- **raises** ValueError on 0.",
    ]


def test_the_pages_of_examples_show_scripts_whole_and_notebooks_with_their_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example_pages, "FOLDER", tmp_path / "examples")
    example_pages.write()
    pages = {path.stem: path.read_text() for path in (tmp_path / "examples").glob("*.md")}
    scripts = {path.stem for path in example_pages.EXAMPLES.glob("*.py")}
    notebooks = {path.stem for path in (example_pages.EXAMPLES / "notebooks").glob("*.ipynb")}
    assert set(pages) == {"index", *scripts, *notebooks}
    assert all(f"({name}.md)" in pages["index"] for name in scripts | notebooks)
    assert all(f"{{literalinclude}} ../../examples/{name}.py" in pages[name] for name in scripts)
    for name in notebooks:
        drawn = re.findall(r"!\[\]\(([^)]+)\)", pages[name])
        assert drawn and all((tmp_path / "examples" / one).stat().st_size > 5000 for one in drawn)


def test_the_page_of_commands_has_each_with_its_help() -> None:
    from docs import command_pages

    page = command_pages.page()
    for command in command_pages.commands():
        part = page.split(f"## attnzoo {command.name}\n")[1].split("\n## ")[0]
        words = " ".join(part.split())
        assert command.help in words and "usage: attnzoo" in words and "--help" in words
