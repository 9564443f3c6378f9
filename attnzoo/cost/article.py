"""The tables of M. Brenndoerfer, "Attention Complexity" (2025), each from its formula, with its
parameters as arguments.

https://mbrenndoerfer.com/writing/attention-complexity-quadratic-scaling-memory-efficient-transformers

The article counts one multiply-accumulate (MAC) as one operation and calls it a FLOP; here it is
called a MAC, and is two FLOPs. All tables are for one sample and leave out causality: every token
sees every token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from attnzoo.arguments import check_positive
from attnzoo.cost.hardware import GPU
from attnzoo.cost.model_sizes import TransformerModel
from attnzoo.results.table import Column, Table

LENGTHS = (128, 512, 1024, 2048, 4096, 8192)
MEMORY_LENGTHS = (512, 2048, 8192, 32768)
CROSSOVER_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
PATH_LENGTHS = (128, 256, 512, 1024, 2048)
TIME_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
LAYER_LENGTHS = (256, 512, 1024, 2048, 4096)
SHARE = 0.7  # of a GPU's memory that the attention matrices may fill
RATE = 150e12  # operations a second, in the article's sense: MACs
GIB = 1024**3


def matrix_macs(n: int, d: int) -> int:
    """MACs of one of attention's two products over n tokens of width d: n² scores of d multiplies,
    summed over the heads."""
    return n * n * d


def attention_flops(
    lengths: Iterable[int] = LENGTHS, d: int = 768, softmax_operations: int = 3
) -> Table:
    """Operations of one attention layer: two products, and `softmax_operations` a score of one n ×
    n matrix."""
    rows = []
    for n in checked(lengths):
        flops = 2 * matrix_macs(n, d) + softmax_operations * n * n
        rows.append(
            {
                "n": n,
                "flops": flops,
                "projections": 4 * n * d * d,
                "with_projections": flops + 4 * n * d * d,
            }
        )
    columns = (
        Column("n", "n"),
        Column("flops", "attention, operations"),
        Column("projections", "projections, operations"),
        Column("with_projections", "together, operations"),
    )
    formula = f"2·n²·d + {softmax_operations}·n²; projections 4·n·d²"
    notes = (
        "A MAC is one operation here; the softmax is counted for one head, as the article does.",
    )
    return Table(
        "attention_flops",
        "Cost of one attention layer",
        formula,
        columns,
        tuple(rows),
        {"d": d},
        notes,
    )


def attention_memory(
    models: Sequence[TransformerModel],
    lengths: Iterable[int] = MEMORY_LENGTHS,
    element_bytes: int = 2,
) -> Table:
    """GiB of the queries, keys, values, attention matrices and outputs of all layers."""
    lengths = checked(lengths)
    rows = []
    for model in models:
        for n in lengths:
            elements = model.layers * (3 * n * model.d + model.heads * n * n + n * model.d)
            rows.append({"model": model.title, "n": n, "gib": elements * element_bytes / GIB})
    columns = (Column("model", "model", words=True), Column("n", "n"), Column("gib", "GiB", ",.2f"))
    formula = "layers · (3·n·d + heads·n² + n·d) · bytes / 1024³"
    notes = (
        "As an attention that stores its matrices keeps them for the backward pass; FlashAttention "
        "does not store them.",
    )
    return Table(
        "attention_memory",
        "Memory of attention, all layers",
        formula,
        columns,
        tuple(rows),
        {"element_bytes": element_bytes},
        notes,
    )


def rnn_crossover(lengths: Iterable[int] = CROSSOVER_LENGTHS, d: int = 512) -> Table:
    """MACs of one attention product against those of one recurrent layer; they meet at n = d."""
    rows = []
    for n in checked(lengths):
        attention, rnn = matrix_macs(n, d), n * d * d
        rows.append({"n": n, "attention": attention, "rnn": rnn, "ratio": attention / rnn})
    columns = (
        Column("n", "n"),
        Column("attention", "attention, MACs"),
        Column("rnn", "RNN, MACs"),
        Column("ratio", "ratio", ",.3f"),
    )
    return Table(
        "rnn_crossover",
        "Attention against a recurrent layer",
        "attention n²·d, RNN n·d²",
        columns,
        tuple(rows),
        {"d": d},
        (f"Equal at n = d = {d}.",),
    )


def path_length(lengths: Iterable[int] = PATH_LENGTHS, d: int = 512) -> Table:
    """Steps between two tokens, 1 by attention and (n-1)/2 in the mean by an RNN, against what
    attention costs more."""
    rows = []
    for n in checked(lengths):
        ratio, improvement = n / d, (n - 1) / 2
        rows.append(
            {
                "n": n,
                "rnn_max": n - 1,
                "rnn_mean": improvement,
                "attention": 1,
                "compute_ratio": ratio,
                "improvement": improvement,
                "efficiency": improvement / ratio,
            }
        )
    columns = (
        Column("n", "n"),
        Column("rnn_max", "RNN, longest path"),
        Column("rnn_mean", "RNN, mean path", ",.1f"),
        Column("attention", "attention, path"),
        Column("compute_ratio", "compute ratio", ",.2f"),
        Column("improvement", "improvement", ",.1f"),
        Column("efficiency", "improvement / ratio", ",.3f"),
    )
    formula = "improvement (n-1)/2, compute ratio n/d"
    return Table(
        "path_length",
        "Path between two tokens against its cost",
        formula,
        columns,
        tuple(rows),
        {"d": d},
    )


def longest_matrices(
    model: TransformerModel,
    memory_bytes: float,
    share: float = SHARE,
    element_bytes: int = 2,
    batch_size: int = 1,
) -> int:
    """Largest n whose attention matrices, heads · n² for each layer and sample, fit into `share` of
    the memory."""
    return math.isqrt(
        int(memory_bytes * share / (model.heads * element_bytes * model.layers * batch_size))
    )


def max_length(
    model: TransformerModel,
    gpus: Sequence[GPU],
    share: float = SHARE,
    element_bytes: int = 2,
    batch_size: int = 1,
) -> Table:
    """Longest sequence whose attention matrices of all layers fit a GPU."""
    rows = [
        {
            "gpu": gpu.title,
            "memory_gb": gpu.memory_gb,
            "n": longest_matrices(model, gpu.memory_bytes, share, element_bytes, batch_size),
        }
        for gpu in gpus
    ]
    columns = (
        Column("gpu", "GPU", words=True),
        Column("memory_gb", "memory, GB", ",g"),
        Column("n", "longest n"),
    )
    formula = "floor(√(memory · share / (heads · bytes · layers · batch)))"
    parameters = {
        "model": model.title,
        "share": share,
        "element_bytes": element_bytes,
        "batch_size": batch_size,
    }
    return Table(
        "max_length",
        "Longest sequence whose attention matrices fit",
        formula,
        columns,
        tuple(rows),
        parameters,
    )


def attention_time(
    model: TransformerModel, lengths: Iterable[int] = TIME_LENGTHS, macs_per_second: float = RATE
) -> Table:
    """Milliseconds of the two products of every layer at a given rate, and the tokens a second that
    follow."""
    rows = []
    for n in checked(lengths):
        seconds = 2 * matrix_macs(n, model.d) * model.layers / macs_per_second
        rows.append({"n": n, "ms": 1e3 * seconds, "tokens_per_s": n / seconds})
    columns = (
        Column("n", "n"),
        Column("ms", "ms", ",.2f"),
        Column("tokens_per_s", "tokens/s", ",.0f"),
    )
    notes = (
        f"The rate is in MACs: the article sets {macs_per_second / 1e12:g}·10¹² MACs a second "
        f"equal to {macs_per_second / 1e12:g} TFLOP/s. "
        "A datasheet counts two FLOPs a MAC, so at that datasheet rate the real time is twice "
        "this.",
    )
    parameters = {"model": model.title, "macs_per_second": macs_per_second}
    return Table(
        "attention_time",
        "Time of attention's two products",
        "2·n²·d·layers / rate",
        columns,
        tuple(rows),
        parameters,
        notes,
    )


def layer_breakdown(
    lengths: Iterable[int] = LAYER_LENGTHS, d: int = 768, ffn_factor: int = 4
) -> Table:
    """Shares of a transformer layer's MACs, in percent."""
    rows = []
    for n in checked(lengths):
        parts = {
            "attention": 2 * matrix_macs(n, d),
            "projections": 4 * n * d * d,
            "ffn": 2 * n * d * ffn_factor * d,
        }
        total = sum(parts.values())
        rows.append(
            {
                "n": n,
                **{name: 100 * macs / total for name, macs in parts.items()},
                "total_macs": total,
            }
        )
    columns = (
        Column("n", "n"),
        Column("attention", "attention, %", ".1f"),
        Column("projections", "projections, %", ".1f"),
        Column("ffn", "feed-forward, %", ".1f"),
        Column("total_macs", "together, MACs"),
    )
    formula = f"attention 2·n²·d, projections 4·n·d², feed-forward 2·n·d·({ffn_factor}·d)"
    return Table(
        "layer_breakdown",
        "Shares of a layer",
        formula,
        columns,
        tuple(rows),
        {"d": d, "ffn_factor": ffn_factor},
    )


