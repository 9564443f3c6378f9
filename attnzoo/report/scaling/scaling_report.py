"""Everything that `attnzoo scaling` says, in one value: the article's tables, and further ones for
a model, a GPU and the whole zoo."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attnzoo.cost import article
from attnzoo.cost.contradictions import Contradiction, contradictions
from attnzoo.cost.hardware import GPU
from attnzoo.cost.layer_costs import CountedVariant, whole_zoo
from attnzoo.cost.model_sizes import TransformerModel
from attnzoo.registry import Choice
from attnzoo.report.scaling import latent_table, model_tables, path_table, variant_tables
from attnzoo.report.scaling.settings import Settings
from attnzoo.results.table import Table

FORMAT = "attnzoo.scaling/1"
CONVENTION = (
    "One MAC is one multiply-accumulate, and two FLOPs. The article counts a MAC as one operation "
    "and calls it a FLOP; "
    "its own tables keep its count, everything else here says MACs, or FLOPs = 2 · MACs. The "
    "softmax's exponentials are in no MAC count."
)
# Presets that the article's tables are about.
ARTICLE_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "13b")
ARTICLE_GPUS = ("rtx-3090", "a100-40gb", "a100-80gb", "h100")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Scaling:
    """All tables of one run.

    settings: what was computed.
    article: the article's tables, by its own parameters.
    extension: the tables of the settings' model and GPU.
    contradictions: where the article's prose differs from its tables.
    remarks: what was left out, in sentences.
    variants: what the tables counted.
    models, gpus: the presets and the settings' own.
    """

    settings: Settings
    article: tuple[Table, ...]
    extension: tuple[Table, ...]
    contradictions: tuple[Contradiction, ...]
    remarks: tuple[str, ...]
    variants: tuple[CountedVariant, ...]
    models: tuple[TransformerModel, ...]
    gpus: tuple[GPU, ...]

    @property
    def tables(self) -> tuple[Table, ...]:
        return self.article + self.extension

    def table(self, name: str) -> Table:
        return next(table for table in self.tables if table.name == name)

    def to_json(self) -> str:
        """All tables with their formulas, parameters and exact values."""
        content = {
            "format": FORMAT,
            "convention": CONVENTION,
            "settings": asdict(self.settings),
            "variants": [variant.label for variant in self.variants],
            "tables": {table.name: _plain(table) for table in self.tables},
            "contradictions": [asdict(found) for found in self.contradictions],
            "remarks": list(self.remarks),
        }
        return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)


def scaling(
    settings: Settings,
    models: dict[str, TransformerModel],
    gpus: dict[str, GPU],
    variants: Iterable[Choice] | None = None,
    progress: Progress = lambda stage: None,
) -> Scaling:
    """Compute every table.

    settings: the model, the GPU and the length.
    models, gpus: presets by name, which must hold the article's.
    variants: default: the whole zoo.
    progress: called with what comes next.
    Raises ValueError on a preset that is missing and on a variant or an option that does not exist.
    """
    for kind, wanted, found in (("model", ARTICLE_MODELS, models), ("gpu", ARTICLE_GPUS, gpus)):
        missing = [name for name in wanted if name not in found]
        if missing:
            raise ValueError(
                f"the {kind} presets lack {', '.join(missing)}, which the article's tables need; "
                "add your own beside them"
            )
    progress("the article's tables")
    small, large = models["gpt2"], [models[name] for name in ARTICLE_MODELS]
    the_gpus = [gpus[name] for name in ARTICLE_GPUS]
    if variants is None:
        counted, need_options = whole_zoo(settings.model)
    else:
        counted, need_options = (
            [CountedVariant(choice, settings.model) for choice in variants],
            [],
        )
    baseline = CountedVariant(Choice("standard"), settings.model)
    baseline = next((variant for variant in counted if variant == baseline), baseline)
    every_model, every_gpu = (
        _with(models.values(), settings.model),
        _with(gpus.values(), settings.gpu),
    )
    steps: list[tuple[str, Callable[[], Table]]] = [
        ("longest sequences", lambda: model_tables.limits_by_gpu(settings, every_gpu)),
        ("longest sequences by model", lambda: model_tables.limits_by_model(settings, every_model)),
        ("time of the model", lambda: model_tables.model_time(settings)),
        ("variants", lambda: variant_tables.variant_costs(settings, counted, baseline)),
        ("longest sequences by variant", lambda: variant_tables.variant_limits(settings, counted)),
        ("crossovers", lambda: variant_tables.crossovers(settings, counted, baseline)),
        ("latent attention", lambda: latent_table.latent_costs(settings)),
        ("paths", lambda: path_table.paths(settings, counted, baseline)),
    ]
    tables = []
    for stage, compute in steps:
        progress(stage)
        tables.append(compute())
    remarks = tuple(
        f"{name} is left out: it needs options that only you can give; name it with --variants"
        for name in need_options
    )
    return Scaling(
        settings,
        _article_tables(small, large, the_gpus),
        tuple(tables),
        contradictions(small, the_gpus[0], the_gpus[-1]),
        remarks,
        tuple(counted),
        tuple(every_model),
        tuple(every_gpu),
    )


def _article_tables(
    small: TransformerModel, models: Sequence[TransformerModel], gpus: Sequence[GPU]
) -> tuple[Table, ...]:
    return (
        article.attention_flops(),
        article.attention_memory(models),
        article.rnn_crossover(),
        article.path_length(),
        article.max_length(small, gpus),
        article.attention_time(small),
        article.layer_breakdown(),
        article.variant_complexity(),
    )


def _with(presets: Iterable[Any], own: Any) -> list[Any]:
    """The presets, and the user's own behind them if it is none of them."""
    presets = list(presets)
    return presets if own in presets else [*presets, own]


def _plain(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "formula": table.formula,
        "parameters": table.parameters,
        "notes": list(table.notes),
        "columns": {column.key: column.heading for column in table.columns},
        "rows": list(table.rows),
    }
