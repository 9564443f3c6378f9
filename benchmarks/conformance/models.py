"""Ask whole layers and models what no single call of an attention shows.

    sh benchmarks/conformance/setup.sh FOLDER
    PYTHONPATH=FOLDER python benchmarks/conformance/models.py

A row of the result file is one question. docs/results/what_a_check_finds.md has the answers.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import transformers
from adapters import of
from page import MODELS, write_page
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # so that layers add as much as they are given
}
#: Lengths of the texts of a packed row, and of the pieces of a continued one.
FIRST, LENGTH = 11, 20


@dataclass(frozen=True)
class Question:
    """A question to a library.

    package: that is asked
    name: what of it
    asked: in words
    answer: in words, with what was measured
    """

    package: str
    name: str
    asked: str
    answer: Callable[[], str]


def far(found: Tensor, wanted: Tensor) -> str:
    """How far rows lie from those that belong, over the size of these."""
    error = ((found - wanted).norm() / wanted.norm()).item()
    return "equal to rounding" if error < 1e-5 else f"off by {error:.1g} times their size"


def tokens() -> Tensor:
    return torch.randint(1, 50, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def made(name: str, **options: Any) -> nn.Module:
    """A small model of transformers with weights of its own kind."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    return getattr(transformers, f"{name}Model")(config).eval()


def packed(name: str, **options: Any) -> Callable[[], str]:
    """Two texts in one row, told apart by positions that begin again, beside each alone."""

    def answer() -> str:
        model, ids = made(name, **options), tokens()
        places = torch.cat([torch.arange(FIRST), torch.arange(LENGTH - FIRST)])[None]
        with torch.no_grad():
            row = model(ids, position_ids=places, use_cache=False).last_hidden_state
            alone = model(ids[:, FIRST:], use_cache=False).last_hidden_state
        return f"beside its run alone, the rows of the second text are {far(row[:, FIRST:], alone)}"

    return answer


def continued(name: str, **options: Any) -> Callable[[], str]:
    """A cached sequence that goes on by several tokens, and one by one, beside the whole run."""

    def answer() -> str:
        model, ids = made(name, **options), tokens()
        with torch.no_grad():
            whole = model(ids, use_cache=False).last_hidden_state[:, FIRST:]
            cache = model(ids[:, :FIRST], use_cache=True)
            several = _goes_on(model, ids[:, FIRST:], cache)
            cache, single = model(ids[:, :FIRST], use_cache=True), []
            for token in range(FIRST, LENGTH):
                cache = _next(model, ids[:, token : token + 1], cache)
                single.append(cache.last_hidden_state)
        return (
            f"beside the whole run, the rows of {LENGTH - FIRST} tokens at once are "
            f"{far(several, whole)}; one by one they are {far(torch.cat(single, 1), whole)}"
        )

    return answer


def _goes_on(model: nn.Module, ids: Tensor, before: Any) -> Tensor:
    return _next(model, ids, before).last_hidden_state


def _next(model: nn.Module, ids: Tensor, before: Any) -> Any:
    name = "cache_params" if "cache_params" in before else "past_key_values"
    return model(ids, use_cache=True, **{name: before[name]})


def bigbird_in_eval() -> str:
    """The keys that its random blocks name, by values that tell them."""
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    config = transformers.BigBirdConfig(
        hidden_size=64, num_attention_heads=1, block_size=4, num_random_blocks=2, use_bias=False
    )
    attention, length = BigBirdBlockSparseAttention(config, seed=0), 64
    with torch.no_grad():
        for projection in (attention.query, attention.key):
            projection.weight.zero_()  # every key that is seen weighs the same, once for each time
        attention.value.weight.copy_(torch.eye(64))
    ones = torch.ones(1, length)
    blocked, *bands = transformers.BigBirdModel.create_masks_for_block_sparse_attn(ones, 4)
    told = {}
    for training in (True, False):
        attention.train(training)
        with torch.no_grad():
            rows = attention(torch.eye(length)[None], *bands, blocked, blocked)[0][0]
        blocks = rows[32].unflatten(0, (-1, 4)).mean(1)  # of a token in the middle
        weights = (blocks / blocks[blocks > 0].min()).round().int().tolist()
        told[training] = {place: weight for place, weight in enumerate(weights) if weight}

    def said(weights: dict[int, int]) -> str:
        often = [f"block {place} {n} times" for place, n in weights.items() if n > 1]
        return f"blocks {', '.join(map(str, weights))}" + (
            f" ({', '.join(often)})" if often else ""
        )

    return (
        f"with every score 0 a token of block 8 reads {said(told[True])} in training, and "
        f"{said(told[False])} in evaluation"
    )


def argument_order() -> str:
    """Positions of the gate and the strength in two functions for the same rule."""
    module = "fla.ops.gated_delta_rule.naive"
    recurrent = of(f"{module}:naive_recurrent_gated_delta_rule")
    chunk = of(f"{module}:naive_chunk_gated_delta_rule")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, LENGTH, 2, 8) for _ in "qkv")
    k = nn.functional.normalize(k, dim=-1)
    beta, g = torch.rand(1, LENGTH, 2), -torch.rand(1, LENGTH, 2)
    named = {"q": q, "k": k, "v": v, "beta": beta, "g": g}
    by_name = far(recurrent(**named)[0], chunk(**named)[0])
    by_place = far(chunk(q, k, v, beta, g)[0], recurrent(q, k, v, beta, g)[0])
    orders = [", ".join(list(inspect.signature(one).parameters)[3:5]) for one in (recurrent, chunk)]
    return (
        f"the recurrent one takes ({orders[0]}) after q, k and v, the one in chunks ({orders[1]}): "
        f"called by names they are {by_name}, by places {by_place}"
    )


