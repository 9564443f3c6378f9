"""count_flops against the closed forms, torch's own counter and integers worked out by hand."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from cases import Case, can, cases, squared_elu, usual_cases
from small import in_models, of_each_family, of_each_folder, small
from stages import each_way, only, staged, thorough
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import attnzoo
from attnzoo import UnsupportedError, count_flops
from attnzoo.cost.huggingface_flops import whole_model
from attnzoo.cost.tracing import counting, engine_counts
from attnzoo.cost.tracing.operators import einsum_macs
from attnzoo.engines.linear.sums import CHUNK
from attnzoo.registry import Choice, sized, spec_of

pytest.importorskip("fvcore")
HEADS, HEAD_DIM = 4, 8
LENGTHS = [(1, 1), (140, 257), (65, 18), (1, 65)]


def empty(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def torch_macs(module: nn.Module, *inputs: Any, **kwargs: Any) -> int:
    """torch counts 2 FLOPs a MAC; on the meta device, where it sees into every product."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs, **kwargs)
    return counter.get_total_flops() // 2


def agree(
    case: Case,
    is_causal: bool,
    query_length: int,
    key_length: int,
    kv_heads: int = 2,
    batch: int = 2,
) -> None:
    attn = case.build(HEADS, HEAD_DIM).to("meta")
    q, k = empty(batch, HEADS, query_length, HEAD_DIM), empty(batch, kv_heads, key_length, HEAD_DIM)
    counted = count_flops(attn, q, k, k, is_causal=is_causal)
    closed = attn.cost(batch, query_length, key_length, kv_heads=kv_heads, is_causal=is_causal)
    assert counted.macs == closed.macs == torch_macs(attn, q, k, k, is_causal=is_causal) > 0
    assert counted.flops == closed.flops == 2 * counted.macs
    queries = min(query_length, key_length) if is_causal else query_length
    own = (
        batch * HEAD_DIM * (HEADS * queries + kv_heads * key_length)
        if case.options.get("feature_map") is squared_elu
        else 0
    )
    # A user's own map is not in the closed form: one elu a number here.
    assert counted.elementwise == closed.elementwise + own


def longest(case: Case, is_causal: bool) -> int:
    """Tokens of which some backend takes more than two pieces: sums over all keys take CHUNK at a
    time, whatever is causal far fewer."""
    if is_causal:
        return 197
    return CHUNK + 88 if case.spec.family == "kernel" else 300


BOTH_WAYS = [(case, way) for case in usual_cases() for way in case.spec.forms]
ONE_WAY = [(case, case.spec.forms[-1]) for case in usual_cases()]
FAMILIES = [case for case in usual_cases() if case.variant in of_each_family()]
OPTIONS = [case for case in cases() if case not in usual_cases()]


@pytest.mark.parametrize(("case", "is_causal"), only(ONE_WAY, BOTH_WAYS))
def test_count_closed_form_and_torch_agree(case: Case, is_causal: bool):
    long = longest(case, is_causal)
    agree(case, is_causal, long, long, kv_heads=1)


@thorough
@pytest.mark.parametrize(("case", "is_causal"), BOTH_WAYS, ids=str)
def test_every_length_agrees(case: Case, is_causal: bool):
    for query_length, key_length in LENGTHS:
        if query_length == key_length or case.spec.cross:
            agree(case, is_causal, query_length, key_length)
    agree(case, is_causal, 70, 70, kv_heads=4, batch=1)


@pytest.mark.parametrize(("case", "is_causal"), each_way(OPTIONS, few=OPTIONS[::4]))
def test_every_option_agrees(case: Case, is_causal: bool):
    agree(case, is_causal, *[longest(case, is_causal)] * 2)


@pytest.mark.parametrize("case", only(FAMILIES, usual_cases()))
def test_padding_changes_no_count(case: Case):
    """A key mask is traced as an input; the products keep their sizes."""
    attn = case.build(HEADS, HEAD_DIM).to("meta")
    q = empty(2, HEADS, 150, HEAD_DIM)
    masks = {
        "key_mask": torch.ones(2, 150, dtype=torch.bool, device="meta"),
        "is_causal": not case.spec.bidirectional,
    }
    closed = attn.cost(2, 150, is_causal=masks["is_causal"]).macs
    assert count_flops(attn, q, q, q, **masks).macs == torch_macs(attn, q, q, q, **masks) == closed


