"""Which nn.MultiheadAttention of a model is self-attention is found by trying; what looks at
another sequence is swapped by its name only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small
from torch import Tensor, nn

import attnzoo
from attnzoo import UnsupportedError
from attnzoo.layers.multihead import MultiheadAttention

SIZE = 32


def attention(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(SIZE, 4, **{"batch_first": True, **options})


class Detr(nn.Module):
    """A decoder layer as DETR's: positions of both sequences, masks, no defaults for what must be
    given."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = (
            attention(batch_first=batch_first),
            attention(batch_first=batch_first),
        )
        self.norm = nn.LayerNorm(SIZE)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Any = None,
        pos: Any = None,
        query_pos: Any = None,
    ) -> Tensor:
        q = k = tgt if query_pos is None else tgt + query_pos
        tgt = self.norm(tgt + self.self_attn(q, k, value=tgt, attn_mask=tgt_mask)[0])
        key = memory if pos is None else memory + pos
        return tgt + self.cross_attn(query=tgt, key=key, value=memory)[0]


class OptionalContext(nn.Module):
    """The context of other features, and only if there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.c = attention(), nn.LayerNorm(24), attention(kdim=24, vdim=24)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        x = x + self.a(x, x, x, attn_mask=mask)[0]
        return x if context is None else x + self.c(x, *[self.norm(context)] * 2)[0]


class ByKeyword(nn.Module):
    """Sequences first outside, batch second inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = attention(batch_first=False), attention(batch_first=False)

    def forward(self, x: Tensor, *, context: Tensor) -> Tensor:
        x, context = x.transpose(0, 1), context.transpose(0, 1)
        x = x + self.a(x, x, x)[0]
        return (x + self.c(x, context, context)[0]).transpose(0, 1)


class Latents(nn.Module):
    """Three learned queries, and what they say to each other; then the mean that asks all
    tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, SIZE))
        self.c, self.a, self.pool = attention(), attention(), attention()

    def forward(self, x: Tensor) -> Tensor:
        latents = self.c(self.latents.expand(len(x), -1, -1), x, x)[0]
        latents = self.a(latents, latents, latents)[0]
        return self.pool(latents.mean(1, keepdim=True), x, x)[0]


class Language(nn.Module):
    """Of tokens, inside a layer whose mask must be given."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(20, SIZE), nn.ModuleList([Masked(), Masked()])

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1))
        return x


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = attention()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.a(x, x, x, attn_mask=mask, need_weights=False)[0]


class OfBatches(nn.Module):
    """Nobody can make up what it takes, but its layer can be tried."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Detr()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.layer(batch["x"], batch["memory"])


class Subclass(nn.TransformerDecoderLayer):
    """Of torch's, with a forward of its own that swaps the sequences."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.multihead_attn(x, x, x)[0] + self.self_attn(x, memory, memory)[0]


def swapped(model: nn.Module) -> list[str]:
    return [
        path for path, module in model.named_modules() if isinstance(module, MultiheadAttention)
    ]


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (Detr, ["self_attn"]),
        (lambda: Detr(batch_first=False), ["self_attn"]),
        (
            lambda: nn.Sequential(nn.Linear(3, SIZE), nn.ModuleList([Detr(), Detr()])),
            ["1.0.self_attn", "1.1.self_attn"],
        ),
        (OptionalContext, ["a"]),
        (ByKeyword, ["a"]),
        (Latents, ["a"]),
        (Language, ["blocks.0.a", "blocks.1.a"]),
        (OfBatches, ["layer.self_attn"]),
        (lambda: Subclass(SIZE, 4, 48, 0.0, batch_first=True), ["multihead_attn"]),
        (lambda: Detr().to("meta"), ["self_attn"]),
        (
            lambda: nn.Transformer(SIZE, 4, 1, 1, 48, 0.0),
            ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn"],
        ),
    ],
)
def test_only_what_looks_at_itself_is_swapped(
    make: Callable[[], nn.Module], wanted: list[str]
) -> None:
    model = make()
    state, modes = (
        {key: value.clone() for key, value in model.state_dict().items()},
        [module.training for module in model.modules()],
    )
    attnzoo.swap(model, "linear")
    assert swapped(model) == wanted
    assert all(
        value.is_meta or torch.equal(value, state[key]) for key, value in model.state_dict().items()
    )
    assert [module.training for module in attnzoo.unswap(model).modules()] == modes and not any(
        "forward" in vars(m) for m in model.modules()
    )


