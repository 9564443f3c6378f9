"""Which attention should I use: the short answers of docs/choosing.md, each with the number that it
rests on and the command that measures it again."""

from __future__ import annotations

from attnzoo.cost.article import layer_breakdown
from attnzoo.registry import build
from attnzoo.results.result_file import read_rows
from attnzoo.results.units import memory
from attnzoo.training.summary import Summary, summed_up
from attnzoo.training.training_rows import Row as TrainingRow
from benchmarks.readme import choices, files
from benchmarks.readme.files import Row, read_lines
from benchmarks.readme.regions import Table, markdown_table

EXACT_FIRST = "standard" + " + gated_deltanet scale=1.0" * 3
WHOLE = ("all", "final")  # every layer swapped, on text that chose nothing
SINKS = "longformer window=256 global_tokens=4"
PATCHES = 197  # of an image of 224 by 224 pixels in squares of 16, and [CLS]
HEADINGS = ["you have", "use", "because", "measure again"]


def answers() -> str:
    """By task."""
    rows = [
        ["an encoder of up to 512 tokens", "exact attention", _encoder(), "`attnzoo compare`"],
        [
            "a pretrained encoder and longer documents",
            "`bigbird` or `longformer`",
            _documents(),
            "`attnzoo compare --model minilm --study full`",
        ],
        [
            "a pretrained decoder, a context of 32k tokens, and nothing to train",
            "`sliding_window` with sinks",
            _decoder(),
            "`attnzoo compare --model smollm2 --study full`, `python benchmarks/generation.py`",
        ],
        [
            "the same, and something far back must be found",
            "exact attention in some layers, `moba` with small blocks in others",
            _needle(),
            "`python benchmarks/selected_quality.py`",
        ],
        [
            "a model to train from scratch that must recall",
            "`gated_deltanet` behind one exact layer",
            _recall(),
            "`attnzoo train --task mqar --size hybrid`",
        ],
        [
            "a state to be followed, such as a parity or a permutation",
            "`deltanet` with `allow_neg_eigval=True`",
            _parity(),
            "`attnzoo train --task parity --size cpu --learning-rates 0.01 --seeds 0 1`",
        ],
        [
            "a pretrained model to linearise",
            "`gated_deltanet` in most layers, exact attention where a swap hurts most",
            _linearised(),
            "`python benchmarks/heal/heal.py --config benchmarks/heal/hybrid.yaml`",
        ],
        [
            "images of a few hundred patches",
            "exact attention",
            _images(),
            "`attnzoo.count_flops(model, pixels)`",
        ],
    ]
    sections = [
        "an-encoder-at-512-tokens",
        "long-documents-by-a-pretrained-encoder",
        "a-decoder-with-a-context-of-32k-tokens",
        "something-far-back-must-be-found",
        "training-from-scratch",
        "states-to-be-followed",
        "linearising-a-pretrained-model",
        "vision",
    ]
    linked = [
        [f"[{have}](#{section})", *rest]
        for (have, *rest), section in zip(rows, sections, strict=True)
    ]
    return markdown_table(HEADINGS, linked)


def answers_hardware() -> str:
    """By hardware."""
    speed = {row["variant"]: row for row in choices.compared("SmolLM2-135M", 4096)}
    kept = ", ".join(
        f"`{name}` {speed[name]['speedup']:.1f}× where its MACs promise "
        f"{speed[name]['promised_speedup']:.1f}×"
        for name in ("sliding_window", "bigbird", "linear")
    )
    return markdown_table(
        HEADINGS,
        [
            [
                "a CPU, some thousand tokens",
                "windows and blocks first, then feature maps",
                f"at 4,096 tokens, causal, over exact attention: {kept}",
                "`attnzoo bench --config quick`",
            ],
            [
                "a GPU, up to about a thousand tokens",
                "exact attention",
                _gpu(),
                "`attnzoo bench --config cuda`",
            ],
            [
                "little memory while decoding",
                "a bounded state: windows, kernels, decays, delta rules",
                _states(),
                "`attnzoo.memory(module, *inputs)`, `attn.cost(1, 32768, is_causal=True)`",
            ],
        ],
    )


def answers_training() -> str:
    """By what can be retrained."""
    mix = next(
        row
        for row in read_lines(choices.SMOLLM)
        if (row["task"], row["part"], row["text"], row["length"], row["tolerance"])
        == ("mix", "final", "shakespeare", 4096, 0.01)
    )
    above = mix["perplexity"] / mix["exact_perplexity"] - 1
    return markdown_table(
        ["you can train", *HEADINGS[1:]],
        [
            [
                "nothing",
                "exact attention, `sliding_window` with sinks or `bigbird`, which are softmax on "
                "fewer keys; or a [mix by layer](#mixes-by-layer)",
                f"perplexity {_perplexity(SINKS)} with sinks and "
                f"{_perplexity('bigbird block_size=64')} with `bigbird`, beside "
                f"{_perplexity('exact')}; a mix that saves {choices.macs_saved(mix):.0%} of the "
                f"MACs is {above:.1%} above exact",
                "`attnzoo compare --model smollm2 --study full`",
            ],
            [
                "the projections, for minutes",
                "the same, healed; or a hybrid with `gated_deltanet` in most layers",
                f"perplexity on Hamlet {_healed('sliding_window')} with a window of 32 keys and "
                f"{_healed('gated_deltanet')} with the hybrid, beside {_exact_hamlet():.1f}",
                "`python benchmarks/heal/heal.py --config benchmarks/heal/cpu.yaml`",
            ],
            [
                "the whole model",
                "anything: first of all an exact layer in front of recurrent ones, with learning "
                "rates searched for each attention, since [the best rate differs]"
                "(results/recall.md)",
                _recall(),
                "`attnzoo train --task mqar --size hybrid`",
            ],
        ],
    )


