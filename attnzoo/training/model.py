"""The model of every task: a small pre-norm transformer in which only the attention changes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.arguments import check_count, check_flag, check_positive
from attnzoo.call import UnsupportedError
from attnzoo.layers.input_projections import INPUT_PROJECTIONS
from attnzoo.layers.multihead import MultiheadAttention
from attnzoo.layers.options.short_convolution import convolution_of
from attnzoo.quality.mixes import resolved
from attnzoo.registry import Choice
from attnzoo.spec_checks import check_causality
from attnzoo.tasks.task import Batch, Task
from attnzoo.training.contenders import GRU, Contender

POSITION_SCALE = 10_000.0  # Vaswani et al. 2017, section 3.5


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model.

    width: of the residual stream.
    expansion: of the hidden layer of an MLP, in widths.
    convolution: taps of a causal depthwise convolution before every mixer, 0 for none.
    short_convolution, output_norm: of every attention's layer, see `MultiheadAttention`; 0 for no
    convolution. With the norm there is a gate, elementwise.

    With a convolution a token knows its neighbours whatever the attention (Zoology's models, and
    most linear-time ones, have it), so that a task measures recall and not the step before it.
    """

    width: int = 64
    layers: int = 2
    heads: int = 2
    expansion: int = 4
    convolution: int = 0
    short_convolution: int = 0
    output_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "expansion"):
            check_positive(name, getattr(self, name))
        check_count("convolution", self.convolution)
        check_count("short_convolution", self.short_convolution)
        check_flag("output_norm", self.output_norm)
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width} must be an even multiple of heads={self.heads}")

    def to_json(self) -> dict[str, Any]:
        """All of it but what came later and is left out: rows from before it are of the same
        runs."""
        later = {"short_convolution": 0, "output_norm": False}
        return {name: x for name, x in asdict(self).items() if later.get(name) != x}


class Attending(nn.Module):
    """attnzoo.MultiheadAttention over x itself or, in a cross block, over a memory."""

    def __init__(
        self, choice: Choice, sizes: Sizes, length: int, *, is_causal: bool, seed: int
    ) -> None:
        super().__init__()
        self.attention = MultiheadAttention(
            sizes.width,
            sizes.heads,
            batch_first=True,
            attention=choice.name,
            attention_options=resolved(choice, length, seed).options,
            short_convolution=sizes.short_convolution or None,
            output_gate="elementwise" if sizes.output_norm else None,
            output_norm=sizes.output_norm,
        )
        check_causality(self.attention.attention.spec, is_causal)
        if sizes.short_convolution and not is_causal:
            raise UnsupportedError(
                f"short_convolution={sizes.short_convolution} is causal and this task is not; "
                "leave it out"
            )
        self.is_causal = is_causal

    def forward(self, x: Tensor, memory: Tensor | None, mask: Tensor | None) -> Tensor:
        """x: (batch, length, width). memory: what is attended to, x when None. mask: (batch, its
        length), True at real tokens."""
        source = x if memory is None else memory
        return self.attention(
            x,
            source,
            source,
            None if mask is None else ~mask,
            need_weights=False,
            is_causal=self.is_causal,
        )[0]

    def macs(self, length: int, memory_length: int | None) -> int:
        """Of one sequence: the projections, those of inputs and of a gate among them, the short
        convolution, and the attention, as a kernel runs it that skips masked scores where it
        can."""
        attention, width = self.attention.attention, self.attention.embed_dim
        core = attention.cost(1, length, memory_length, is_causal=self.is_causal).kernel_macs
        sources = [memory_length if name in ("k", "v") else None for name in attention.projected]
        projected = length + sum(source or length for source in sources)  # and the way back
        return projected * width**2 + length * self._of_a_token() + core

    def _of_a_token(self) -> int:
        """Multiply-accumulates of a token for what this layer has beside torch's projections."""
        gates = getattr(self.attention.attention, INPUT_PROJECTIONS, None)
        own = [*(gates.modules() if gates else ()), *self.attention.children()]
        return sum(
            part.weight.numel()
            for part in own
            if isinstance(part, nn.Linear | nn.Conv1d) and part is not self.attention.out_proj
        )

    def state_bytes(self, length: int) -> int | None:
        """What decoding carries after `length` tokens, the short convolution's in float32; None
        when the variant does not decode."""
        attention = self.attention.attention
        if not attention.spec.decodes:
            return None
        convolution = convolution_of(self.attention)
        earlier = (
            0 if convolution is None else 4 * (convolution.weight.numel() - len(convolution.weight))
        )
        return attention.cost(1, length, is_causal=True).state_bytes + earlier


