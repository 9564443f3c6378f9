"""Multi-head latent attention: by hand, both forms alike, and under the rules of masks, padding,
packing and states."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import small
from stages import only
from torch import Tensor

import attnzoo
from attnzoo import LatentAttention, UnsupportedError
from attnzoo.registry import spec_of

SIZE, HEADS, NOPE, ROPE, RANK, VALUE = 12, 4, 5, 4, 6, 3
CLOSE: Any = {"rtol": 1e-12, "atol": 1e-12}
HOW: dict[str, Any] = {"need_weights": False, "is_causal": True}
PLAIN = [
    name
    for name in attnzoo.names()
    if not any(one.is_projected or one.like for one in spec_of(name).inputs)
    and name != "differential"  # which halves a head, and here it has 9 features
]
ABSORBING = ["standard", "bigbird", "flash", "sliding_window", "sparse_transformer"]


def layer_of(name: str = "standard", **more: Any) -> LatentAttention:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "kv_lora_rank": RANK,
        "q_lora_rank": 7,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE,
        "rotary": {"base": 50.0},
        "batch_first": True,
        "attention": name,
        "attention_options": small(name),
        **more,
    }
    layer = LatentAttention(SIZE, HEADS, **options).double()
    for norm in (getattr(layer.latent, "q_norm", None), layer.latent.kv_norm):
        if norm is not None:
            torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    return layer


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def turned(x: Tensor, position: int, interleaved: bool) -> Tensor:
    """Pairs as complex numbers, times e^(i · position · rate)."""
    pairs = x.view(-1, 2) if interleaved else torch.stack(x.chunk(2), -1)
    rates = 50.0 ** (-torch.arange(len(pairs)).double() / len(pairs))
    done = torch.view_as_complex(pairs.clone()) * torch.polar(
        torch.ones_like(rates), position * rates
    )
    out = torch.view_as_real(done)
    return out.flatten() if interleaved else torch.cat([out[:, 0], out[:, 1]])


def by_hand(layer: Any, x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Rows of one sample, (length, SIZE), and A, (heads, length, length), from the equations."""
    parts, core = layer.latent, layer.attention
    up = core.kv_up.weight.view(HEADS, NOPE + VALUE, RANK)
    length = len(x)
    latents, keys = [], []
    for t in range(length):
        down = parts.kv_down.weight @ x[t]
        keys.append(turned(down[:ROPE], t, interleaved))
        latents.append(normed(down[ROPE:], parts.kv_norm.weight))
    matrix, rows = torch.zeros(HEADS, length, length).double(), []
    for t in range(length):
        q = parts.q_proj.weight @ normed(parts.q_down.weight @ x[t], parts.q_norm.weight)
        heads = []
        for h, q_h in enumerate(q.view(HEADS, ROPE + NOPE)):
            q_turned = turned(q_h[:ROPE], t, interleaved)
            scores = [
                (q_turned @ keys[s] + q_h[ROPE:] @ (up[h, :NOPE] @ latents[s]))
                / math.sqrt(ROPE + NOPE)
                for s in range(t + 1)
            ]
            matrix[h, t, : t + 1] = torch.stack(scores).softmax(0)
            heads.append(
                sum(a * (up[h, NOPE:] @ c) for a, c in zip(matrix[h, t], latents, strict=False))
            )
        rows.append(layer.out_proj.weight @ torch.cat(heads))
    return torch.stack(rows), matrix


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_by_hand(form: Any, interleaved: bool) -> None:
    layer = layer_of(form=form, rotary={"base": 50.0, "interleaved": interleaved})
    x = torch.randn(2, 9, SIZE).double()
    out, weights = layer(x, is_causal=True, average_attn_weights=False)
    for sample in range(2):
        rows, matrix = by_hand(layer, x[sample], interleaved)
        torch.testing.assert_close(out[sample], rows, **CLOSE)
        assert weights is not None
        torch.testing.assert_close(weights[sample], matrix, **CLOSE)
    assert str(layer.attention.last_backend).startswith(form)


