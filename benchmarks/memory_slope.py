"""Peak memory against length: does every sub-quadratic variant stay linear, forward and backward?

    python benchmarks/memory_slope.py [--output benchmarks/results/memory_slope.jsonl]

One head of 64, float32, CPU; peaks are sums of the allocator's events beyond the inputs. The slope
is the exponent p of peak ∝ n^p between the two longest lengths: 1 is linear, 2 is quadratic. The
reference backend stands beside the fast one (up to the length where its n × n matrices fit), so
that the measure is seen to tell them apart.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

import attnzoo
from attnzoo.benchmarking.environment import environment
from attnzoo.benchmarking.peak_memory import peak_bytes
from attnzoo.registry import sized, spec_of

LENGTHS = (4096, 8192, 32768)
REFERENCE_LENGTHS = (1024, 2048, 4096)
OPTIONS: dict[str, list[dict[str, Any]]] = {  # beside the defaults
    "sliding_window": [{"dilation": 4}, {"sinks": 4}],
    "longformer": [{"global_tokens": 2}],
}


@dataclass(frozen=True)
class Peak:
    """Peaks in bytes, one for each length."""

    variant: str
    options: dict[str, Any]
    backend: str
    is_causal: bool
    backward: bool
    lengths: tuple[int, ...]
    bytes: tuple[int, ...]

    @property
    def slope(self) -> float:
        """Exponent of growth between the two longest lengths."""
        return math.log(self.bytes[-1] / self.bytes[-2]) / math.log(
            self.lengths[-1] / self.lengths[-2]
        )


def measure(
    variant: str, options: dict[str, Any], backend: str, is_causal: bool, backward: bool
) -> Peak:
    lengths = REFERENCE_LENGTHS if backend == "reference" else LENGTHS
    peaks = []
    for length in lengths:
        attention = attnzoo.build(
            variant, heads=1, head_dim=64, backend=backend, **options, **sized(variant, length)
        )
        q, k, v = (torch.randn(1, 1, length, 64, requires_grad=backward) for _ in range(3))

        def run(attention=attention, q=q, k=k, v=v) -> None:
            out = attention(q, k, v, is_causal=is_causal)
            if backward:
                out.sum().backward()

        with torch.set_grad_enabled(backward):
            peaks.append(peak_bytes(run))
    return Peak(variant, options, backend, is_causal, backward, lengths, tuple(peaks))


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of every variant against length.")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/memory_slope.jsonl")
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=attnzoo.names(),
        choices=attnzoo.names(),
        metavar="NAME",
        help="default: all",
    )
    settings = parser.parse_args()
    output: Path = settings.output
    output.parent.mkdir(parents=True, exist_ok=True)
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    print(
        f"{'variant':32}{'backend':11}{'form':15}{'pass':18}"
        f"{'MiB at the longest length':>28}{'slope':>8}"
    )
    with output.open("w") as file:
        for variant in settings.variants:
            kinds = product(
                [{}, *OPTIONS.get(variant, [])],
                spec_of(variant).forms,
                (False, True),
                ("auto", "reference"),
            )
            for options, is_causal, backward, backend in kinds:
                torch.manual_seed(0)
                peak = measure(variant, options, backend, is_causal, backward)
                file.write(
                    json.dumps(
                        {**asdict(peak), "slope": round(peak.slope, 3), "environment": where}
                    )
                    + "\n"
                )
                file.flush()
                form, which = (
                    "causal" if is_causal else "bidirectional",
                    "forward+backward" if backward else "forward",
                )
                reached = f"{peak.bytes[-1] / 2**20:,.0f} at {peak.lengths[-1]:,}"
                shown = " ".join([variant, *(f"{key}={value}" for key, value in options.items())])
                print(
                    f"{shown:32}{backend:11}{form:15}{which:18}{reached:>28}{peak.slope:8.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
