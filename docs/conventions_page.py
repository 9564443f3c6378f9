"""Write docs/conventions.md from `attnzoo.conventions.dialects.facts`:

python docs/conventions_page.py
"""

from __future__ import annotations

from pathlib import Path

from attnzoo.conventions.dialects.facts import SPELLINGS, Spelling

PAGE = Path(__file__).with_name("conventions.md")
HEAD = """# How libraries spell attention

`docs/conventions_page.py` writes this table from `attnzoo.conventions.SPELLINGS`. What is printed
plainly was found by asking the library itself, in this version and on that day, on a CPU:
`tests/test_speakers.py` does so for what is installed, and `benchmarks/conventions/setup.sh`
installs it. What is in *italics* was read in the library's documentation.

"""
COLUMNS = (
    *("library", "asked on", "arguments, in order", "scale", "layout of q, k, v"),
    *("keys of a causal window of w", "fewer queries than keys stand", "a row that sees nothing"),
    *("a mask of keys", "L2 norm of q and k", "decay", "state", "its dtype, of half precision"),
    *("besides",),
)
TAIL = """
`to` and `from_` turn what a call has from this library's spelling into another, and back.

```python
import torch
from attnzoo.conventions import from_, to

log_decay = -torch.rand(1, 4, 10)
theirs = to("rwkv", log_decay=log_decay, state=torch.zeros(1, 4, 16, 32))
assert theirs["log_decay"].shape == (1, 10, 4) and theirs["log_decay"].max() <= 1  # factors
assert theirs["state"].shape == (1, 4, 32, 16)
assert torch.allclose(from_("rwkv", **theirs)["log_decay"], log_decay, atol=1e-6)

assert to("jax.nn", window=128) == {"window": 127}  # the query's own key comes on top there
assert from_("transformers", window=128) == {"window": 128}
```
"""


FIELDS = (
    *("arguments", "scale", "layout", "window_keys", "alignment", "hidden_row", "mask"),
    *("l2_norm", "decay", "state", "state_dtype"),
)
WORDS = {
    "window_keys": {None: "", 0: "w", 1: "w + 1"},
    "alignment": {"first": "at the first key", "last": "at the last key"},
}


def _cell(one: Spelling, field: str) -> str:
    said = getattr(one, field)
    said = WORDS.get(field, {}).get(said, said)
    return f"*{said}*" if said and one.name != "attnzoo" and field not in one.tested else said


def page() -> str:
    """The whole page."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for one in SPELLINGS.values():
        cells = (
            f"`{one.name}` {one.version}".strip(),
            one.date or ("" if one.name == "attnzoo" else "read"),
            *(_cell(one, field) for field in FIELDS),
            one.note,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