@pytest.mark.parametrize("name", ABSORBING)
def test_both_forms_are_equal(name: str) -> None:
    """Rows, gradients, and A, under padding, pieces and a mask of every head."""
    layer, x = layer_of(name), torch.randn(2, 20, SIZE).double().requires_grad_()
    padding, ids = torch.zeros(2, 20, dtype=torch.bool), torch.arange(20).expand(2, -1) // 8
    padding[0, :3] = padding[1, 17:] = True
    calls: list[dict[str, Any]] = [{}, {"key_padding_mask": padding}, {"segments": ids}]
    if spec_of(name).attn_mask:
        calls.append({"attn_mask": torch.randn(2 * HEADS, 20, 20).double(), "is_causal": False})
    for more in calls:
        found = []
        for form in ("expanded", "absorbed"):
            layer.attention.form = form
            out, weights = layer(x, **{"is_causal": True, **more})
            upstream = torch.ones_like(out).cumsum(1)
            to = torch.autograd.grad(out, [x, *layer.parameters()], upstream, allow_unused=True)
            found.append([out, weights, *to])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


def stepped(layer: LatentAttention, x: Tensor, cuts: list[int], **masks: Tensor) -> Tensor:
    state, rows = layer.init_state(len(x)), []
    for start, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        own = {name: mask[:, start:end] for name, mask in masks.items()}
        out, state = layer.step(x[:, start:end], state, **own)
        rows.append(out)
    return torch.cat(rows, 1)


