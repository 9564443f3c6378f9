"""Draw the figures of the pages of results that have no script of their own, from the recorded
rows:

    python -m benchmarks.draw_results
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib

from attnzoo.report.axes import log_axis
from attnzoo.report.style import INK, PALETTE, RC, new_figure, styles
from attnzoo.report.training.train_tables import full_title
from attnzoo.results.result_file import read_rows
from attnzoo.training.summary import summed_up
from attnzoo.training.training_rows import Row as TrainingRow
from benchmarks.readme import files, gates, peers
from benchmarks.readme.files import read_lines

FOLDER = files.ROOT / "docs" / "figures"
Lines = Mapping[str, Mapping[int, float]]
Bars = Mapping[str, Mapping[str, float]]


def gates_speed() -> Bars:
    """Times faster than SDPA, forward and with the backward pass, beside what the MACs promise."""
    found: dict[str, dict[str, float]] = {}
    for row in read_lines("gates.jsonl"):
        is_shown = row["variant"] not in ("sdpa", "standard") and row["segments"] == 1
        if is_shown and row["length"] == gates.LENGTH and row["phase"] in gates.PHASES:
            measured = row["sdpa_seconds"] / row["seconds"]
            bars = found.setdefault(row["variant"], {})
            bars[row["phase"]] = measured
            bars["by MACs"] = measured / row["kept_speedup"]
    order = (*gates.PHASES, "by MACs")
    return {name: {one: bars[one] for one in order} for name, bars in found.items()}


def peers_speed() -> Bars:
    """The time of the fastest other library over ours, at 4,096 tokens."""
    rows = [row for row in read_lines("peers.jsonl") if row["length"] == 4096]
    found: dict[str, dict[str, float]] = {}
    for group, title in peers.GROUPS.items():
        for phase, is_causal in peers.PASSES:
            own = [
                row
                for row in rows
                if (row["group"], row["phase"], row["is_causal"]) == (group, phase, is_causal)
            ]
            best = peers.fastest_others(own).get(4096) if own else None
            if best is not None:
                said = f"{phase}, causal" if is_causal else phase
                found.setdefault(title, {})[said] = best["seconds"] / best["ours_seconds"]
    return found


def scores(file: str) -> Callable[[], Bars]:
    """Test scores of one study, the bars of a contender side by side for each problem."""

    def found() -> Bars:
        problems = summed_up(read_rows(files.RESULTS / "tasks" / f"{file}.jsonl", TrainingRow))
        bars: dict[str, dict[str, float]] = {}
        for problem in problems:
            title = full_title(problem, problems)
            for one in problem.contenders:
                if one.test is not None and not one.is_baseline:
                    bars.setdefault(one.label, {})[title] = one.test
        return bars

    return found


def short_inputs() -> Lines:
    """Median time over the faster of SDPA and SDPA under a mask, forward, one sample."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in read_lines("short_inputs.jsonl"):
        if row["phase"] == "forward" and row["batch_size"] == 1:
            by_length = found.setdefault(row["variant"], {})
            by_length.setdefault(row["length"], []).append(row["over_faster"][0])
    return {
        name: {length: statistics.median(ratios) for length, ratios in by_length.items()}
        for name, by_length in found.items()
    }


def compiled_gain() -> Bars:
    """The time of `tiles` over that of `native`, 4,096 tokens, causal and not."""
    found: dict[str, dict[str, float]] = {}
    for row in read_lines("native.jsonl"):
        if row["length"] == 4096:
            said = f"{row['phase']}, causal" if row["is_causal"] else row["phase"]
            found.setdefault(row["variant"], {})[said] = row["gain"][0]
    return found


def memory_slope() -> Lines:
    """Peak bytes of a forward by the fast backend, causal where the variant can be."""
    rows = [row for row in read_lines("memory_slope.jsonl") if row["backend"] == "auto"]
    found: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["is_causal"]):
        if not row["backward"]:
            found[row["variant"]] = dict(zip(row["lengths"], row["bytes"], strict=True))
    return found


def draw_bars(bars: Bars, label: str, output: Path, *, are_ratios: bool = False) -> None:
    """Groups of horizontal bars; those of ratios begin at 1, on a logarithmic axis."""
    kinds = list(dict.fromkeys(kind for one in bars.values() for kind in one))
    height = 0.8 / len(kinds)
    with matplotlib.rc_context({**RC, "figure.facecolor": "white"}):
        figure = new_figure(7.5, 0.9 + 0.2 * len(bars) * max(2, len(kinds)))
        axes = figure.subplots()
        for number, kind in enumerate(kinds):
            shown = {place: one[kind] for place, one in enumerate(bars.values()) if kind in one}
            places = [place + (number + 0.5) * height - 0.4 for place in shown]
            start = 1 if are_ratios else 0
            widths = [value - start for value in shown.values()]
            axes.barh(places, widths, height, start, label=kind, color=PALETTE[number])
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        if are_ratios:
            log_axis(axes, "x", [x for one in bars.values() for x in one.values()], "{:g}".format)
            axes.axvline(1, color=INK, linewidth=1)
        if len(kinds) > 1:
            figure.legend(loc="outside lower center", ncols=min(len(kinds), 3))
        figure.savefig(output, dpi=100)


def draw_lines(
    lines: Lines, label: str, output: Path, said: Callable[[float], str], level: float | None
) -> None:
    """A line a variant against the length; level: where a dotted line is drawn."""
    look = styles((name.split(",")[0], name) for name in lines)
    with matplotlib.rc_context({**RC, "figure.facecolor": "white"}):
        figure = new_figure(7.5, 4.6)
        axes = figure.subplots()
        for name, points in lines.items():
            axes.plot(list(points), list(points.values()), label=name, **look[name].line_options())
        log_axis(axes, "x", [n for one in lines.values() for n in one], lambda n: f"{n:,.0f}")
        log_axis(axes, "y", [y for one in lines.values() for y in one.values()], said)
        if level is not None:
            axes.axhline(level, color=INK, linestyle=":", linewidth=1.4)
        axes.set_xlabel("length, tokens")
        axes.set_ylabel(label)
        figure.legend(loc="outside right upper")
        figure.savefig(output, dpi=100)


def write(folder: Path = FOLDER) -> None:
    """Draw all of them."""
    faster = "times as fast as SDPA, causal, 4,096 tokens"
    draw_bars(gates_speed(), faster, folder / "gates.png", are_ratios=True)
    others = "times as long as this library takes, the fastest other, 4,096 tokens"
    draw_bars(peers_speed(), others, folder / "peers.png", are_ratios=True)
    compiled = "times as fast as the backend tiles, 4,096 tokens"
    draw_bars(compiled_gain(), compiled, folder / "compiled.png", are_ratios=True)
    parity = scores("parity-study")
    draw_bars(parity(), "accuracy on parity of 64 bits", folder / "parity.png")
    characters = scores("shakespeare-cpu")
    draw_bars(
        characters(), "bits per character of Shakespeare, less is better", folder / "characters.png"
    )
    ratio = "time over exact attention's, forward"
    draw_lines(short_inputs(), ratio, folder / "short-inputs.png", "{:g}".format, 1)
    peak = "peak memory of a forward"
    draw_lines(memory_slope(), peak, folder / "memory-slope.png", lambda y: f"{y / 1e6:g} MB", None)


if __name__ == "__main__":
    write()
