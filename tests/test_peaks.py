"""`attnzoo.memory` against autograd and against the allocator's own events."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from cases import CPU_BACKENDS, Case, cases, takes, usual_cases
from small import in_models, of_each_family, of_each_folder
from stages import each_way, only, staged
from torch import Tensor, nn
from torch.autograd.profiler import profile

import attnzoo
from attnzoo import Attention
from attnzoo.benchmarking.peak_memory import peak_bytes
from attnzoo.cost.memory.memory import kept_bytes
from attnzoo.registry import sized, spec_of

SIZES = [(1, 1), (600, 600), (140, 257), (65, 18)]


def inputs(
    attn: Attention, batch: int, lengths: tuple[int, int], kv_heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    query, key = lengths
    shapes = [(attn.heads, query), (kv_heads, key), (kv_heads, key)]
    q, k, v = (
        torch.randn(batch, heads, n, attn.head_dim, dtype=dtype, requires_grad=True)
        for heads, n in shapes
    )
    return q, (q if getattr(attn.engine, "share_qk", False) else k), v


class Held:
    """What autograd holds in a tensor's place, alive for as long as it holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept(attn: Attention, given: tuple[Tensor, ...], is_causal: bool) -> tuple[int, int]:
    """Bytes of storage that autograd saves, without parameters and buffers; and bytes that a
    forward leaves allocated, with the inputs and without the output where those are not saved."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*attn.parameters(), *attn.buffers())}
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Held:
        place = Held(tensor)
        held.add(place)
        return place

    attn(*given, is_causal=is_causal)  # what is made once and for all is made
    profiler: Any = profile(profile_memory=True)
    with profiler, torch.autograd.graph.saved_tensors_hooks(pack, lambda place: place.tensor):
        out = attn(*given, is_causal=is_causal)
    assert out.requires_grad
    saved = {
        place.tensor.untyped_storage().data_ptr(): place.tensor.untyped_storage().nbytes()
        for place in held
    }
    saved = {pointer: size for pointer, size in saved.items() if pointer not in own}
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    left = sum(event.nbytes() for event in events)
    left += sum(saved.get(x, 0) for x in {x.untyped_storage().data_ptr() for x in given})
    if out.untyped_storage().data_ptr() not in saved:
        left -= out.untyped_storage().nbytes()
    return sum(saved.values()), left


MIXED = [
    Case("longformer", {"window": 9, "dilation": [1, 2, 1, 3], "global_tokens": 3}),
    Case("sliding_window", {"window": 5, "dilation": [3, 2, 2, 1], "sink_logits": True}),
    Case("sliding_window", {"window": 5, "dilation": [3, 2, 2, 1], "sinks": 2}),
    Case("sliding_window", {"window": 5, "dilation": 2, "sinks": 2, "sink_logits": True}),
    Case("reformer", {"share_qk": True}),
]


FEW = [case for case in usual_cases() if case.variant in of_each_family()] + MIXED


@pytest.mark.parametrize(("case", "is_causal"), each_way(cases() + MIXED, few=FEW))
def test_kept_bytes_are_what_a_forward_leaves(case: Case, is_causal: bool) -> None:
    """To the byte: what autograd saves, and what a Function of our own holds beside it, such as
    indices, by which alone the two may differ. The allocator may count one number more, and with a
    softcap three, with three branches four: the constants by which scores are multiplied."""
    shared = "share_qk" in case.options
    ways = (
        (2, 4 if shared else 2, torch.float32),
        (3, 4 if shared else 1, torch.bfloat16),
    )
    for place, lengths in enumerate(SIZES if case in usual_cases() else SIZES[1:3]):
        if lengths[0] != lengths[1] and (shared or not case.spec.cross):
            continue
        # A size in one dtype each way round, or in both where there is one way only
        only = (ways[(place + is_causal) % 2],) if len(case.spec.forms) == 2 else ways
        for batch, kv_heads, dtype in only:
            attn = case.build(dtype=dtype)
            given = inputs(attn, batch, lengths, kv_heads, dtype)
            found = kept_bytes(attn, *given, is_causal=is_causal)
            saved, left = kept(attn, given, is_causal)
            constants = 3 if "softcap" in case.options else 1
            constants = 4 if hasattr(attn.engine, "branches") else constants
            assert found == saved or left - 8 * constants <= found <= left, (lengths, dtype)


def measured(attn: Attention, given: tuple[Tensor, ...], is_causal: bool, training: bool) -> int:
    """Peak of a forward without gradients, or of a forward and its backward pass."""
    upstream = torch.randn_like(given[0])

    def run() -> Tensor:
        with torch.set_grad_enabled(training):
            out = attn(*given, is_causal=is_causal)
        if training:
            out.backward(upstream)
        return out

    attn.zero_grad()
    for x in given:
        x.grad = None
    return peak_bytes(run)


def check_peaks(
    attn: Attention, given: tuple[Tensor, ...], is_causal: bool, tolerance: float
) -> None:
    found = attnzoo.memory(attn, *given, is_causal=is_causal)
    peaks = [measured(attn, given, is_causal, training) for training in (False, True)]
    expected = [found.peak_bytes_forward, found.peak_bytes_training]
    assert expected == [pytest.approx(peak, rel=tolerance) for peak in peaks]


OPTIONS = [
    *((name, {}) for name in attnzoo.names()),
    ("linear", {"feature_map": "softmax"}),
    ("nystromformer", {"convolution": 33}),
    ("sparse_transformer", {"pattern": "fixed"}),
    ("sparse_transformer", {"factors": "by_head"}),
    ("sliding_window", {"sinks": 4}),
    ("sliding_window", {"sinks": 4, "sink_logits": True}),
    ("sliding_window", {"dilation": 4}),
    ("sliding_window", {"dilation": [1, 3]}),
    ("longformer", {"global_tokens": 2}),
    ("longformer", {"global_tokens": 40, "dilation": 3}),
]
LONG = [
    (name, options, is_causal) for name, options in OPTIONS for is_causal in spec_of(name).forms
]


@pytest.mark.parametrize(
    ("name", "options", "is_causal"),
    only([(name, {}, spec_of(name).forms[-1]) for name in of_each_folder()[:1]], LONG),
)
def test_peaks_are_the_allocators(name: str, options: dict[str, Any], is_causal: bool) -> None:
    """5,000 tokens need padding. In half precision what oneDNN packs depends on the machine. Both
    with the default options, which take the longest ways, and of the engine of gates for one
    variant."""
    for n, kv_heads, dtype, tolerance in (
        (4096, 2, torch.float32, 0.02),
        (5000, 1, torch.float32, 0.02),
        (4096, 2, torch.bfloat16, 0.1),
    ):
        usual = n == 4096 and dtype == torch.float32
        by_tiles = name in ("flash", "path")  # tile by tile, in seconds
        if not usual and (options or name not in in_models() or by_tiles):
            continue
        forms = spec_of(name).forms
        if not usual and is_causal != forms[n != 4096 and len(forms) > 1]:
            continue  # where there are two, padding is tried in one and half precision in the other
        n = n // 2 if by_tiles else n
        attn = attnzoo.build(name, heads=2, head_dim=64, **options, **sized(name, n)).to(dtype)
        check_peaks(attn, inputs(attn, 1, (n, n), kv_heads, dtype), is_causal, tolerance)


OTHER_FORMS: list[tuple[str, dict[str, Any]]] = [  # which reach backends that defaults do not
    ("sliding_window", {"window": 1000}),
    ("sliding_window", {"sinks": 4}),
    ("longformer", {"global_tokens": 2}),
]
BACKENDS = [
    (name, options, backend, is_causal)
    for name, options in [*((name, {}) for name in attnzoo.names()), *OTHER_FORMS]
    for backend in Case(name).build().engine.backend_names()
    if backend in CPU_BACKENDS
    for is_causal in spec_of(name).forms
]


@pytest.mark.parametrize(
    ("name", "options", "backend", "is_causal"),
    [
        staged(*one, first=one[0] in of_each_folder()[1::2] and one[3] == spec_of(one[0]).forms[-1])
        for one in BACKENDS
    ],
)
def test_peaks_of_every_backend(
    name: str, options: dict[str, Any], backend: str, is_causal: bool
) -> None:
    """Of short inputs, several samples and several queries to a key head, wherever the backend
    takes them."""
    options = {**options, **sized(name, 600)}
    attn = attnzoo.build(name, heads=4, head_dim=64, backend=backend, **options)
    tensors = inputs(attn, 2, (600, 600), 2, torch.float32)
    if takes(attn, backend, *tensors, is_causal=is_causal):
        check_peaks(attn, tensors, is_causal, 0.05)


@pytest.mark.parametrize("threads", [1, 3])
def test_every_thread_has_working_memory(threads: int) -> None:
    """To the byte, where each kernel works on whole tiles."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        attn = Case("standard").build()
        for dtype in (torch.float32, torch.float64):
            check_peaks(attn, inputs(attn, 1, (1000, 1000), 4, dtype), False, 1e-9)
    finally:
        torch.set_num_threads(before)