def variant_complexity(n: int = 16384, d: int = 768, window: int = 256) -> Table:
    """The leading term of four kinds of attention. The zoo's own counts, which are not leading
    terms, are in `attnzoo.report.scaling.variant_tables`."""
    (n,) = checked([n])
    root = math.isqrt(n)
    exact = matrix_macs(n, d)
    terms = (
        ("standard", "n²·d", exact),
        ("linear", "n·d²", n * d * d),
        ("sparse, k=√n", "n·k·d", n * root * d),
        (f"window, w={window}", "n·w·d", n * window * d),
    )
    rows = tuple(
        {"variant": variant, "formula": formula, "flops": macs, "speedup": exact / macs}
        for variant, formula, macs in terms
    )
    columns = (
        Column("variant", "variant", words=True),
        Column("formula", "leading term", words=True),
        Column("flops", "MACs"),
        Column("speedup", "ratio to standard", ",.1f"),
    )
    return Table(
        "variant_complexity",
        "Leading terms of the variants",
        "see the rows",
        columns,
        rows,
        {"n": n, "d": d, "window": window},
        ("Linear is counted for one head of width d; h heads of width d/h need h times fewer.",),
    )


def checked(lengths: Iterable[int]) -> list[int]:
    """The lengths as a list. Raises ValueError on one that is not a whole number of at least 1."""
    return [check_positive("n", n) for n in lengths]