@pytest.mark.parametrize("case", only(FAMILIES, usual_cases()))
def test_multihead_is_its_core_and_its_projections(case: Case):
    options = sized(case.variant, 64)
    width, n, batch = HEADS * HEAD_DIM, 40, 3
    mha = attnzoo.MultiheadAttention(
        width,
        HEADS,
        batch_first=True,
        attention=case.variant,
        attention_options={**options, **case.options},
    )
    x = empty(batch, n, width)
    masks = (
        {}
        if case.spec.bidirectional
        else {"attn_mask": torch.empty(n, n, dtype=torch.bool, device="meta"), "is_causal": True}
    )
    counted = count_flops(mha.to("meta"), x, x, x, need_weights=False, **masks)
    core = case.build(HEADS, HEAD_DIM).cost(batch, n, is_causal=bool(masks)).macs
    # Global tokens have their own q, k and v.
    projections = 4 if mha.attention.own_projection is None else 7
    if projections == 7:  # a dense mask, of a short input, makes their rows a second time
        core += 2 * batch * HEADS * case.options["global_tokens"] * n * HEAD_DIM
    of_inputs = sum(
        project.weight.numel()
        for name, project in mha.attention.named_modules()
        if name.startswith("input_projections.") and isinstance(project, nn.Linear)
    )
    assert (
        counted.macs
        == batch * n * (projections * width**2 + of_inputs) + core
        == torch_macs(mha, x, x, x, need_weights=False, **masks)
    )


def test_encoder_layer_in_both_modes():
    """Evaluation would hide the layer in one fused operator."""
    n, width, inner = 20, 32, 64
    layer = nn.TransformerEncoderLayer(width, 4, inner, batch_first=True, device="meta")
    expected = 4 * n * width**2 + 2 * n * n * width + 2 * n * width * inner
    x = empty(1, n, width)
    for mode in (layer.train(), layer.eval()):
        counted = count_flops(mode, x)
        assert counted.macs == expected
        assert counted.by_module["linear1"] == counted.by_module["linear2"] == n * width * inner
        assert counted.by_module["self_attn"] == 4 * n * width**2 + 2 * n * n * width
    assert torch.backends.mha.get_fastpath_enabled()


def test_encoder_of_layers():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, device="meta")
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x, padded = empty(2, 20, 32), torch.zeros(2, 20, dtype=torch.bool, device="meta")
    assert (
        count_flops(encoder, x).macs
        == 3 * count_flops(layer, x).macs
        == torch_macs(encoder.train(), x)
    )
    assert count_flops(encoder, x, src_key_padding_mask=padded).macs == count_flops(encoder, x).macs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_hugging_face_model(family: str, attention: str):
    transformers = pytest.importorskip("transformers")
    batch, n = 2, 33
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
    }
    per_token, pooler = 4 * 64**2 + 2 * 64 * 128, 64**2
    if family == "llama":
        per_token, pooler = 2 * 64**2 + 2 * 64 * 32 + 3 * 64 * 128, 0
        sizes |= {"num_key_value_heads": 2, "use_cache": False}
    config = transformers.AutoConfig.for_model(family, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config, attn_implementation=attention).eval()
    tokens = torch.zeros(batch, n, dtype=torch.long, device="meta")
    assert count_flops(model, input_ids=tokens).macs == batch * (
        2 * (n * per_token + 2 * n * n * 64) + pooler
    )


def test_tables_add_up_and_softmax_has_its_own_column():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4), nn.Softmax(-1))
    counted = count_flops(model, torch.zeros(3, 8))
    assert counted.by_module == {"": 576, "0": 384, "1": 0, "2": 192, "3": 0}
    assert counted.by_operator == {"linear": 576} and counted.macs == 576 and counted.flops == 1152
    assert (
        counted.elementwise_by_operator == {"gelu": 48, "softmax": 36} and counted.elementwise == 84
    )
    assert counted.elementwise_by_module["3"] == 36


def test_a_convolution_on_the_meta_device():
    """16 outputs of 3 · 4 · 4 products in each of 5 × 5 patches."""
    embedding = nn.Conv2d(3, 16, 4, stride=4, device="meta")
    assert (
        count_flops(embedding, empty(1, 3, 20, 20)).macs
        == 25 * 16 * 3 * 16
        == torch_macs(embedding, empty(1, 3, 20, 20))
    )


