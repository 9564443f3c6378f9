"""What decoding of PaTH attention carries: all that a token brought, and the older keys turned to
where they are read from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.engine import accumulation_dtype
from attnzoo.engines.linear.gated.tokens import REMOVAL_KEY, STRENGTH
from attnzoo.engines.softmax.cache import KeyValueCache
from attnzoo.variants.path.path_step import TurnedKeys


@dataclass(frozen=True, eq=False)
class PathState:
    """Keys, values, w, β and gates of every token, as they came, so that any number of tokens can
    be taken back.

    keys: as the last query reads them; None: they must be turned first
    """

    cache: KeyValueCache
    keys: TurnedKeys | None = None

    @property
    def far(self) -> Tensor | None:
        """The first keys, turned to behind the last of them; None: there are none."""
        return None if self.keys is None or not self.keys.far.shape[2] else self.keys.far

    @property
    def k(self) -> Tensor:
        return self.cache.k

    @property
    def v(self) -> Tensor:
        return self.cache.v

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        return self.cache.inputs

    @property
    def batch_size(self) -> int:
        return self.cache.batch_size

    @property
    def seen(self) -> int:
        return self.cache.seen

    @property
    def max_length(self) -> int | None:
        return self.cache.max_length

    def elements(self) -> int:
        """Numbers that the next query can read, without turned copies of them."""
        return self.cache.elements()

    def held_bytes(self) -> int:
        """Bytes of the tensors, turned keys and reserve included."""
        held = [] if self.keys is None else self.keys.tensors()
        return self.cache.held_bytes() + sum(x.nbytes for x in held)

    def check_room(self, call: Call) -> None:
        self.cache.check_room(call)

    def select(self, rows: Tensor) -> PathState:
        """The state of these rows of the batch, (new_batch,) indices; a row may be taken more than
        once. Raises ValueError on rows that it does not have."""
        cache = self.cache.select(rows)
        return PathState(cache, None if self.keys is None else self.keys.select(rows))

    def crop(self, n: int) -> PathState:
        """The state without its last n tokens. Raises ValueError on more than it has."""
        cache, far = self.cache.crop(n), self.far
        if not n:
            return self
        stays = far is not None and far.shape[2] <= cache.seen
        return PathState(cache, turned(cache, far) if stays else None)


def turned(cache: KeyValueCache, far: Tensor | None) -> TurnedKeys:
    """The keys of a cache as the last query reads them. far: the first ones, if these are turned
    already."""
    k, w, beta = _of_tokens(cache, slice(0 if far is None else far.shape[2], None))
    return TurnedKeys.of(k, w, beta, far)


def with_last(cache: KeyValueCache, keys: TurnedKeys | None) -> TurnedKeys:
    """The keys of a cache, of which `keys` are all but the last one."""
    if keys is None:
        k, w, beta = _of_tokens(cache, slice(-1))
        keys = TurnedKeys.of(k, w, beta, None)
    k, w, beta = _of_tokens(cache, slice(-1, None))
    return keys.with_token(k, w, beta)


def _of_tokens(cache: KeyValueCache, which: slice) -> Iterator[Tensor]:
    """k, w and β of some tokens, in the precision of sums."""
    inputs, dtype = cache.inputs, accumulation_dtype(cache.k.dtype)
    for x in (cache.k, inputs[REMOVAL_KEY.name], inputs[STRENGTH.name]):
        yield x[:, :, which].to(dtype)
