"""The two stages of the tests. The first has every rule, variant and backend; the second, marked
`thorough`, has the rest of products that are long."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest
from cases import Case

thorough = pytest.mark.thorough


def staged(*values: Any, first: bool) -> Any:
    """A parameter set of the first stage, or of the second."""
    return pytest.param(*values, id="-".join(map(_said, values)), marks=() if first else thorough)


def only(first: Collection[Any], values: Sequence[Any]) -> list[Any]:
    """All values, or tuples of them, of which those in `first` are in the first stage."""
    return [staged(*_several(value), first=value in first) for value in values]


def in_turn(rows: Sequence[Any], columns: Sequence[Any], whole: Collection[Any] = ()) -> list[Any]:
    """Every row with every column, both values or tuples of them. In the first stage each row has
    one column, the next row the next one; a row in `whole` has all of them."""
    return [
        staged(
            *_several(row),
            *_several(column),
            first=row in whole or place % len(columns) == number,
        )
        for place, row in enumerate(rows)
        for number, column in enumerate(columns)
    ]


def each_way(cases: Sequence[Case], few: Collection[Case] | None = None) -> list[Any]:
    """Every case with is_causal as it may be. In the first stage each has one direction, in turn;
    of these cases alone, where there are `few`."""
    return [
        staged(
            case,
            is_causal,
            first=number == place % len(case.spec.forms) and (few is None or case in few),
        )
        for place, case in enumerate(cases)
        for number, is_causal in enumerate(case.spec.forms)
    ]


def _several(one: Any) -> tuple[Any, ...]:
    return one if isinstance(one, tuple) else (one,)


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={one}" for name, one in value.items()) or "none"
    return str(getattr(value, "__name__", value))