@pytest.mark.parametrize("name", [name for name in PLAIN if spec_of(name).decodes])
def test_steps_equal_the_forward(name: str) -> None:
    """In pieces of either form, with padding, and in a packed row."""
    layer, x = layer_of(name), torch.randn(2, 20, SIZE).double()
    cuts = [2, 9, 10, 17]
    wanted = layer(x, **HOW)[0]
    torch.testing.assert_close(stepped(layer, x, cuts), wanted, **CLOSE)
    padding = torch.zeros(2, 20, dtype=torch.bool)
    padding[0, :4] = padding[1, 18:] = True
    ids = torch.stack([torch.arange(20) // 7, (torch.arange(20) >= 9).long()])
    for more in ({"key_padding_mask": padding}, {"segments": ids}):
        wanted, found = layer(x, **HOW, **more)[0], stepped(layer, x, cuts, **more)
        real = ~more.get("key_padding_mask", torch.zeros(2, 20, dtype=torch.bool))
        torch.testing.assert_close(found[real], wanted[real], **CLOSE)


@pytest.mark.parametrize("form", ["auto", "expanded", "absorbed"])
def test_states_go_back_and_branch(form: Any) -> None:
    layer, x = layer_of(form=form), torch.randn(2, 20, SIZE).double()
    wanted = layer(x, **HOW)[0]
    _, state = layer.step(x[:, :9], layer.init_state(2))
    _, drafted = layer.step(torch.randn(2, 4, SIZE).double(), state)
    for behind in (state, drafted.crop(4)):
        out, _ = layer.step(x[:, 9:], behind)
        torch.testing.assert_close(out, wanted[:, 9:], **CLOSE)
    rows = torch.tensor([1, 1, 0])
    out, _ = layer.step(x[rows, 9:], drafted.crop(4).select(rows))
    torch.testing.assert_close(out, wanted[rows, 9:], **CLOSE)


@torch.no_grad()
def test_decoding_absorbs_and_keeps_one_latent_a_token() -> None:
    """Of any number of heads, and twice as much room at most; a window keeps its own length."""
    layer, x = layer_of(), torch.randn(2, 20, SIZE).double()
    state = layer.init_state(2, max_length=30)
    assert state.core.held_bytes() == 2 * 30 * (RANK + ROPE) * 8
    _, state = layer.step(x[:, :19], state)
    assert layer.attention.last_backend == "expanded sdpa"
    _, state = layer.step(x[:, 19:], state)
    assert layer.attention.last_backend == "absorbed shared_keys"
    assert state.core.elements() == 2 * 20 * (RANK + ROPE) == layer.cost(2, 20).state_elements
    assert state.core.held_bytes() == 2 * 30 * (RANK + ROPE) * 8
    window = layer_of("sliding_window")
    assert window.cost(2, 20, is_causal=True).state_elements == 2 * 4 * (RANK + ROPE)
    published = LatentAttention(
        512, 128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, device="meta"
    )
    assert published.attention.cost(1, 1, 1000).state_elements == 576 * 1000


@pytest.mark.parametrize("name", PLAIN)
def test_padding_and_packing_do_not_reach_it(name: str) -> None:
    layer, x = layer_of(name), torch.randn(2, 16, SIZE).double()
    how: dict[str, Any] = {**HOW, "is_causal": spec_of(name).causal}
    wanted = layer(x, **how)[0]
    for ahead, behind in ((3, 0), (0, 4)):
        padding = F.pad(torch.zeros(2, 16, dtype=torch.bool), (ahead, behind), value=True)
        held = F.pad(x, (0, 0, ahead, behind), value=math.nan)
        out = layer(held, key_padding_mask=padding, **how)[0][:, ahead : ahead + 16]
        torch.testing.assert_close(out, wanted, **CLOSE)
        _, weights = layer(held, key_padding_mask=padding, is_causal=how["is_causal"])
        assert weights is not None
        assert not weights[:, ahead : ahead + 16][:, :, padding[0]].any()
    lengths = (5, 11)
    ids = torch.arange(2).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    wanted = torch.cat([layer(one, **how)[0] for one in x.split(lengths, 1)], 1)
    torch.testing.assert_close(layer(x, segments=ids, **how)[0], wanted, **CLOSE)
    with attnzoo.packed(layer, ids):
        torch.testing.assert_close(layer(x, **how)[0], wanted, **CLOSE)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_a_bad_token_reaches_no_earlier_row(form: Any) -> None:
    layer, x = layer_of(form=form), torch.randn(1, 9, SIZE).double()
    wanted = layer(x, **HOW)[0]
    x[:, 5] = math.nan
    for out in (layer(x, **HOW)[0], stepped(layer, x, [2, 7])):
        torch.testing.assert_close(out[:, :5], wanted[:, :5], **CLOSE)
        assert bool(out[:, 5:].isnan().all())


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("name", ["standard", "sliding_window", "linear"])
def test_macs_are_counted(name: str, form: Any) -> None:
    """The closed form is what is counted, and parameters are all of them."""
    if form == "absorbed" and name == "linear":
        form = "auto"
    layer = layer_of(name, form=form, bias=True, v_head_dim=NOPE + ROPE).float()
    for queries, keys in ((20, 20), (1, 20), (3, 20)):
        q, x = torch.randn(2, queries, SIZE), torch.randn(2, keys, SIZE)
        q = x if queries == keys else q
        counted = attnzoo.count_flops(layer, q, x, x, **HOW)
        cost = layer.cost(2, queries, keys, is_causal=True)
        assert cost.macs == counted.macs
        assert cost.parameters == sum(one.numel() for one in layer.parameters())
    auto = layer_of(name)
    auto.attention.form = "auto"
    if name == "standard":
        both = [layer_of(form=one).cost(2, 1, 20).macs for one in ("expanded", "absorbed")]
        assert auto.cost(2, 1, 20).macs == min(both)


def test_a_layer_lives_on() -> None:
    layer, x = layer_of(form="absorbed", bias=True), torch.randn(2, 7, SIZE).double()
    wanted = layer(x, **HOW)[0]
    fresh = layer_of(form="absorbed", bias=True)
    fresh.reset_parameters()
    assert not torch.allclose(fresh(x, **HOW)[0], wanted)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other(x, **HOW)[0], wanted)
    torch.testing.assert_close(layer(x[0], **HOW)[0], wanted[0], **CLOSE)
    layer.batch_first = False
    torch.testing.assert_close(layer(x.transpose(0, 1), **HOW)[0].transpose(0, 1), wanted)


@pytest.mark.parametrize("form", only(["absorbed"], ["expanded", "absorbed"]))
def test_it_trains_and_compiles(form: Any) -> None:
    layer = layer_of(form=form)
    x = torch.randn(1, 5, SIZE).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x, **HOW)[0], x)
    ids = torch.tensor([[0, 0, 1, 1, 1]])
    graph: Any = torch.compile(layer, backend="eager", fullgraph=True)
    for more in ({}, {"segments": ids}):
        torch.testing.assert_close(graph(x, **HOW, **more)[0], layer(x, **HOW, **more)[0], **CLOSE)
    for shape in ((0, 5, SIZE), (2, 0, SIZE)):
        empty = torch.zeros(shape).double().requires_grad_()
        out = layer(empty, **HOW)[0]
        out.sum().backward()
        assert out.shape == shape
    dropped = layer_of(form=form, dropout=0.5)
    assert not torch.equal(dropped(x, **HOW)[0], dropped(x, **HOW)[0])
    assert torch.equal(dropped.eval()(x, **HOW)[0], dropped(x, **HOW)[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_in_half_precision(form: Any) -> None:
    layer, x = layer_of(form=form).float(), torch.randn(2, 9, SIZE)
    wanted = layer(x, **HOW)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [layer(x, **HOW)[0]]
    found.append(copy.deepcopy(layer).bfloat16()(x.bfloat16(), **HOW)[0])
    for out in found:
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), wanted, rtol=0.05, atol=0.02)


