"""A of every variant beside exact attention's, as docs/figures/zoo/NAME.png:

    python -m docs.zoo_pictures [NAME ...]

One text of 64 tokens in which words come again goes through a layer with fixed weights; options are
small enough for the length.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.fidelity.comparison_rows import HeatMap
from attnzoo.layers.multihead import MultiheadAttention
from attnzoo.registry import names, options_of, sized, spec_of
from attnzoo.report.heatmaps import heat_map_figure

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "figures" / "zoo"
LENGTH, WIDTH, HEADS, WORDS, LOUD = 64, 64, 2, 9, 1.9
#: Options that would hide nothing at this length.
SMALL: dict[str, Any] = {
    "window": 8,
    "window_size": 8,
    "block_size": 4,
    "chunk_size": 8,
    "top_k": 3,
    "stride": 8,
    "rank": 8,
    "num_landmarks": 8,
    "num_features": 32,
    "compressed_size": 4,
    "compressed_stride": 4,
}
#: Where an option of this name counts something else.
OWN: dict[str, dict[str, Any]] = {
    "indexed": {"top_k": 16, "block_size": 1},
    "xattention": {"stride": 4},
}


def text() -> Tensor:
    """(1, LENGTH, WIDTH): words drawn from a few, each with a place of its own added faintly."""
    generator = torch.Generator().manual_seed(5)
    words = torch.randn(WORDS, WIDTH, generator=generator)
    drawn = torch.randint(WORDS, (LENGTH,), generator=generator)
    return LOUD * (words[drawn] + 0.2 * torch.randn(LENGTH, WIDTH, generator=generator))[None]


def drawn(name: str) -> HeatMap:
    """A of one head of a layer, causal where the variant can be."""
    spec = spec_of(name)
    taken = {option.name: option.default for option in options_of(name)}
    options = {
        key: value
        for key, value in SMALL.items()
        if key in taken and isinstance(taken[key], int) and not isinstance(taken[key], bool)
    }
    options |= OWN.get(name, {})
    torch.manual_seed(0)
    layer = MultiheadAttention(
        WIDTH,
        HEADS,
        batch_first=True,
        attention=name,
        attention_options={**options, **sized(name, LENGTH)},
        rotary=True,
    ).eval()
    x = text()
    with torch.no_grad():
        _, weights = layer(x, x, x, is_causal=spec.causal, average_attn_weights=False)
    assert weights is not None
    return HeatMap(
        label=" ".join([name, *(f"{key}={value}" for key, value in options.items())]),
        model="a layer",
        is_causal=spec.causal,
        length=LENGTH,
        layer="layer 0",
        head=0,
        query_range=(0, LENGTH),
        key_range=(0, LENGTH),
        weights=weights[0, 0].tolist(),
    )


def main(chosen: list[str]) -> None:
    """Draw the pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in chosen or names():
        other = drawn(name)
        maps = [other] if name == "standard" else [_exact(other.is_causal), other]
        heat_map_figure(maps).savefig(FOLDER / f"{name}.png", dpi=110)


def _exact(is_causal: bool) -> HeatMap:
    torch.manual_seed(0)
    layer = MultiheadAttention(WIDTH, HEADS, batch_first=True, rotary=True).eval()
    x = text()
    with torch.no_grad():
        _, weights = layer(x, x, x, is_causal=is_causal, average_attn_weights=False)
    assert weights is not None
    fields = {"model": "a layer", "is_causal": is_causal, "length": LENGTH, "layer": "layer 0"}
    return HeatMap(
        label="standard",
        **fields,  # type: ignore[arg-type]
        head=0,
        query_range=(0, LENGTH),
        key_range=(0, LENGTH),
        weights=weights[0, 0].tolist(),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
