"""Colours, markers and lines of figures: told apart on paper, on a screen, and with every common
colour blindness."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from attnzoo.report.style import INK, MARKERS, PALETTE, styles

#: Machado, Oliveira and Fernandes (2009), table 1, severity 1: linear RGB as somebody sees it who
#: lacks one kind of cone.
SIGHT = {
    "all cones": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# Of sRGB, D65.
XYZ = torch.tensor(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
WHITE = torch.tensor([0.95047, 1.0, 1.08883])


def lab(color: str, sight: str) -> Tensor:
    """CIELAB of a colour such as "#0072b2"."""
    rgb = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (torch.tensor(SIGHT[sight]) @ linear).clamp(0, 1)
    x, y, z = (lambda t: torch.where(t > 0.008856, t.pow(1 / 3), 7.787 * t + 16 / 116))(
        XYZ @ seen / WHITE
    ).unbind()
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
def test_thirteen_colours_are_told_apart(sight: str) -> None:
    """A distance of 2.3 in CIELAB is just noticeable; thin lines need several times as much. Ink is
    the colour of exact attention."""
    assert len(PALETTE) == 12
    distances = {
        (a, b): float((lab(a, sight) - lab(b, sight)).norm())
        for a, b in combinations((INK, *PALETTE), 2)
    }
    assert min(distances.values()) > 15, min(distances, key=lambda pair: distances[pair])


def test_twenty_variants_have_looks_of_their_own() -> None:
    looks = [
        (style.color, style.marker)
        for style in styles((f"variant {i}", f"variant {i}") for i in range(20)).values()
    ]
    assert len(set(looks)) == 20 and len(set(MARKERS)) == 13


def test_what_is_not_in_the_registry_takes_a_look_that_is_free() -> None:
    shown = ["standard", "linear", "bigbird", "linear + standard", "gru"]
    looks = styles((name, name) for name in shown)
    assert len({(style.color, style.marker) for style in looks.values()}) == len(shown)
    for name in ("linear + standard", "gru"):  # which share neither
        others = [style for other, style in looks.items() if other != name]
        assert looks[name].color not in {style.color for style in others}
        assert looks[name].marker not in {style.marker for style in others}
    assert looks["bigbird"] == styles([("bigbird", "bigbird")])["bigbird"]
