"""A variant of the zoo at the sizes of one layer of a model: what it costs there at any length."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from attnzoo.attention import Attention, Spec
from attnzoo.cost.memory.memory import kept_bytes
from attnzoo.cost.model_sizes import TransformerModel
from attnzoo.engines.engine import Cost
from attnzoo.registry import Choice, names, options_of, spec_of

FROM_THE_MODEL = ("heads", "head_dim", "max_length")
DTYPE = torch.bfloat16
COUNTED_LENGTH = 4096  # up to which memory is counted, which takes longer with every token
SAME_SLOPE = 1.1  # lines whose slopes differ by no more are one


@dataclass(frozen=True)
class CountedVariant:
    """A choice at the heads of `model`. Costs are of one layer, for one sample
    in bf16."""

    choice: Choice
    model: TransformerModel
    _costs: dict[tuple[int, bool], Cost] = field(default_factory=dict, repr=False, compare=False)
    _kept: dict[tuple[int, bool], int] = field(default_factory=dict, repr=False, compare=False)
    _built: list[Attention] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        taken = [option for option in FROM_THE_MODEL if option in self.choice.options]
        if taken:
            raise ValueError(
                f"{self.choice.name}: leave out {' and '.join(taken)}, which the model and the "
                "length decide"
            )
        self.attention(1)

    @property
    def label(self) -> str:
        """Name and options in one line, see `Choice.label`."""
        return self.choice.label

    @property
    def spec(self) -> Spec:
        return spec_of(self.choice.name)

    def runs(self, is_causal: bool) -> bool:
        """Whether the variant can be causal, or not causal, at all."""
        return self.spec.runs(is_causal)

    def attention(self, n: int) -> Attention:
        """The variant built for up to n tokens, with the model's heads. Raises ValueError on a bad
        option."""
        sizes = {"heads": self.model.heads, "head_dim": self.model.head_dim}
        if self.spec.needs_max_length:
            return self.choice.build(**sizes, max_length=n)
        if not self._built:
            self._built.append(self.choice.build(**sizes))
        return self._built[0]

    def cost(self, n: int, is_causal: bool) -> Cost:
        """`Attention.cost` at n tokens. A variant sized by the length is built without storage, so
        that any n costs nothing."""
        if (n, is_causal) not in self._costs:
            self._costs[n, is_causal] = self._without_storage(n).cost(
                1, n, kv_heads=self.model.kv_heads, is_causal=is_causal, dtype=DTYPE
            )
        return self._costs[n, is_causal]

    def macs(self, n: int, is_causal: bool) -> int:
        """MACs that a good kernel executes: the masked half of exact attention is skipped, as
        FlashAttention does."""
        return self.cost(n, is_causal).kernel_macs

    def moved_bytes(self, n: int) -> int:
        """The least that one forward moves (`Cost.moved_bytes`)."""
        return self.cost(n, is_causal=self.spec.forms[0]).moved_bytes

    def state_bytes(self, n: int) -> int | None:
        """What one layer carries to decode token n + 1; None when the variant does not decode."""
        return self.cost(n, is_causal=True).state_bytes if self.spec.decodes else None

    def kept_bytes(self, n: int, is_causal: bool) -> int | None:
        """What one layer's forward keeps for its backward pass (`attnzoo.memory`); None when the
        variant cannot run so.

        Counted up to `COUNTED_LENGTH` tokens. Beyond, the straight line through the count there and
        at half of it, where what is kept grows by the token; None where it grows faster.
        """
        if not self.runs(is_causal) or n > self.known_length(is_causal, n):
            return None
        if n <= COUNTED_LENGTH:
            return self._counted(n, is_causal)
        beyond = n - COUNTED_LENGTH
        return self._counted(COUNTED_LENGTH, is_causal) + math.ceil(
            beyond * self._slope(COUNTED_LENGTH, is_causal)
        )

    def known_length(self, is_causal: bool, limit: int) -> int:
        """The longest sequence, up to `limit` tokens, of which `kept_bytes` is known."""
        if limit <= COUNTED_LENGTH:
            return limit
        before, last = (self._slope(n, is_causal) for n in (COUNTED_LENGTH // 2, COUNTED_LENGTH))
        return limit if last <= SAME_SLOPE * before else COUNTED_LENGTH

    def kept_bytes_per_token(self, is_causal: bool) -> float | None:
        """How `kept_bytes` grows up to `COUNTED_LENGTH` tokens."""
        return self._slope(COUNTED_LENGTH, is_causal) if self.runs(is_causal) else None

    def _slope(self, n: int, is_causal: bool) -> float:
        """Bytes a token between n / 2 and n tokens."""
        low = n // 2
        return (self._counted(n, is_causal) - self._counted(low, is_causal)) / (n - low)

    def _counted(self, n: int, is_causal: bool) -> int:
        if (n, is_causal) not in self._kept:
            model = self.model
            q, k, v = (
                torch.empty(1, heads, n, model.head_dim, dtype=DTYPE, device="meta")
                for heads in (model.heads, model.kv_heads, model.kv_heads)
            )
            attention = self._without_storage(n)
            self._kept[n, is_causal] = kept_bytes(attention, q, k, v, is_causal=is_causal)
        return self._kept[n, is_causal]

    def _without_storage(self, n: int) -> Attention:
        if not self.spec.needs_max_length:
            return self.attention(n)
        with torch.device("meta"):
            return self.attention(n).to(DTYPE)


def whole_zoo(model: TransformerModel) -> tuple[list[CountedVariant], list[str]]:
    """Every registered variant with its default options, and the names of those that cannot be
    built without being told more."""
    counted, need_options = [], []
    for name in names():
        required = [
            option.name
            for option in options_of(name)
            if option.required and option.name not in FROM_THE_MODEL
        ]
        if required:
            need_options.append(name)
        else:
            counted.append(CountedVariant(Choice(name), model))
    return counted, need_options
