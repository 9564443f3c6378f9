"""Attention whose keys the data select, against exact attention: 16,384 causal tokens, 8 heads of
64, 2,048 visible keys, forward and forward with backward, float32, CPU.

    OMP_PROC_BIND=true python benchmarks/selected.py [--output FILE] [--length N] [--rounds N]

A contender and torch's causal SDPA take turns; `speedup` is the median over the rounds of one
round's ratio, with its quartiles. `promised` is the ratio of what both execute in
multiply-accumulates, SDPA's without the half that causality hides; `kept` is the share of it that
the clock shows. `selecting` is the share of a pass that choosing the keys takes, timed in the
same rounds. Where compiled code can choose them (`native`), the same in Python (`tiles`) follows.
Rows and gradients are compared with the reference in the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnzoo
from attnzoo.attention import Attention
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.timing import Timing, disagreement, interleave
from attnzoo.call import Call
from attnzoo.engines.native import library
from attnzoo.engines.sparse.selected.selected_softmax import SelectedSoftmax
from attnzoo.engines.sparse.selected.selection import Placed

LENGTH, HEADS, HEAD_DIM, ROUNDS = 16384, 8, 64, 7
CHECKED = 64  # rows at a place
CONTENDERS: list[tuple[str, dict[str, Any]]] = [
    ("moba", {"block_size": 256, "top_k": 8}),
    ("moba", {"block_size": 512, "top_k": 4}),
    ("indexed", {"block_size": 256, "top_k": 2048, "index_heads": 1, "index_dim": 32}),
    ("indexed", {"block_size": 256, "top_k": 2048, "index_heads": 4, "index_dim": 32}),
]


def passes(attend: Callable[..., Tensor], inputs: list[Tensor], learns: bool) -> Callable[[], None]:
    """One pass, whose gradients are thrown away."""

    def run() -> None:
        with torch.set_grad_enabled(learns):
            out = attend(*inputs)
        if learns:
            torch.autograd.grad(out, inputs, torch.ones_like(out))

    return run


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def quotients(of: Timing, to: Timing) -> tuple[float, list[float]]:
    """The median of the rounds' ratios, and its quartiles."""
    each = [a / b for a, b in zip(of.seconds, to.seconds, strict=True)]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return middle, [low, high]


def index_inputs(options: dict[str, Any], length: int) -> dict[str, Tensor]:
    """What an indexer of these options is given."""
    if "index_heads" not in options:
        return {}
    heads, width = options["index_heads"], options["index_dim"]
    return {
        "q_index": torch.randn(1, heads, length, width),
        "k_index": torch.randn(1, 1, length, width),
        "w_index": torch.randn(1, heads, length),
    }


def mistake(
    attention: Attention, inputs: list[Tensor], own: dict[str, Tensor], learns: bool
) -> str | None:
    """What is wrong in the last and the middle rows, and their gradients, beside the reference, or
    None."""
    reference = copy.deepcopy(attention)
    reference.backend, length = "reference", inputs[0].shape[2]
    whole = Call(*inputs, is_causal=True, inputs=own, declared=attention.spec.inputs)
    with torch.set_grad_enabled(learns):
        out = attention(*inputs, is_causal=True, **own)
        for end in (length // 2 + 1, length):
            rows = slice(end - CHECKED, end)
            part = whole.select(queries=rows, keys=slice(0, end))
            wanted = reference(part.q, part.k, part.v, is_causal=True, **part.inputs)
            pairs = [("rows", out[:, :, rows].detach(), wanted.detach())]
            if learns:
                upstream = torch.randn_like(wanted)
                found = torch.autograd.grad(out[:, :, rows], inputs, upstream, retain_graph=True)
                pairs += zip(
                    "qkv", found, torch.autograd.grad(wanted, inputs, upstream), strict=True
                )
            for what, one, other in pairs:
                if (wrong := disagreement(one, other)) is not None:
                    return f"{what} off by {wrong}"
    return None


def promised(attention: Attention, length: int) -> float:
    """How many times as many multiply-accumulates exact attention takes."""
    standard = attnzoo.build("standard", heads=HEADS, head_dim=HEAD_DIM)
    costs = [one.cost(1, length, is_causal=True) for one in (standard, attention)]
    return costs[0].kernel_macs / costs[1].kernel_macs


def backends(name: str) -> list[str]:
    """What a contender runs on: compiled code first, where it chooses the keys."""
    can_choose = name == "indexed" and library.cannot_compile() is None
    return ["native", "tiles"] if can_choose else ["tiles"]


def rows(
    name: str, options: dict[str, Any], backend: str, length: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """One for each phase."""
    attention = attnzoo.build(name, heads=HEADS, head_dim=HEAD_DIM, backend=backend, **options)
    inputs = [torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3)]
    assert isinstance(attention.engine, SelectedSoftmax)  # all are of blocks
    selector: Any = attention.engine.selector  # compiled code is an indexer's alone
    select = selector.select_natively if backend == "native" else selector.select
    own = index_inputs(options, length)
    declared = attention.spec.inputs
    placed = Placed.of(
        Call(*(x.detach() for x in inputs), is_causal=True, inputs=own, declared=declared)
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, is_causal=True, **own)

    for learns in (False, True):
        passes(attend, inputs, learns)()
        wrong = mistake(attention, inputs, own, learns)
        contenders = {
            "exact": passes(exact, inputs, learns),
            "selected": passes(attend, inputs, learns),
            "selecting": lambda: select(placed),
        }
        timings = interleave(contenders, rounds=rounds)
        speedup, quartiles = quotients(timings["exact"], timings["selected"])
        yield {
            "variant": name,
            "options": options,
            "n": length,
            "phase": "forward+backward" if learns else "forward",
            "ran": attention.last_backend,
            "mistake": wrong,
            "seconds": {who: timing.median for who, timing in timings.items()},
            "speedup": speedup,
            "quartiles": quartiles,
            "promised": promised(attention, length),
            "kept": speedup / promised(attention, length),
            "selecting": quotients(timings["selecting"], timings["selected"])[0],
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/selected.jsonl"))
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    print(
        f"{'contender':36}{'phase':18}{'speed-up':>9}{'quartiles':>14}{'promised':>10}{'kept':>6}"
        f"{'selecting':>11}  rows"
    )
    with arguments.output.open("w") as file:
        contenders = [(*one, backend) for one in CONTENDERS for backend in backends(one[0])]
        for name, options, backend in contenders:
            for row in rows(name, options, backend, arguments.length, arguments.rounds):
                file.write(json.dumps({**row, "environment": where}) + "\n")
                file.flush()
                low, high = row["quartiles"]
                label = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
                print(
                    f"{label:36}{row['phase']:18}{row['speedup']:8.2f}×{low:7.2f}-{high:.2f}"
                    f"{row['promised']:9.2f}×{row['kept']:6.2f}{row['selecting']:10.0%}  "
                    f"{row['mistake'] or 'right'} ({row['ran']})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
