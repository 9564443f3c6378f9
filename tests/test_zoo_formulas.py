"""The formulas on the pages of the zoo give what `attn.cost` gives."""

from __future__ import annotations

from dataclasses import replace
from math import log2
from typing import Any

import pytest

import attnzoo
from attnzoo.engines.engine import Shape
from attnzoo.registry import options_of, sized
from docs.zoo_formulas import FORMULAS, formulas

#: Options other than the defaults, those of every letter of a formula among them.
OTHERS: dict[str, dict[str, Any]] = {
    "flash": {"block_size": 32},
    "sliding_window": {"window": 100, "sinks": 4},
    "longformer": {"window": 100, "global_tokens": 3},
    "bigbird": {
        "block_size": 32,
        "num_window_blocks": 5,
        "num_random_blocks": 2,
        "num_global_blocks": 1,
    },
    "sparse_transformer": {"stride": 32},
    "reformer": {"num_hashes": 2, "chunk_size": 32, "num_buckets": 16},
    "moba": {"block_size": 32, "top_k": 5},
    "xattention": {"block_size": 64, "max_blocks": 5, "stride": 16},
    "indexed": {"top_k": 100, "index_dim": 16, "index_heads": 6},
    "nsa": {"block_size": 32, "top_k": 4, "window_size": 100},
    "linformer": {"rank": 64},
    "nystromformer": {"num_landmarks": 32, "iterations": 4},
    "performer": {"num_features": 128},
}
#: Without an indexer the formula's letters stand for nothing.
CASES = [(name, {}) for name in FORMULAS if name != "indexed"] + list(OTHERS.items())
HEADS = 2


def value(formula: str, **letters: float) -> float:
    """The number that a formula stands for."""
    signs = {"·": "*", "−": "-", "²": "**2", "³": "**3", "log₂": "log2"}
    for printed, written in signs.items():
        formula = formula.replace(printed, written)
    return eval(formula, {"log2": log2, **letters})


def choosing_macs(attn: attnzoo.Attention, shape: Shape) -> int:
    engine: Any = attn.engine
    if hasattr(engine, "hashing"):
        return engine.hashing.macs(shape.heads * (shape.query_length + shape.key_length))
    return getattr(engine, "selected", engine).selector.macs(shape)


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda value: value if isinstance(value, str) else len(value)
)
def test_a_formula_is_what_cost_says(name: str, options: dict[str, Any], head_dim: int) -> None:
    found = FORMULAS[name]
    defaults = {one.name: one.default for one in options_of(name)}
    chosen = {**defaults, "heads": HEADS, **options}
    for length in (1024, 2048, 4096):
        attn = attnzoo.build(name, heads=HEADS, head_dim=head_dim, **sized(name, length), **options)
        is_causal = attn.spec.causal
        cost = attn.cost(1, length, is_causal=is_causal)
        letters: dict[str, float] = {"n": length, "d": head_dim}
        for letter, meaning in found.symbols.items():
            letters[letter] = value(meaning, **chosen, **letters)
        shape = Shape(1, HEADS, HEADS, head_dim, length, length, is_causal)
        counted = [
            (found.support, cost.support_macs),
            (found.computed, cost.macs),
            (found.state, cost.state_elements),
            (found.choosing, choosing_macs(attn, shape) if found.choosing else 0),
        ]
        for formula, number in counted:
            if formula:
                assert HEADS * value(formula, **letters) == pytest.approx(number, rel=1e-12)
        assert bool(found.state) == bool(cost.state_elements)


def test_every_variant_here_has_its_formulas() -> None:
    assert sorted(FORMULAS) == sorted(attnzoo.names())
    for name, found in FORMULAS.items():
        assert found.support or found.computed, name


def test_a_section_names_its_letters_and_says_where_it_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, table = formulas("moba")
    assert told == (
        "The same in formulas, for one head (causal): n tokens, d = `head_dim`, b = `block_size` "
        "and p = `top_k`. These hold where n is a multiple of b and at least p·b."
    )
    assert "| MACs of choosing the keys | `d·n²/b` |" in table
    assert not list(formulas("a variant of another package"))
    monkeypatch.setitem(FORMULAS, "moba", replace(FORMULAS["moba"], at_most=True))
    assert "| MACs that A's support needs, at most |" in list(formulas("moba"))[1]
