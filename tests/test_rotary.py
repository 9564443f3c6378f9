"""QK-norm and rotary embedding as options of MultiheadAttention: the numbers of transformers'
attentions, and the rules of padding and packing in every variant."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
import transformers
from small import small
from torch import Tensor, nn

import attnzoo
from attnzoo import MultiheadAttention
from attnzoo.layers.input_projections import project_inputs, weighed
from attnzoo.layers.options.qk_norm import NORMS
from attnzoo.registry import spec_of

NAMES = attnzoo.names()
SIZE, HEADS, WIDTH = 16, 4, 4
OPTIONS: dict[str, Any] = {"qk_norm": "per_head", "rotary": {"base": 100.0}}


def layer_of(name: str, **more: Any) -> MultiheadAttention:
    torch.manual_seed(0)
    options = {"attention": name, "attention_options": small(name), **OPTIONS, **more}
    layer = MultiheadAttention(SIZE, HEADS, batch_first=True, **options).double()
    norms: Any = [layer._modules[one] for one in NORMS if one in layer._modules]
    for norm in norms:
        nn.init.normal_(norm.weight, 1.0, 0.3)
    return layer


def causal(name: str) -> bool:
    return not spec_of(name).bidirectional


def with_weights_of(theirs: Any, **options: Any) -> MultiheadAttention:
    """A layer with the weights of one of transformers'."""
    ours = MultiheadAttention(SIZE, HEADS, bias=False, batch_first=True, **options)
    packed = torch.cat([x.weight for x in (theirs.q_proj, theirs.k_proj, theirs.v_proj)])
    state = {"in_proj_weight": packed, "out_proj.weight": theirs.o_proj.weight}
    for name in NORMS:
        if hasattr(theirs, name):
            nn.init.normal_(getattr(theirs, name).weight, 1.0, 0.3)
            state[f"{name}.weight"] = getattr(theirs, name).weight
    ours.load_state_dict(state)
    return ours


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {"rotary": {"base": 500.0}}),
        ("Qwen3", {"rotary": {"base": 500.0}, "qk_norm": "per_head"}),
        ("Olmo2", {"rotary": {"base": 500.0}, "qk_norm": "all_heads"}),
        ("Glm", {"rotary": {"base": 500.0, "width": 2, "interleaved": True}}),
    ],
)
def test_equals_transformers(family: str, options: dict[str, Any]) -> None:
    name = family.lower()
    made = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    part = {"partial_rotary_factor": 0.5} if family == "Glm" else {}
    config = getattr(transformers, f"{family}Config")(
        hidden_size=SIZE,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH,
        rms_norm_eps=1e-6,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, **part},
        attn_implementation="eager",
        pad_token_id=0,
    )
    torch.manual_seed(0)
    theirs = getattr(made, f"{family}Attention")(config, 0)
    ours = with_weights_of(theirs, **options)
    x, y = (torch.randn(2, 9, SIZE) for _ in range(2))
    x.requires_grad_()
    slots = torch.arange(9)
    turns = getattr(made, f"{family}RotaryEmbedding")(config)(x, slots[None])
    hidden = torch.zeros(9, 9).masked_fill(slots[:, None] < slots, -torch.inf)
    wanted = theirs(x, position_embeddings=turns, attention_mask=hidden)[0]
    out = ours(x, x, x, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad((wanted * y).sum(), [x, theirs.q_proj.weight])
    found = torch.autograd.grad((out * y).sum(), [x, ours.in_proj_weight])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1][:SIZE], expected[1], rtol=1e-5, atol=1e-5)


def by_hand(x: Tensor, weight: Tensor, start: int) -> Tensor:
    """(batch, heads, length, 4): normalised per head and turned at positions from `start` on, pair
    by pair, as complex numbers."""
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    out = torch.empty_like(x)
    for slot in range(x.shape[2]):
        for i in range(2):
            angle = torch.tensor((start + slot) * 100.0 ** (-2 * i / 4), dtype=x.dtype)
            turned = torch.complex(x[:, :, slot, i], x[:, :, slot, i + 2])
            turned = turned * torch.polar(torch.ones_like(angle), angle)
            out[:, :, slot, i], out[:, :, slot, i + 2] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("name", NAMES)