def test_a_window_leaves_the_memory_whole() -> None:
    torch.manual_seed(0)
    model, x, memory = Detr().eval(), torch.randn(2, 4, SIZE), torch.randn(2, 30, SIZE)
    exact = model(x, memory)
    attnzoo.swap(model, "sliding_window", window=4)  # as wide as the targets
    torch.testing.assert_close(model(x, memory), exact, rtol=0.0, atol=5e-6)


@pytest.mark.parametrize("name", attnzoo.names())
def test_it_is_swapped_by_its_name(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, spec = Detr().eval(), attnzoo.describe(name).spec
    if not spec.cross:
        with pytest.raises(
            UnsupportedError,
            match=rf"layer 1 \(cross_attn\): it looks at another sequence, which {name} cannot",
        ):
            attnzoo.swap(model, name, layers="cross_attn", **small(name))
        return
    attnzoo.swap(model, {"cross_attn": (name, small(name)), "0": "standard"})
    assert swapped(model) == ["self_attn", "cross_attn"]
    x, memory = torch.randn(2, 4, SIZE), torch.randn(2, 30, SIZE)
    if spec.bidirectional:
        found = model(x, memory)
        attnzoo.save(model, tmp_path / "swap.safetensors")
        torch.manual_seed(0)
        assert torch.equal(
            attnzoo.load(Detr().eval(), tmp_path / "swap.safetensors")(x, memory), found
        )
    attnzoo.unswap(model)
    attnzoo.swap(model, name, layers=["*cross*"], **small(name))
    assert swapped(model) == ["cross_attn"]


def test_names_in_every_kind_of_model() -> None:
    decoder = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(SIZE, 4, 48, 0.0, batch_first=True), 3
    )
    attnzoo.swap(decoder, "linear", layers="layers.*.multihead_attn")
    assert swapped(decoder) == [f"layers.{n}.multihead_attn" for n in range(3)]
    attnzoo.unswap(decoder)
    attnzoo.swap(decoder, {"0-1": "linear", "layers.2.*": "standard"})
    assert swapped(decoder) == [
        "layers.0.self_attn",
        "layers.1.self_attn",
        "layers.2.self_attn",
        "layers.2.multihead_attn",
    ]
    attnzoo.unswap(decoder)
    for layers in ("layers.7.self_attn", 3, "0,layers.0.self_attn", ["layers.0.self_attn", 0], ""):
        with pytest.raises(
            ValueError,
            match=r"distinct layers of the model.* 3 attention layers, 0 to 2, and those "
            r"that are named by their paths, ",
        ):
            attnzoo.swap(decoder, "linear", layers=layers)


class Default(nn.Module):
    """Of itself or of another sequence, as the caller likes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = attention()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return self.a(x, context, context)[0]


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Default()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_what_cannot_be_told_is_not_swapped_without_a_word() -> None:
    for model, path in (
        (Default(), "a"),
        (nn.ModuleDict({"text": attention()}), "text"),
        (nn.Sequential(attention()), "0"),
    ):
        with pytest.raises(
            UnsupportedError,
            match=rf"{path}: attnzoo could not find out by trying .* say what to swap: "
            rf"layers=\['{path}'\]",
        ):
            attnzoo.swap(model, "linear")
        assert swapped(attnzoo.swap(model, "linear", layers=[path])) == [path]
    assert swapped(attnzoo.swap(Around(), "linear")) == ["inner.a"]  # which never gives a context
    only: Any = Detr()
    only.self_attn = nn.Identity()
    only.forward = lambda tgt, memory: only.cross_attn(tgt, memory, memory)[0]
    with pytest.raises(
        UnsupportedError,
        match="cross_attn looks at another sequence, and by itself a swap takes self-attention "
        "only",
    ):
        attnzoo.swap(only, "linear")
    assert not swapped(only)
