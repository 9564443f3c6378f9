"""What decoding of PaTH attention carries: all that a token brought, and the older keys turned to
where they are read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from attnzoo.call import Call
from attnzoo.engines.softmax.cache import KeyValueCache


@dataclass(frozen=True, eq=False)
class PathState:
    """Keys, values, w, β and gates of every token, as they came, so that any number of tokens can
    be taken back.

    turned: the first keys, turned to behind the last of them; a row turns its query back to there,
        through the tokens behind, and no farther. None: there are none
    """

    cache: KeyValueCache
    turned: Tensor | None = None

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
        return self.cache.held_bytes() + (0 if self.turned is None else self.turned.nbytes)

    def check_room(self, call: Call) -> None:
        self.cache.check_room(call)

    def select(self, rows: Tensor) -> PathState:
        """The state of these rows of the batch, (new_batch,) indices; a row may be taken more than
        once. Raises ValueError on rows that it does not have."""
        turned = None if self.turned is None else self.turned.index_select(0, rows)
        return PathState(self.cache.select(rows), turned)

    def crop(self, n: int) -> PathState:
        """The state without its last n tokens. Raises ValueError on more than it has."""
        cache = self.cache.crop(n)
        stays = self.turned is not None and self.turned.shape[2] <= cache.seen
        return replace(self, cache=cache, turned=self.turned if stays else None)
