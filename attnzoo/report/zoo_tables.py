"""The zoo on the screen, in rich: the list of variants, and one variant in full."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attnzoo.attention import Attention, Spec
from attnzoo.registry import Description, Option, build, describe, names, options_of, sized, spec_of
from attnzoo.report.plain_table import plain_table
from attnzoo.results.units import count, ratio

HEADS, HEAD_DIM = 8, 64
LENGTHS = (256, 1024, 4096, 16384)
CAPABILITIES = {
    "exact": "on the keys that a row sees, A is softmax's own",
    "causal": "runs with is_causal=True",
    "bidirectional": "runs without is_causal",
    "cross": "query_length may differ from key_length",
    "attn_mask": "takes an arbitrary attn_mask, beside key_mask and is_causal",
    "dropout": "can drop entries of A while training",
    "decodes": "has init_state and step: a few new tokens at a time",
    "needs_max_length": "is built for a longest length, max_length",
}
HEADINGS = {"bidirectional": "bi-\ndirectional", "attn_mask": "attn\nmask"}
LISTED = ("exact", "causal", "bidirectional", "cross", "attn_mask", "decodes")


def zoo_table() -> Table:
    """All variants, one a row."""
    table = plain_table()
    table.add_column("name", no_wrap=True)
    for heading in ("title", "family", "complexity"):
        table.add_column(heading)
    for capability in LISTED:
        table.add_column(HEADINGS.get(capability, capability), justify="center")
    for name in names():
        spec = spec_of(name)
        marks = [_mark(getattr(spec, capability)) for capability in LISTED]
        table.add_row(
            Text(name, style="bold"),
            spec.title,
            spec.family.replace("_", " "),
            spec.complexity,
            *marks,
        )
    return table


TECHNIQUES = (
    (
        "KV caching",
        "the past is not computed again for every token",
        "attn.init_state and attn.step; state_cache(model) in generate",
    ),
    (
        "gradient checkpointing",
        "the backward pass computes activations again",
        "torch's and transformers' own switches, with every variant",
    ),
    (
        "grouped-query attention",
        "heads of queries share keys and values; one head of them: multi-query",
        "k and v with fewer heads, in every variant",
    ),
    (
        "recurrent layer",
        "the baseline beside attention: n·d² operations, one after the other",
        "torch.nn.GRU: count_flops, and gru in attnzoo train",
    ),
)
"""Parts of the cost of attention that are no variant: (name, what it does, where it is) each."""


def techniques_table() -> Table:
    """What goes with every variant, one technique a row."""
    table = plain_table()
    table.add_column("technique", no_wrap=True)
    table.add_column("what it does")
    table.add_column("where it is")
    for name, what, where in TECHNIQUES:
        table.add_row(Text(name, style="bold"), what, where)
    return table


def variant_view(name: str) -> RenderableType:
    """One variant: equation, paper, docstring, capabilities, options, backends and cost. Raises
    ValueError on an unknown name."""
    described = describe(name)
    spec = described.spec
    return Group(
        Text.assemble(
            (spec.title, "bold"),
            f"  ({spec.name}, {spec.family.replace('_', ' ')}, {spec.complexity})",
        ),
        Text(spec.paper, style="dim"),
        Padding(Text(spec.equation, style="cyan"), (1, 0, 1, 4)),
        *_paragraphs(described.text),
        *_section("Capabilities", _capabilities(spec)),
        *_section("Options", _options(described)),
        *_section("Cost of one forward", *_cost(name)),
    )


def _paragraphs(docstring: str) -> Iterator[RenderableType]:
    """A docstring filled to the terminal's width; indented paragraphs, the equations, stay as they
    are."""
    for number, paragraph in enumerate(docstring.split("\n\n")):
        if number:
            yield Text()
        yield Text(paragraph if paragraph.startswith(" ") else " ".join(paragraph.split()))


def _section(title: str, *content: RenderableType) -> tuple[RenderableType, ...]:
    return Text(), Text(title, style="bold"), *content


def _capabilities(spec: Spec) -> Table:
    table = plain_table()
    for heading in ("", "", "meaning"):
        table.add_column(heading)
    for capability, meaning in CAPABILITIES.items():
        table.add_row(capability, _mark(getattr(spec, capability)), meaning)
    return table


def _options(described: Description) -> Table:
    table = plain_table()
    for heading in ("option", "type", "default"):
        table.add_column(heading)
    for option in described.options:
        table.add_row(
            Text(option.name, style="bold"),
            Text(option.type),
            "required" if option.required else repr(option.default),
        )
    return table


def _cost(name: str) -> Iterator[RenderableType]:
    if unknown := _unknown_requirements(options_of(name)):
        yield Text(
            f"It cannot be counted here: {' and '.join(unknown)} must be given; use "
            f"attnzoo.build({name!r}, ...).cost(...)"
        )
        return
    attention = _built(name, LENGTHS[-1])
    yield Text(f"backends, in order of preference: {', '.join(attention.engine.backend_names())}")
    yield Text(
        f"batch 1, {HEADS} heads of {HEAD_DIM}, other options at their defaults; MAC speed-up: "
        "exact attention's MACs on its support, divided by these (those of SDPA, which short "
        "inputs take, have the half that causality hides)"
    )
    table = plain_table()
    for heading in (
        "length",
        "",
        "MACs",
        "MAC speed-up",
        "MACs on A's support",
        "decoding state, numbers",
    ):
        table.add_column(heading, justify="left" if heading == "" else "right")
    exact = _built("standard", LENGTHS[-1])
    for is_causal in attention.spec.forms:
        for length in LENGTHS:
            # Drawing features takes long, and only a longest length makes another attention of it.
            own = _built(name, length) if attention.spec.needs_max_length else attention
            table.add_row(*_cost_cells(own, exact, length, is_causal))
    yield table


def _cost_cells(
    attention: Attention, standard: Attention, length: int, is_causal: bool
) -> list[str]:
    cost = attention.cost(1, length, is_causal=is_causal)
    exact = standard.cost(1, length, is_causal=is_causal)
    state = count(cost.state_elements) if cost.state_elements else "-"
    mode = "causal" if is_causal else "bidirectional"
    return [
        f"{length:,}",
        mode,
        count(cost.macs),
        ratio(exact.support_macs / cost.macs),
        count(cost.support_macs),
        state,
    ]


def _built(name: str, length: int) -> Attention:
    return build(name, heads=HEADS, head_dim=HEAD_DIM, **sized(name, length))


def _unknown_requirements(options: tuple[Option, ...]) -> list[str]:
    return [
        option.name
        for option in options
        if option.required and option.name not in ("heads", "head_dim", "max_length")
    ]


def _mark(able: bool) -> Text:
    return Text("yes", style="green") if able else Text("-", style="dim")
