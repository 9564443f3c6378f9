"""What is timed: an attention alone, with its projections, or in a whole layer; and torch's SDPA,
called directly, in its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention import Attention
from attnzoo.benchmarking.plan import DECODE_ROOM, Cell, Contender
from attnzoo.layers.multihead import MultiheadAttention
from attnzoo.registry import Choice

FEED_FORWARD = 4  # inner width of the feed-forward network, in widths of the model

Pass = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """One contender, ready to run.

    attention: its core; None for SDPA called directly.
    """

    run: Pass
    attention: Attention | None


class DirectAttention(nn.Module):
    """The projections of multi-head self-attention around one call of torch's SDPA: the least that
    the zoo's module could do."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class SelfAttention(nn.Module):
    """`attnzoo.MultiheadAttention` as self-attention without weights."""

    def __init__(self, width: int, heads: int, choice: Choice) -> None:
        super().__init__()
        self.multihead = MultiheadAttention(
            width,
            heads,
            batch_first=True,
            attention=choice.name,
            attention_options=choice.options,
        )

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        return self.multihead(x, x, x, need_weights=False, is_causal=is_causal)[0]


class Layer(nn.Module):
    """A pre-norm Transformer layer, as torch's with norm_first=True and GELU: x +
    attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, FEED_FORWARD * width),
            nn.GELU(),
            nn.Linear(FEED_FORWARD * width, width),
        )

    def forward(self, x: Tensor, is_causal: bool) -> Tensor:
        x = x + self.attention(self.attention_norm(x), is_causal)
        return x + self.feed_forward(self.feed_forward_norm(x))


def choice_for(contender: Contender, cell: Cell, seed: int) -> Choice:
    """A contender's choice with its backend, and with seed and max_length where it takes them."""
    length = cell.length + (DECODE_ROOM if cell.phase == "decode" else 0)
    choice = contender.choice.completed(seed=seed, max_length=length)
    return Choice(choice.name, {**choice.options, "backend": contender.backend})


def core_inputs(cell: Cell, sets: int, device: torch.device, seed: int) -> list[tuple[Tensor, ...]]:
    """Sets of normal q, k and v, each (batch, heads, length, head_dim)."""
    shape = (cell.shape.batch_size, cell.shape.heads, cell.length, cell.shape.head_dim)
    return [_normal(shape, 3, cell.dtype, device, seed + number) for number in range(sets)]


def layer_inputs(
    cell: Cell, sets: int, device: torch.device, seed: int
) -> list[tuple[Tensor, ...]]:
    """Sets of one normal x, (batch, length, heads · head_dim)."""
    shape = (cell.shape.batch_size, cell.length, cell.shape.heads * cell.shape.head_dim)
    return [_normal(shape, 1, cell.dtype, device, seed + number) for number in range(sets)]


def gates_of(attention: Attention, q: Tensor, k: Tensor, seed: int) -> dict[str, Tensor]:
    """What a layer would project for an attention beside q, k and v, made of normal numbers: by
    name, with the axes of each, in q's dtype."""
    sizes = {
        **dict(zip(("batch", "heads", "queries", "width"), q.shape, strict=True)),
        **dict(zip(("kv_heads", "keys", "value_width"), k.shape[1:], strict=True)),
        **attention.input_sizes,
    }
    made = {}
    for one in attention.spec.inputs:
        if one.is_projected:
            shape = tuple(sizes[axis] for axis in one.names)
            (x,) = _normal(shape, 1, "float32", torch.device("cpu"), seed + len(made) + 1)
            made[one.name] = (x if one.activation is None else one.activation(x)).to(q)
    return made


def segments_of(cell: Cell, q: Tensor) -> Tensor | None:
    """The ids of equal pieces for the rows of q, (batch, heads, length, head_dim): (batch,
    length); None where a row is one piece."""
    if cell.segments == 1:
        return None
    ids = torch.arange(q.shape[2], device=q.device) // cell.piece_length
    return ids.expand(q.shape[0], -1)


