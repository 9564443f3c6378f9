"""What `attnzoo scaling` computes, as the tables of docs/attention_cost.md."""

from __future__ import annotations

from functools import cache

from attnzoo.cost.hardware import find_gpu, gpu_presets
from attnzoo.cost.model_sizes import find_model, model_presets
from attnzoo.report.scaling.scaling_report import Scaling, scaling
from attnzoo.report.scaling.settings import Settings
from benchmarks.readme.regions import markdown_table

MODEL, GPU, LENGTH, SHARE, TFLOPS = "gpt2", "h100", 16384, 0.7, 150.0  # the command's own defaults


@cache
def computed() -> Scaling:
    """`attnzoo scaling` without its variants: each page of docs/zoo/ has those."""
    models, gpus = model_presets(None), gpu_presets(None)
    model, gpu = find_model(MODEL, models), find_gpu(GPU, gpus)
    return scaling(Settings(model, gpu, LENGTH, False, SHARE, TFLOPS), models, gpus, [])


def cost(name: str) -> str:
    """One table, with its formula and what has to be known to read it."""
    table = computed().table(name)
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table.cells()]
    sizes = ", ".join(f"{key} = {value}" for key, value in table.parameters.items())
    parts = [f"**{table.title}**", f"`{table.formula}`" + (f" ({sizes})" if sizes else "")]
    parts.append(markdown_table([column.heading for column in table.columns], rows))
    return "\n\n".join([*parts, *table.notes])


def contradictions() -> str:
    """Where the article's prose says something else than its tables."""
    rows = [[f"“{found.prose}”", found.table] for found in computed().contradictions]
    return markdown_table(["the prose", "by the table's formula"], rows)


TABLES = {"cost": cost, "contradictions": contradictions}
