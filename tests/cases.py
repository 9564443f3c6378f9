"""Small configurations of every variant, the situations they are tried in, and the oracle's answer
to each."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import attnzoo
from attnzoo import Attention
from attnzoo.oracles import ORACLES
from attnzoo.registry import options_of, sized, spec_of

CPU_BACKENDS = {
    *(
        "sdpa",
        "rows",
        "tiled",
        "dense",
        "native",
        "native_row",
        "tiles",
        "windows",
        "columns",
        "blocks",
        "ragged",
    ),
    *("one_row", "flash", "short", "chunked", "open", "selected", "branches", "reference"),
}
MAX_LENGTH = 1024


def preferring(attn: Attention, backend: str) -> Attention:
    """The attention whose calls go to this backend wherever it does not refuse them."""
    first = [
        replace(one, untried=lambda engine, call: None)
        for one in attn.engine.backends
        if one.name == backend
    ]
    assert first, f"{backend} is none of {attn.engine.backend_names()}"
    others = [one for one in attn.engine.backends if one.name != backend]
    attn.engine.backends = (*first, *others)  # pyright: ignore[reportAttributeAccessIssue]
    return attn


def takes(
    attn: Attention,
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    **inputs: Tensor,
) -> bool:
    """Whether the backend, asked for by name, takes such a call, without gradients and with those
    that the tensors ask for, rather than refuse it."""
    call = attn._call(q, k, v, key_mask, None, is_causal, inputs)
    attn.refuse(call)
    try:
        for learns in (False, True):
            with torch.set_grad_enabled(learns):
                attn.engine.choose(attn.engine.completed(attn.place(call, 0)), backend)
    except attnzoo.UnsupportedError:
        return False
    return True


def squared_elu(x: Tensor) -> Tensor:
    """A user's own feature map, of another width than head_dim; at module level so that it
    pickles."""
    positive = torch.nn.functional.elu(x) + 1
    return torch.cat([positive, positive**2], -1)


@dataclass(frozen=True)
class Case:
    """One variant with options.

    shift: added to q and k where a feature map would else leave next to nothing to normalise by:
    there every order of operations loses float32's digits, the oracle's too.
    """

    variant: str
    options: dict[str, Any] = field(default_factory=dict)
    shift: float = 0.0

    @property
    def spec(self) -> attnzoo.Spec:
        return spec_of(self.variant)

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        shown = [
            f"{name}={getattr(value, '__name__', value)}" for name, value in self.options.items()
        ]
        return f"{self.variant}({', '.join(shown)})"

    def build(
        self, heads: int = 4, head_dim: int = 8, *, dtype: torch.dtype = torch.float32, **more: Any
    ) -> Attention:
        """The attention, with the same learned and drawn numbers every time. prefer: a backend that
        is the first choice: a call that it refuses goes to the next that does not."""
        options = {**sized(self.variant, MAX_LENGTH), **self.options, **more}
        backend = options.pop("prefer", "auto")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)  # `conftest.fixed_seed` says why
            attn = attnzoo.build(self.variant, heads=heads, head_dim=head_dim, **options).to(dtype)
        return attn if backend == "auto" else preferring(attn, backend)


CASES: dict[str, list[Case]] = {
    "standard": [
        Case("standard"),
        Case("standard", {"scale": 0.7}),
        Case("standard", {"softcap": 2.0}),
    ],
    "path": [Case("path"), Case("path", {"scale": 0.7})],
    "sigmoid": [Case("sigmoid"), Case("sigmoid", {"bias": -3.0, "scale": 0.7})],
    "differential": [Case("differential"), Case("differential", {"layer": 3, "scale": 0.7})],
    "forgetting": [Case("forgetting"), Case("forgetting", {"scale": 0.7})],
    "linformer": [
        Case("linformer", {"rank": 16, "sharing": "none"}),
        Case("linformer", {"rank": 16, "sharing": "headwise"}),
        Case("linformer", {"rank": 16, "sharing": "key_value"}),
        Case("linformer", {"rank": 16, "sharing": "layerwise"}),
    ],
    "linear": [
        Case("linear"),
        Case("linear", {"feature_map": "relu"}, shift=0.5),
        Case("linear", {"feature_map": "squared_relu"}, shift=1.0),
        Case("linear", {"feature_map": "softmax"}),
        Case("linear", {"feature_map": "identity", "normalize": False}),
        Case("linear", {"normalize": False}),
        Case("linear", {"feature_map": "taylor"}),
        Case("linear", {"feature_map": "taylor", "normalize": False}),
        Case("linear", {"feature_map": squared_elu}),
    ],
    "performer": [
        Case("performer", {"num_features": 24}),
        Case("performer", {"num_features": 24, "features": "hyperbolic"}),
        Case("performer", {"num_features": 64, "features": "trigonometric", "scale": 0.05}),
        Case("performer", {"num_features": 24, "features": "relu"}),
        Case("performer", {"num_features": 24, "orthogonal": False, "seed": 5, "scale": 0.3}),
    ],
    "sliding_window": [
        Case("sliding_window", {"window": 16}),
        Case("sliding_window", {"window": 1}),
        Case("sliding_window", {"window": 7}),
        Case("sliding_window", {"window": 100}),
        Case("sliding_window", {"window": 5, "dilation": 3}),
        Case("sliding_window", {"window": 70, "dilation": 2}),
        Case("sliding_window", {"window": 7, "sinks": 3}),
        Case("sliding_window", {"window": 70, "sinks": 100}),
        Case("sliding_window", {"window": 7, "sink_logits": True}),
        Case("sliding_window", {"window": 16, "sinks": 2, "sink_logits": True}),
        Case("sliding_window", {"window": 5, "dilation": 2, "sink_logits": True}),
        Case("sliding_window", {"window": 5, "dilation": 3, "sinks": 4}),
        Case("sliding_window", {"window": 9, "softcap": 2.0}),
        Case("sliding_window"),
    ],
    "sparse_transformer": [
        Case("sparse_transformer", {"stride": 8}),
        Case("sparse_transformer", {"stride": 8, "pattern": "fixed", "expressivity": 2}),
        Case("sparse_transformer", {"stride": 5, "factors": "by_head"}),
        Case(
            "sparse_transformer",
            {"stride": 5, "pattern": "fixed", "expressivity": 1, "factors": "by_head"},
        ),
        Case("sparse_transformer", {"stride": 1}),
        Case("sparse_transformer"),
    ],
    "bigbird": [
        Case("bigbird", {"block_size": 4, "num_random_blocks": 2}),
        Case("bigbird", {"block_size": 16, "num_random_blocks": 2, "seed": 3}),
        Case(
            "bigbird",
            {
                "block_size": 3,
                "num_random_blocks": 0,
                "num_window_blocks": 1,
                "num_global_blocks": 0,
            },
        ),
        Case(
            "bigbird",
            {
                "block_size": 5,
                "num_random_blocks": 3,
                "num_window_blocks": 5,
                "num_global_blocks": 3,
            },
        ),
        Case("bigbird", {"block_size": 1, "num_random_blocks": 4}),
        Case("bigbird", {"block_size": 8, "num_random_blocks": 1, "softcap": 2.0}),
        Case("bigbird"),
    ],
    "cosformer": [Case("cosformer", shift=0.5), Case("cosformer", {"max_length": 1000}, shift=0.5)],
    "retention": [Case("retention"), Case("retention", {"scale": 0.5})],
    "mamba2": [Case("mamba2"), Case("mamba2", {"scale": None})],
    "log_linear": [
        Case("log_linear"),
        Case("log_linear", {"base": "gated_deltanet", "scale": None}),
    ],
    "lightning": [
        Case("lightning"),
        Case("lightning", {"slopes": "fla", "layer": 1, "num_layers": 3, "scale": None}),
    ],
    "flash": [
        Case("flash", {"block_size": 100}),
        Case("flash", {"block_size": 64, "scale": 0.7}),
        Case("flash", {"block_size": 64, "softcap": 2.0}),
        Case("flash"),
    ],
    "nystromformer": [
        Case("nystromformer", {"num_landmarks": 8}),
        Case("nystromformer", {"num_landmarks": 8, "convolution": 5}),
        Case("nystromformer", {"num_landmarks": 5, "iterations": 2, "scale": 0.7}),
        Case("nystromformer"),
    ],
    "reformer": [
        Case("reformer", {"num_buckets": 6, "num_hashes": 3, "chunk_size": 5}),
        Case("reformer", {"num_buckets": 2, "num_hashes": 1, "chunk_size": 7}),
        Case(
            "reformer",
            {"num_buckets": 16, "num_hashes": 2, "chunk_size": 4, "seed": 3, "scale": 0.7},
        ),
        Case("reformer", {"num_buckets": (4, 2, 6), "num_hashes": 2, "chunk_size": 3}),
        Case("reformer"),
    ],
    "moba": [
        Case("moba", {"block_size": 4, "top_k": 3}),
        Case("moba", {"block_size": 5, "top_k": 1, "scale": 0.7}),
        Case("moba", {"block_size": 1, "top_k": 6}),
        Case("moba"),
    ],
    "indexed": [
        Case("indexed", {"top_k": 12, "block_size": 4}),
        Case("indexed", {"top_k": 7, "scale": 0.7}),
        Case("indexed", {"top_k": 1}),
        Case("indexed"),
    ],
    "nsa": [
        Case("nsa", {"block_size": 4, "top_k": 4, "window_size": 6}),
        Case("nsa", {"block_size": 5, "top_k": 2, "window_size": 70, "scale": 0.7}),
        Case("nsa", {"block_size": 1, "top_k": 6, "window_size": 1}),
        Case("nsa", {"block_size": 4, "compressed_size": 6, "compressed_stride": 2, "top_k": 4}),
        Case("nsa", {"block_size": 4, "top_k": 3, "key_compression": "mlp"}),
        Case(
            "nsa",
            {
                "block_size": 4,
                "compressed_size": 6,
                "compressed_stride": 2,
                "top_k": 3,
                "key_compression": "mlp",
                "importance": "logits",
                "first_block": False,
            },
        ),
        Case("nsa"),
    ],
    "xattention": [
        Case("xattention", {"block_size": 4, "stride": 2, "threshold": 0.6, "max_blocks": 5}),
        Case("xattention", {"block_size": 6, "stride": 3, "max_blocks": 40, "scale": 0.7}),
        Case("xattention"),
    ],
    "longformer": [
        Case("longformer", {"window": 16, "global_tokens": 3}),
        Case("longformer", {"window": 16}),
        Case("longformer", {"window": 1, "global_tokens": 1}),
        Case("longformer", {"window": 9, "dilation": 3, "global_tokens": 2}),
        Case("longformer", {"window": 100, "global_tokens": 40, "scale": 0.7}),
        Case("longformer", {"window": 9, "global_tokens": 3, "softcap": 2.0}),
        Case("longformer"),
    ],
}
"""The first case of each is its usual small form, and the only one that the rules run over."""


def cases() -> list[Case]:
    """Every case of every registered variant; one with its defaults where none is listed."""
    return [case for name in attnzoo.names() for case in CASES.get(name, [Case(name)])]


def usual_cases() -> list[Case]:
    """One small form of every registered variant."""
    return [CASES.get(name, [Case(name)])[0] for name in attnzoo.names()]


@cache
def backends_of(case: Case) -> list[str]:
    """Backends that take a call of this case on a CPU: of few tokens, of many, or padded."""
    attn, found = case.build(), []
    for backend in attn.engine.backend_names():
        if backend in CPU_BACKENDS and any(
            takes(attn, backend, *tensors(probe)[:3], key_mask=probe.key_mask(), is_causal=causal)
            for probe in (Situation(5, 5), Situation(40, 40), Situation(40, 40, "left"))
            for causal in (False, True)
            if can(case.spec, causal)
        ):
            found.append(backend)
    return found


def with_backends(some: list[Case]) -> list[tuple[Case, str]]:
    """Every case with each of its backends; those that need a GPU are tested where there is one."""
    return [(case, backend) for case in some for backend in backends_of(case)]


@dataclass(frozen=True)
class Situation:
    """Lengths, heads and padding of a call. padding: none, left, right, interior, or whole (the
    first sample sees nothing)."""

    query_length: int
    key_length: int
    padding: str = "none"
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2

    def __str__(self) -> str:
        return f"{self.query_length}x{self.key_length}-{self.padding}-{self.heads}/{self.kv_heads}"

    def key_mask(self) -> Tensor | None:
        return padding(self.padding, self.batch, self.key_length)


SITUATIONS = [
    Situation(1, 1),
    Situation(1, 1, "whole"),
    Situation(2, 2, "left"),
    Situation(63, 63, heads=2, kv_heads=1, batch=1),
    Situation(65, 65, "interior", heads=2, kv_heads=1),  # more heads in short inputs alone
    Situation(65, 65, "left", heads=3, kv_heads=3, batch=1),
    Situation(65, 65, "right", heads=2, kv_heads=1),
    Situation(65, 65, "whole", heads=2, kv_heads=2),
    Situation(1, 65, "interior"),
    Situation(6, 65, "right"),
    Situation(65, 17),
    Situation(65, 18, "left"),
    Situation(257, 257, heads=2, kv_heads=1, batch=1),
    Situation(257, 257, "interior", heads=2, kv_heads=2, batch=1),
    Situation(140, 257, "left", heads=2, kv_heads=1, batch=1),
    Situation(560, 560, heads=1, kv_heads=1, batch=1),
    Situation(560, 560, "interior", heads=1, kv_heads=1, batch=1),
]
FEW_SITUATIONS = [SITUATIONS[i] for i in (2, 3, 4, 7, 9, 11, 14)]


def padding(kind: str, batch: int, length: int) -> Tensor | None:
    """(batch, length) bool, True = attend; every sample padded differently."""
    if kind == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.bool)
    for b in range(batch):
        count = max(1, length // 3 - 2 * b)
        if kind == "left":
            mask[b, :count] = False
        elif kind == "right":
            mask[b, length - count :] = False
        elif kind == "interior":
            mask[b, 1 + b : length - 1 : 3] = False
            mask[b, length // 4 : length // 2] = False
        elif kind == "whole":
            mask[b] = b > 0
        else:
            raise ValueError(kind)
    return mask


def tensors(
    situation: Situation, head_dim: int = 8, *, shift: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output, rounded to float32 and held in float64, so that both
    precisions start from the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(situation.batch, heads, length, head_dim, generator=generator)

    q = (draw(situation.heads, situation.query_length) + shift).double()
    k = (draw(situation.kv_heads, situation.key_length) + shift).double()
    return (
        q,
        k,
        draw(situation.kv_heads, situation.key_length).double(),
        draw(situation.heads, situation.query_length).double(),
    )


def learned(attn: Attention) -> dict[str, Tensor]:
    """The parameters that the oracle reads."""
    told = attn.oracle_arguments(1, 1, attn.spec.forms[0])
    return {name: x for name, x in told.items() if isinstance(x, torch.nn.Parameter)}


def ask_oracle(
    attn: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    parameters: dict[str, Tensor] | None = None,
    options: dict[str, Any] | None = None,
    **masks: Any,
) -> tuple[Tensor, ...]:
    """What the variant's oracle returns. parameters: stand-ins for `learned(attn)`. options: those
    that attn was built with."""
    name = attn.spec.name
    function = ORACLES[name]
    wanted = inspect.signature(function).parameters
    values = (
        {option.name: option.default for option in options_of(name)}
        | sized(name, MAX_LENGTH)
        | (options or {})
    )
    told = attn.oracle_arguments(q.shape[2], k.shape[2], masks.get("is_causal", False))
    inputs = {
        one.name for one in attn.spec.inputs
    }  # an option of the name says that one is learned
    given = {name: x for name, x in values.items() if name in wanted and name not in inputs}
    return function(q, k, v, **given, **{**told, **(parameters or {})}, **masks)


@dataclass(frozen=True)
class Answer:
    """What an oracle or a backend gives: the output, A where it was asked for, and the gradients by
    name."""

    out: Tensor
    gradients: dict[str, Tensor]
    weights: Tensor | None = None


def gradients_of(out: Tensor, upstream: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients by input, 0 where out does not depend on it."""
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return list(
        torch.autograd.grad(
            out, inputs, upstream.detach(), allow_unused=True, materialize_grads=True
        )
    )


