"""What one attention, one layer or a whole model costs by component, with exact attention and with
another: the counts behind `attnzoo flops`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.attention import Attention
from attnzoo.cost.model_sizes import TransformerModel
from attnzoo.cost.tracing.counting import FlopReport, count_flops
from attnzoo.registry import Choice

CORE, PROJECTIONS, FEED_FORWARD, HEAD, OTHER = (
    "attention core",
    "projections",
    "feed-forward",
    "embeddings and head",
    "other",
)
COMPONENTS = (CORE, PROJECTIONS, FEED_FORWARD, HEAD, OTHER)


@dataclass(frozen=True)
class Call:
    """A module on the meta device and what it is called with.

    component: of each module by its name, of its own operations alone.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    keywords: dict[str, Any]
    component: Callable[[str, nn.Module], str]


@dataclass(frozen=True)
class Subject:
    """What is counted.

    exact: its own attention's name.
    call: made for n tokens, one sample, with its own attention (None) or another.
    """

    title: str
    exact: str
    call: Callable[[int, Choice | None], Call]
    longest: int | None = None
    too_long: str = ""


@dataclass(frozen=True)
class Breakdown:
    """One count: the report, and MACs and elementwise operations by component."""

    report: FlopReport
    macs: dict[str, int]
    elementwise: dict[str, int]


def breakdown(subject: Subject, n: int, chosen: Choice | None) -> Breakdown:
    """Count `subject` at n tokens.

    Raises ValueError on a length past its positions, and what building, swapping and `count_flops`
    raise.
    """
    if subject.longest is not None and n > subject.longest:
        raise ValueError(
            f"length={n} is past the {subject.longest:,} positions of {subject.title}; "
            f"{subject.too_long}"
        )
    call = subject.call(n, chosen)
    report = count_flops(call.module, *call.inputs, **call.keywords)
    modules = dict(call.module.named_modules(remove_duplicate=False))
    components = {name: call.component(name, module) for name, module in modules.items()}
    return Breakdown(
        report,
        _by_component(report.by_module, components),
        _by_component(report.elementwise_by_module, components),
    )


def _by_component(by_module: dict[str, int], components: dict[str, str]) -> dict[str, int]:
    """Sum what each module does itself: its count without those of the modules directly inside
    it."""
    own = dict(by_module)
    for name, count in by_module.items():
        if name:
            own[name.rpartition(".")[0]] -= count
    found: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
    for name, count in own.items():
        found[components[name]] += count
    return found


def one_attention(heads: int, head_dim: int, kv_heads: int, is_causal: bool) -> Subject:
    """A core alone, beside `standard` at the same heads."""

    def call(n: int, chosen: Choice | None) -> Call:
        with torch.device("meta"):
            q, k = torch.empty(1, heads, n, head_dim), torch.empty(1, kv_heads, n, head_dim)
            core = _core(chosen, heads, head_dim, n)
        return Call(core, (q, k, k), {"is_causal": is_causal}, lambda name, module: CORE)

    shared = "" if kv_heads == heads else f" on {kv_heads} key heads"
    return Subject(
        f"one attention of {heads} heads × {head_dim}{shared}, {_causality(is_causal)}",
        "standard",
        call,
    )


def one_layer(model: TransformerModel, is_causal: bool) -> Subject:
    """Projections, core and feed-forward network of one layer of a model given by its sizes."""

    def call(n: int, chosen: Choice | None) -> Call:
        with torch.device("meta"):
            layer = _Layer(model, _core(chosen, model.heads, model.head_dim, n), is_causal)
            return Call(
                layer,
                (torch.empty(1, n, model.d),),
                {},
                lambda name, module: _LAYER[name.split(".")[0]],
            )

    return Subject(f"one layer of {model.title}, {_causality(is_causal)}", "standard", call)


# "": the activation.
_LAYER = {"": FEED_FORWARD, "core": CORE, "projections": PROJECTIONS, "feed_forward": FEED_FORWARD}


class _Layer(nn.Module):
    """A layer by its products; norms and residuals, which multiply no matrices, are left out."""

    def __init__(self, model: TransformerModel, core: Attention, is_causal: bool) -> None:
        super().__init__()
        self.model, self.core, self.is_causal = model, core, is_causal
        widths = {"query": model.query_width, "key": model.key_width, "value": model.key_width}
        self.projections = nn.ModuleDict(
            {name: nn.Linear(model.d, width) for name, width in widths.items()}
        )
        self.projections["output"] = nn.Linear(model.query_width, model.d)
        inner = ["gate", "up"] if model.gated else ["up"]
        self.feed_forward = nn.ModuleDict({name: nn.Linear(model.d, model.ffn) for name in inner})
        self.feed_forward["down"] = nn.Linear(model.ffn, model.d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.projections[name](x).unflatten(2, (-1, self.model.head_dim)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        x = self.projections["output"](
            self.core(q, k, v, is_causal=self.is_causal).transpose(1, 2).flatten(2)
        )
        up = self.feed_forward["up"](x)
        up = (
            nn.functional.silu(self.feed_forward["gate"](x)) * up
            if self.model.gated
            else nn.functional.gelu(up)
        )
        return self.feed_forward["down"](up)


def _core(chosen: Choice | None, heads: int, head_dim: int, n: int) -> Attention:
    return (chosen or Choice("standard")).build(heads, head_dim, max_length=n)


def _causality(is_causal: bool) -> str:
    return "causal" if is_causal else "bidirectional"
