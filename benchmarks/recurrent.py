"""Attention against a recurrent layer, measured: torch.nn.GRU beside attention layers of the same
width, and the length at which it gets ahead.

    python benchmarks/recurrent.py [--output benchmarks/results/recurrent.jsonl] [--figure
        docs/figures/recurrent.png] [--longest 8192]

Width 512, batch 1, float32, CPU, causal. An attention layer is MultiheadAttention with 8 heads,
projections included. Multiply-accumulates are
counted (`attnzoo.count_flops`): a GRU takes 6·n·d², an attention layer 4·n·d² for its projections
and 2·n²·d for its core, half of them causal. By counts alone exact attention is the cheaper layer
up to n = 2·d; a GRU takes its n steps one after the other, so by the clock it is not. Times are
medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: unbound, two threads may come to share one core.
os.environ.setdefault("OMP_PROC_BIND", "true")

import torch
from torch import nn

import attnzoo
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.peak_memory import peak_bytes
from attnzoo.benchmarking.timing import Timing, interleave
from attnzoo.report.style import RC, new_figure, styles

WIDTH, HEADS = 512, 8
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
VARIANTS = ("standard", "sliding_window", "linear")
GRU = "GRU"
TURN, ROUNDS = 0.05, 7  # seconds that a turn lasts at least


def layers() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Each contender as a function from (1, n, width) to the same shape."""
    recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {GRU: lambda x: recurrent(x)[0]}
    for name in VARIANTS:
        attention = attnzoo.MultiheadAttention(WIDTH, HEADS, batch_first=True, attention=name)
        found[name] = lambda x, attention=attention: attention(
            x, x, x, is_causal=True, need_weights=False
        )[0]
    return found


def macs_of(name: str, n: int) -> int:
    """Multiply-accumulates that a forward executes; of causal exact attention the half that can be
    seen."""
    x = torch.empty(1, n, WIDTH, device="meta")
    if name == GRU:
        return attnzoo.count_flops(nn.GRU(WIDTH, WIDTH, batch_first=True, device="meta"), x).macs
    cost = attnzoo.build(name, heads=HEADS, head_dim=WIDTH // HEADS).cost(1, n, is_causal=True)
    return 4 * n * WIDTH**2 + (cost.support_macs if name == "standard" else cost.macs)


def passes(
    layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, learns: bool
) -> Callable[[], None]:
    def run() -> None:
        with torch.set_grad_enabled(learns):
            out = layer(x)
        if learns:
            out.sum().backward()

    return run


def measured(contenders: dict[str, Callable[[], None]]) -> dict[str, Timing]:
    """Seconds of one pass; a short pass is repeated to fill a turn."""
    once = interleave(contenders, rounds=2)
    repeats = {name: max(1, int(TURN / once[name].seconds[-1])) for name in contenders}

    def turn(name: str) -> Callable[[], None]:
        def run() -> None:
            for _ in range(repeats[name]):
                contenders[name]()

        return run

    found = interleave({name: turn(name) for name in contenders}, rounds=ROUNDS)
    return {
        name: Timing(tuple(seconds / repeats[name] for seconds in timing.seconds))
        for name, timing in found.items()
    }


def rows(longest: int) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    contenders = layers()
    for n in (n for n in LENGTHS if n <= longest):
        for learns in (False, True):
            x = torch.randn(1, n, WIDTH, requires_grad=learns)
            calls = {name: passes(layer, x, learns) for name, layer in contenders.items()}
            for name, timing in measured(calls).items():
                low, high = timing.quartiles
                yield {
                    "layer": name,
                    "n": n,
                    "phase": "forward+backward" if learns else "forward",
                    "macs": macs_of(name, n),
                    "seconds": timing.median,
                    "quartiles": [low, high],
                    "rounds": len(timing.seconds),
                    "peak_bytes": peak_bytes(calls[name]),
                }


def crossover(found: list[dict[str, Any]], name: str, phase: str, quantity: str) -> str:
    """From which measured length on the GRU needs less than an attention layer."""

    def of(layer: str) -> dict[int, float]:
        return {
            row["n"]: row[quantity]
            for row in found
            if row["layer"] == layer and row["phase"] == phase
        }

    theirs, ours = of(GRU), of(name)
    behind = [n for n in theirs if theirs[n] >= ours[n]]
    if not behind:
        return f"at every length measured, from {min(theirs):,}"
    later = [n for n in theirs if n > max(behind)]
    return f"from {min(later):,} on" if later else f"nowhere up to {max(theirs):,}"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    with mpl.rc_context(RC):
        figure = new_figure(8, 3.4)
        looks: dict[str, dict[str, Any]] = {
            GRU: {"color": "#7f8c99", "marker": "x", "linestyle": "--"}
        }
        looks |= {
            name: style.line_options()
            for name, style in styles((name, name) for name in VARIANTS).items()
        }
        for place, (quantity, label, scale) in enumerate(
            (("macs", "multiply-accumulates, G", 1e-9), ("seconds", "time of a forward, ms", 1e3))
        ):
            axes = figure.add_subplot(1, 2, place + 1)
            for name, look in looks.items():
                line = [
                    (row["n"], row[quantity] * scale)
                    for row in found
                    if row["layer"] == name and row["phase"] == "forward"
                ]
                axes.plot(*zip(*line, strict=True), label=name, **look)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(
                [row["n"] for row in found if row["layer"] == GRU and row["phase"] == "forward"][
                    ::2
                ]
            )
            axes.xaxis.set_major_formatter(lambda n, _: f"{int(n):,}")
            axes.set_xlabel("tokens")
            axes.set_ylabel(label)
            axes.grid(visible=True, which="major")
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4
        )
        figure.savefig(path, dpi=150, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/recurrent.jsonl"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/recurrent.png"))
    parser.add_argument("--longest", type=int, default=LENGTHS[-1])
    settings = parser.parse_args()
    if settings.longest < LENGTHS[0]:
        parser.error(
            f"--longest {settings.longest} is below the shortest length, {LENGTHS[0]}; give that "
            "or more"
        )
    where, found = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32), []
    with settings.output.open("w") as file:
        for row in rows(settings.longest):
            found.append(row)
            file.write(json.dumps({**row, "environment": where}) + "\n")
            file.flush()
            print(
                f"{row['layer']:16}{row['n']:>7}  {row['phase']:18}{row['macs'] / 1e9:9.3f} "
                f"G{row['seconds'] * 1e3:10.2f} ms",
                flush=True,
            )
    for name in VARIANTS:
        print(
            f"GRU needs fewer MACs than {name} {crossover(found, name, 'forward', 'macs')}, less "
            f"time {crossover(found, name, 'forward', 'seconds')}"
        )
    draw(found, settings.figure)


if __name__ == "__main__":
    main()
