"""What is said of how a library spells attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Spelling:
    """How a library spells what a call has. "" is what it has no word for, or what is not known.

    name, version: of the library or function
    arguments: the first ones in their order
    scale: factor of the scores where none is given; given: one has to be
    layout: axes of q, k and v
    window_keys: keys that a causal window of w shows, the query's own included, beyond w
    alignment: where queries stand when there are fewer of them than keys and the call is causal
    hidden_row: what a row is that sees nothing
    mask: what a mask of keys means
    decay: the form of a gate of the state
    state: axes of a recurrent state behind batch and heads
    state_dtype: of the state, of half-precision tensors
    l2_norm: of queries and keys
    note: what else differs
    tested: the fields that were found by asking the library itself, on a CPU, in this version, as
        `tests/test_speakers.py` does; all others were read in its documentation
    date: when, year-month-day
    """

    name: str
    version: str
    layout: str = "batch heads length width"
    window_keys: int | None = None
    alignment: Literal["first", "last", "refused", ""] = ""
    hidden_row: str = ""
    mask: Literal["True = attend", "True = hidden", "1 = attend", "added", ""] = ""
    decay: Literal["natural logarithm", "logarithm to 2", "factor", ""] = ""
    state: Literal["width value_dim", "value_dim width", ""] = ""
    state_dtype: Literal["float32", "as q", ""] = ""
    l2_norm: str = ""
    arguments: str = ""
    scale: Literal["1/√width", "1", "given", ""] = ""
    note: str = ""
    tested: tuple[str, ...] = ()
    date: str = ""
