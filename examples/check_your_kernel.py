"""A kernel of your own, held against a variant's oracle and the rules of meaning.

The same window, written twice: once it shows one key too many, as libraries that do not count the
query's own key do; once it is right. The check shows the smallest call that tells them apart. One
rule fails for both: a NaN in a later value reaches earlier rows, since 0 · NaN is NaN.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from attnzoo.conformance import check

WINDOW = 8


def windowed(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, key_mask: Tensor | None, keys: int):
    """Softmax over the keys at a distance below `keys`, by a mask."""
    queries, length = q.shape[2], k.shape[2]
    positions = torch.arange(queries)[:, None] + length - queries
    distance = positions - torch.arange(length)
    seen = distance.abs() < keys
    if is_causal:
        seen = seen & (distance >= 0)
    seen = seen.expand(q.shape[0], 1, -1, -1)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
        v = v.masked_fill(~key_mask[:, None, :, None], 0.0)  # a NaN in the padding stays there
        k = k.masked_fill(~key_mask[:, None, :, None], 0.0)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return weights @ v


def right(q, k, v, *, is_causal=False, key_mask=None):
    """WINDOW keys, the query's own among them."""
    return windowed(q, k, v, is_causal, key_mask, WINDOW)


def one_too_many(q, k, v, *, is_causal=False, key_mask=None):
    """WINDOW keys and the query's own."""
    return windowed(q, k, v, is_causal, key_mask, WINDOW + 1)


def main(arguments: list[str] | None = None) -> None:
    """Check both, and say what was found."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ask three rules of each")
    quick = parser.parse_args(arguments).quick
    rules = ["outputs", "causality", "padding"] if quick else None
    for kernel in (one_too_many, right):
        report = check(kernel, like="sliding_window", window=WINDOW, rules=rules)
        print(f"\n{kernel.__name__}: {kernel.__doc__}")
        for found in report.findings:
            if found.status == "fails":
                print(f"  {found.rule} fails: {found.found} ({found.trial})")
        held = [found.rule for found in report.findings if found.status == "holds"]
        print(f"  holds: {', '.join(held)}")


if __name__ == "__main__":
    main()