class Scores(nn.Module):
    """A user's own attention, with a mask, and a look at the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(64, 192)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        q, k, v = self.to_qkv(x).chunk(3, -1)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu_(1)
        scores = (q @ k.mT).masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1)
        if not torch.isfinite(weights).all():
            raise ValueError("values are not looked at")
        return weights @ v, {"weights": weights[:, :2].detach()}


MODULES = {
    "encoder layer": nn.TransformerEncoderLayer(64, 4, 128, batch_first=True),
    "encoder layer, norm first": nn.TransformerEncoderLayer(
        64, 4, 128, 0.0, norm_first=True, batch_first=True
    ),
    "convolutions": nn.Sequential(
        nn.Unflatten(1, (1, 500)), nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.Flatten(1, 2)
    ),
    "normalised": nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.ReLU()),
    "scores": Scores(),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_the_users_own(name: str) -> None:
    module = MODULES[name]
    x = torch.randn(8, 500, 64, requires_grad=True)
    found = attnzoo.memory(module, (8, 500, 64))
    assert found == attnzoo.memory(module, x)

    def first(out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    upstream = torch.randn_like(first(module(x)).detach())

    def run(training: bool) -> object:
        with torch.set_grad_enabled(training):
            out = module(x)
        if training:
            first(out).backward(upstream)
        return out

    forward = peak_bytes(lambda: run(False))
    module.zero_grad()
    x.grad = None
    assert found.peak_bytes_forward == pytest.approx(forward, rel=0.1)
    assert found.peak_bytes_training == pytest.approx(peak_bytes(lambda: run(True)), rel=0.1)
    assert all(parameter.untyped_storage().nbytes() for parameter in module.parameters())


def test_shapes_depend_on_values() -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x > 0]

    with pytest.raises(
        attnzoo.UnsupportedError, match=r"Chosen cannot be followed without values.*Measure it"
    ):
        attnzoo.memory(Chosen(), (4, 4))


def test_only_modules() -> None:
    with pytest.raises(ValueError, match="wrap a function in a module"):
        attnzoo.memory(torch.sin, (4, 4))  # pyright: ignore[reportArgumentType]


def test_nothing_is_computed_and_nothing_stays() -> None:
    """A sequence that would need hundreds of gibibytes, and a module that is as it was."""
    attn = attnzoo.build("standard", heads=8, head_dim=64, backend="reference")
    found = attnzoo.memory(attn, *[(4, 8, 65536, 64)] * 3)
    assert found.kept_bytes > 2**39
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    before = {name: id(tensor) for name, tensor in layer.state_dict(keep_vars=True).items()}
    state = torch.random.get_rng_state()
    attnzoo.memory(layer, (2, 32, 64))
    assert torch.equal(state, torch.random.get_rng_state())
    assert before == {name: id(x) for name, x in layer.state_dict(keep_vars=True).items()}
    assert all(parameter.grad is None for parameter in layer.parameters())


class Leaves(nn.Module):
    """Values that are asked for outside of torch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * len(x.detach().tolist())