class Recurrent(nn.Module):
    """torch.nn.GRU; in an encoder both ways, with half the width each."""

    def __init__(self, sizes: Sizes, *, is_causal: bool) -> None:
        super().__init__()
        self.directions = 1 if is_causal else 2
        self.gru = nn.GRU(
            sizes.width,
            sizes.width // self.directions,
            batch_first=True,
            bidirectional=not is_causal,
        )

    def forward(self, x: Tensor, memory: Tensor | None, mask: Tensor | None) -> Tensor:
        """x: (batch, length, width). mask: (batch, length), True at real tokens, which come
        first."""
        if memory is not None:
            raise UnsupportedError(
                "a GRU reads one sequence and cannot ask another; it fits the tasks without cross "
                "attention"
            )
        if mask is None:
            return self.gru(x)[0]
        packed = nn.utils.rnn.pack_padded_sequence(
            x, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        return nn.utils.rnn.pad_packed_sequence(
            self.gru(packed)[0], batch_first=True, total_length=x.shape[1]
        )[0]

    def macs(self, length: int, memory_length: int | None) -> int:
        """Of one sequence: three gates, each from the input and from the state."""
        return (
            length
            * self.directions
            * 3
            * self.gru.hidden_size
            * (self.gru.input_size + self.gru.hidden_size)
        )

    def state_bytes(self, length: int) -> int:
        """The hidden state, in float32."""
        return self.directions * self.gru.hidden_size * 4


class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, sizes: Sizes, *, is_cross: bool) -> None:
        super().__init__()
        hidden = sizes.expansion * sizes.width
        self.norm, self.mlp_norm = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.memory_norm = nn.LayerNorm(sizes.width) if is_cross else None
        self.mlp = nn.Sequential(
            nn.Linear(sizes.width, hidden), nn.GELU(), nn.Linear(hidden, sizes.width)
        )
        # The queries of a cross block are no neighbours.
        taps = 0 if is_cross else sizes.convolution
        self.convolution = (
            nn.Conv1d(sizes.width, sizes.width, taps, padding=taps - 1, groups=sizes.width)
            if taps
            else None
        )
        self.mixer: Any = None

    def forward(self, x: Tensor, memory: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.memory_norm is not None:
            memory = self.memory_norm(memory)
        mixed = self.norm(x)
        if self.convolution is not None:
            mixed = mixed + self.convolution(mixed.transpose(1, 2))[:, :, : x.shape[1]].transpose(
                1, 2
            )
        x = x + self.mixer(mixed, memory, mask)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Token and position embeddings, blocks, a norm and a linear head; an encoder's head reads the
    mean over the real tokens. For a cross task all blocks but the last run over the memory, and
    the last lets the queries attend to it.

    seed: gives everything but the attention the same start whatever the contender.
    Raises UnsupportedError, a ValueError, when the contender cannot do the task.
    """

    def __init__(self, task: Task, contender: Contender, sizes: Sizes, seed: int) -> None:
        super().__init__()
        self.form, self.length = task.form, task.length
        cross = self.form == "cross"
        if cross and sizes.layers < 2:
            raise ValueError(
                "layers=1 is too few for a cross task, whose first layers read the memory and "
                "whose last asks it; give at least 2"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.tokens = nn.Embedding(task.vocabulary_size, sizes.width)
            self.positions = nn.Parameter(_sinusoids(task.length, sizes.width))
            self.norm, self.head = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, task.outputs)
            self.blocks = nn.ModuleList(
                [
                    Block(sizes, is_cross=cross and layer == sizes.layers - 1)
                    for layer in range(sizes.layers)
                ]
            )
            for layer, (block, choice) in enumerate(
                zip(self.blocks, contender.layers(sizes.layers), strict=True)
            ):
                # What one attention draws for itself moves no other layer's start.
                torch.manual_seed((seed + 1) * 1009 + layer)
                block.mixer = make_mixer(choice, sizes, task, seed + layer)

    def forward(self, batch: Batch) -> Tensor:
        """Logits: (batch, length, outputs); of an encoder (batch, outputs)."""
        if batch.memory is not None:
            *readers, asker = self.blocks
            memory = self._embed(batch.memory)
            for block in readers:
                memory = block(memory, None, batch.mask)
            return self.head(self.norm(asker(self.tokens(batch.inputs), memory, batch.mask)))
        x = self._embed(batch.inputs)
        for block in self.blocks:
            x = block(x, None, batch.mask)
        if self.form == "encoder":
            x = (
                x.mean(1)
                if batch.mask is None
                else (x * batch.mask[:, :, None]).sum(1) / batch.mask.sum(1, keepdim=True)
            )
        return self.head(self.norm(x))

    def macs(self, queries: int) -> int:
        """Of all mixers, for one sequence.

        queries: length of the asking sequence of a cross task.
        """
        last = len(self.blocks) - 1 if self.form == "cross" else None
        return sum(
            mixer.macs(queries, self.length) if layer == last else mixer.macs(self.length, None)
            for layer, mixer in enumerate(self._mixers())
        )

    def state_bytes(self) -> int | None:
        """What decoding carries after all tokens (of a cross task: of the memory), all layers; None
        of an encoder, which does not decode, and when a layer does not."""
        if self.form == "encoder":
            return None
        found = [mixer.state_bytes(self.length) for mixer in self._mixers()]
        return None if None in found else sum(found)

    def _mixers(self) -> list[Any]:
        return [block.mixer for block in self.blocks]

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.positions[: tokens.shape[1]]


def make_mixer(choice: Choice, sizes: Sizes, task: Task, seed: int) -> Attending | Recurrent:
    """What mixes the tokens in one layer."""
    if choice.name == GRU:
        return Recurrent(sizes, is_causal=task.is_causal)
    return Attending(choice, sizes, task.length, is_causal=task.is_causal, seed=seed)


def _sinusoids(length: int, width: int) -> Tensor:
    """(length, width): where training starts the position embeddings from, so that a shift is a
    rotation from the beginning."""
    angles = torch.arange(length)[:, None] / POSITION_SCALE ** (torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)