def test_in_place_operators_count_as_their_plain_forms():
    counted = count_flops(Run(lambda x: (x + 1).exp_().div_(2)), torch.zeros(3, 4))
    assert counted.elementwise_by_operator == {"exp": 12, "div": 12} and counted.macs == 0


def test_softmax_takes_three_operations_a_score():
    """As the article counts it; a causal call counts every score."""
    attn = attnzoo.build("standard", heads=4, head_dim=8)
    q = torch.zeros(2, 4, 50, 8)
    for is_causal in (False, True):
        assert count_flops(attn, q, q, q, is_causal=is_causal).elementwise == 3 * 2 * 4 * 50 * 50
    reference = attnzoo.build("standard", heads=4, head_dim=8, backend="reference")
    assert count_flops(reference, q, q, q).elementwise == 3 * 2 * 4 * 50 * 50
    assert count_flops(reference, q, q, q).by_operator == {"einsum": 2 * 2 * 4 * 50 * 50 * 8}


class Run(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Any, *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.within = function, nn.ModuleList(modules)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


@pytest.mark.parametrize(
    ("left", "right", "macs"),
    [
        ((3, 5), (5, 7), 3 * 5 * 7),
        ((4, 3, 5), (5, 7), 4 * 3 * 5 * 7),
        ((3, 5), (4, 5, 7), 4 * 3 * 5 * 7),
        ((1, 3, 5), (4, 5, 7), 4 * 3 * 5 * 7),
        ((2, 1, 3, 5), (1, 6, 5, 7), 2 * 6 * 3 * 5 * 7),
        ((5,), (5, 7), 5 * 7),
        ((3, 5), (5,), 3 * 5),
        ((5,), (5,), 5),
        ((4, 3, 5), (5,), 4 * 3 * 5),
    ],
    ids=str,
)
def test_matmul_broadcasts(left: tuple[int, ...], right: tuple[int, ...], macs: int):
    assert count_flops(Run(torch.matmul), torch.zeros(left), torch.zeros(right)).macs == macs


def test_products_with_an_addend():
    bias, batched = torch.zeros(7), (torch.zeros(2, 3, 5), torch.zeros(2, 5, 7))
    assert count_flops(Run(torch.addmm), bias, torch.zeros(3, 5), torch.zeros(5, 7)).macs == 105
    assert count_flops(Run(torch.baddbmm), bias, *batched).macs == 210
    assert count_flops(Run(torch.bmm), *batched).macs == 210
    assert (
        count_flops(Run(torch.addmv), torch.zeros(3), torch.zeros(3, 5), torch.zeros(5)).macs == 15
    )


EINSUMS = [
    ("b h i d, b h j d -> b h i j", [(2, 3, 5, 7), (2, 3, 11, 7)], 2 * 3 * 5 * 11 * 7),
    ("bhid,bhjd", [(2, 3, 5, 7), (2, 3, 11, 7)], 2 * 3 * 5 * 11 * 7),
    ("...id,...jd->...ij", [(2, 3, 5, 7), (1, 3, 11, 7)], 2 * 3 * 5 * 11 * 7),
    ("...id,jd->...ij", [(2, 3, 5, 7), (11, 7)], 2 * 3 * 5 * 11 * 7),
    ("ij,jk->ik", [(12345, 6789), (6789, 101)], 12345 * 6789 * 101),
    ("i,j->ij", [(5,), (7,)], 0),
    ("ij,ij->ij", [(5, 7), (5, 7)], 0),
    ("ij,ij->", [(5, 7), (5, 7)], 35),
    ("ij,jk->i", [(5, 7), (7, 11)], 35),
    ("ij,jk->ik", [(5, 1), (7, 11)], 0),
    ("ab,bc,cd,de->ae", [(2, 3), (3, 5), (5, 7), (7, 11)], 30 + 70 + 154),
    ("ii->i", [(5, 5)], 0),
]


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"), EINSUMS, ids=[equation for equation, *_ in EINSUMS]
)
def test_einsum_in_exact_integers(equation: str, shapes: list[tuple[int, ...]], macs: int):
    tensors = [empty(*shape) for shape in shapes]
    module = Run(lambda *operands: torch.einsum(equation, *operands))
    assert count_flops(module, *tensors).macs == macs == torch_macs(module, *tensors)


