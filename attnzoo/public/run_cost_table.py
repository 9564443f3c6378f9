"""`attnzoo.cost_table`: what attentions cost in a model on a GPU, by their closed forms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo.public.variant_text import Variant, parse_variant, written

if TYPE_CHECKING:
    from attnzoo.report.result import Result
    from attnzoo.report.scaling.scaling_report import Progress, Scaling


def cost_table(
    variants: Variant | Iterable[Variant] | None = None,
    *,
    model: str = "gpt2",
    gpu: str = "h100",
    length: int = 16384,
    causal: bool = False,
    share: float = 0.7,
    tflops: float = 150.0,
    model_presets: str | Path | None = None,
    gpu_presets: str | Path | None = None,
) -> Result:
    """What attentions cost: MACs, kept bytes, decoding state, least time, longest sequences and
    crossovers, computed and not measured.

    variants: such as "performer:num_features=64", ("performer", {"num_features": 64}), or a list;
    default: the whole zoo.
    model: a preset of configs/models.yaml, or "d=4096,heads=32,kv_heads=8,layers=32".
    gpu: a preset of configs/gpus.yaml, or "memory_gb=48,tflops=150,bandwidth_gb=700".
    length: tokens at which variants are compared.
    causal: count causal attention; default: every token sees every token.
    share: part of the GPU's memory that may be filled.
    tflops: a rate of your own for the table of times, in 10^12 FLOPs a second.
    model_presets, gpu_presets: YAML files with presets of your own, beside the shipped ones.

    Raises ValueError, one sentence, on a setting that is not allowed.
    """
    from attnzoo.report.scaling.scaling_page import scaling_result

    found = compute_costs(
        None if variants is None else written(variants),
        model,
        gpu,
        length,
        causal,
        share,
        tflops,
        model_presets,
        gpu_presets,
    )
    return scaling_result(found)


def compute_costs(
    variants: list[str] | None,
    model: str,
    gpu: str,
    length: int,
    causal: bool,
    share: float,
    tflops: float,
    model_presets: str | Path | None,
    gpu_presets: str | Path | None,
    progress: Progress = lambda stage: None,
) -> Scaling:
    """All tables of `cost_table` and what the command line says of them."""
    from attnzoo.cost import hardware, model_sizes
    from attnzoo.report.scaling.scaling_report import scaling
    from attnzoo.report.scaling.settings import Settings

    models = model_sizes.model_presets(_path(model_presets))
    gpus = hardware.gpu_presets(_path(gpu_presets))
    chosen = Settings(
        model_sizes.find_model(model, models),
        hardware.find_gpu(gpu, gpus),
        length,
        causal,
        share,
        tflops,
    )
    choices = None if variants is None else [parse_variant(text) for text in variants]
    with one_thread():
        return scaling(chosen, models, gpus, choices, progress)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


@contextmanager
def one_thread() -> Iterator[None]:
    """The tensors here are small: waking a second thread for each costs more than it brings."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
