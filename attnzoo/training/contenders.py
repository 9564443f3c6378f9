"""What is trained on a task: a variant in every layer, several in turns, or a recurrent network."""

from __future__ import annotations

from dataclasses import dataclass

from attnzoo.arguments import nearest
from attnzoo.registry import Choice, ParseChoice, names

GRU = "gru"  # torch.nn.GRU in the place of attention: the baseline without any


@dataclass(frozen=True)
class Contender:
    """What is trained.

    parts: layer i has part i, and again from the first when there are more layers than parts.
    """

    parts: tuple[Choice, ...]

    @property
    def label(self) -> str:
        """Such as "linear", or "linear + standard" where layers take turns."""
        return " + ".join(part.label for part in self.parts)

    def layers(self, count: int) -> list[Choice]:
        """The part of each layer. Raises ValueError when the parts do not come out even."""
        if count % len(self.parts):
            raise ValueError(
                f"{self.label} has {len(self.parts)} parts and the model layers={count}, no "
                "multiple; name a part for each"
            )
        return [self.parts[layer % len(self.parts)] for layer in range(count)]


def parse_contender(text: str, parse_variant: ParseChoice) -> Contender:
    """The contender of PART[+PART...], a part being gru or what `parse_variant` reads. Raises
    ValueError."""
    return Contender(tuple(_part(part.strip(), parse_variant) for part in text.split("+")))


def _part(text: str, parse_variant: ParseChoice) -> Choice:
    if text == GRU:
        return Choice(GRU)
    name = text.partition(":")[0]
    if name == GRU:
        raise ValueError(f"{text}: {GRU} has no options; it has the model's width")
    if name not in names():
        known = [*names(), GRU]
        raise ValueError(
            f"unknown attention {name!r}{nearest(name, known)}; the zoo has "
            f"{', '.join(names())}, and beside it there is {GRU}"
        )
    return parse_variant(text)
