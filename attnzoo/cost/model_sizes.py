"""Sizes of transformer models, and what follows from them: parameters, and bytes of activations and
of caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from attnzoo.arguments import check_positive
from attnzoo.configuration import configs_folder
from attnzoo.cost.presets import choose, read_presets


@dataclass(frozen=True)
class TransformerModel:
    """A transformer by its sizes. Zero stands for the usual value: kv_heads = heads, head_dim = d /
    heads, ffn = 4 · d.

    d: width of the embedding.
    ffn: width inside the feed-forward network.
    gated: it has a third matrix (SwiGLU).
    vocab: entries of the embedding, 0 to leave it out.
    tied: the output layer reuses it.
    """

    EXAMPLE: ClassVar[str] = "d: 4096, heads: 32, kv_heads: 8, layers: 32"

    title: str
    d: int
    heads: int
    layers: int
    kv_heads: int = 0
    head_dim: int = 0
    ffn: int = 0
    gated: bool = False
    vocab: int = 0
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("d", "heads", "layers"):
            check_positive(name, getattr(self, name))
        for name in ("kv_heads", "head_dim", "ffn", "vocab"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} must not be negative; 0 stands for the usual "
                    "value"
                )
        if not self.head_dim and self.d % self.heads:
            raise ValueError(
                f"d={self.d} is not divisible by heads={self.heads}; change one of them or give "
                "head_dim"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        for name, value in (
            ("kv_heads", self.heads),
            ("head_dim", self.d // self.heads),
            ("ffn", 4 * self.d),
        ):
            if not getattr(self, name):
                object.__setattr__(self, name, value)

    @property
    def query_width(self) -> int:
        """Numbers in the queries of one token; its attention output has as many."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Numbers in the keys of one token; its values have as many."""
        return self.kv_heads * self.head_dim

    @property
    def projection_parameters(self) -> int:
        """Entries of one layer's query, key, value and output matrices: also the MACs that one
        token spends in them."""
        return self.d * (2 * self.query_width + 2 * self.key_width)

    @property
    def ffn_parameters(self) -> int:
        """Entries of one layer's feed-forward matrices: also the MACs that one token spends in
        them."""
        return (3 if self.gated else 2) * self.d * self.ffn

    @property
    def parameters(self) -> int:
        """Entries of all matrices and embeddings. Biases, norms and learned positions (under 1%)
        are left out."""
        embeddings = self.vocab * self.d * (1 if self.tied else 2)
        return self.layers * (self.projection_parameters + self.ffn_parameters) + embeddings


def model_presets(own: Path | None = None) -> dict[str, TransformerModel]:
    """The presets of `configs/models.yaml`, and those of a YAML file of the user's own over
    them."""
    shipped = read_presets(TransformerModel, configs_folder() / "models.yaml")
    return shipped if own is None else shipped | read_presets(TransformerModel, own)


def find_model(text: str, presets: dict[str, TransformerModel]) -> TransformerModel:
    """A preset by name, or `d=4096,heads=32,kv_heads=8,layers=32`."""
    return choose(TransformerModel, text, presets, "model")
