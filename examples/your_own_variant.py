"""A variant of your own: softmax over the first block of keys and the block of the query.

A selector says which blocks a row sees; masks, padding, packed rows, decoding, gradients, costs,
layers and swaps follow.
"""

from __future__ import annotations

import argparse

import torch

import attnzoo
from attnzoo.conformance import check
from attnzoo.engines.sparse.selected.selected_softmax import SelectedSoftmax
from attnzoo.engines.sparse.selected.selection import Selection, Selector


class FirstAndOwn(Selector):
    """The first block of keys, and the block that the query stands in."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def select(self, placed):
        own = placed.positions[:, None, :, None] // self.block_size
        first = torch.where(own > 0, 0, -1)  # -1: none; a block is named once
        return Selection(torch.cat([first, own], -1).expand(placed.call.q.shape[0], -1, -1, -1))

    def width(self, key_blocks):
        return 2

    def macs(self, shape):
        return 0

    def elementwise(self, shape):
        return 0


@attnzoo.register
class FirstAndOwnBlock(attnzoo.Attention):
    """Softmax over the first block of keys and the query's own."""

    spec = attnzoo.Spec(
        name="first_and_own",
        title="First block and own",
        paper="this example",
        equation="softmax over the keys of two blocks",
        complexity="O(n·B) time",
        family="sparse",
        exact=True,
    )

    def __init__(self, heads: int, head_dim: int, *, block_size: int = 16, backend: str = "auto"):
        super().__init__(heads, head_dim, SelectedSoftmax(FirstAndOwn(block_size)), backend=backend)


def main(arguments: list[str] | None = None) -> None:
    """Build it, look at A, decode, check the rules, and put it into a layer and a model."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ask fewer rules")
    quick = parser.parse_args(arguments).quick
    torch.manual_seed(0)

    attn = attnzoo.build("first_and_own", heads=4, head_dim=16)
    q, k, v = (torch.randn(1, 4, 100, 16) for _ in range(3))
    out = attn(q, k, v, is_causal=True)
    weights = attn.weights(q, k, is_causal=True)
    seen = (weights[0, 0, 99] > 0).nonzero().flatten().tolist()
    print(f"row 99 sees {len(seen)} keys: {seen[0]} to {seen[15]} and {seen[16]} to {seen[-1]}")

    state = attn.init_state(batch_size=1)
    rows, state = attn.step(q[:, :, :90], k[:, :, :90], v[:, :, :90], state)
    more, state = attn.step(q[:, :, 90:], k[:, :, 90:], v[:, :, 90:], state)
    difference = (torch.cat([rows, more], 2) - out).abs().max()
    print(f"decoding gives the same rows, to {float(difference):.1e}")

    cost, exact = (
        one.cost(1, 4096, is_causal=True) for one in (attn, attnzoo.build("standard", 4, 16))
    )
    print(f"4,096 tokens take {cost.macs / exact.support_macs:.1%} of exact attention's MACs")

    rules = ["causality", "padding"] if quick else None
    report = check(attn, rules=rules, heads=4, head_dim=16)
    held = [one for one in report.findings if one.status == "holds"]
    print(f"{len(held)} rules hold, {sum(one.status == 'fails' for one in report.findings)} fail")

    encoder = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True), 2
    ).eval()
    attnzoo.swap(encoder, "first_and_own", block_size=8)
    print(f"an encoder that was swapped answers {tuple(encoder(torch.randn(2, 50, 64)).shape)}")


if __name__ == "__main__":
    main()