def test_einsum_follows_a_path():
    shapes = [(2, 3), (3, 5), (5, 7), (7, 11)]
    assert (
        einsum_macs("ab,bc,cd,de->ae", shapes, [2, 3, 1, 2, 0, 1])
        == 5 * 7 * 11 + 3 * 5 * 11 + 2 * 3 * 11
    )
    assert (
        einsum_macs("ab,bc,cd,de->ae", shapes, [0, 1, 0, 1, 0, 1])
        == 2 * 3 * 5 + 5 * 7 * 11 + 2 * 5 * 11
    )


def test_an_operator_that_nobody_counts_is_named():
    with pytest.raises(
        UnsupportedError,
        match=r"Run runs operators that have no count: aten::linalg_inv \(1 times\)",
    ):
        count_flops(Run(torch.linalg.inv), torch.eye(3))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x @ x @ x


def test_an_autograd_function_that_nobody_counts_is_named():
    with pytest.raises(UnsupportedError, match=r"prim::PythonOp\.Cube"):
        count_flops(Run(Cube.apply), torch.eye(3))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flex_attention_is_refused_by_name(device: str):
    """torch.jit.trace does not see into it, so a count would be a silent 0."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    q = torch.zeros(1, 2, 64, 16, device=device)
    with pytest.raises(UnsupportedError, match="Run calls FlexAttention, which"):
        count_flops(Run(flex), q, q, q)


def test_bad_input_gets_one_sentence():
    with pytest.raises(ValueError, match="takes a torch"):
        count_flops(torch.relu, torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="Linear cannot be traced with these inputs"):
        count_flops(nn.Linear(3, 4), torch.zeros(5))
    refused = pytest.raises(
        UnsupportedError,
        match=r"Run cannot be traced with these inputs: it makes a NumPy array .* use "
        r"torch's operators",
    )
    with warnings.catch_warnings(), refused:
        # Tracing tells of it by a warning, which must not be missed.
        warnings.simplefilter("ignore")
        count_flops(Run(lambda x: torch.from_numpy(x.numpy() @ x.numpy())), torch.zeros(3, 3))
    attn = attnzoo.build("standard", heads=4, head_dim=8)
    with pytest.raises(ValueError, match="q has 3 heads"):
        count_flops(attn, *[torch.zeros(1, 3, 5, 8)] * 3)


def test_a_missing_fvcore_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    with pytest.raises(ImportError, match=r"pip install 'attnzoo\[cost\]'"):
        count_flops(nn.Linear(3, 4), torch.zeros(5, 3))


def test_import_leaves_fvcore_alone():
    subprocess.run(
        [sys.executable, "-c", "import attnzoo, sys; assert 'fvcore' not in sys.modules"],
        check=True,
    )


LINEAR = [case for case in cases() if case.variant in ("linear", "performer")]


FOLDED = [  # query_length, key_length, padded, is_causal
    (4 * CHUNK + 77, 4 * CHUNK + 77, True, False),
    (3 * CHUNK, 3 * CHUNK, False, False),
    (3 * CHUNK + 1, 3 * CHUNK + 1, True, True),
    (2 * CHUNK, 2 * CHUNK, False, True),
    (5, 4 * CHUNK + 77, True, False),
    (4 * CHUNK + 77, 5, False, False),
    (4 * CHUNK + 1, 3 * CHUNK, False, False),
    (5, 4 * CHUNK + 77, False, True),
    (CHUNK + 3, 5 * CHUNK + 80, True, True),
    (3 * CHUNK, 2 * CHUNK + 9, False, True),
    (4 * CHUNK, 5, False, True),
]


@pytest.mark.parametrize("place", only([1, len(LINEAR) - 1], range(len(LINEAR))))
def test_a_folded_loop_counts_as_the_unrolled_one(place: int, monkeypatch: pytest.MonkeyPatch):
    """Every table of the report, with a remainder, without one, under a key mask, and with other
    queries than keys: all of these for the first case, two of them in turn for the others."""
    case = LINEAR[place]
    attn = case.build(HEADS, HEAD_DIM).to("meta")
    in_turn = [FOLDED[place % len(FOLDED)], FOLDED[(place + 5) % len(FOLDED)]]
    for queries, keys, padded, is_causal in FOLDED if place == 0 else in_turn:
        q, k = empty(2, HEADS, queries, HEAD_DIM), empty(2, 2, keys, HEAD_DIM)
        masks = {"key_mask": torch.ones(2, keys, dtype=torch.bool, device="meta")} if padded else {}
        monkeypatch.setattr(engine_counts, "FOLDED_FROM", max(queries, keys) + 1)
        unrolled = count_flops(attn, q, k, k, is_causal=is_causal, **masks)
        monkeypatch.setattr(engine_counts, "FOLDED_FROM", max(queries, keys))
        folded = count_flops(attn, q, k, k, is_causal=is_causal, **masks)
        assert folded == unrolled
        closed = attn.cost(2, queries, keys, kv_heads=2, is_causal=is_causal)
        assert folded.macs == closed.macs
        if not padded and case.options.get("feature_map") is not squared_elu:
            assert folded.elementwise == closed.elementwise


MODELS = [("bert", False, 70), ("llama", True, 100)]


@pytest.mark.parametrize(
    ("variant", "family", "is_causal", "n"),
    [
        staged(
            name,
            *MODELS[place % 2 if len(spec_of(name).forms) == 2 else spec_of(name).forms[0]],
            first=name in of_each_folder()[::2],
        )
        for place, name in enumerate(name for name in in_models() if name != "standard")
    ],
)
def test_engines_counted_apart_count_as_the_whole_trace(
    variant: str, family: str, is_causal: bool, n: int
):
    """Every table of a whole model's report, a key mask and a ragged last block included."""
    pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 100,
    }
    sizes |= {"num_key_value_heads": 2} if family == "llama" else {}
    # Which the length decides.
    options = {option: value for option, value in small(variant).items() if option != "max_length"}
    call = whole_model(family, sizes).call(n, Choice(variant, options))
    whole = counting._report(counting._trace(call.module, (), call.keywords))
    apart = count_flops(call.module, **call.keywords)
    assert apart == whole
    assert any(name.endswith("engine") and macs for name, macs in apart.by_module.items())


