"""Longformer's global tokens: against Hugging Face's layer, against the oracle, in
MultiheadAttention, and in swapped models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import Case, Situation, ask_oracle, close, gradients_of, padding, tensors, with_backends
from stages import staged
from torch import Tensor, nn

import attnzoo
from attnzoo import MultiheadAttention, UnsupportedError, count_flops
from attnzoo.engines.sparse import flex
from attnzoo.engines.sparse.patterns.window import Window

CASE = Case("longformer", {"window": 16})
FIRST = Case("longformer", {"window": 16, "global_tokens": 2})
DILATED = Case("longformer", {"window": 5, "dilation": (3, 1, 2, 3)})
NAMES = [backend for _, backend in with_backends([CASE])]
BACKENDS = pytest.mark.parametrize("backend", NAMES)
CAUSALITY = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
SITUATIONS = [
    Situation(65, 65),
    Situation(65, 65, "interior"),
    Situation(65, 65, "left", kv_heads=4),
    Situation(70, 70, "whole"),
    Situation(9, 65, "right"),
    Situation(65, 18, "left"),
    Situation(257, 257, "interior", heads=2, kv_heads=1),
    Situation(140, 257, heads=2, kv_heads=1),
]


def global_mask(batch: int, length: int, seed: int = 0) -> Tensor:
    """A different number of global tokens in every sample, none in the last; neighbours and the two
    ends among them."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for sample in range(batch - 1):
        mask[sample, torch.randint(length, (7 - sample,), generator=generator)] = True
        mask[sample, [0, length // 2, length // 2 - 1, length - 1]] = True
    return mask


def own_projections(situation: Situation) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _ = tensors(situation, seed=5)
    return q, k, v


@pytest.mark.parametrize(
    ("situation", "case", "own", "is_causal"),
    [
        staged(situation, case, own, is_causal, first=is_causal == bool((i + j) // 2 % 2))
        for i, situation in enumerate(SITUATIONS)
        for j, case in enumerate([CASE, FIRST, DILATED])
        for is_causal in (False, True)
        for own in (bool((i + j + is_causal) % 2),)  # in turn, so that every two of these meet
    ],
)
def test_global_tokens_of_the_call(
    situation: Situation, case: Case, own: bool, is_causal: bool
) -> None:
    """Rows, A, and the gradients of all six tensors, by every backend."""
    if case is DILATED and situation.heads != 4:
        case = Case("longformer", {"window": 40, "dilation": 2, "global_tokens": 1})
    q, k, v, upstream = tensors(situation)
    inputs = [x.requires_grad_() for x in (q, k, v, *(own_projections(situation) if own else ()))]
    mask = global_mask(situation.batch, situation.key_length)
    masks = {"key_mask": situation.key_mask(), "is_causal": is_causal, "global_mask": mask}
    attn = case.build(situation.heads, dtype=torch.float64)
    own_qkv: Any = tuple(inputs[3:]) if own else None
    expected, a = ask_oracle(attn, *inputs[:3], options=case.options, global_qkv=own_qkv, **masks)
    wanted = gradients_of(expected, upstream, *inputs)
    close(attn.weights(q, k, global_qk=own_qkv and own_qkv[:2], **masks), a, 1e-10, "A")
    for backend in NAMES:
        attn = case.build(situation.heads, dtype=torch.float64, prefer=backend)
        out = attn(*inputs[:3], global_qkv=own_qkv, **masks)
        close(out, expected, 1e-10, f"output by {backend}")
        for i, (gradient, one) in enumerate(
            zip(gradients_of(out, upstream, *inputs), wanted, strict=True)
        ):
            close(gradient, one, 1e-10, f"gradient {i} by {backend}")
        with torch.no_grad():
            out = attn(*inputs[:3], global_qkv=own_qkv, **masks)
        close(out, expected, 1e-10, f"output without gradients by {backend}")


@CAUSALITY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_globals(dtype: torch.dtype, is_causal: bool) -> None:
    """By torch's SDPA, in pieces: at most twice the reference's error."""
    q, k, v, _ = (x.to(dtype) for x in tensors(Situation(300, 300)))
    masks = {"is_causal": is_causal, "global_mask": global_mask(2, 300)}
    exact = CASE.build(dtype=torch.float64)(*(x.double() for x in (q, k, v)), **masks)
    errors = [
        (CASE.build(dtype=dtype, prefer=backend)(q, k, v, **masks) - exact).norm()
        for backend in ("reference", "columns")
    ]
    assert errors[1] <= 2 * errors[0]


@CAUSALITY
def test_dropout_drops_entries_with_globals(is_causal: bool) -> None:
    """Over many draws the mean is the row without dropout."""
    attn = (
        Case("longformer", {"window": 4, "dropout": 0.3}).build(1, 4, dtype=torch.float64).train()
    )
    q, k, v, _ = (
        x.expand(4000, -1, -1, -1)
        for x in tensors(Situation(9, 9, batch=1, heads=1, kv_heads=1), 4)
    )
    mask = torch.tensor([[True, False, False, False, True, False, False, False, False]]).expand(
        4000, -1
    )
    drawn = attn(q, k, v, global_mask=mask, is_causal=is_causal)
    kept = attn.eval()(q[:1], k[:1], v[:1], global_mask=mask[:1], is_causal=is_causal)
    assert (drawn.mean(0) - kept[0]).abs().max() < 6 * drawn.std(0).max() / 4000**0.5
    assert drawn.std(0).max() > 0.1


@BACKENDS
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_padding_of_own_projections_reaches_nothing(backend: str, garbage: float) -> None:
    """Bit for bit; and a padded slot that is called global is not."""
    situation = Situation(70, 70)
    attn, key_mask = CASE.build(prefer=backend), padding("left", 2, 70)
    assert key_mask is not None
    q, k, v, own_q, own_k, own_v = (
        x.float() for x in (*tensors(situation)[:3], *own_projections(situation))
    )
    named = global_mask(2, 70)
    clean = attn(
        q, k, v, key_mask=key_mask, global_mask=named & key_mask, global_qkv=(own_q, own_k, own_v)
    )
    bad = ~key_mask[:, None, :, None]
    spoilt = [x.masked_fill(bad, garbage) for x in (k, v, own_k, own_v)]
    out = attn(
        q,
        *spoilt[:2],
        key_mask=key_mask,
        global_mask=named | ~key_mask,
        global_qkv=(own_q, *spoilt[2:]),
    )
    assert torch.equal(out, clean)


@BACKENDS
def test_causal_globals_see_and_are_seen_by_no_earlier_row(backend: str) -> None:
    """Whether token 60 is global, and what it holds, changes no row before it; it changes its own
    and every later one, also outside the window."""
    attn, (q, k, v, _) = (
        CASE.build(dtype=torch.float64, prefer=backend),
        tensors(Situation(120, 120)),
    )
    own = own_projections(Situation(120, 120))
    first = torch.zeros(2, 120, dtype=torch.bool)
    first[:, 3] = True
    both = first.clone()
    both[:, 60] = True
    inputs = [q, k, v, *own]
    before = attn(*inputs[:3], is_causal=True, global_mask=first, global_qkv=tuple(inputs[3:]))
    for value in (None, 7.0, float("nan")):
        if value is not None:
            for x in inputs[1:3] + inputs[4:]:
                x[:, :, 60] = value
        out = attn(*inputs[:3], is_causal=True, global_mask=both, global_qkv=tuple(inputs[3:]))
        close(out[:, :, :60], before[:, :, :60], 1e-12, "rows before it")
        changed = (out != before).any(-1)
        # A key of sevens may score so low that its weight is exactly 0.
        assert value == 7.0 or (changed[:, :, 60].all() and changed[:, :, 60 + 16 :].all())


def hugging_face_layer(dtype: torch.dtype, attention_window: int = 8):
    """A layer of a tiny random model, its padded rows left out of account by its own rules."""
    longformer = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    config = longformer.LongformerConfig(
        hidden_size=24,
        num_attention_heads=3,
        attention_window=[attention_window],
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(4)
    return longformer.LongformerSelfAttention(config, layer_id=0).to(dtype).eval()


def ours_with_its_weights(layer: Any, dtype: torch.dtype) -> MultiheadAttention:
    options = {"window": Window.from_longformer(2 * layer.one_sided_attn_window_size).window}
    mha = MultiheadAttention(
        24, 3, batch_first=True, dtype=dtype, attention="longformer", attention_options=options
    )
    packed: Any = mha.attention.global_projection
    with torch.no_grad():
        for suffix, weight, bias in (
            ("", mha.in_proj_weight, mha.in_proj_bias),
            ("_global", packed.weight, packed.bias),
        ):
            projections = [getattr(layer, name + suffix) for name in ("query", "key", "value")]
            weight.copy_(torch.cat([projection.weight for projection in projections]))
            bias.copy_(torch.cat([projection.bias for projection in projections]))
        mha.out_proj.weight.copy_(torch.eye(24))  # the layer ends before its output projection
        mha.out_proj.bias.zero_()
    return mha


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", ["none", "right", "interior"])
@pytest.mark.parametrize("globals_", ["none", "ragged", "all"])
def test_equals_hugging_face(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, kind: str, globals_: str
) -> None:
    """Rows and the gradients of the input and of all six projections. Their softmax runs in float32
    whatever comes in; here in the input's dtype."""
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    layer = hugging_face_layer(dtype)
    mha = ours_with_its_weights(layer, dtype)
    batch, length = 3, 64
    torch.manual_seed(0)
    x = torch.randn(batch, length, 24, dtype=dtype)
    real = (
        padding(kind, batch, length)
        if kind != "none"
        else torch.ones(batch, length, dtype=torch.bool)
    )
    assert real is not None
    named = {
        "none": torch.zeros_like(real),
        "ragged": global_mask(batch, length) & real,
        "all": real,
    }[globals_]
    signs = (
        torch.zeros(batch, length, dtype=dtype)
        .masked_fill(~real, -10000.0)
        .masked_fill(named, 10000.0)
    )
    theirs_x, ours_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    theirs = layer(
        theirs_x,
        attention_mask=signs,
        is_index_masked=~real,
        is_index_global_attn=named,
        is_global_attn=bool(named.any()),
    )[0]
    ours, _ = mha(
        ours_x, ours_x, ours_x, key_padding_mask=~real, need_weights=False, global_mask=named
    )
    rows = real[..., None]  # a padded row is 0 there, and here the row of its query
    close(ours * rows, theirs.detach() * rows, tolerance, "rows")
    upstream = torch.randn(batch, length, 24, dtype=dtype) * rows
    ours.backward(upstream)
    theirs.backward(upstream)
    assert ours_x.grad is not None and theirs_x.grad is not None
    close(ours_x.grad, theirs_x.grad, 4 * tolerance, "gradient of x")
    packed: Any = mha.attention.global_projection
    gradients: Any = (("", mha.in_proj_weight.grad), ("_global", packed.weight.grad))
    for suffix, gradient in gradients:
        of_theirs: Any = [
            getattr(layer, name + suffix).weight.grad for name in ("query", "key", "value")
        ]
        if of_theirs[0] is not None:
            close(
                gradient,
                torch.cat(of_theirs),
                4 * tolerance,
                f"gradient of the projections{suffix}",
            )


def test_own_projections_begin_as_copies_and_travel() -> None:
    """As Longformer itself is made from RoBERTa; torch's checkpoint fills them, its own keeps
    them."""
    options = {"batch_first": True, "attention": "longformer", "attention_options": {"window": 3}}
    plain, mha = (
        nn.MultiheadAttention(12, 3, batch_first=True),
        MultiheadAttention(12, 3, **options),
    )
    packed: Any = mha.attention.global_projection
    assert (
        torch.equal(packed.weight, mha.in_proj_weight) and packed.weight is not mha.in_proj_weight
    )
    mha.load_state_dict(plain.state_dict())
    assert torch.equal(packed.weight, plain.in_proj_weight)
    nn.init.normal_(packed.weight)
    other = MultiheadAttention(12, 3, **options)
    other.load_state_dict(copy.deepcopy(mha.state_dict()))
    x, named = torch.randn(2, 20, 12), global_mask(2, 20)
    assert torch.equal(mha(x, x, x, global_mask=named)[0], other(x, x, x, global_mask=named)[0])
    alone, weights = mha(x[0], x[0], x[0], global_mask=named[0])
    close(alone, mha(x, x, x, global_mask=named)[0][0], 1e-6, "one sample without its batch")
    assert weights is not None and weights.shape == (20, 20)


@BACKENDS
def test_decoding_with_named_globals(backend: str) -> None:
    """A prompt with global tokens of its own projections, left-padded, then tokens in pieces: the
    rows of one causal forward."""
    situation, named = Situation(150, 150), torch.zeros(2, 150, dtype=torch.bool)
    named[0, [3, 20, 25]] = named[1, 39] = True
    key_mask = torch.ones(2, 150, dtype=torch.bool)
    key_mask[:, :40] = padding("left", 2, 40)  # pyright: ignore[reportArgumentType]
    q, k, v, _ = tensors(situation)
    own = own_projections(situation)
    attn: Any = CASE.build(dtype=torch.float64, prefer=backend)
    expected = attn(q, k, v, key_mask=key_mask, global_mask=named, global_qkv=own, is_causal=True)
    prompt = slice(0, 40)
    first, state = attn.step(
        *(x[:, :, prompt] for x in (q, k, v)),
        attn.init_state(2, kv_heads=2, dtype=q.dtype),
        key_mask=key_mask[:, prompt],
        global_mask=named[:, prompt],
        global_qkv=tuple(x[:, :, prompt] for x in own),
    )
    rows, start = [first], 40
    for length in [1] * 30 + [40, 1, 39]:
        out, state = attn.step(*(x[:, :, start : start + length] for x in (q, k, v)), state)
        rows.append(out)
        start += length
    close(torch.cat(rows, 2), expected, 1e-10, "rows")
    # The window, and two slots of globals; what `crop` needs of the last piece is not counted.
    assert state.elements() == 2 * 2 * 2 * 8 * (16 + 2)


def test_globals_that_come_late() -> None:
    """Within the first window they may come in any step; later, and with projections of their own,
    they are refused."""
    attn: Any = CASE.build(dtype=torch.float64)
    q, k, v, _ = tensors(Situation(40, 40))
    named = torch.zeros(2, 40, dtype=torch.bool)
    named[0, 9] = named[1, 12] = True
    expected = attn(q, k, v, global_mask=named, is_causal=True)
    state, rows = attn.init_state(2, kv_heads=2, dtype=q.dtype), []
    for start in range(0, 40, 5):
        some = slice(start, start + 5)
        out, state = attn.step(
            q[:, :, some], k[:, :, some], v[:, :, some], state, global_mask=named[:, some]
        )
        rows.append(out)
    close(torch.cat(rows, 2), expected, 1e-10, "rows")
    one, yes = [x[:, :, :1] for x in (q, k, v)], torch.ones(2, 1, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match=r"after 40 others .* within the first 16 tokens"):
        attn.step(*one, state, global_mask=yes)
    _, state = attn.step(*one, attn.init_state(2, kv_heads=2, dtype=q.dtype))
    with pytest.raises(UnsupportedError, match="first step"):
        attn.step(*one, state, global_mask=yes, global_qkv=tuple(one))


def test_a_state_branches_and_is_selected_with_its_globals() -> None:
    attn: Any = FIRST.build(dtype=torch.float64)
    q, k, v, _ = tensors(Situation(50, 50))
    whole = attn(q, k, v, is_causal=True)
    with torch.no_grad():
        _, state = attn.step(
            q[:, :, :30],
            k[:, :, :30],
            v[:, :, :30],
            attn.init_state(2, 50, kv_heads=2, dtype=q.dtype),
        )
        rest = [x[:, :, 30:].flip(0) for x in (q, k, v)]
        for _ in range(2):
            out, _ = attn.step(*rest, state.select(torch.tensor([1, 0])))
            close(out, whole[:, :, 30:].flip(0), 1e-10, "rows of the selected state")
    assert state.held_bytes() > 0


@pytest.mark.parametrize("length", [300, 600])
@CAUSALITY
def test_counted_with_named_globals(is_causal: bool, length: int) -> None:
    """A mask with g tokens a sample costs what global_tokens=g costs. Where they have projections
    of their own, a dense mask, of a short input, computes their rows a second time."""
    pytest.importorskip("fvcore")
    attn, q = CASE.build(), torch.randn(2, 4, length, 8)
    named = torch.arange(length).expand(2, -1) < 5
    closed = (
        Case("longformer", {"window": 16, "global_tokens": 5})
        .build()
        .cost(2, length, is_causal=is_causal)
    )
    call = {"is_causal": is_causal, "global_mask": named}
    assert count_flops(attn, q, q, q, **call).macs == closed.macs
    again = 2 * (2 * 4 * 5 * length * 8) if attn.last_backend == "dense" else 0
    assert (length <= 512) == (again > 0)
    own = count_flops(attn, q, q, q, **call, global_qkv=(q, q, q))
    assert own.macs == closed.macs + again
    assert closed.macs >= CASE.build().cost(2, length, is_causal=is_causal).macs


def test_refusals() -> None:
    attn, q = CASE.build(), torch.randn(2, 4, 20, 8)
    for wrong, message in (
        (torch.ones(2, 19, dtype=torch.bool), r"global_mask has shape \(2, 19\)"),
        (torch.ones(2, 20), "global_mask has dtype torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            attn(q, q, q, global_mask=wrong)
    with pytest.raises(ValueError, match="tuple of three"):
        attn(q, q, q, global_qkv=(q, q))
    with pytest.raises(ValueError, match=r"global_k has shape \(2, 4, 3, 8\)"):
        attn(q, q, q, global_qkv=(q, q[:, :, :3], q))
    for name in ("standard", "performer"):
        with pytest.raises(
            UnsupportedError, match=f"{name} has no place for global_mask.*use longformer"
        ):
            attnzoo.build(name, heads=4, head_dim=8)(
                q, q, q, global_mask=torch.ones(2, 20, dtype=torch.bool)
            )
    with pytest.raises(ValueError, match="global_tokens=-1"):
        attnzoo.build("longformer", heads=1, head_dim=4, global_tokens=-1)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=32,
        vocab_size=50,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertModel(config).eval()


def test_global_tokens_in_a_swapped_bert() -> None:
    """[CLS] by the option, any tokens by `attnzoo.global_mask`; all tokens global is exact
    attention again."""
    model = bert()
    ids = torch.randint(50, (2, 60))
    real = padding("right", 2, 60)
    assert real is not None
    exact = model(ids, attention_mask=real.long()).last_hidden_state
    attnzoo.swap(model, "longformer", window=4, global_tokens=1)
    by_option = model(ids, attention_mask=real.long()).last_hidden_state
    attnzoo.unswap(model)
    attnzoo.swap(model, "longformer", window=4)
    without = model(ids, attention_mask=real.long()).last_hidden_state
    named = torch.zeros(2, 60, dtype=torch.bool)
    named[:, 0] = True
    with attnzoo.global_mask(model, named):
        by_mask = model(ids, attention_mask=real.long()).last_hidden_state
    with attnzoo.global_mask(model, real):
        everything = model(ids, attention_mask=real.long()).last_hidden_state
    assert torch.equal(model(ids, attention_mask=real.long()).last_hidden_state, without)
    close(
        by_mask * real[..., None],
        by_option * real[..., None],
        1e-6,
        "the first token by mask and by option",
    )
    close(everything * real[..., None], exact * real[..., None], 1e-5, "every token global")
    assert (by_option - without).abs().max() > 1e-3
    with (
        pytest.raises(ValueError, match="BertModel has no attention with global tokens"),
        attnzoo.global_mask(bert(), named),
    ):
        pass
    with pytest.raises(ValueError, match=r"mask is torch\.int64"), attnzoo.global_mask(model, ids):
        pass


def test_own_projections_in_a_swapped_torch_model(tmp_path) -> None:
    """They begin as copies, train, are saved beside the model, and go when it is unswapped."""
    torch.manual_seed(0)
    model: Any = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(24, 3, 32, dropout=0.0, batch_first=True),
        2,
        enable_nested_tensor=False,
    )
    x, named = torch.randn(2, 40, 24), global_mask(2, 40)
    exact = model(x)
    names = list(model.state_dict())
    attnzoo.swap(model, "longformer", window=40)
    close(model(x), exact, 1e-5, "a window over everything")
    with attnzoo.global_mask(model, named):
        close(model(x), exact, 1e-5, "copies")
        model(x).square().sum().backward()
        packed: Any = model.layers[0].self_attn.attention.global_projection
        assert packed.weight.grad.abs().max() > 0
        with torch.no_grad():
            packed.weight.add_(0.1 * torch.randn_like(packed.weight))
        changed = model(x)
    assert (changed - exact).abs().max() > 1e-4
    attnzoo.save(model, tmp_path / "swap.safetensors")
    attnzoo.unswap(model)
    assert list(model.state_dict()) == names
    attnzoo.load(model, tmp_path / "swap.safetensors")
    with attnzoo.global_mask(model, named):
        assert torch.equal(model(x), changed)


def test_flex_refuses_global_tokens_wherever_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too, where it has nothing else to refuse: its tables would leave them out."""
    monkeypatch.setattr(flex, "why_not", lambda *_: None)
    q, k, v, _ = tensors(Situation(20, 20))
    with pytest.raises(
        UnsupportedError, match=r"backend='flex' .*its tables have no keys that every row sees"
    ):
        CASE.build(backend="flex", dtype=torch.float64)(
            q, k, v, global_mask=torch.ones(2, 20, dtype=torch.bool)
        )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*is deprecated")
def test_a_trace_with_padding_and_global_tokens() -> None:
    """Of masks, which a trace takes by value."""
    q, k, v, _ = tensors(Situation(20, 20, "left"))
    attn, mask = CASE.build(dtype=torch.float64), padding("left", 2, 20)
    assert mask is not None
    named = global_mask(2, 20)

    def run(q: Tensor, real: Tensor, named: Tensor) -> Tensor:
        return attn(q, k, v, key_mask=real, global_mask=named)

    traced: Any = torch.jit.trace(run, (q, mask, named), check_trace=False)
    close(traced(q + 1, mask, named), run(q + 1, mask, named), 1e-12, "traced")


@pytest.mark.parametrize(
    ("place", "wrong", "match"),
    [
        (0, torch.zeros(1, 2, 6, 4, dtype=torch.float64), r"q in global_qkv is of dtype .*float64"),
        (2, None, "v in global_qkv is of NoneType; give a tensor"),
    ],
)
def test_a_wrong_projection_is_named_as_it_was_given(place: int, wrong, match: str) -> None:
    q = torch.zeros(1, 2, 6, 4)
    own = [q, q, q]
    own[place] = wrong
    attn = attnzoo.build("longformer", heads=2, head_dim=4)
    with pytest.raises(ValueError, match=match):
        attn(q, q, q, global_qkv=tuple(own))