def oracle_answer(case: Case, situation: Situation, is_causal: bool) -> Answer:
    """The oracle's output, A and gradients."""
    q, k, v, grad = tensors(situation, shift=case.shift)
    leaves = {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}
    attn = case.build(situation.heads)
    stand_ins: dict[int, Tensor] = {}
    for parameter in learned(attn).values():  # a shared parameter gets one stand-in
        stand_ins.setdefault(id(parameter), parameter.detach().double().requires_grad_())
    parameters = {name: stand_ins[id(parameter)] for name, parameter in learned(attn).items()}
    out, a = ask_oracle(
        attn,
        q,
        k,
        v,
        parameters=parameters,
        options=case.options,
        key_mask=situation.key_mask(),
        is_causal=is_causal,
    )
    leaves.update(parameters)
    found = gradients_of(out, grad, *leaves.values())
    gradients = dict(zip(leaves, found, strict=True))
    return Answer(out.detach(), gradients, a.detach())


def library_answer(
    case: Case, backend: str, situation: Situation, is_causal: bool, dtype: torch.dtype
) -> Answer:
    """What the library computes by a backend asked for by name, forward and backward."""
    q, k, v, grad = (x.to(dtype) for x in tensors(situation, shift=case.shift))
    leaves = {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}
    attn = case.build(situation.heads, dtype=dtype, prefer=backend)
    out = attn(q, k, v, key_mask=situation.key_mask(), is_causal=is_causal)
    assert out.dtype == dtype
    leaves.update(learned(attn))
    found = gradients_of(out, grad, *leaves.values())
    gradients = dict(zip(leaves, found, strict=True))
    return Answer(out.detach(), gradients)


def can(spec: attnzoo.Spec, is_causal: bool, situation: Situation | None = None) -> bool:
    """Does the spec allow this kind of call, and in this situation?"""
    square = situation is None or situation.query_length == situation.key_length
    return spec.runs(is_causal) and (square or spec.cross)


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Fail when an entry differs by more than tolerance times the largest expected one (1 at
    least)."""
    assert actual.shape == expected.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    assert bool(torch.isfinite(actual).all()), f"{what} is not finite"
    if expected.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs().max().item()
    bound = tolerance * max(1.0, expected.abs().max().item())
    assert error <= bound, f"{what}: error {error:.3g} over {bound:.3g}"
