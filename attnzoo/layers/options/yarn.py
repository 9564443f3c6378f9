"""YaRN: the turns of rotary embedding slowed down for sequences longer than a model was trained
on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.arguments import check_flag, check_positive, nearest


@dataclass(frozen=True)
class Yarn:
    """Rates of turning between those of the trained length and those stretched to a longer one.

        rate_i' = (1 - r_i) · rate_i + r_i · rate_i / factor

    r_i rises from 0, for pairs that turn more than beta_fast times within the trained length, to 1,
    for those that turn less than beta_slow times.

    factor: how many times longer sequences become
    original_length: tokens of the sequences that the model was trained on
    beta_fast, beta_slow: turns within these
    attention_factor: multiplies cosines and sines; None: 0.1 · ln(factor) + 1
    truncate: whether the pairs between which r_i rises are brought to whole numbers

    Source: Peng et al., YaRN, 2023, arXiv:2309.00071, sections 3.2 to 3.4.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        given = self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if given is None else given

    def slowed(self, rates: Tensor, base: float) -> Tensor:
        """rates: (pairs,) of turning a token, base^(-i / pairs)."""
        pairs = rates.shape[0]
        first, last = (self._pair(turns, base, pairs) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        slots = torch.arange(pairs, device=rates.device, dtype=rates.dtype)
        rise = ((slots - first) / (last - first or 0.001)).clamp(0, 1)
        return rates / self.factor * rise + rates * (1 - rise)

    def _pair(self, turns: float, base: float, pairs: int) -> float:
        """The pair, a fraction, that turns so many times within the trained length."""
        return pairs * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(base)


def yarn_of(options: Any) -> Yarn | None:
    """What the option `yarn` of a rotary embedding asks for: a mapping of `Yarn`'s arguments, or
    None. Raises ValueError on anything else."""
    if options is None:
        return None
    known = tuple(Yarn.__dataclass_fields__)
    if not isinstance(options, Mapping):
        raise ValueError(
            f"rotary yarn={options!r} must be a mapping, such as "
            "{'factor': 40.0, 'original_length': 4096}"
        )
    for name in options:
        if name not in known:
            raise ValueError(
                f"rotary yarn has no option {name!r}{nearest(name, known)}; its options are "
                f"{', '.join(known)}"
            )
    for name in ("factor", "original_length"):
        if name not in options:
            raise ValueError(f"rotary yarn={options!r} lacks {name}; give it, such as 40")
    yarn = Yarn(**options)
    check_positive("yarn original_length", yarn.original_length)
    check_flag("yarn truncate", yarn.truncate)
    _check_number("factor", yarn.factor, 1.0)
    for name in ("beta_fast", "beta_slow"):
        _check_number(name, getattr(yarn, name), 0.0)
    if yarn.attention_factor is not None:
        _check_number("attention_factor", yarn.attention_factor, 0.0)
    return yarn


def _check_number(name: str, value: Any, least: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value < math.inf or value == 0:
        raise ValueError(
            f"rotary yarn {name}={value!r} must be a number "
            f"{'of at least 1' if least else 'above 0'}, such as 32.0"
        )
