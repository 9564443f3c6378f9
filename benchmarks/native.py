"""The backend `native`, compiled tiles and recurrences, beside the backend in Python and exact
attention; 12 heads of 64, float32, CPU.

    OMP_PROC_BIND=true python -m benchmarks.native {tiles,recurrences} [--output FILE]
        [--rounds N] [--lengths N ...] [--variants VARIANT ...]

All contenders take turns; a ratio is the median over the rounds of one round's ratio, with its
quartiles. `gain` is the time of the backend in Python, `beside`, over that of `native`,
`over_exact` the time of `native` over SDPA's, and `kept` the share of the MACs' speed-up that the
clock shows, where causal SDPA counts for its visible half. Rows are compared with the reference,
and gradients with those of the backend in Python, in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnzoo
from attnzoo.attention import Attention
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.timing import disagreement, interleave
from benchmarks.selected import passes, quotients
from benchmarks.short_inputs import HEAD_DIM, HEADS, SPARSE, Setting, gates, mistake

#: By what is compiled: the backend in Python, and the variants with their options.
KINDS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "tiles": (
        "tiles",
        {
            label: SPARSE[label]
            for label in ("sliding_window", "sliding_window, sinks", "bigbird", "longformer")
        },
    ),
    "recurrences": (
        "chunked",
        {
            "linear": {},
            "retention": {},
            "cosformer": {"max_length": 16384},
            "performer": {},
            **{name: {} for name in ("mamba2", "gla", "deltanet", "gated_deltanet", "kda")},
            "rwkv7": {},
        },
    ),
}
FILES = {"tiles": "native.jsonl", "recurrences": "native_recurrences.jsonl"}
LENGTHS, ROUNDS, BUDGET = (128, 256, 512, 1024, 4096, 16384), 9, 4.0
LAID_OUT = {"tiles": 4096, "recurrences": 1024}  # tokens up to which A is laid out to be compared


def rows(
    kind: str, label: str, length: int, is_causal: bool, rounds: int
) -> Iterator[dict[str, Any]]:
    """One for each phase."""
    name = label.split(",")[0]
    beside, variants = KINDS[kind]
    options = variants[label]
    inputs = [torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3)]

    def build(backend: str) -> Attention:
        return attnzoo.build(name, heads=HEADS, head_dim=HEAD_DIM, backend=backend, **options)

    def calling(attention: Attention) -> Callable[..., Tensor]:
        return lambda q, k, v, *given: attention(
            q, k, v, is_causal=is_causal, **dict(zip(gated, given, strict=True))
        )

    attentions = {backend: build(backend) for backend in ("native", beside)}
    gated = gates(attentions["native"], Setting(1, length, is_causal, is_padded=False))
    inputs += [x.requires_grad_() for x in gated.values()]
    ways = {backend: calling(attention) for backend, attention in attentions.items()}
    wrong = _mistake(kind, attentions["native"], ways, inputs, {"is_causal": is_causal, **gated})
    cost = attentions["native"].cost(1, length, is_causal=is_causal)
    exact_cost = attnzoo.build("standard", heads=HEADS, head_dim=HEAD_DIM).cost(
        1, length, is_causal=is_causal
    )
    promised = exact_cost.kernel_macs / cost.macs
    for learns in (False, True):
        contenders = {key: passes(way, inputs, learns) for key, way in ways.items()}
        contenders["exact"] = passes(partial(_exact, is_causal=is_causal), inputs[:3], learns)
        timings = interleave(
            contenders,
            rounds=rounds if length > 512 else 3 * rounds,
            warmups=2,
            budget=BUDGET,
        )
        exact, native = timings["exact"], timings["native"]
        speedup, spread = quotients(exact, native)
        yield {
            "variant": label,
            "options": options,
            "length": length,
            "is_causal": is_causal,
            "phase": "forward+backward" if learns else "forward",
            "mistake": wrong,
            "seconds": {key: timing.median for key, timing in timings.items()},
            "beside": beside,
            "gain": quotients(timings[beside], native),
            "over_exact": quotients(native, exact),
            "kept": (speedup / promised, [one / promised for one in spread]),
        }


def _exact(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def _mistake(
    kind: str,
    attention: Attention,
    ways: dict[str, Callable[..., Tensor]],
    inputs: list[Tensor],
    call: dict[str, Any],
) -> str | None:
    """What is wrong with rows of `native` beside the reference, or gradients beside those of the
    backend in Python."""
    found = {name: way(*inputs) for name, way in ways.items()}
    sent = torch.randn_like(found["native"])
    gradients = [torch.autograd.grad(out, inputs, sent) for out in found.values()]
    reasons = (disagreement(*pair) for pair in zip(*gradients, strict=True))
    if inputs[0].shape[2] > LAID_OUT[kind]:
        return next(filter(None, (disagreement(*found.values()), *reasons)), None)
    of_rows = mistake(attention, inputs[:3], call, found["native"])
    return next(filter(None, (of_rows, *reasons)), None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=list(KINDS), help="what is compiled")
    parser.add_argument("--variants", nargs="+", help="labels, as printed; all by default")
    parser.add_argument("--output", type=Path, help="a file of benchmarks/results by default")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    arguments = parser.parse_args()
    kind: str = arguments.kind
    torch.manual_seed(0)
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    directions = (False, True) if kind == "tiles" else (True,)
    output = arguments.output or Path("benchmarks/results", FILES[kind])
    with output.open("w") as file:
        for label in arguments.variants or KINDS[kind][1]:
            for length, is_causal in itertools.product(arguments.lengths, directions):
                for row in rows(kind, label, length, is_causal, arguments.rounds):
                    file.write(json.dumps({**row, "environment": where}) + "\n")
                    file.flush()
                    print(line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    said = " ".join(
        f"{key} {row[key][0]:5.2f} ({row[key][1][0]:.2f}-{row[key][1][1]:.2f})"
        for key in ("gain", "over_exact", "kept")
    )
    return (
        f"{row['variant']:22} {row['length']:6} {'causal' if row['is_causal'] else '      '} "
        f"{row['phase'][-8:]:8} {said}  {row['mistake'] or 'right'}"
    )


if __name__ == "__main__":
    main()