def _as_batch(x: Tensor, segments: int) -> Tensor:
    """The pieces of packed rows as samples: (batch · segments, heads, piece_length, head_dim)."""
    return x.unflatten(2, (segments, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def prepare(
    contender: Contender | None, cell: Cell, inputs: Sequence[tuple[Tensor, ...]], seed: int
) -> Work:
    """A contender (None: SDPA called directly) on inputs of `core_inputs` at level core and of
    `layer_inputs` at the others.

    Raises ValueError on an option that the variant does not take.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if cell.level == "core":
            return _core(contender, cell, inputs, seed)
        return _module(contender, cell, inputs, seed)


def _core(
    contender: Contender | None, cell: Cell, inputs: Sequence[tuple[Tensor, ...]], seed: int
) -> Work:
    if contender is None:
        if cell.phase == "decode":
            return Work(_decode_directly(*inputs[0]), None)
        if cell.segments > 1:
            inputs = [tuple(_as_batch(x, cell.segments) for x in one) for one in inputs]
        return Work(
            passes(
                cell,
                inputs,
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=cell.is_causal),
                (),
            ),
            None,
        )
    attention = choice_for(contender, cell, seed).build(cell.shape.heads, cell.shape.head_dim)
    attention = attention.eval().to(inputs[0][0].device, inputs[0][0].dtype)
    q, k, v = inputs[0]
    gates = gates_of(attention, q, k, seed)
    if cell.phase == "decode":
        return Work(_decode(attention, q, k, v, gates), attention)
    ids = segments_of(cell, q)

    def forward(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        named: dict[str, Any] = dict(zip(gates, given, strict=True))
        return attention(q, k, v, is_causal=cell.is_causal, segments=ids, **named)

    whole = [(*one, *gates.values()) for one in inputs]
    return Work(passes(cell, whole, forward, tuple(attention.parameters())), attention)


def _module(
    contender: Contender | None, cell: Cell, inputs: Sequence[tuple[Tensor, ...]], seed: int
) -> Work:
    width, heads = cell.shape.heads * cell.shape.head_dim, cell.shape.heads
    attention = None
    if contender is None:
        module: nn.Module = DirectAttention(width, heads)
    else:
        module = SelfAttention(width, heads, choice_for(contender, cell, seed))
        attention = module.multihead.attention
    if cell.level == "layer":
        module = Layer(width, module)
    module = module.eval().to(inputs[0][0].device, inputs[0][0].dtype)
    return Work(
        passes(cell, inputs, lambda x: module(x, cell.is_causal), tuple(module.parameters())),
        attention,
    )


def passes(
    cell: Cell,
    inputs: Sequence[tuple[Tensor, ...]],
    forward: Callable[..., Tensor],
    parameters: tuple[Tensor, ...],
) -> Pass:
    """Forward, or forward and backward to all inputs and parameters, on one set of inputs after
    another."""
    sets = cycle(inputs)
    if cell.phase == "forward":

        def infer() -> Tensor:
            with torch.no_grad():
                return forward(*next(sets))

        return infer

    def train() -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in next(sets)]
            out = forward(*leaves)
            return torch.autograd.grad(
                out, [*leaves, *parameters], torch.ones_like(out), allow_unused=True
            )

    return train


def _decode(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor]
) -> Pass:
    """One token after q.shape[2] others. Each run takes the state that the last one left, so that
    none copies it."""
    length = q.shape[2]
    one = [x[:, :, -1:].clone() for x in (q, k, v)]
    declared = [one for one in attention.spec.inputs if one.name in gates]
    tokens = {
        one.name: one.names.index("keys" if "keys" in one.names else "queries") for one in declared
    }
    of_one = {name: gates[name].narrow(dim, length - 1, 1).clone() for name, dim in tokens.items()}
    state: Any = None

    def step() -> Tensor:
        nonlocal state
        with torch.no_grad():
            if state is None:
                state = attention.init_state(
                    q.shape[0], length + DECODE_ROOM, dtype=q.dtype, device=q.device
                )
                state = attention.step(q, k, v, state, **gates)[1]
            out, state = attention.step(one[0], one[1], one[2], state, **of_one)
            return out

    return step


def _decode_directly(q: Tensor, k: Tensor, v: Tensor) -> Pass:
    """One token written behind the others and one call of SDPA over all of them."""
    taken = q.shape[2]
    keys, values = (F.pad(x, (0, 0, 0, DECODE_ROOM)) for x in (k, v))
    one = [x[:, :, -1:].clone() for x in (q, k, v)]

    def step() -> Tensor:
        nonlocal taken
        with torch.no_grad():
            keys[:, :, taken : taken + 1], values[:, :, taken : taken + 1] = one[1], one[2]
            taken += 1
            return F.scaled_dot_product_attention(one[0], keys[:, :, :taken], values[:, :, :taken])

    return step


def _normal(
    shape: tuple[int, ...], number: int, dtype: str, device: torch.device, seed: int
) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed % 2**63)
    return tuple(
        torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))
        for _ in range(number)
    )