def test_every_core_gets_them_normalised_and_turned(name: str) -> None:
    layer, x = layer_of(name), torch.randn(2, 20, SIZE).double()
    q, k, v = (
        one.unflatten(2, (HEADS, WIDTH)).transpose(1, 2)
        for one in (x @ layer.in_proj_weight.T).chunk(3, 2)
    )
    norms: Any = layer._modules
    q, k = by_hand(q, norms["q_norm"].weight, 0), by_hand(k, norms["k_norm"].weight, 0)
    inputs = project_inputs(layer, x, x, k, ())
    k, v = weighed(layer, k, v, inputs, {})
    packed: Any = getattr(layer.attention, "global_projection", None)
    if packed is not None:
        own = (x @ packed.weight.T).chunk(3, 2)
        gq, gk, gv = (one.unflatten(2, (HEADS, WIDTH)).transpose(1, 2) for one in own)
        inputs = {
            "global_q": by_hand(gq, norms["q_norm"].weight, 0),
            "global_k": by_hand(gk, norms["k_norm"].weight, 0),
            "global_v": gv,
        }
    out, weights = layer(x, x, x, is_causal=causal(name), average_attn_weights=False)
    wanted = layer.attention(q, k, v, is_causal=causal(name), **inputs)
    torch.testing.assert_close(
        out, layer.out_proj(wanted.transpose(1, 2).flatten(2)), rtol=1e-12, atol=1e-12
    )
    read = {key: value for key, value in inputs.items() if key != "global_v"}
    expected = layer.attention.weights(q, k, is_causal=causal(name), **read)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_absence(name: str) -> None:
    """Ahead and behind, forward and backward; in the rows of a piece too."""
    layer, x = layer_of(name), torch.randn(2, 20, SIZE).double()
    how = {"need_weights": False, "is_causal": causal(name)}
    wanted = layer(x, x, x, **how)[0]
    for ahead, behind in ((3, 0), (0, 4), (2, 1)):
        padding = torch.ones(2, ahead + 20 + behind, dtype=torch.bool)
        padding[:, ahead : ahead + 20] = False
        padded = torch.full((2, ahead + 20 + behind, SIZE), 7.0).double()
        padded[:, ahead : ahead + 20] = x
        for ids in (None, padding.new_ones(padding.shape).long()):
            out = layer(padded, padded, padded, padding, segments=ids, **how)[0]
            torch.testing.assert_close(out[:, ahead : ahead + 20], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_packing_starts_again(name: str) -> None:
    """Also where a piece has padding ahead, and where its tokens do not stand together."""
    layer, lengths = layer_of(name), (5, 9, 6)
    x, ids = (
        torch.randn(2, 20, SIZE).double(),
        torch.arange(3).repeat_interleave(torch.tensor(lengths)),
    )
    how = {"need_weights": False, "is_causal": causal(name)}
    pieces = x.split(lengths, 1)
    wanted = torch.cat([layer(one, one, one, **how)[0] for one in pieces], 1)
    out = layer(x, x, x, segments=ids.expand(2, -1), **how)[0]
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    order = torch.cat([torch.arange(0, 20, 2), torch.arange(1, 20, 2)])
    mixed = x[:, order]
    out = layer(mixed, mixed, mixed, segments=ids[order].expand(2, -1), **how)[0]
    apart = [mixed[:, ids[order] == one] for one in range(3)]
    wanted = torch.cat([layer(one, one, one, **how)[0] for one in apart], 1)
    back = ids[order].argsort(stable=True)
    torch.testing.assert_close(out[:, back], wanted, rtol=1e-12, atol=1e-12)


def test_scores_depend_on_distances() -> None:
    """Queries stand at the last keys; keys further on change nothing."""
    layer = layer_of("standard")
    x = torch.randn(1, 12, SIZE).double()
    whole = layer(x, x, x, is_causal=True)
    part = layer(x[:, 9:], x, x, is_causal=True)
    for one, other in zip(whole, part, strict=True):
        torch.testing.assert_close(other, one[:, 9:], rtol=1e-12, atol=1e-12)
    more = layer(x, x[:, :9], x[:, :9], need_weights=False)[0]
    seen = torch.zeros(1, 9, dtype=torch.bool)
    torch.testing.assert_close(
        layer(x, x[:, :9], x[:, :9], seen, need_weights=False)[0], more, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("qk_norm", ["per_head", "all_heads"])
def test_a_layer_lives_on(qk_norm: Any) -> None:
    layer, x = layer_of("standard", qk_norm=qk_norm), torch.randn(2, 9, SIZE).double()
    wanted = layer(x, x, x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, x, x)[0], wanted)
    fresh = layer_of("standard", qk_norm=qk_norm)
    fresh._reset_parameters()
    norms: Any = [fresh._modules[name] for name in NORMS]
    assert all(bool((norm.weight == 1).all()) for norm in norms)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x, x, x)[0], wanted)
    with pytest.raises(RuntimeError, match="q_norm"):
        fresh.load_state_dict(nn.MultiheadAttention(SIZE, HEADS).state_dict())


