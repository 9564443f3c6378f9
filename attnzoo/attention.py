"""The one interface: `Attention` computes `A(q, k, inputs) · v`; its `Spec` says what it can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn

from attnzoo import execution, spec_checks
from attnzoo.arguments import check_choice, check_count, check_kv_heads, check_positive
from attnzoo.autocast import autocast_inputs_only
from attnzoo.call import Call, spread_keys
from attnzoo.call_checks import check, check_new_tokens
from attnzoo.eager import loses_values
from attnzoo.engines.engine import Cost, Engine, Shape, StateSizes
from attnzoo.engines.linear.gated.gate_projections import Gate
from attnzoo.sequences.bad_slots import clear_padding
from attnzoo.spec import Input, Spec

__all__ = ["Attention", "Input", "Spec"]

#: As the `__module__` of an instance (a class keeps its own): torch.fx's tracers take such a module
#: as a leaf, called and not looked into.
LEAF = "torch.nn"


class Attention(nn.Module):
    """Base of every variant: checks the call, applies the rules of masking, and lets the variant's
    engine multiply by A.

    A subclass sets `spec` and builds `self.engine` in its constructor. One that changes q or k by
    their positions overrides `place`, one that mixes them along the length `attend`. After a call,
    `last_backend` names the backend that ran.
    """

    spec: ClassVar[Spec]
    #: The attribute in which a layer puts one linear layer, packed as its own of q, k and v and at
    #: first a copy of it, which makes the inputs that are `like` these. None: there are none.
    own_projection: ClassVar[str | None] = None
    #: What a layer around this attention projects; "qk" and "v" where one tensor is q and k.
    projected: tuple[str, ...] = ("q", "k", "v")
    output_scale: float = 1.0  # what the weight of a layer's norm of each row begins with
    input_sizes: Mapping[str, int] = {}  # of axes in `spec.FREE`, of inputs that a layer projects
    engine: Engine

    def __init__(self, heads: int, head_dim: int, engine: Engine, *, backend: str = "auto") -> None:
        super().__init__()
        self.__module__ = LEAF
        self.heads = check_positive("heads", heads)
        self.head_dim = check_positive("head_dim", head_dim)
        allowed = ["auto", *engine.backend_names()]
        self.backend = check_choice(f"{self.spec.name}: backend", backend, allowed)
        self.engine = engine
        self.last_backend: str | None = None

    def with_own_inputs(
        self, inputs: dict[str, Any], k: Tensor, seen: int | None
    ) -> dict[str, Any]:
        """A call's inputs and what this attention adds. seen: tokens before a step's; else None."""
        return inputs

    def wants_own_projection(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a call with these inputs reads what `own_projection` makes."""
        return True

    def input_projection(self, one: Input, features: int) -> Gate | None:
        """What a layer makes an input with; None: a linear layer and `one.activation`."""
        return None

    @property
    def packs(self) -> bool:
        """Whether nothing but the engine mixes tokens or counts positions, so that its backends
        that pack keep pieces apart in a graph."""
        own = type(self)
        return own.attend is Attention.attend and own.place is Attention.place

    def value_width(self, call: Call) -> int:
        """Numbers of a row of A·v."""
        return call.v.shape[3]

    def place(self, call: Call, seen: int) -> Call:
        """The call with positions put into q and k; `seen` tokens stand before its first key."""
        return call

    def attend(self, call: Call, backend: str, state: Any = None) -> tuple[Tensor, str, Any]:
        """A·v, the name of the backend that ran, and the state after the call, which is checked and
        zero in padded slots (None without one)."""
        return self.engine(call, backend, state)

    @autocast_inputs_only
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        segments: Tensor | None = None,
        **inputs: Tensor | None,
    ) -> Tensor:
        """Attention of q to k and v.

        q: (batch, heads, query_length, head_dim)
        k, v: (batch, kv_heads, key_length, head_dim), kv_heads divides heads
        key_mask: (batch, key_length) bool, True = attend
        attn_mask: bool (True = attend) or additive float, broadcastable to (batch, heads,
            query_length, key_length)
        is_causal: query i sees keys up to position key_length - query_length + i
        segments: (batch, key_length) integer, the piece of a packed row that every token belongs
            to: tokens of different ids never meet, and the rows are those of the pieces run apart
        inputs: what the variant takes beside these, as `spec.inputs` declares it; None is left out
        returns: (batch, heads, query_length, head_dim) in q's dtype; a row that sees no key is 0.
            What stands in a padded slot reaches nothing. With is_causal, a NaN or inf in k, v or an
            input makes every later row NaN and no earlier one; a gate of inf is refused.
        raises: ValueError on a malformed argument, UnsupportedError on what the spec excludes
        """
        call = self._call(q, k, v, key_mask, attn_mask, is_causal, inputs, segments=segments)
        self.refuse(call)
        return execution.run(self, call)

    @autocast_inputs_only
    def weights(
        self,
        q: Tensor,
        k: Tensor,
        *,
        key_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        segments: Tensor | None = None,
        **inputs: Tensor | None,
    ) -> Tensor:
        """A itself, without dropout, (batch, heads, query_length, key_length), as the reference
        forms it.

        Memory is quadratic in the length. Arguments and errors are those of `forward`; inputs that
        are `like` v are not read.
        """
        values = {one.name for one in self.spec.inputs if one.like == "v"}
        inputs = {name: x for name, x in inputs.items() if name not in values}
        call = self._call(q, k, k, key_mask, attn_mask, is_causal, inputs, segments=segments)
        self.refuse(call)
        self.last_backend = "reference"
        return execution.weights(self, call)

    def matrix(self, call: Call) -> Tensor:
        """A of a checked call whose padded slots are zero. A variant that mixes tokens outside its
        engine, or whose engine does not write A out, multiplies the identity."""
        if type(self).attend is Attention.attend and type(self.engine).matrix is not Engine.matrix:
            return self.engine.weights(call)
        identity = torch.eye(call.key_length, dtype=call.k.dtype, device=call.k.device)
        training = self.engine.training
        self.engine.eval()
        try:
            whole = replace(call, v=identity.expand(*call.k.shape[:2], -1, -1))
            return self.attend(clear_padding(whole), "reference")[0]
        finally:
            self.engine.train(training)

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        *,
        kv_heads: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Any:
        """An empty decoding state. max_length: tokens it will accept; `step` raises past it (None:
        no limit).

        kv_heads: heads of the k and v to come (default: heads). dtype, device: theirs.
        """
        spec_checks.check_decodes(self.spec)
        check_positive("batch_size", batch_size)
        if max_length is not None:
            check_positive("max_length", max_length)
        kv_heads = check_kv_heads(kv_heads, self.heads)
        dtype = dtype or torch.get_default_dtype()
        sizes = StateSizes(batch_size, kv_heads, self.head_dim, max_length, dtype, device)
        return execution.first_state(self, sizes)

    @autocast_inputs_only
    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Any,
        *,
        key_mask: Tensor | None = None,
        segments: Tensor | None = None,
        **inputs: Tensor | None,
    ) -> tuple[Tensor, Any]:
        """Attend to the tokens in `state` and to the new ones, causally: rows equal those of one
        forward with is_causal=True.

        q: (batch, heads, new_tokens, head_dim)
        k, v: (batch, kv_heads, new_tokens, head_dim)
        state: of `init_state` or of the step before
        key_mask: (batch, new_tokens) bool
        segments: (batch, new_tokens) integer, the piece that each belongs to; None: they go on with
            the last one
        inputs: as in `forward`, of the new tokens; one without a length is the same in every step
        returns: the new rows and the new state; `state` itself stays valid (branching costs a copy)
        raises: ValueError when the state would pass its max_length, or a piece goes on after
            another one has begun
        """
        execution.check_state(self, state)
        call = self._call(q, k, v, key_mask, None, True, inputs, state.seen, segments=segments)
        self.refuse(call)
        check_new_tokens(call)
        state.check_room(call)
        return execution.step(self, call, state)

    def cost(
        self,
        batch_size: int,
        query_length: int,
        key_length: int | None = None,
        *,
        kv_heads: int | None = None,
        is_causal: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Cost:
        """Closed-form cost of one forward at these sizes (see `Cost`). key_length defaults to
        query_length, kv_heads to heads.

        dtype: of q, k and v. Raises ValueError on a size below 1 and a dtype that is not floating.
        """
        spec_checks.check_sizes(batch_size, query_length, key_length, dtype)
        spec_checks.check_causality(self.spec, is_causal)
        kv_heads = check_kv_heads(kv_heads, self.heads)
        lengths = (query_length, key_length or query_length)
        sizes = (batch_size, self.heads, kv_heads, self.head_dim, *lengths)
        shape = Shape(*sizes, is_causal=is_causal, dtype=dtype)
        parameters = sum(parameter.numel() for parameter in self.parameters())
        found = replace(self.count(shape), parameters=parameters)
        return found if self.spec.decodes else found.without_state()

    def count(self, shape: Shape) -> Cost:
        """The engine's cost; a variant that works outside its engine adds its own."""
        return self.engine.cost(shape)

    def refuse(self, call: Call) -> None:
        """Raise on a malformed call, and on a feature that the spec excludes."""
        check(call, self.spec, self.heads, self.head_dim)
        spec_checks.check_features(call, self.spec)

    def keep_heads(self, first: int, count: int) -> None:
        """Become the attention of heads `first` to `first + count - 1` alone, in place: for a
        process that holds only these heads.

        What each head has is cut, into new parameters; what heads share stays the same object.
        Raises ValueError on heads that this attention does not have.
        """
        if check_count("first", first) + check_positive("count", count) > self.heads:
            raise ValueError(
                f"heads {first} to {first + count - 1} are not among the {self.heads} heads of "
                f"this attention, 0 to {self.heads - 1}"
            )
        self.heads = count

    def reset_parameters(self) -> None:
        """Set all that this attention draws and learns to what it begins with."""
        for module in self.modules():
            reset = None if module is self else getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What `to_empty` makes holds anything, and a checkpoint of exact attention has no draws.
        super()._apply(fn, recurse)
        held = (*self.parameters(), *self.buffers())
        if recurse and held and loses_values(fn):
            self.reset_parameters()
        return self

    def oracle_arguments(self, queries: int, keys: int, is_causal: bool) -> dict[str, Any]:
        """What the oracle needs beside options: what is learned and drawn, for these lengths."""
        return {}

    def shared_options(self) -> dict[str, Any]:
        """Options that make another layer's attention share what this one learns."""
        return {}

    def __prepare_scriptable__(self) -> NoReturn:
        spec_checks.refuse_scripting(self.spec)

    def extra_repr(self) -> str:
        sizes = f"heads={self.heads}, head_dim={self.head_dim}"
        return f"{self.spec.name}, {sizes}, backend={self.backend!r}"

    def _call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        inputs: dict[str, Any],
        seen: int | None = None,
        *,
        segments: Tensor | None = None,
    ) -> Call:
        """The call, not yet checked, of what a caller gave. seen: as in `with_own_inputs`."""
        own = self.with_own_inputs(inputs, k, seen)
        given = {name: x for name, x in own.items() if x is not None}
        call = Call(q, k, v, key_mask, attn_mask, is_causal, given, self.spec.inputs, segments)
        return spread_keys(call) if self.spec.value_heads else call
