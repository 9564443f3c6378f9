"""A transformers cache whose layers carry the states of `Attention.step` instead of keys and
values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.engines.engine import State
from attnzoo.integrations.huggingface.attention_function import STATE_LAYER
from attnzoo.integrations.huggingface.choice import IMPLEMENTATION
from attnzoo.integrations.huggingface.masks.interface_masks import SUBMODULE
from attnzoo.integrations.huggingface.projected_inputs import key_heads

NEW_CACHE = "make a new cache with attnzoo.state_cache(model)"


class StateLayer(CacheLayerMixin):
    """One layer's decoding state. `update` hands the new keys and values on as they are, and the
    model's attention then calls `step`."""

    supports_early_init = False
    is_croppable = True

    def __init__(self, module: Any, attention: Attention, is_sliding: bool) -> None:
        super().__init__()
        self.module = module
        self.attention = attention
        # Whether the model's own cache has a window here, which decides the mask it asks for
        self.is_sliding = is_sliding
        self.state: State | None = None
        self.waiting = False  # keys were handed on that no step has taken

    def __deepcopy__(self, memo: dict[int, Any]) -> StateLayer:
        """A state is a value, so that a copy may share it; the model is not copied."""
        copied = StateLayer(self.module, self.attention, self.is_sliding)
        copied.state, copied.is_initialized, copied.waiting = (
            self.state,
            self.is_initialized,
            self.waiting,
        )
        return copied

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch_size = key_states.shape[0]
        kv_heads = key_heads(self.attention, key_states)
        self.state = self.attention.init_state(
            batch_size, kv_heads=kv_heads, dtype=key_states.dtype, device=key_states.device
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if (
            getattr(self.module, SUBMODULE, None) is not self.attention
            or self.module.config._attn_implementation != IMPLEMENTATION
        ):
            raise ValueError(
                "the model's attention was swapped again, or back, since this cache was made; "
                f"{NEW_CACHE}"
            )
        if self.waiting:
            raise ValueError(
                "a forward with this cache stopped before its end, and only some layers have read "
                f"its tokens; {NEW_CACHE}"
            )
        if self.state is None:
            self.lazy_initialization(key_states, value_states)
        self.waiting = True
        setattr(key_states, STATE_LAYER, self)
        return key_states, value_states

    def check_reader(self, attention: Attention | None, is_causal: bool) -> None:
        """Raise UnsupportedError when another attention reads the keys than the one that they were
        handed to."""
        if attention is not self.attention:
            raise UnsupportedError(
                f"{type(self.module).__name__} attends to another layer's keys, whose state it "
                "cannot read; generate with transformers' own cache"
            )
        if not is_causal:
            raise UnsupportedError(
                "a state knows the tokens so far, so attention with is_causal=False cannot use it; "
                "call the model without it"
            )

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        segments: Tensor | None,
        inputs: dict[str, Tensor],
    ) -> Tensor:
        """The rows of the new tokens. mask: (batch, length) bool over the keys up to the new ones,
        the last columns being theirs.
        segments: (batch, length) of the new tokens. inputs: as in `Attention.step`."""
        if mask is not None and mask.dim() != 2:
            raise UnsupportedError(
                "a 4-D attention_mask cannot hide keys that a state has summed; give a 2-D mask of "
                "the padding"
            )
        if segments is not None and self.get_seq_length():
            raise UnsupportedError(
                f"a packed row came behind the {self.get_seq_length()} tokens of this cache; a "
                f"packed row must be read in one forward: {NEW_CACHE}"
            )
        key_mask = None if mask is None else mask[:, mask.shape[1] - key.shape[2] :]
        out, self.state = self.attention.step(
            query, key, value, self.state, key_mask=key_mask, segments=segments, **inputs
        )
        self.waiting = False
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the new tokens alone: what was padding before is in the state already."""
        return query_length, self.get_seq_length()

    def get_seq_length(self) -> int:
        return 0 if self.state is None else self.state.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.is_initialized, self.waiting = None, False, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.select(
                torch.arange(self.state.batch_size).repeat_interleave(repeats)
            )

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(torch.arange(self.state.batch_size)[indices.cpu()])

    def crop(self, tokens_to_remove: int) -> None:
        self.state = self.cropped(tokens_to_remove)

    def cropped(self, tokens_to_remove: int) -> State | None:
        """The state without the last -tokens_to_remove tokens; the layer keeps its own."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}) is not supported; give how many tokens to remove as a "
                "negative number"
            )
        return None if self.state is None else self.state.crop(-tokens_to_remove)

    def held_bytes(self) -> int:
        return 0 if self.state is None else self.state.held_bytes()


class StateCache(DynamicCache):
    """`past_key_values` for a swapped model: a state for every swapped layer, transformers' own
    keys and values for the others.

    A DynamicCache by name, since an EncoderDecoderCache crops and selects no other."""

    layers: list[Any]

    def __init__(self, config: Any, swapped: list[tuple[Any, Attention]]) -> None:
        """config: the model's. swapped: the modules that hold an attention of the zoo, with it."""
        own = DynamicCache(config=config).layers
        for module, attention in swapped:
            index = getattr(module, "layer_idx", None)
            if not isinstance(index, int) or index >= len(own):
                raise UnsupportedError(
                    f"{type(module).__name__} does not tell its place in a cache "
                    f"(layer_idx={index}); generate without a state"
                )
            own[index] = StateLayer(module, attention, getattr(own[index], "is_sliding", False))
        Cache.__init__(self, layers=own)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As the model's own layers need the mask where there are any of this kind: a state takes
        the part of the new tokens from it."""
        layer = self.layers[layer_idx]
        for other in self.layers:
            if (
                isinstance(layer, StateLayer)
                and not isinstance(other, StateLayer)
                and getattr(other, "is_sliding", False) == layer.is_sliding
            ):
                return other.get_mask_sizes(query_length)
        return super().get_mask_sizes(query_length, layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, -tokens_to_remove of them: those of the last forward, at most
        128 where a state is bounded. Where a state cannot, ValueError, and nothing is removed."""
        states = [
            layer.cropped(tokens_to_remove) if isinstance(layer, StateLayer) else None
            for layer in self.layers
        ]
        for layer, state in zip(self.layers, states, strict=True):
            if isinstance(layer, StateLayer):
                layer.state = state
            else:
                layer.crop(tokens_to_remove)

    def held_bytes(self) -> int:
        """Bytes that the cache takes now, what its buffers hold in reserve included."""
        return sum(
            layer.held_bytes()
            if isinstance(layer, StateLayer)
            else sum(x.nbytes for x in (layer.keys, layer.values) if x is not None)
            for layer in self.layers
        )
