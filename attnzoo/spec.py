"""What a variant says of itself: its `Spec`, and the `Input`s it takes beside q, k and v."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

#: exact: softmax itself. dense: every visible key weighs something, in rows of another kind.
Family = Literal["exact", "dense", "sparse", "low_rank", "kernel"]
#: Names of a call's own arguments, which no input can have.
TAKEN = ("q", "k", "v", "key_mask", "attn_mask", "is_causal", "segments", "state")
#: The axes that an input may have. width: of q and k; value_width: of v; and those of `FREE`.
AXES = (
    "batch",
    "heads",
    "kv_heads",
    "queries",
    "keys",
    "width",
    "value_width",
    "distances",
    "levels",
    "index_heads",
    "index_key_heads",
    "index_width",
)
#: Axes whose size is a call's own choice. distances: of any odd size, from keys that stand so far
#: before the query to those as far after it; levels: as many as the length asks for; the others: of
#: an indexer, which has heads and a width of its own.
FREE = {
    "distances": "2 · reach + 1",
    "levels": "any",
    "index_heads": "any",
    "index_key_heads": "any",
    "index_width": "any",
}


@dataclass(frozen=True)
class Input:
    """What a variant takes beside q, k and v: a tensor whose axes have names.

    From this alone follow the check of a call, what a padded slot holds, what a NaN reaches, how
    decoding, tensor parallelism and engines slice it, and what a layer must project for it.

    name: as an argument of a call.
    axes: names of `AXES` in the tensor's order, "batch kv_heads keys"; batch first, where there is
        a length.
    dtype: its kind; a floating one may be more precise than q.
    padded: what a padded slot holds in its place; None: what stands there is never read.
    required: whether every call must bring it.
    like: "q", "k" or "v", where it is another one of these: of its dtype, and made by a layer with
        a projection that begins as a copy of that one's, see `Attention.own_projection`.
    activation: brings any number into its range, as log_sigmoid makes a decay. A layer projects
        every floating input along the length: by a linear layer and this, or by what
        `Attention.input_projection` says.
    sized: whether a layer projects it only where `Attention.input_sizes` has the sizes of its free
        axes; without it the attention does as well.
    """

    name: str
    axes: str
    dtype: Literal["float", "bool", "int"] = "float"
    padded: float | None = None
    required: bool = False
    like: Literal["q", "k", "v"] | None = None
    activation: Callable[[Tensor], Tensor] | None = None
    sized: bool = False
    names: tuple[str, ...] = field(init=False, repr=False, compare=False)  # the axes one by one

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier() or self.name in TAKEN:
            raise ValueError(
                f"an input cannot be called {self.name!r}: give a Python name that is none of "
                f"{', '.join(TAKEN)}"
            )
        if not isinstance(self.axes, str):
            raise ValueError(
                f"the input {self.name} has the axes {self.axes!r}; give names in one string, such "
                'as "batch kv_heads keys"'
            )
        object.__setattr__(self, "names", tuple(self.axes.split()))
        if self.dtype not in ("float", "bool", "int") or self.like not in (None, "q", "k", "v"):
            raise ValueError(
                f"the input {self.name} has dtype={self.dtype!r} and like={self.like!r}; dtype is "
                "float, bool or int, and like is q, k, v or None"
            )
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"the input {self.name} names an axis twice: {self.axes!r}")
        unknown = [axis for axis in self.names if axis not in AXES]
        if unknown:
            raise ValueError(
                f"the input {self.name} has the axis {unknown[0]!r}; axes are {', '.join(AXES)}"
            )
        if self.has_length and self.names[0] != "batch":
            raise ValueError(
                f"the input {self.name} has a length, so its first axis must be batch; got "
                f"{self.axes!r}"
            )
        if self.padded is not None and "keys" not in self.names:
            raise ValueError(
                f"the input {self.name} has padded={self.padded} and no axis of keys to be padded"
            )

    @property
    def has_length(self) -> bool:
        """Whether it has an entry for every token."""
        return "queries" in self.names or "keys" in self.names

    @property
    def has_heads(self) -> bool:
        """Whether every head has its own."""
        return "heads" in self.names or "kv_heads" in self.names

    @property
    def is_projected(self) -> bool:
        """Whether a layer has a linear projection for it alone: of a token, not of a pair."""
        return self._is_of_tokens and not self.sized

    def is_projected_by(self, sizes: Collection[str]) -> bool:
        """Whether a layer projects it, around an attention whose `input_sizes` have these axes."""
        free = [axis for axis in self.names if axis in FREE]
        return self.is_projected or (self._is_of_tokens and all(axis in sizes for axis in free))

    @property
    def _is_of_tokens(self) -> bool:
        of_pairs = "queries" in self.names and "keys" in self.names
        return self.has_length and not of_pairs and self.dtype == "float" and self.like is None


@dataclass(frozen=True)
class Spec:
    """What a variant is and what it can do. A call outside it raises `UnsupportedError`.

    equation: one line, row by row. complexity: time and memory in the sequence length n.
    exact: without the inputs, A is softmax's own on its support. bidirectional: runs without
    is_causal. cross: query_length may differ from key_length. value_heads: v may have a multiple of
    k's heads, and consecutive heads of v, of which each has its own inputs, share one of k.
    inputs: what a call may or must bring beside q, k and v.
    data_dependent: which keys a row sees depends on the queries and keys; `Cost.support_macs` is
    then the most that it can be.
    """

    name: str
    title: str
    paper: str
    equation: str
    complexity: str
    family: Family
    exact: bool
    causal: bool = True
    bidirectional: bool = True
    cross: bool = True
    attn_mask: bool = False
    dropout: bool = False
    decodes: bool = True
    needs_max_length: bool = False
    value_heads: bool = False
    data_dependent: bool = False
    inputs: tuple[Input, ...] = ()

    def __post_init__(self) -> None:
        if not all(isinstance(one, Input) for one in self.inputs):
            raise ValueError(f"{self.name} has inputs={self.inputs!r}; give an Input for each")
        known = [one.name for one in self.inputs]
        if len(set(known)) < len(known):
            raise ValueError(f"{self.name} declares two inputs of one name: {', '.join(known)}")

    def runs(self, is_causal: bool) -> bool:
        """Whether calls of this kind are inside the spec."""
        return self.causal if is_causal else self.bidirectional

    @property
    def forms(self) -> tuple[bool, ...]:
        """is_causal of every kind of call inside the spec."""
        return tuple(is_causal for is_causal in (False, True) if self.runs(is_causal))

    @property
    def has_gates(self) -> bool:
        """Whether a layer around it projects inputs for it. Without them it is another attention,
        and with them it must be trained, so that q and k alone do not say what it is."""
        return any(one.is_projected for one in self.inputs)

    def takes(self, name: str) -> bool:
        """Whether a call may bring the input of this name."""
        return any(one.name == name for one in self.inputs)


def registered() -> list[Spec]:
    """The specs of all registered variants."""
    return _registry()


def with_spec(able: Callable[[Spec], bool]) -> list[str]:
    """Names of the registered variants whose spec is so, for errors that say what to use
    instead."""
    return [spec.name for spec in registered() if able(spec)]


def ask(registry: Callable[[], list[Spec]]) -> None:
    """Take the answer of `registered` from here: the registry, which this file must not import."""
    global _registry
    _registry = registry


_registry: Callable[[], list[Spec]] = list
