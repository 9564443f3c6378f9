"""The pages of examples/, made when the site is built: docs/examples/, which git ignores. A script
is shown whole, a notebook with its outputs."""

from __future__ import annotations

import ast
import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.docstrings import markdown

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "examples"
EXAMPLES = ROOT / "examples"
#: Where the name of a file is not how its title is spelt.
TITLES = {"finetune_bert": "Fine-tune BERT"}


def write() -> None:
    """Write a page for every script and notebook, and the one that lists them."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    pages = {path.stem: script(path) for path in sorted(EXAMPLES.glob("*.py"))}
    for path in sorted((EXAMPLES / "notebooks").glob("*.ipynb")):
        text, pictures = notebook(path)
        pages[path.stem] = text
        for name, picture in pictures.items():
            (FOLDER / name).write_bytes(picture)
    pages["index"] = index(list(pages))
    for name, text in pages.items():
        (FOLDER / f"{name}.md").write_text(text, encoding="utf-8")


def index(names: list[str]) -> str:
    """The words of examples/README.md, whose links lead to pages here."""
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in names:
        text = text.replace(f"(notebooks/{name}.ipynb)", f"({name}.md)")
        text = text.replace(f"({name}.py)", f"({name}.md)")
    return f"{text}\n```{{toctree}}\n:hidden:\n\n" + "\n".join(names) + "\n```\n"


def script(path: Path) -> str:
    """A script under what it says of itself."""
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    title = TITLES.get(path.stem, path.stem.replace("_", " ").capitalize())
    command = f"python examples/{path.name}"
    return "\n\n".join(
        [
            f"# {title}",
            markdown(said),
            f"```sh\n{command}\n{command} --help\n```",
            f"```{{literalinclude}} ../../examples/{path.name}\n:language: python\n```\n",
        ]
    )


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook's text, code and outputs, and the pictures that it names."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            for kind, content in _shown(output):
                if kind == "text":
                    parts.append(f"```text\n{content}\n```")
                    continue
                name = f"{path.stem}-{len(pictures)}.png"
                pictures[name] = base64.b64decode(content)
                parts.append(f"![]({name})")
    link = f"[The notebook](../../examples/notebooks/{path.name}) runs as it is."
    return "\n\n".join([*parts, link]) + "\n", pictures


def _shown(output: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What an output shows: text or the letters of a picture."""
    if output["output_type"] == "stream":
        yield "text", "".join(output["text"]).rstrip()
    else:
        data = output.get("data", {})
        if "image/png" in data:
            yield "picture", "".join(data["image/png"])
        elif "text/plain" in data:
            yield "text", "".join(data["text/plain"])