@pytest.mark.parametrize(
    "module",
    [nn.LSTM(8, 8), nn.TransformerEncoderLayer(8, 2, 8, batch_first=True).eval(), Leaves()],
    ids=["LSTM", "fused layer", "tolist"],
)
def test_what_cannot_be_seen_is_refused(module: nn.Module) -> None:
    """Tensors that torch makes inside one operator, and values that leave it."""
    with pytest.raises(attnzoo.UnsupportedError, match=r"without values: .*attnzoo\.bench"):
        attnzoo.memory(module, (2, 4, 8))


@pytest.mark.parametrize(
    ("module", "given", "match"),
    [
        (nn.Linear(4, 4), (), "Linear cannot be called with 0 inputs.*give what its forward takes"),
        (nn.Linear(4, 4), ("4 4",), "input 0 is '4 4'; give a tensor, or a shape"),
        (nn.Linear(4, 4), ([4, 4],), r"input 0 is \[4, 4\]; give a tensor, or a shape"),
        (nn.Linear(4, 4), ((2, 5),), r"Linear fails on inputs of shapes \(2, 5\): .*; give what"),
    ],
)
def test_inputs_that_the_module_cannot_take(module, given, match: str) -> None:
    with pytest.raises(ValueError, match=match) as refusal:
        attnzoo.memory(module, *given)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_refusal_is_short() -> None:
    """And not torch's paragraph."""

    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError("Could not run it. This could be because. " * 9)

    with pytest.raises(attnzoo.UnsupportedError) as refusal:
        attnzoo.memory(Unknown(), (4, 4))
    assert str(refusal.value) == (
        "Unknown cannot be followed without values: Could not run it. Measure it instead, with "
        "attnzoo.benchmarking.peak_bytes"
    )


def test_hooks_of_the_user_do_not_fire() -> None:
    fired = []
    module = nn.Sequential(nn.Linear(4, 4))
    module.register_forward_pre_hook(lambda *_: fired.append("before"))
    module[0].register_forward_hook(lambda *_: fired.append("after"))
    module[0].register_full_backward_hook(lambda *_: fired.append("backward"))
    attnzoo.memory(module, (2, 4))
    assert not fired
    module(torch.zeros(2, 4))
    assert fired == ["before", "after"]