TABLES: dict[str, Table] = {
    "answers": answers,
    "answers_hardware": answers_hardware,
    "answers_training": answers_training,
}


def _encoder() -> str:
    rows = [row for row in choices.compared("MiniLM-L6", 512) if (row["output_error"] or 0) > 1e-3]
    faster = min(
        (row for row in rows if row["speedup"] > 1), key=lambda row: float(row["output_error"])
    )
    return (
        f"the nearest attention that is faster, `{faster['variant']}`, errs by "
        f"{faster['output_error']:.2f}, where the average of the values errs by "
        f"{faster['mean_value_error']:.2f}"
    )


def _documents() -> str:
    rows = [row for row in read_lines(choices.MINILM) if (row["task"], row["part"]) == WHOLE]
    found = {row["label"]: row for row in rows if row["length"] == 256}
    told = [
        f"{found[label]['cosine']:.2f} by `{label}`, {choices.macs_saved(found[label]):.0%} saved"
        for label in ("bigbird block_size=16", "longformer window=64 global_tokens=1")
    ]
    return f"cosine to exact embeddings, and attention's MACs saved: {'; '.join(told)}"


def _perplexity(label: str) -> str:
    """Of Shakespeare at 4,096 tokens, SmolLM2 with every layer swapped."""
    return f"{choices.swapped(label)['shakespeare']['perplexity']:.1f}"


def _decoder() -> str:
    return (
        f"perplexity {_perplexity(SINKS)} beside {_perplexity('exact')}; a token after 32,768 "
        f"others takes {choices.token_time('sliding_window') * 1e3:.0f} ms beside "
        f"{choices.token_time('standard') * 1e3:.0f} ms"
    )


def _needle() -> str:
    rows = read_lines("selected_quality.jsonl")
    found = {row["attention"]: row["needle"]["8192"] for row in rows}
    small = found["moba block_size=16 top_k=32"]
    window = found["sliding_window window=508 sinks=4"]
    return (
        f"at 8,192 tokens `moba` with blocks of 16 finds {small['digits']} of {small['of']} "
        f"digits, and a window with as many keys {window['digits']}"
    )


def _trained(file: str, label: str, problem: int = 0) -> Summary:
    problems = summed_up(read_rows(files.RESULTS / "tasks" / f"{file}.jsonl", TrainingRow))
    return next(one for one in problems[problem].contenders if one.label == label)


def _scored(one: Summary) -> str:
    return f"{one.test:.1%}"


def _recall() -> str:
    hybrid, exact = (_trained("mqar-hybrid", label) for label in (EXACT_FIRST, "standard"))
    return (
        f"{_scored(hybrid)} of 16 pairs recalled with a state of {memory(hybrid.state_bytes)}, "
        f"exact attention {_scored(exact)} with {memory(exact.state_bytes)}"
    )


def _parity() -> str:
    delta = _trained("parity-study", "deltanet allow_neg_eigval=True")
    exact = _trained("parity-study", "standard")
    return f"{_scored(delta)} on parity of 64 bits, exact attention {_scored(exact)}"


def _run(variant: str) -> Row:
    return next(run for run in read_lines("heal.jsonl") if run["recipe"]["variant"] == variant)


def _healed(variant: str) -> str:
    return f"{_run(variant)['evaluations'][-1]['perplexity']['Hamlet']:.1f}"


def _exact_hamlet() -> float:
    return float(read_lines("heal.jsonl")[0]["exact"]["Hamlet"])


def _linearised() -> str:
    swapped = _run("gated_deltanet")["evaluations"][0]["perplexity"]["Hamlet"]
    return (
        f"perplexity on Hamlet goes from {swapped:.0f} after the swap to "
        f"{_healed('gated_deltanet')} after minutes of training; exact {_exact_hamlet():.1f}"
    )


def _images() -> str:
    (row,) = layer_breakdown([PATCHES]).rows
    return (
        f"at {PATCHES} tokens of width 768 attention's two products are {row['attention']:.0f}% of "
        "a layer's MACs"
    )


def _gpu() -> str:
    rows = [row for row in read_lines("cuda/bench.jsonl") if row["seconds"]]
    fastest = min(
        (row for row in rows if row["is_causal"] and row["variant"] not in ("sdpa", "standard")),
        key=lambda row: float(row["seconds"]),
    )
    return (
        f"1,024 tokens, causal, bfloat16, forward, on an H200: SDPA "
        f"{fastest['sdpa_seconds'] * 1e3:.2f} ms, the fastest other, `{fastest['variant']}` by "
        f"`{fastest['ran']}`, {fastest['seconds'] * 1e3:.2f} ms; longer sequences have not been "
        "timed"
    )


def _states() -> str:
    told = []
    for name, options in (
        ("standard", {}),
        ("sliding_window", {"window": 256, "sinks": 4}),
        ("gated_deltanet", {}),
    ):
        cost = build(name, 8, 64, **options).cost(1, 32768, is_causal=True)
        told.append(f"`{name}` {memory(cost.state_bytes)}")
    return f"after 32,768 tokens, 8 heads of 64 in float32: {', '.join(told)}"
