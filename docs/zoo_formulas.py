"""What every variant costs, in formulas, for the pages of the zoo. `tests/test_zoo_formulas.py`
evaluates each of them and compares it with `attn.cost`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from attnzoo.engines.linear.causal.chunks import CAUSAL_CHUNK
from attnzoo.engines.linear.gated.gated_chunks import CHUNK as GATED_CHUNK
from attnzoo.engines.linear.log_linear.tree_chunks import CHUNK as TREE_CHUNK
from attnzoo.registry import spec_of
from attnzoo.variants.path.householder import CHUNK as PATH_CHUNK
from benchmarks.readme.regions import markdown_table


@dataclass(frozen=True)
class Formulas:
    """What one head costs in n tokens of width d, causal where the variant can be.

    support: MACs that the support of A needs (`Cost.support_macs`); "" where A is never formed, so
        that its support says nothing
    computed: MACs that the fast backend computes (`Cost.macs`); "" where these follow the sizes of
        its tiles
    choosing: MACs of finding which keys a row sees, where the data decide; "" elsewhere
    state: numbers that decoding carries for a key-value head after n tokens; "" where the variant
        does not decode
    symbols: what the letters beside n and d stand for, in formulas of options
    holds: of which n; "" where of all
    at_most: whether the support is what it is at most, since the data decide how many keys a row
        sees
    """

    support: str = ""
    computed: str = ""
    choosing: str = ""
    state: str = ""
    symbols: dict[str, str] = field(default_factory=dict)
    holds: str = ""
    at_most: bool = False


def _chunks(size: int) -> dict[str, str]:
    return {"c": str(size)}


_IN_CHUNKS = "n is a multiple of c and at least 3·c"
_KEYS_AND_VALUES = "2·d·n"
_ALL_PAIRS = Formulas("d·n·(n + 1)", "2·d·n²", state=_KEYS_AND_VALUES)
_TWO_MAPS = Formulas("2·d·n·(n + 1)", "4·d·n²", state=_KEYS_AND_VALUES)
#: Rows that see p blocks of b, their own among them, as far as there are so many.
_OF_BLOCKS = "d·n·(2·p·b − b + 1) − d·b²·p·(p − 1)"
_BLOCKS_HOLD = "n is a multiple of b and at least p·b"
_WINDOW_AND_FIRST = Formulas(
    "2·d·n·(w + s) − d·w·(w − 1) − d·s·(2·w + s − 1)", state="2·d·(w + s)", holds="n ≥ w + s"
)
_NO_DELTA = "n·(2·c·d + 2·d²) − c·d²"
_DELTA = "n·(4·c·d + 3·d² + (c² − 1)/3) − c·d²"

FORMULAS: dict[str, Formulas] = {
    "standard": _ALL_PAIRS,
    "sigmoid": _ALL_PAIRS,
    "forgetting": Formulas(_ALL_PAIRS.support, _ALL_PAIRS.computed, state="(2·d + 1)·n"),
    "flash": Formulas(
        _ALL_PAIRS.support,
        "d·n·(n + b)",
        state=_KEYS_AND_VALUES,
        symbols={"b": "block_size"},
        holds="n is a multiple of b",
    ),
    "path": Formulas(
        _ALL_PAIRS.support,
        "n²·(d + d²/(2·c)) + n·(7·c·d + (7·c² − 1)/3 − d²/2) − c·d·(3·c + d)",
        state="(3·d + 2)·n",
        symbols=_chunks(PATH_CHUNK),
        holds=_IN_CHUNKS,
    ),
    "differential": _TWO_MAPS,
    "differential_v2": _TWO_MAPS,
    "sliding_window": Formulas(
        _WINDOW_AND_FIRST.support,
        state=_WINDOW_AND_FIRST.state,
        symbols={"w": "window", "s": "sinks"},
        holds=_WINDOW_AND_FIRST.holds,
    ),
    "longformer": Formulas(
        _WINDOW_AND_FIRST.support,
        state=_WINDOW_AND_FIRST.state,
        symbols={"w": "window", "s": "global_tokens"},
        holds=_WINDOW_AND_FIRST.holds,
    ),
    "bigbird": Formulas(
        _OF_BLOCKS,
        state=_KEYS_AND_VALUES,
        symbols={
            "b": "block_size",
            "p": "1 + (num_window_blocks − 1)/2 + num_global_blocks + num_random_blocks",
        },
        holds=_BLOCKS_HOLD,
    ),
    "sparse_transformer": Formulas(
        "d·n·(2·l + n/l − 1) − d·l·(l − 1)",
        state=_KEYS_AND_VALUES,
        symbols={"l": "stride"},
        holds="n is a multiple of l",
    ),
    "reformer": Formulas(
        "d·p·(2·n − p + 1)",
        choosing="d·n·h·u",
        state="n·(2·d + h)",
        symbols={"h": "num_hashes", "u": "num_buckets", "p": "1 + 2·h·chunk_size"},
        holds="n ≥ p",
        at_most=True,
    ),
    "moba": Formulas(
        _OF_BLOCKS,
        choosing="d·n²/b",
        state=_KEYS_AND_VALUES,
        symbols={"b": "block_size", "p": "top_k"},
        holds=_BLOCKS_HOLD,
    ),
    "xattention": Formulas(
        _OF_BLOCKS,
        choosing="d·n²/s",
        symbols={"b": "block_size", "p": "max_blocks", "s": "stride"},
        holds=_BLOCKS_HOLD,
        at_most=True,
    ),
    "indexed": Formulas(
        "d·k·(2·n − k + 1)",
        choosing="n²·j·(i + 1)/h",
        state="n·(2·d + i/h)",
        symbols={"k": "top_k", "i": "index_dim", "j": "index_heads", "h": "heads"},
        holds="n ≥ k, `block_size` is 1 and there is an indexer",
    ),
    "nsa": Formulas(
        "d·p·(2·n − p + 1) + d·w·(2·n − w + 1) + d·n·(n/b − 1) + 2·d·n/b",
        choosing="d·n²/b",
        state=_KEYS_AND_VALUES,
        symbols={"b": "block_size", "p": "top_k·block_size", "w": "window_size"},
        holds="n is a multiple of b and at least p and w",
    ),
    "linformer": Formulas(computed="4·d·n·r", symbols={"r": "rank"}),
    "nystromformer": Formulas(
        computed="4·d·n·m + 2·d·m² + 4·t·m³", symbols={"m": "num_landmarks", "t": "iterations"}
    ),
    "linear": Formulas(
        computed="c·n·(2·d + 1) + 2·(n − c)·d·(d + 1)",
        state="d·(d + 1)",
        symbols=_chunks(CAUSAL_CHUNK),
        holds=_IN_CHUNKS,
    ),
    "cosformer": Formulas(
        computed="c·n·(3·d + 1) + 4·(n − c)·d·(d + 1)",
        state="2·d·(d + 1)",
        symbols=_chunks(CAUSAL_CHUNK),
        holds=_IN_CHUNKS,
    ),
    "performer": Formulas(
        computed="2·d·n·m + c·n·(m + d + 1) + 2·(n − c)·m·(d + 1)",
        state="m·(d + 1)",
        symbols={"m": "num_features", **_chunks(CAUSAL_CHUNK)},
        holds=_IN_CHUNKS,
    ),
    "retention": Formulas(
        computed="2·c·d·n + (n − c)·d·(2·d + 1)",
        state="d·(d + 1)",
        symbols=_chunks(CAUSAL_CHUNK),
        holds=_IN_CHUNKS,
    ),
    "lightning": Formulas(
        computed=_NO_DELTA, state="d²", symbols=_chunks(GATED_CHUNK), holds=_IN_CHUNKS
    ),
    "mamba2": Formulas(
        computed=_NO_DELTA, state="d²", symbols=_chunks(GATED_CHUNK), holds=_IN_CHUNKS
    ),
    "gla": Formulas(
        computed="n·(d·(3·c + 1)/2 + 2·d²) − c·d²",
        state="d²",
        symbols=_chunks(GATED_CHUNK),
        holds=_IN_CHUNKS,
    ),
    "deltanet": Formulas(
        computed=_DELTA, state="d²", symbols=_chunks(GATED_CHUNK), holds=_IN_CHUNKS
    ),
    "gated_deltanet": Formulas(
        computed=_DELTA, state="d²", symbols=_chunks(GATED_CHUNK), holds=_IN_CHUNKS
    ),
    "kda": Formulas(
        computed="n·(d·(3·c + 1) + 3·d² + (c² − 1)/3) − c·d²",
        state="d²",
        symbols=_chunks(GATED_CHUNK),
        holds=_IN_CHUNKS,
    ),
    "rwkv7": Formulas(
        computed="n·(d·(8·c + 2) + 5·d² + (8·c² − 2)/3) − 2·c·d²",
        state="d²",
        symbols=_chunks(GATED_CHUNK),
        holds=_IN_CHUNKS,
    ),
    "log_linear": Formulas(
        computed="n·(2·c·d + d² + d²·log₂(n/c)/2) − c·d²",
        state="d²·(1 + log₂(n))",
        symbols=_chunks(TREE_CHUNK),
        holds="n is a power of 2 and more than c",
    ),
}


def formulas(name: str) -> Iterator[str]:
    """The section of one variant's page: its formulas, and what their letters stand for."""
    found = FORMULAS.get(name)
    if found is None:
        return
    most = ", at most" if found.at_most else ""
    rows = [
        [what, f"`{formula}`"]
        for what, formula in (
            (f"MACs that A's support needs{most}", found.support),
            ("MACs of choosing the keys", found.choosing),
            ("MACs computed", found.computed),
            ("numbers in the state", found.state),
        )
        if formula
    ]
    letters = ["n tokens", "d = `head_dim`"]
    for letter, meaning in found.symbols.items():
        letters.append(
            f"chunks of {letter} = {meaning} tokens"
            if meaning.isdigit()
            else f"{letter} = `{meaning}`"
        )
    form = "causal" if spec_of(name).causal else "not causal"
    where = f" These hold where {found.holds}." if found.holds else ""
    yield (
        f"The same in formulas, for one head ({form}): {', '.join(letters[:-1])} and "
        f"{letters[-1]}.{where}"
    )
    yield markdown_table(["of one head", "formula"], rows)
