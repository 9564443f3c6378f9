"""Result files of single studies as tables of the pages of results."""

from __future__ import annotations

from benchmarks.readme.files import Row, read_lines
from benchmarks.readme.regions import markdown_table

MIB = 2**20
ROUNDS = (1, 4, 16)
PASTS = (1024, 32768)
GENERATORS = {
    "transformers": "transformers, SDPA with `DynamicCache`",
    "standard": "`standard`, state",
    "sliding_window": "`sliding_window`, window 256",
    "linear": "`linear`, elu + 1",
    "performer": "`performer`, 256 features",
}
HEALED = {
    "sliding_window": "sliding_window, 32 keys",
    "linear": "linear, elu + 1",
    "performer": "performer, 256 features",
    "gated_deltanet": "gated_deltanet, in 22 of 30 layers",
}


def recall() -> str:
    """What hashing sees of softmax's top keys, beside the nearest ones, without shared queries and
    keys."""
    rows = []
    for row in read_lines("lsh_recall.jsonl"):
        if not row["shared"] and row["num_hashes"] in ROUNDS:
            pairs = [
                f"{row['reformer'][what]:.0%}, {row['nearest'][what]:.0%}"
                for what in ("top_1", "top_8", "top_32", "mass")
            ]
            keys = f"{row['keys']:.0f} ({row['share_of_keys']:.0%})"
            rows.append(
                [f"{row['model']}, {row['length']:,} tokens", str(row["num_hashes"]), keys, *pairs]
            )
    return markdown_table(
        [
            "model",
            "rounds",
            "keys seen",
            "top 1: hashed, nearest",
            "top 8",
            "top 32",
            "mass of softmax",
        ],
        rows,
    )


def checkpointing() -> str:
    """Memory and time of a training step with gradient checkpointing."""
    rows = []
    for row in sorted(
        read_lines("checkpointing.jsonl"),
        key=lambda row: (row["variant"] != "standard", row["variant"]),
    ):
        peak = row["peak_bytes"]
        sizes = [f"{peak[kind] / MIB:.0f}" for kind in ("plain", "checkpointed")]
        rows.append(
            [
                f"`{row['variant']}`",
                *sizes,
                f"{row['memory_ratio']:.2f}×",
                f"{row['time_ratio']:.2f}×",
            ]
        )
    return markdown_table(["attention", "peak, MiB", "checkpointed", "memory", "time"], rows)


def generation() -> str:
    """Time of a generated token, the better of the passes, and bytes of the past."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in read_lines("generation.jsonl"):
        found.setdefault((row["contender"], row["length"]), []).append(row)
    rows = []
    for contender, said in GENERATORS.items():
        times = [
            f"{min(row['median_seconds'] for row in found[contender, length]) * 1e3:,.0f} ms"
            for length in PASTS
        ]
        last = found[contender, PASTS[-1]][0]
        rows.append(
            [said, *times, *(f"{last[what] / MIB:,.1f}" for what in ("held_bytes", "needed_bytes"))]
        )
    first, last = (f"{length:,}" for length in PASTS)
    return markdown_table(
        [
            "past",
            f"{first} tokens",
            f"{last} tokens",
            f"MiB held at {last}",
            "MiB that a token reads",
        ],
        rows,
    )


def healing() -> str:
    """Perplexity on both texts after swapping, after matching and after distilling."""
    runs = read_lines("heal.jsonl")
    texts = list(runs[0]["exact"])
    headings = [
        "",
        *(
            f"{text}: {stage}" if stage == "swapped" else stage
            for text in texts
            for stage in ("swapped", "matched", "distilled")
        ),
    ]
    rows = [
        ["exact", *(cell for text in texts for cell in (f"{runs[0]['exact'][text]:.1f}", "", ""))]
    ]
    for run in runs:
        recipe, by_step = (
            run["recipe"],
            {one["step"]: one["perplexity"] for one in run["evaluations"]},
        )
        stages = (
            0,
            recipe["matching_steps"],
            recipe["matching_steps"] + recipe["distillation_steps"],
        )
        rows.append(
            [
                HEALED[recipe["variant"]],
                *(_digits(by_step[stage][text]) for text in texts for stage in stages),
            ]
        )
    return markdown_table(headings, rows)


def selected() -> str:
    """Keys chosen by the data and by position, at one budget."""
    rows, found = [], read_lines("selected_quality.jsonl")
    lengths = list(found[0]["needle"])
    for row in found:
        seen, needles = row["seen"], (row["needle"][length] for length in lengths)
        rows.append(
            [
                row["attention"],
                f"{row['macs_share']:.0%}",
                *(("", "") if seen is None else (f"{seen['top_16']:.0%}", f"{seen['mass']:.0%}")),
                *(_digits(value) for value in row["perplexity"].values()),
                *(f"{one['digits']} of {one['of']} ({one['probability']:.0%})" for one in needles),
            ]
        )
    texts = [f"perplexity, {text}" for text in found[0]["perplexity"]]
    needles = [f"needle at {int(length):,}" for length in lengths]
    return markdown_table(["attention", "MACs", "top 16 seen", "mass", *texts, *needles], rows)


def selecting() -> str:
    """Time of attentions that select keys beside exact attention, and what of it the choice takes,
    forward and with the backward pass."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in read_lines("selected.jsonl"):
        options = (f"{key}={value}" for key, value in row["options"].items())
        label = " ".join([row["variant"], *options])
        found.setdefault((label, row["ran"]), {})[row["phase"]] = row
    rows = []
    for (label, ran), by in found.items():
        both = by["forward"], by["forward+backward"]
        rows.append(
            [
                label,
                f"`{ran}`",
                ", ".join(f"{row['speedup']:.2f}×" for row in both),
                f"{both[0]['promised']:.2f}×",
                ", ".join(f"{row['kept']:.2f}" for row in both),
                ", ".join(f"{row['selecting']:.0%}" for row in both),
            ]
        )
    headings = ["attention", "backend", "speed-up", "by MACs", "kept", "of it choosing keys"]
    return markdown_table(headings, rows)


def packing() -> str:
    """The time of a packed row over that of its pieces as a batch, by phase, causal where it can
    be."""
    found: dict[str, dict[str, Row]] = {}
    for row in sorted(read_lines("packing.jsonl"), key=lambda row: row["is_causal"]):
        found.setdefault(row["variant"], {})[row["phase"]] = row
    phases = list(next(iter(found.values())))
    return markdown_table(
        ["attention", *phases],
        [
            [f"`{variant}`", *(f"{by[phase]['packed_to_batch']['ratio']:.2f}×" for phase in phases)]
            for variant, by in found.items()
        ],
    )


TABLES = {
    "packing": packing,
    "selected": selected,
    "selecting": selecting,
    "recall": recall,
    "checkpointing": checkpointing,
    "generation": generation,
    "healing": healing,
}


def _digits(value: float) -> str:
    """Three digits, whole from 100 on."""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
