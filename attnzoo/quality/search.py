"""The cheapest mix of attentions that stays within a tolerance of exact: greedy by change per saved
MAC, checked on another text.

1. Every choice was tried in every layer alone; each trial is a point (MACs saved, change), the
   change being its distance from exact on the text to choose by. A layer's useful choices are
   those on the lower convex hull of its points and of (0, 0), exact attention.
2. A move takes a layer from one of its useful choices to the next, which saves more. All moves
   are put in order of change per MAC saved; on a hull the moves of one layer stand in their order.
3. From the mix found for the next smaller tolerance (at first: exact everywhere), as many moves
   from the front are tried together as their changes, added, leave room for. Doubling and bisection
   then find how many can be made before the change of the whole mix, measured on the text to check
   against, exceeds the tolerance. The move that breaks it is dropped and the search goes on behind
   it, until no move is left or the evaluations are spent. Whatever was found is a mix that was
   measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from attnzoo.quality.mixes import Mix
from attnzoo.registry import Choice


@dataclass(frozen=True)
class Trial:
    """A choice alone in one layer.

    saved: MACs of one sequence, against exact attention.
    change: how far from exact, 0 or more.
    """

    layer: int
    choice: Choice
    saved: int
    change: float


@dataclass(frozen=True)
class Move:
    """To use a choice in a layer from now on.

    change: how much more than with what stood there.
    price: change per MAC saved.
    """

    layer: int
    choice: Choice
    change: float
    price: float


def moves(trials: Iterable[Trial]) -> list[Move]:
    """The moves in order of price, each layer's with rising savings."""
    by_layer: dict[int, list[Trial]] = {}
    for trial in trials:
        if trial.saved > 0:
            by_layer.setdefault(trial.layer, []).append(trial)
    found: list[Move] = []
    for layer, points in sorted(by_layer.items()):
        saved, change = 0, 0.0
        while ahead := [point for point in points if point.saved > saved]:
            best = min(
                ahead,
                key=lambda point: ((point.change - change) / (point.saved - saved), -point.saved),
            )
            more = best.change - change
            found.append(Move(layer, best.choice, more, more / (best.saved - saved)))
            saved, change = best.saved, best.change
    return sorted(found, key=lambda move: move.price)


def cheapest(
    waiting: list[Move],
    change_of: Callable[[Mix], float],
    limit: float,
    evaluations: int,
    start: Mix | None = None,
) -> tuple[dict[int, Choice], list[Move]]:
    """The mix found, and the moves that were not made.

    change_of: measured change of a whole mix.
    limit: the most that it may be.
    start: a mix known to be within the limit. At most `evaluations` mixes are measured.
    """
    mix, dropped, left, room = dict(start or {}), [], evaluations, limit
    while waiting and left:
        # So many moves from the front fit; so many were seen not to.
        fits, breaks = (0, len(waiting) + 1)
        while breaks - fits > 1 and left:
            seen = breaks <= len(waiting)
            tried = (
                (fits + breaks) // 2
                if seen
                else min(2 * fits or _expected(waiting, room), len(waiting))
            )
            left -= 1
            change = change_of(_after(mix, waiting[:tried]))
            if change <= limit:
                fits, room = tried, limit - change
            else:
                breaks = tried
        mix = _after(mix, waiting[:fits])
        found_the_break = breaks - fits == 1
        dropped += waiting[fits : fits + found_the_break]
        waiting = waiting[fits + found_the_break :]
    return mix, dropped + waiting


def _expected(waiting: list[Move], room: float) -> int:
    """How many moves from the front have changes that add up to no more than `room`; one at
    least."""
    sums = itertools.accumulate(move.change for move in waiting)
    return max(1, sum(1 for _ in itertools.takewhile(lambda total: total <= room, sums)))


def _after(mix: Mix, made: Iterable[Move]) -> dict[int, Choice]:
    return {**mix, **{move.layer: move.choice for move in made}}
