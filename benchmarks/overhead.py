"""What the module costs beside what it does: `standard` against SDPA called directly, and every
variant without its engine at 64 tokens.

    python benchmarks/overhead.py [--output benchmarks/results/overhead.jsonl] [--longest N]

Batch 1, 8 heads of 64, float32, CPU. The ratio of `standard` to SDPA is the median over interleaved
rounds of the ratio of the two times of one round. The overhead is the time of a forward whose
engine hands back v at once: what the module adds to the bare engine, that is the checks of the
arguments and the look for bad numbers in the past, with inputs that take gradients and without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

# Before torch is imported: unbound, two threads may come to share one core.
os.environ.setdefault("OMP_PROC_BIND", "true")

import torch
import torch.nn.functional as F
from torch import Tensor

import attnzoo
from attnzoo.attention import Attention
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.timing import Timing, interleave
from attnzoo.registry import sized, spec_of

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SHORT = 64  # tokens where the overhead is measured
TURN = 0.02  # seconds that a turn lasts at least
ROUNDS, LONG_ROUNDS, SHORT_ROUNDS, SHORT_REPEATS = 15, 5, 25, 200
TARGETS = {"standard against SDPA": 1.03, "overhead": 40e-6}

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def passes(attend: Attend, length: int, learns: bool, repeats: int) -> Callable[[], None]:
    """So many forwards, or forwards with backwards, on one set of inputs."""
    q, k, v = (
        torch.randn(
            1, 8, length, 64, generator=torch.Generator().manual_seed(seed), requires_grad=learns
        )
        for seed in range(3)
    )
    direction = torch.ones_like(q)

    def run() -> None:
        for _ in range(repeats):
            out = attend(q, k, v)
            if learns:
                torch.autograd.grad(out, (q, k, v), direction)

    def infer() -> None:
        with torch.no_grad():
            run()

    return run if learns else infer


def in_turns(
    one: Attend, other: Attend, length: int, learns: bool, rounds: int
) -> tuple[Timing, Timing]:
    """Seconds of a pass of each, one number a round."""
    once = interleave({"one": passes(one, length, learns, 1)}, rounds=2)["one"].seconds[-1]
    repeats = max(1, int(TURN / once))
    found = interleave(
        {
            name: passes(attend, length, learns, repeats)
            for name, attend in (("one", one), ("other", other))
        },
        rounds=rounds,
    )
    one_time, other_time = (
        Timing(tuple(seconds / repeats for seconds in found[name].seconds))
        for name in ("one", "other")
    )
    return one_time, other_time


def built(variant: str, length: int) -> Attention:
    return attnzoo.build(variant, heads=8, head_dim=64, **sized(variant, length)).eval()


def hollow(variant: str) -> Attention:
    """A variant whose engine does nothing."""
    attention = built(variant, SHORT)
    attention.attend = lambda call, backend, state=None: (call.v, "none", None)
    return attention


def standard_rows(longest: int) -> Iterator[dict[str, object]]:
    for length in (length for length in LENGTHS if length <= longest):
        for learns in (False, True):
            for is_causal in (False, True):
                attention = built("standard", length)
                ours, direct = in_turns(
                    lambda q, k, v, attention=attention, is_causal=is_causal: attention(
                        q, k, v, is_causal=is_causal
                    ),
                    lambda q, k, v, is_causal=is_causal: F.scaled_dot_product_attention(
                        q, k, v, is_causal=is_causal
                    ),
                    length,
                    learns,
                    ROUNDS if length <= 2048 else LONG_ROUNDS,
                )
                ratio = statistics.median(
                    mine / theirs for mine, theirs in zip(ours.seconds, direct.seconds, strict=True)
                )
                yield _row(
                    "standard against SDPA",
                    "standard",
                    length,
                    learns,
                    is_causal,
                    ours,
                    direct,
                    ratio,
                )


def overhead_rows() -> Iterator[dict[str, object]]:
    for variant in attnzoo.names():
        for learns in (False, True):
            for is_causal in spec_of(variant).forms:
                attention = hollow(variant)
                q, k, v = (torch.randn(1, 8, SHORT, 64, requires_grad=learns) for _ in range(3))

                def turn(
                    attention=attention, q=q, k=k, v=v, is_causal=is_causal, learns=learns
                ) -> None:
                    with torch.set_grad_enabled(learns):
                        for _ in range(SHORT_REPEATS):
                            attention(q, k, v, is_causal=is_causal)

                taken = interleave({"turn": turn}, rounds=SHORT_ROUNDS)["turn"]
                ours = Timing(tuple(seconds / SHORT_REPEATS for seconds in taken.seconds))
                yield _row("overhead", variant, SHORT, learns, is_causal, ours, None, ours.median)


def _row(
    what: str,
    variant: str,
    length: int,
    learns: bool,
    is_causal: bool,
    ours: Timing,
    bare: Timing | None,
    result: float,
) -> dict[str, object]:
    return {
        "what": what,
        "variant": variant,
        "length": length,
        "phase": ("forward+backward" if bare else "forward, recording") if learns else "forward",
        "is_causal": is_causal,
        "seconds": ours.median,
        "bare_seconds": None if bare is None else bare.median,
        "rounds": len(ours.seconds),
        "result": result,
        "target": TARGETS[what],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/overhead.jsonl"))
    parser.add_argument(
        "--longest",
        type=int,
        default=LENGTHS[-1],
        help="longest length of standard against SDPA; 0 leaves it out",
    )
    settings = parser.parse_args()
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    with settings.output.open("w") as file:
        for row in chain(overhead_rows(), standard_rows(settings.longest)):
            file.write(json.dumps({**row, "environment": where}) + "\n")
            form = "causal" if row["is_causal"] else "not causal"
            shown = (
                f"{float(str(row['result'])) * 1e6:6.1f} µs"
                if row["what"] == "overhead"
                else f"{row['result']:6.3f}x"
            )
            print(
                f"{row['what']:22} {row['variant']:16}{row['length']:>7}  "
                f"{row['phase']:19}{form:11}{shown}",
                flush=True,
            )


if __name__ == "__main__":
    main()
