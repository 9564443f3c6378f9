"""What a comparison with exact attention is made of, and how it is written and read back as
JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

FORMAT = "attnzoo.comparison/1"


@dataclass(frozen=True)
class Sample:
    """Queries, keys and values of a few layers and heads of one model, on one text.

    layers: one name per batch entry, such as "layer 3".
    heads: the query heads that were kept.
    score_std: standard deviation of q·k/√head_dim over the visible pairs.
    text: what the model read.
    q: (layers, heads, length, head_dim).
    k, v: (layers, kv_heads, length, head_dim), kv_heads divides heads.
    """

    model: str
    is_causal: bool
    length: int
    layers: tuple[str, ...]
    heads: tuple[int, ...]
    score_std: float
    q: Tensor
    k: Tensor
    v: Tensor
    text: str = ""

    def summary(self) -> dict[str, Any]:
        """The sample without its tensors, as it is written into a `Comparison`."""
        return {
            "model": self.model,
            "is_causal": self.is_causal,
            "length": self.length,
            "layers": list(self.layers),
            "heads": list(self.heads),
            "score_std": self.score_std,
            "shape": {"q": list(self.q.shape), "k": list(self.k.shape), "v": list(self.v.shape)},
            "text": self.text,
        }


@dataclass(frozen=True)
class Row:
    """One variant with its options on one sample at one length. None where there is no number;
    `note` says why.

    output_error: ||A v - exact||_F / ||exact||_F, mean over layers, heads and draws.
    output_error_spread: its standard deviation.
    mean_value_error: the same error for answering the mean of the visible v (causal: the running
    mean), the baseline of doing nothing.
    total_variation: mean over rows of ½ Σ_j |A_ij - exact_ij|.
    top_mass_kept: mean over rows of Σ_T A_ij / Σ_T exact_ij, kept within [0, 1], where T are the
    row's 16 heaviest keys in exact.
    macs: what the variant executes in one forward.
    exact_macs: what exact attention needs on its support, and its own `macs` too, since SDPA skips
    the masked half.
    seconds: median of one forward over `rounds` interleaved rounds, with the first and third
    quartile.
    speedup: median time of exact attention (SDPA) in the same rounds, divided by `seconds`.
    promised_speedup: exact_macs / macs.
    peak_bytes: highest sum of allocations during one forward beyond the inputs.
    """

    variant: str
    options: dict[str, Any]
    label: str
    model: str
    is_causal: bool
    length: int
    output_error: float | None = None
    output_error_spread: float | None = None
    mean_value_error: float | None = None
    total_variation: float | None = None
    top_mass_kept: float | None = None
    macs: int | None = None
    exact_macs: int | None = None
    seconds: float | None = None
    seconds_quartiles: tuple[float, float] | None = None
    rounds: int = 0
    speedup: float | None = None
    promised_speedup: float | None = None
    peak_bytes: int | None = None
    backend: str | None = None
    note: str = ""


@dataclass(frozen=True)
class HeatMap:
    """A of one variant, one layer and one head; the map labelled "standard" is exact A.

    query_range, key_range: (start, stop) in tokens.
    weights: at most 64 × 64 numbers, rows are queries; where a cell covers several tokens it is the
    mass that its queries put, on average, on all its keys, so every row still sums to the row sum
    of A.
    """

    label: str
    model: str
    is_causal: bool
    length: int
    layer: str
    head: int
    query_range: tuple[int, int]
    key_range: tuple[int, int]
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Comparison:
    """Everything `compare` found.

    rows: one per variant and sample.
    by_length: the same without times, from short lengths to the longest; below the longest, output
    errors and costs alone.
    environment: date, seed, versions, machine.
    samples: `Sample.summary()` of each sample.
    """

    rows: tuple[Row, ...]
    heat_maps: tuple[HeatMap, ...]
    by_length: tuple[Row, ...]
    environment: dict[str, str]
    samples: tuple[dict[str, Any], ...]

    def to_json(self) -> str:
        """The comparison as JSON text that `from_json` reads back to an equal comparison."""
        return json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, source: str = "the text") -> Comparison:
        """Read what `to_json` wrote. Raises ValueError, one sentence that names `source`, when it
        is truncated or something else."""
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{source} is not a whole JSON file ({error.msg}, line {error.lineno}, column "
                f"{error.colno}); run `attnzoo compare` again to write it"
            ) from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            said = found.get("format") if isinstance(found, dict) else type(found).__name__
            raise ValueError(
                f"{source} is not a comparison of this version of attnzoo (its format is {said!r}, "
                f"wanted {FORMAT!r})"
            )
        try:
            return cls(
                rows=tuple(_row(row) for row in found["rows"]),
                heat_maps=tuple(_heat_map(heat_map) for heat_map in found["heat_maps"]),
                by_length=tuple(_row(row) for row in found["by_length"]),
                environment={str(key): str(value) for key, value in found["environment"].items()},
                samples=tuple(dict(sample) for sample in found["samples"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{source} has the format {FORMAT!r} but not its fields ({error}); run `attnzoo "
                "compare` again to write it"
            ) from None

    @classmethod
    def read(cls, path: str | Path) -> Comparison:
        """Read a file that `to_json` was written to. Raises ValueError, one sentence, when there is
        none or it is another file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as a comparison: {error}") from None
        return cls.from_json(text, source=str(path))


def _row(found: dict[str, Any]) -> Row:
    _check_fields(Row, found)
    quartiles = found["seconds_quartiles"]
    return Row(
        **{
            **found,
            "seconds_quartiles": None
            if quartiles is None
            else (float(quartiles[0]), float(quartiles[1])),
        }
    )


def _heat_map(found: dict[str, Any]) -> HeatMap:
    _check_fields(HeatMap, found)
    pairs = {
        name: (int(found[name][0]), int(found[name][1])) for name in ("query_range", "key_range")
    }
    return HeatMap(
        **{
            **found,
            **pairs,
            "weights": tuple(tuple(float(x) for x in row) for row in found["weights"]),
        }
    )


def _check_fields(kind: type, found: dict[str, Any]) -> None:
    wanted = {field.name for field in fields(kind)}
    if set(found) != wanted:
        raise ValueError(f"{kind.__name__} has the fields {sorted(found)}, wanted {sorted(wanted)}")