@pytest.mark.thorough
def test_in_torchs_layers_and_one_graph() -> None:
    encoder = nn.TransformerEncoderLayer(SIZE, HEADS, 32, 0.0, batch_first=True).double()
    encoder.self_attn = layer_of("standard")
    x, padding = torch.randn(2, 9, SIZE).double(), torch.zeros(2, 9, dtype=torch.bool)
    padding[0, :2] = True
    wanted = encoder(x, src_key_padding_mask=padding)
    encoder.eval()
    with torch.no_grad():
        found = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], wanted[~padding])
    ids = torch.arange(3).repeat_interleave(3).expand(2, -1)
    layer = layer_of("standard")
    graph: Any = torch.compile(layer, backend="eager", fullgraph=True)
    for more in ({"key_padding_mask": padding}, {"segments": ids}):
        how = {"need_weights": False, "is_causal": True, **more}
        torch.testing.assert_close(graph(x, x, x, **how)[0], layer(x, x, x, **how)[0])


@pytest.mark.thorough
def test_exports() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    layer = layer_of("standard").float().eval()
    x, padding = torch.randn(2, 9, SIZE), torch.zeros(2, 9, dtype=torch.bool)
    padding[0, :2] = True

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer
            self.eval()

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.layer(x, x, x, padding, need_weights=False)[0]

    program: Any = torch.onnx.export(
        Whole(), (x, padding), opset_version=20, dynamo=True, verbose=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [one.name for one in session.get_inputs()]
    (out,) = session.run(None, dict(zip(names, (x.numpy(), padding.numpy()), strict=True)))
    wanted = layer(x, x, x, padding, need_weights=False)[0]
    torch.testing.assert_close(torch.tensor(out)[~padding], wanted[~padding])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("qk_norm", ["per_head", "all_heads"])
def test_in_half_precision(qk_norm: Any) -> None:
    """Of the module, and of its products alone."""
    layer, x = layer_of("standard", qk_norm=qk_norm).float(), torch.randn(2, 9, SIZE)
    wanted = layer(x, x, x, need_weights=False)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, x, x, need_weights=False)[0]
    half = x.bfloat16()
    for found in (out, layer.bfloat16()(half, half, half, need_weights=False)[0]):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.02)


def test_one_norm_for_shared_queries_and_keys() -> None:
    """Which stay one tensor."""
    layer = layer_of("reformer", attention_options={**small("reformer"), "share_qk": True})
    assert "k_norm" not in layer._modules
    x = torch.randn(2, 20, SIZE).double()
    assert bool(layer(x, x, x, need_weights=False)[0].isfinite().all())


def test_macs_are_those_of_the_projections_and_the_core() -> None:
    x = torch.randn(1, 20, SIZE)
    counts = []
    for options in ({}, OPTIONS):
        layer = MultiheadAttention(SIZE, HEADS, batch_first=True, **options)
        counts.append(attnzoo.count_flops(layer, x, x, x, need_weights=False))
    assert counts[0].macs == counts[1].macs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotary": {"width": 3}}, "rotary width=3 must be even and at most head_dim=4"),
        ({"rotary": {"width": 6}}, "rotary width=6 must be even and at most head_dim=4"),
        ({"rotary": {"width": 0}}, "rotary width=0 must be a whole number of at least 1"),
        ({"rotary": {"base": 1.0}}, "rotary base=1.0 must be a number above 1"),
        ({"rotary": {"base": float("nan")}}, "rotary base=nan must be a number above 1"),
        ({"rotary": {"theta": 1e6}}, "rotary has no option 'theta'.*base, width, interleaved"),
        ({"rotary": {"interleaved": 1}}, "rotary interleaved=1 must be True or False"),
        ({"rotary": 10_000.0}, "rotary=10000.0 must be True, False or a mapping"),
        ({"rotary": True, "add_bias_kv": True}, "add_bias_kv and add_zero_attn append keys"),
        ({"qk_norm": "perhead"}, "qk_norm='perhead' is unknown .did you mean 'per_head'"),
        ({"qk_norm": True}, "qk_norm=True is unknown"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiheadAttention(SIZE, HEADS, **options)
    with pytest.raises(ValueError, match="rotary width=5 must be even"):
        MultiheadAttention(15, 3, rotary=True)


def test_wrong_segments_are_named() -> None:
    layer, x = layer_of("standard"), torch.randn(2, 9, SIZE).double()
    for ids in (torch.zeros(2, 8).long(), torch.zeros(2, 9)):
        with pytest.raises(ValueError, match="segments has"):
            layer(x, x, x, segments=ids)
