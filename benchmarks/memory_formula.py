"""Memory that a training forward holds against the closed form, `Cost.kept_bytes`: how far is the formula from the allocator?

    python benchmarks/memory_formula.py [--output benchmarks/results/memory_formula.jsonl] [--lengths 1024 4096 ...]

Two heads of 64, float32, CPU; peaks are sums of the allocator's events beyond the inputs. The formula says what autograd holds
after the forward; q, k and v are taken off, since they are there before, and the output is added where autograd holds another. The
forward's ratio is its peak over that. Forward and backward: the same, and the gradients of q, k, v and the output. A ratio above 1 is
what operators need while they run, and in no formula.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import attnzoo
from attnzoo import Attention
from attnzoo.bench.memory import peak_bytes
from attnzoo.environment import environment
from attnzoo.registry import spec_of

LENGTHS = (1024, 4096, 16384, 65536)
QUADRATIC_LENGTHS = (1024, 4096, 16384)  # where the time is quadratic, so that the study ends
HEADS, HEAD_DIM = 2, 64


def measured(attention: Attention, n: int, is_causal: bool, backward: bool) -> int:
    """Peak bytes of a forward that records for its backward pass, or of both."""
    q, k, v = (torch.randn(1, HEADS, n, HEAD_DIM, requires_grad=True) for _ in range(3))
    upstream = torch.randn(1, HEADS, n, HEAD_DIM)

    def run() -> object:
        out = attention(q, k, v, is_causal=is_causal)
        return out.backward(upstream) if backward else out

    return peak_bytes(run)


def rows(name: str, is_causal: bool, lengths: tuple[int, ...]) -> list[dict[str, object]]:
    """One for each length; none where the variant has no closed form."""
    found = []
    for n in lengths:
        sized = {"max_length": n} if spec_of(name).needs_max_length else {}
        attention = attnzoo.build(name, heads=HEADS, head_dim=HEAD_DIM, **sized)
        cost = attention.cost(1, n, is_causal=is_causal)
        if cost.kept_bytes is None:
            return []
        tensor = HEADS * n * HEAD_DIM * 4
        own_output = tensor if spec_of(name).family == "sparse" else 0  # pieces are held, and their join is the output
        held = cost.kept_bytes - 3 * tensor + own_output
        gradients = 3 * tensor + 4 * cost.parameters
        peaks = {"forward": (measured(attention, n, is_causal, False), held), "both": (measured(attention, n, is_causal, True), held + gradients)}
        row: dict[str, object] = {"variant": name, "is_causal": is_causal, "length": n, "kept_bytes": cost.kept_bytes}
        for which, (peak, formula) in peaks.items():
            row |= {f"{which}_peak": peak, f"{which}_formula": formula, f"{which}_ratio": round(peak / formula, 4)}
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Allocator peaks against the closed form of what is kept.")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/memory_formula.jsonl"))
    parser.add_argument("--lengths", type=int, nargs="+", default=None)
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    where = environment(seed=0, device=torch.device("cpu"), dtype=torch.float32)
    torch.manual_seed(0)
    print(f"{'variant':16}{'form':15}{'length':>8}{'kept, MiB':>12}{'forward':>10}{'both':>8}")
    with arguments.output.open("w") as file:
        for name in attnzoo.names():
            spec = spec_of(name)
            lengths = tuple(arguments.lengths or (QUADRATIC_LENGTHS if "n²" in spec.complexity else LENGTHS))
            for is_causal in [form for form, able in ((False, spec.bidirectional), (True, spec.causal)) if able]:
                for row in rows(name, is_causal, lengths):
                    file.write(json.dumps({**row, "environment": where}) + "\n")
                    file.flush()
                    form, kept = "causal" if is_causal else "bidirectional", row["kept_bytes"]
                    assert isinstance(kept, int)
                    print(
                        f"{name:16}{form:15}{row['length']:>8,}{kept / 2**20:>12,.1f}{row['forward_ratio']:>10}{row['both_ratio']:>8}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
