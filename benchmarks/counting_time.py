"""Seconds to count one attention at 1,048,576 tokens on the meta device: the first count of a
process, and one more.

    python benchmarks/counting_time.py [--output benchmarks/results/counting_time.jsonl]

Each variant has a process of its own; importing attnzoo and building the attention stand before the
clock. The first count loads fvcore, and torch's meta kernels load its compiler. CPU seconds stand
beside those of the clock, which other processes stretch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

import attnzoo
from attnzoo.benchmarking.environment import environment

LENGTH = 2**20
ONE = """
import json, sys, time
import torch, attnzoo
from attnzoo.registry import sized

name, n = sys.argv[1], int(sys.argv[2])
spec = attnzoo.describe(name).spec
with torch.device("meta"):
    attention = attnzoo.build(name, heads=8, head_dim=64, **sized(name, n))
    q = torch.empty(1, 8, n, 64)

def count():
    clock, cpu = time.perf_counter(), time.process_time()
    macs = attnzoo.count_flops(attention, q, q, q, is_causal=spec.forms[0]).macs
    wall, used = time.perf_counter() - clock, time.process_time() - cpu
    return {"seconds": round(wall, 3), "cpu_seconds": round(used, 3)}, macs

first, macs = count()
print(json.dumps({"variant": name, "length": n, "macs": macs, "first": first, "again": count()[0]}))
"""


def timed(name: str) -> dict[str, object]:
    """One row, from a process of its own."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ONE, name, str(LENGTH)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of count_flops at 1,048,576 tokens.")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/counting_time.jsonl")
    )
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    where = environment(seed=0, device=torch.device("meta"), dtype=torch.float32)
    print(f"{'variant':16}{'first, s':>10}{'CPU':>8}{'again, s':>10}{'CPU':>8}")
    with output.open("w") as file:
        for name in attnzoo.names():
            row = timed(name)
            file.write(json.dumps({**row, "environment": where}) + "\n")
            first, again = row["first"], row["again"]
            assert isinstance(first, dict) and isinstance(again, dict)
            print(
                f"{name:16}{first['seconds']:>10}{first['cpu_seconds']:>8}{again['seconds']:>10}{again['cpu_seconds']:>8}",
                flush=True,
            )


if __name__ == "__main__":
    main()