def _doubled(module: Any, given: Any, out: Tensor) -> Tensor:
    return 2 * out


def test_an_adapted_projection_is_called() -> None:
    """What stands in place of kv_up, or hooks it, is not read past."""
    layer, x = layer_of(), torch.randn(1, 9, SIZE).double()
    layer.attention.kv_up.register_forward_hook(_doubled)
    wanted = layer(x, **HOW)[0]
    torch.testing.assert_close(stepped(layer, x, [4, 5]), wanted, **CLOSE)
    assert layer.attention.last_backend == "expanded sdpa"


def test_nested_and_quantised() -> None:
    """Sequences of several lengths at once, and integers in place of weights."""
    layer = layer_of().float()
    sequences = [torch.randn(length, SIZE) for length in (3, 5)]
    nested = torch.nested.nested_tensor(sequences, layout=torch.jagged)
    out = layer(nested, **HOW)[0].unbind()
    for found, one in zip(out, sequences, strict=True):
        torch.testing.assert_close(found, layer(one, **HOW)[0])
    quantise: Any = torch.ao.quantization.quantize_dynamic
    integers = quantise(layer, {torch.nn.Linear}, dtype=torch.qint8)
    x = torch.randn(2, 9, SIZE)
    wanted = layer(x, **HOW)[0]
    assert (integers(x, **HOW)[0] - wanted).abs().max() < 0.2 * wanted.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank=0 must be a whole number of at least 1"),
        ({"qk_rope_head_dim": 3}, "rotary width=3 must be even"),
        ({"form": "absorb"}, "form='absorb' is unknown .did you mean 'absorbed'"),
        ({"name": "linear", "form": "absorbed"}, "form='absorbed' .*linear reads keys otherwise"),
        ({"name": "gla"}, "gla takes log_decay of hidden states beside q, k and v"),
        ({"name": "longformer"}, "longformer takes global_q of hidden states"),
        ({"name": "linear", "dropout": 0.1}, "dropout=0.1 drops entries"),
        ({"scale": math.inf}, "scale=inf must be a finite number"),
        ({"rotary": {"yarn": {"factor": 4.0}}}, "lacks original_length"),
        ({"rotary": {"yarn": {"factors": 4.0}}}, "no option 'factors'.*did you mean 'factor'"),
        ({"rotary": {"yarn": 4}}, "rotary yarn=4 must be a mapping"),
        (
            {"rotary": {"yarn": {"factor": 0.5, "original_length": 9}}},
            "rotary yarn factor=0.5 must be a number of at least 1",
        ),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of(**options)


def test_wrong_calls_are_named() -> None:
    layer, x = layer_of(), torch.randn(2, 9, SIZE).double()
    with pytest.raises(ValueError, match="key and value must be one tensor"):
        layer(x, x, x.clone())
    with pytest.raises(ValueError, match="query has 3 features"):
        layer(x[..., :3])
    with pytest.raises(ValueError, match=r"key has dtype torch\.float32"):
        layer(x, x.float())
    q = torch.zeros(1, HEADS, 1, 9).double()
    with pytest.raises(ValueError, match=r"q and k have head_dim 9 and 9; .* and keys of 10"):
        layer.attention(q, q[:, :1], q[:, :1, :, :0])
    with pytest.raises(ValueError, match="state is a int"):
        layer.step(x, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="kv_heads=2 is no choice here"):
        layer.attention.cost(1, 9, kv_heads=2)
    narrow = layer_of("linear")
    with pytest.raises(UnsupportedError, match="linear has a closed form for values as wide"):
        narrow.cost(1, 9)


def test_a_state_of_another_batch_is_refused() -> None:
    sizes: Any = {"kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    for layer in (
        attnzoo.LatentAttention(16, 2, batch_first=True, **sizes),
        attnzoo.MultiheadAttention(16, 2, batch_first=True),
    ):
        with pytest.raises(ValueError, match="x has batch size 1 and the state was made for 2"):
            layer.step(torch.randn(1, 2, 16), layer.init_state(2))