def test_layers_that_compute_the_same_are_traced_once(monkeypatch: pytest.MonkeyPatch):
    """Layers of BigBird draw different blocks, equally many; a layer of another window is
    another."""
    traced = []
    trace = counting._count_by_operator
    monkeypatch.setattr(
        counting,
        "_count_by_operator",
        lambda module, *inputs: traced.append(module) or trace(module, *inputs),
    )
    layers = [
        Case("bigbird", {"block_size": 8, "seed": seed}).build(HEADS, HEAD_DIM) for seed in range(4)
    ]
    layers += [Case("bigbird", {"block_size": 8, "num_random_blocks": 1}).build(HEADS, HEAD_DIM)]
    q = empty(1, HEADS, 600, HEAD_DIM)
    counted = count_flops(
        Run(lambda q: sum(layer(q, q, q) for layer in layers), *layers).to("meta"), q
    )
    assert len(traced) == 2
    assert counted.macs == sum(layer.cost(1, 600).macs for layer in layers)


@pytest.mark.parametrize("name", only(of_each_folder()[::2], attnzoo.names()))
def test_a_million_tokens(name: str):
    case = Case(name)
    n = 2**20
    with torch.device("meta"):
        attn = case.build(heads=8, head_dim=64, **sized(case.variant, n))
    q, k = empty(1, 8, n, 64), empty(1, 2, n, 64)
    for is_causal in (False, True):
        if can(case.spec, is_causal):
            counted, closed = (
                count_flops(attn, q, k, k, is_causal=is_causal),
                attn.cost(1, n, kv_heads=2, is_causal=is_causal),
            )
            assert (counted.macs, counted.elementwise) == (closed.macs, closed.elementwise)


def test_modules_are_left_as_they_were():
    attn = attnzoo.build("linear", heads=4, head_dim=8)
    q = torch.zeros(1, 4, 6 * CHUNK, 8)
    count_flops(attn, q, q, q)
    assert "forward" not in vars(attn.engine)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in attn.modules())


def test_a_report_is_read_at_a_glance() -> None:
    linear = nn.Linear(8, 4).to("meta")
    report = count_flops(nn.Sequential(linear, nn.Softmax(-1)), empty(1000, 8))
    assert str(report) == (
        "32.0 k MACs: linear 32.0 k\n12.0 k elementwise operations: softmax 12.0 k"
    )
    assert str(count_flops(linear, empty(1, 8))).splitlines()[1] == "0 elementwise operations"
