"""One page a variant, docs/zoo/NAME.md, from the registry, its docstring and the result files:

    python -m docs.zoo_pages

Pictures of A are drawn by `python -m docs.zoo_pictures`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

from attnzoo.oracles import ORACLES
from attnzoo.registry import Option, build, describe, find, names, sized
from attnzoo.results.units import count, memory, ratio
from attnzoo.spec import Spec
from benchmarks.readme.regions import markdown_table
from docs.docstrings import escaped, markdown
from docs.zoo_formulas import formulas
from docs.zoo_results import claims, measured

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "zoo"
HEADS, HEAD_DIM, LENGTHS = 8, 64, (1024, 4096, 32768)
BASELINE = "standard"
FAMILIES = {
    "exact": "exact softmax",
    "dense": "all keys, other rows",
    "sparse": "some of the keys",
    "low_rank": "low rank",
    "kernel": "kernels and states",
}
#: What a variant can do, and what it is called here.
ABLE = {
    "causal": "`is_causal=True`",
    "bidirectional": "`is_causal=False`",
    "cross": "fewer or more queries than keys",
    "attn_mask": "an arbitrary `attn_mask`",
    "dropout": "dropout on the entries of A",
    "decodes": "decoding by `init_state` and `step`",
    "value_heads": "more heads of values than of keys",
}


def page(name: str) -> str:
    """The page of one variant."""
    described = describe(name)
    spec = described.spec
    return (
        "\n\n".join(
            [
                f"# {spec.title}",
                f"`{name}` · {FAMILIES[spec.family]} · {escaped(spec.complexity)}",
                f"{escaped(spec.paper)}.",
                _in_words(name),
                *([] if "\n    " in described.text else [f"```text\n{spec.equation}\n```"]),
                f"![{_caption(name)}](../figures/zoo/{name}.png)",
                markdown(described.text, [option.name for option in described.options]),
                *_try(name, spec),
                *_options(name, described.options),
                *_inputs(spec),
                *_abilities(name, spec),
                *_costs(name, spec),
                *measured(name),
                *claims(name),
                *_code(name),
            ]
        )
        + "\n"
    )


def _caption(name: str) -> str:
    """What its picture shows."""
    what = "A of exact attention" if name == BASELINE else f"A of {name}, right, beside exact A"
    return f"{what}: rows are queries, columns are keys; grey is 0, red is below 0."


def _in_words(name: str) -> str:
    """Its row of the page that lists the zoo: what A is and what decoding carries."""
    text = (FOLDER / "index.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| [`{name}`]"))
    _, _, matrix, _, _, decodes, state, _ = (cell.strip() for cell in row.split("|"))
    carried = f"Decoding carries {state}." if decodes == "yes" else "It does not decode."
    return f"A is {matrix}. {carried}"


def _try(name: str, spec: Spec) -> Iterator[str]:
    """A layer of it: inputs beside q, k and v are projected there."""
    options = ", ".join(f"{key}={value}" for key, value in sized(name, 1024).items())
    chosen = f", {options}" if options else ""
    causal = str(not spec.bidirectional)
    layer = f'64, 4, batch_first=True, attention="{name}"'
    if options:
        layer = f"\n    {layer}, attention_options=dict({options})\n"
    yield "## Use it"
    yield "\n".join(
        [
            "```python",
            "import torch, attnzoo",
            "",
            f'attn = attnzoo.build("{name}", heads=4, head_dim=16{chosen})',
            "q, k, v = (torch.randn(1, 4, 100, 16) for _ in range(3))",
            f"out = attn(q, k, v, is_causal={causal})  # (batch, heads, length, head_dim)",
            f"A = attn.weights(q, k, is_causal={causal})  # out = A @ v",
            "torch.testing.assert_close(A @ v, out, atol=1e-4, rtol=1e-4)",
            "",
            f"layer = attnzoo.MultiheadAttention({layer})",
            "x = torch.randn(1, 100, 64)",
            f"rows, _ = layer(x, x, x, is_causal={causal}, need_weights=False)",
            "```",
        ]
    )


def _options(name: str, options: tuple[Option, ...]) -> Iterator[str]:
    rows = [
        [
            f"`{one.name}`",
            f"`{one.type}`".replace("|", "\\|"),
            "required" if one.required else f"`{one.default!r}`",
        ]
        for one in options
    ]
    yield "## Options"
    yield markdown_table(["option", "type", "default"], rows)
    yield f"As the paper has them (`configs/variants/{name}.yaml`):"
    yield f"```{{literalinclude}} ../../configs/variants/{name}.yaml\n:language: yaml\n```"


def _inputs(spec: Spec) -> Iterator[str]:
    if not spec.inputs:
        return
    yield "## Inputs beside q, k and v"
    rows = [
        [
            f"`{one.name}`",
            f"({', '.join(one.names)})",
            one.dtype,
            "every call" if one.required else "optional",
            "not read" if one.padded is None else f"{one.padded:g}",
        ]
        for one in spec.inputs
    ]
    yield markdown_table(["input", "axes", "dtype", "given", "in a padded slot"], rows)


def _abilities(name: str, spec: Spec) -> Iterator[str]:
    able = [said for attribute, said in ABLE.items() if getattr(spec, attribute)]
    unable = [said for attribute, said in ABLE.items() if not getattr(spec, attribute)]
    options = sized(name, LENGTHS[0])
    engine = build(name, heads=HEADS, head_dim=HEAD_DIM, **options).engine
    yield "## What it can do"
    yield f"It takes {_listed(able, 'and')}." + (
        f" It does not take {_listed(unable, 'or')}." if unable else ""
    )
    backends = ", ".join(f"`{one}`" for one in engine.backend_names())
    yield (
        "Every variant takes padding, packed rows, grouped-query heads and any length. Backends, "
        f"in the order in which `auto` asks them: {backends}."
    )


def _listed(said: list[str], last: str) -> str:
    """In one line, with a word before the last: "a", "a and b", "a, b, and c"."""
    if len(said) < 3:
        return f" {last} ".join(said)
    return f"{', '.join(said[:-1])}, {last} {said[-1]}"


def _costs(name: str, spec: Spec) -> Iterator[str]:
    """Cost at three lengths, in the form that decoders use where there is one."""
    is_causal = spec.causal
    rows = []
    for length in LENGTHS:
        attention = build(name, heads=HEADS, head_dim=HEAD_DIM, **sized(name, length))
        exact = build("standard", heads=HEADS, head_dim=HEAD_DIM)
        cost = attention.cost(1, length, is_causal=is_causal)
        pairs = exact.cost(1, length, is_causal=is_causal).support_macs
        state = memory(cost.state_bytes) if cost.state_bytes else "-"
        grows = f"{cost.state_growth:,} B" if cost.state_growth else "0"
        rows.append(
            [
                f"{length:,}",
                count(cost.macs),
                ratio(pairs / cost.macs).replace("x", "×"),
                count(cost.support_macs),
                state,
                grows if cost.state_bytes else "-",
            ]
        )
    form = "causal" if is_causal else "not causal"
    yield "## What it costs"
    yield (
        f"By `attn.cost(1, length, is_causal={is_causal})`: one forward, batch 1, {HEADS} heads of "
        f"{HEAD_DIM}, {form}, other options at their defaults. The MAC speed-up is over the pairs "
        "that exact attention needs. A state is what decoding carries after that many tokens, in "
        "float32, and its growth is that of one token more."
    )
    headings = ["length", "MACs", "MAC speed-up", "MACs on A's support", "state", "its growth"]
    yield markdown_table(headings, rows)
    yield from formulas(name)


def _code(name: str) -> Iterator[str]:
    oracle = Path(inspect.getsourcefile(inspect.unwrap(ORACLES[name])) or "").relative_to(ROOT)
    variant = Path(inspect.getsourcefile(find(name)) or "").relative_to(ROOT)
    yield "## Read it"
    yield (
        f"The variant is [`{variant}`](../../{variant}). Its oracle, in float64 loops written from "
        f"the paper's equation, judges every backend ([`{oracle}`](../../{oracle})):"
    )
    yield f"```{{literalinclude}} ../../{oracle}\n:language: python\n```"


def write() -> None:
    """Write every page."""
    for name in names():
        (FOLDER / f"{name}.md").write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    write()