def landmarks_of_a_batch() -> str:
    """Rows of a sample beside those of the same sample with another one in its batch."""
    torch.manual_seed(0)
    layer = of("nystrom_attention:NystromAttention")(
        dim=32, dim_head=8, heads=4, num_landmarks=8, residual=False
    ).eval()
    x = torch.randn(2, 64, 32)
    x[1] *= 8
    with torch.no_grad():
        return f"beside its run alone, the rows of one are {far(layer(x)[:1], layer(x[:1]))}"


def eps_of_features() -> str:
    """Rows of random features with their eps beside those without it, and the keys' weights."""
    module = "performer_pytorch.performer_pytorch"
    kernel, product = of(f"{module}:softmax_kernel"), of(f"{module}:linear_attention")
    told = []
    for size in (0.5, 1.0):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 1, 1024, 64, dtype=torch.float64) for _ in "qkv")
        projection = of(f"{module}:gaussian_orthogonal_random_matrix")(256, 64).double()
        rows = []
        for eps in (1e-4, 0.0):
            made = {"projection_matrix": projection, "eps": eps}
            features = (
                kernel(size * q, is_query=True, **made),
                kernel(size * k, is_query=False, **made),
            )
            rows.append(product(*features, v))
        told.append(f"{far(*rows)} at numbers of size {size:g}")
    return "beside those with eps=0, rows of 1,024 tokens of 64 are " + ", and ".join(told)


def read_by_rows(attend: Callable[..., Tensor], queries: int, keys: int) -> list[list[int]]:
    """The tokens of which each row reads the values."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, queries, keys), torch.randn(1, 1, keys, keys)
    weights = attend(q, k, torch.eye(keys)[None, None])[0, 0]
    return [row.nonzero()[:, 0].tolist() for row in weights]


def hidden_bucket() -> str:
    causal = of("linear_attention_transformer.linear_attention_transformer:causal_linear_attn")
    rows = read_by_rows(lambda q, k, v: causal(q, k, v, bucket_size=4), 12, 12)
    return f"with bucket_size=4, rows 3, 4 and 7 of 12 read tokens {rows[3]}, {rows[4]}, {rows[7]}"


def moving_diagonal() -> str:
    told = []
    for flash in (False, True):
        attend = of("x_transformers.attend:Attend")(causal=True, heads=1, flash=flash)
        rows = read_by_rows(lambda q, k, v, attend=attend: attend(q, k, v)[0], 4, 2)
        told.append(f"{', '.join(map(str, rows))} with flash={flash}")
    return f"causal rows of 4 queries over 2 keys read keys {'; '.join(told)}"


PACKED = "two texts in one row, told apart by position_ids that begin again"
CONTINUED = "a cached sequence goes on by several tokens"
NEXT = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
    "num_experts": 0,
}
JAMBA = {
    "num_hidden_layers": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 1,
    "num_experts_per_tok": 1,
}
MINIMAX = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "num_local_experts": 2,
}
FALCON = {
    "num_hidden_layers": 2,
    "head_dim": 8,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
}
MAMBA = {"num_hidden_layers": 2, "state_size": 8}
MAMBA2 = {"num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1}
LLAMA = {"num_hidden_layers": 2}
QUESTIONS = (
    Question("performer-pytorch", "softmax_kernel", "what its eps=1e-4 adds", eps_of_features),
    Question(
        "linear-attention-transformer",
        "causal_linear_attn",
        "whether a row reads its own bucket",
        hidden_bucket,
    ),
    Question(
        "x-transformers", "Attend", "where the diagonal of more queries lies", moving_diagonal
    ),
    Question(
        "nystrom-attention",
        "NystromAttention",
        "whether another sample of a batch changes rows",
        landmarks_of_a_batch,
    ),
    Question(
        "transformers",
        "BigBirdBlockSparseAttention",
        "which keys random blocks name",
        bigbird_in_eval,
    ),
    Question("transformers", "MambaModel", CONTINUED, continued("Mamba", **MAMBA)),
    Question("transformers", "Mamba2Model", CONTINUED, continued("Mamba2", **MAMBA2)),
    Question("transformers", "Qwen3NextModel", CONTINUED, continued("Qwen3Next", **NEXT)),
    Question("transformers", "LlamaModel", PACKED, packed("Llama", **LLAMA)),
    Question("transformers", "Qwen3NextModel", PACKED, packed("Qwen3Next", **NEXT)),
    Question("transformers", "MiniMaxModel", PACKED, packed("MiniMax", **MINIMAX)),
    Question("transformers", "JambaModel", PACKED, packed("Jamba", **JAMBA)),
    Question("transformers", "FalconH1Model", PACKED, packed("FalconH1", **FALCON)),
    Question("fla-core", "naive gated delta rules", "the order of arguments", argument_order),
)


def answer_of(one: Question) -> str:
    """What is answered; by transformers itself, not by the kernels of flash-linear-attention that
    it would call on a CPU too, where these are installed."""
    if one.package != "transformers":
        return one.answer()
    sys.modules["fla"] = None  # pyright: ignore[reportArgumentType]
    try:
        return one.answer()
    finally:
        del sys.modules["fla"]


def main() -> None:
    rows = []
    for one in QUESTIONS:
        row = {"package": one.package, "version": version(one.package).split("+")[0]}
        row |= {"name": one.name, "asked": one.asked, "answer": answer_of(one)}
        print(row, flush=True)
        rows.append(row)
    MODELS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_page()


if __name__ == "__main__":
    main()
