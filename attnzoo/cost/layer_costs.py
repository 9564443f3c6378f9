"""A variant of the zoo at the sizes of one layer of a model: what it costs there at any length."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.autograd.graph import saved_tensors_hooks

from attnzoo.attention import Attention, Spec
from attnzoo.cost.model_sizes import TransformerModel
from attnzoo.engines.engine import Cost
from attnzoo.registry import Choice, names, options_of, spec_of

FROM_THE_MODEL = ("heads", "head_dim", "max_length")
DTYPE = torch.bfloat16
# Long enough that the kept bytes of every variant grow by a constant a token.
MEASURED_LENGTHS = (2048, 4096)
# As above, where a closed form is evaluated, which takes milliseconds.
CLOSED_LENGTHS = (2**16, 2**17)


@dataclass(frozen=True)
class CountedVariant:
    """A choice at the heads of `model`. Costs are of one layer, for one sample
    in bf16."""

    choice: Choice
    model: TransformerModel
    _costs: dict[tuple[int, bool], Cost] = field(default_factory=dict, repr=False, compare=False)
    _saved: dict[tuple[int, bool], int] = field(default_factory=dict, repr=False, compare=False)
    _built: dict[int, Attention] = field(default_factory=dict, repr=False, compare=False)

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

    def attention(self, n: int, heads: int | None = None) -> Attention:
        """The variant built for up to n tokens, by default with the model's heads. Raises
        ValueError on a bad option."""
        heads = heads or self.model.heads
        if self.spec.needs_max_length:
            return self.choice.build(heads, self.model.head_dim, max_length=n)
        if heads not in self._built:
            self._built[heads] = self.choice.build(heads, self.model.head_dim)
        return self._built[heads]

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
        """What one layer's forward keeps for its backward pass, by the fast pure-torch backend;
        None when the variant cannot run so.

        `Cost.kept_bytes`; where that is not known, measured through autograd, and None beyond
        `MEASURED_LENGTHS`.
        """
        if not self.runs(is_causal) or n > self.counted_length(is_causal, n):
            return None
        return self._measured(n, is_causal)

    def counted_length(self, is_causal: bool, limit: int) -> int:
        """The longest sequence, up to `limit` tokens, of which `kept_bytes` is known."""
        closed = self.cost(1, is_causal).kept_bytes is not None
        return limit if closed else min(limit, MEASURED_LENGTHS[1])

    def kept_bytes_per_token(self, is_causal: bool) -> float | None:
        """How `kept_bytes` grows in the end."""
        if not self.runs(is_causal):
            return None
        low, high = self._lengths(is_causal)
        return (self._measured(high, is_causal) - self._measured(low, is_causal)) / (high - low)

    def _lengths(self, is_causal: bool) -> tuple[int, int]:
        """Two lengths between which what is kept grows as it does beyond."""
        return MEASURED_LENGTHS if self.cost(1, is_causal).kept_bytes is None else CLOSED_LENGTHS

    def _measured(self, n: int, is_causal: bool) -> int:
        if (n, is_causal) not in self._saved:
            known = self.cost(n, is_causal).kept_bytes
            self._saved[n, is_causal] = self._saved_bytes(n, is_causal) if known is None else known
        return self._saved[n, is_causal]

    def _saved_bytes(self, n: int, is_causal: bool) -> int:
        """Storage that autograd holds after one forward: of one group of query heads with its key
        head, times the key heads."""
        group = self.model.heads // self.model.kv_heads
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            attention = self.attention(n, heads=group)
            q = torch.randn(1, group, n, self.model.head_dim, dtype=DTYPE, requires_grad=True)
            k, v = (
                torch.randn(1, 1, n, self.model.head_dim, dtype=DTYPE, requires_grad=True)
                for _ in "kv"
            )
        own = {
            tensor.untyped_storage().data_ptr()
            for tensor in (*attention.parameters(), *attention.buffers())
        }
        held: dict[int, torch.UntypedStorage] = {}

        def hold(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage
            return tensor

        with saved_tensors_hooks(hold, lambda tensor: tensor):
            attention(q, k, v, is_causal=is_causal)
        return self.model.kv_heads * sum(
            storage.nbytes() for pointer, storage in held.items() if pointer not in own
        )

    def _without_storage(self, n: int) -> Attention:
        if not self.spec.needs_max_length:
            return self.attention(n)
        with torch.device("meta"):
            return self.attention(n)


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
