"""The gates of a swapped transformers layer: what its attention takes beside q, k and v, made of
the hidden states that the layer reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError, repeat_heads
from attnzoo.integrations.places import Site, place_of
from attnzoo.layers.input_projections import (
    INPUT_PROJECTIONS,
    add_projections,
    project_inputs,
    weighed,
)
from attnzoo.layers.layer import Layer

#: Attribute of a module, during its forward: the hidden states that it reads.
HIDDEN = "attnzoo_hidden_states"


@dataclass(frozen=True)
class _Host:
    """A layer of transformers as `layers.input_projections` reads one. Every query head has gates
    of its own, so there are as many key heads."""

    attention: Attention
    embed_dim: int = 0
    out_proj: Any = None
    batch_first: bool = True

    @property
    def kdim(self) -> int:
        return self.embed_dim

    @property
    def num_heads(self) -> int:
        return self.attention.heads

    @property
    def head_dim(self) -> int:
        return self.attention.head_dim


def add_gates(site: Site, attention: Attention) -> RemovableHandle | None:
    """Give the attention what makes its gates, and let the layer keep its hidden states for them
    while it runs. Returns the hook that does so; None for an attention without gates."""
    if not attention.spec.has_gates:
        return None
    assert site.hidden_size is not None  # which `places` has seen to
    device, dtype = site.place or place_of(site.module)
    like = nn.Linear(1, 1, device=device, dtype=dtype)
    add_projections(cast(Layer, _Host(attention, site.hidden_size, like)))
    return site.module.register_forward_pre_hook(
        partial(_keep_hidden_states, attention), with_kwargs=True
    )


def _keep_hidden_states(
    attention: Attention, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    setattr(module, HIDDEN, kwargs.get("hidden_states", args[0] if args else None))


def key_heads(attention: Attention, key: Tensor) -> int:
    """Heads that keys, (batch, kv_heads, ...), have where the attention gets them: with gates, as
    many as queries."""
    return attention.heads if hasattr(attention, INPUT_PROJECTIONS) else key.shape[1]


def with_gates(
    module: Any, attention: Attention, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Keys, values and gates of a call, by name; without gates as they are.

    module: the layer, which has kept its hidden states, (batch, length, hidden_size)
    key, value: (batch, kv_heads, length, head_dim), which are repeated for every query head
    raises: UnsupportedError where there are keys of tokens that are not read now
    """
    if not hasattr(attention, INPUT_PROJECTIONS):
        return key, value, {}
    hidden = getattr(module, HIDDEN, None)
    if not isinstance(hidden, Tensor) or hidden.shape[1] != key.shape[2]:
        raise UnsupportedError(
            f"{attention.spec.name} makes its gates of hidden states, and transformers' own cache "
            "holds none of earlier tokens; give past_key_values=attnzoo.state_cache(model), or "
            "use_cache=False"
        )
    delattr(module, HIDDEN)
    group = key_heads(attention, key) // key.shape[1]
    key, value = (repeat_heads(x, group) for x in (key, value))
    host = cast(Layer, _Host(attention))
    made = project_inputs(host, hidden, hidden, key, ())
    return *weighed(host, key, value, made, {}), made
