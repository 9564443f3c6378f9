"""Inputs beside q, k and v: declared by a variant, and everything else follows from the
declaration."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import swap_models
import torch
from cases import Situation, close, tensors
from small import build_small
from test_swap_modules import TimmAttentionLike
from torch import Tensor, nn
from toy_with_inputs import Weighted

import attnzoo
from attnzoo import Input, Spec, UnsupportedError, registry
from attnzoo.call import Call
from attnzoo.integrations import tensor_parallel
from attnzoo.layers.projections import project
from attnzoo.registry import names, spec_of

HEADS, KV_HEADS, WIDTH = 4, 2, 8
WITH_INPUTS = [name for name in names() if spec_of(name).inputs]


@pytest.fixture(autouse=True)
def weighted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up variant is registered, for one test."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    attnzoo.register(Weighted)


def inputs_for(
    declared: tuple[Input, ...], q: Tensor, k: Tensor, v: Tensor, seed: int = 1
) -> dict[str, Tensor]:
    """One of each, of the axes that it declares."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        **dict(zip(("batch", "heads", "queries", "width"), q.shape, strict=True)),
        **dict(zip(("kv_heads", "keys", "value_width"), v.shape[1:], strict=True)),
        "distances": 2 * max(q.shape[2], k.shape[2]) - 1,
        "levels": 8,
        "index_heads": 4,
        "index_key_heads": 2,
        "index_width": 6,
    }
    made = {}
    for one in declared:
        x = torch.randn([sizes[axis] for axis in one.names], generator=generator, dtype=q.dtype)
        if one.activation is not None:
            x = one.activation(x)  # a gate has a range
        made[one.name] = x > 1.2 if one.dtype == "bool" else x.abs() if one.required else x
    return made


def qkv(length: int = 12, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    situation = Situation(queries or length, length, batch=2, heads=HEADS, kv_heads=KV_HEADS)
    return tensors(situation, WIDTH)[:3]


def build(**options: Any) -> attnzoo.Attention:
    return attnzoo.build("weighted", HEADS, WIDTH, **options).double()


def given(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    return inputs_for(Weighted.spec.inputs, q, k, v)


def expected(q: Tensor, k: Tensor, mask: Tensor, log_weight: Tensor, sharpness: Tensor) -> Tensor:
    """A, from the equation. mask: (batch or 1, query_length or 1, key_length), True = attend."""
    k, weight = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, log_weight))
    scores = q @ k.mT * WIDTH**-0.5 * sharpness[..., None] + weight[:, :, None]
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries", [12, 5])
def test_it_is_its_equation(is_causal: bool, queries: int) -> None:
    q, k, v = qkv(12, queries)
    inputs: dict[str, Any] = {**given(q, k, v)}
    key_mask = torch.rand(2, 12) > 0.3
    mask = key_mask[:, None]
    if is_causal:
        mask = mask & torch.ones(queries, 12, dtype=torch.bool).tril(12 - queries)
    a = expected(q, k, mask, **inputs)
    masks: Any = {"key_mask": key_mask, "is_causal": is_causal}
    out = a @ v.repeat_interleave(2, 1)
    for backend in ("auto", "sdpa", "reference"):
        close(build(backend=backend)(q, k, v, **masks, **inputs), out, 1e-10, backend)
    close(build().weights(q, k, **masks, **inputs), a, 1e-10, "A")
    del inputs["log_weight"]
    zeros = torch.zeros(2, KV_HEADS, 12, dtype=q.dtype)
    a = expected(q, k, mask, log_weight=zeros, **inputs)
    close(build().weights(q, k, **masks, **inputs), a, 1e-10, "A without an optional input")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_absence(side: str, is_causal: bool) -> None:
    """Whatever stands there, NaN included; no gradient comes back from it."""
    q, k, v = qkv(12)
    real = slice(3, None) if side == "left" else slice(None, -3)
    key_mask = torch.zeros(2, 12, dtype=torch.bool)
    key_mask[:, real] = True
    inputs = given(q, k, v)
    inputs["log_weight"] = inputs["log_weight"].masked_fill(~key_mask[:, None], torch.nan)
    leaves = [x.requires_grad_() for x in inputs.values()]
    out = build()(q, k, v, key_mask=key_mask, is_causal=is_causal, **inputs)[:, :, real]
    alone = Call(q, k, v, None, None, is_causal, inputs, Weighted.spec.inputs)
    alone = alone.select(queries=real, keys=real)
    close(
        out,
        build()(alone.q, alone.k, alone.v, is_causal=is_causal, **alone.inputs),
        1e-12,
        "the run without padding",
    )
    found = torch.autograd.grad(out.square().sum(), leaves)
    assert all(bool(torch.isfinite(x).all()) for x in found)
    assert bool((found[0].masked_select(~key_mask[:, None]) == 0).all())
    assert bool((found[0].masked_select(key_mask[:, None]) != 0).any())


def test_the_future_reaches_nothing() -> None:
    q, k, v = qkv(12)
    inputs = given(q, k, v)
    before = build(backend="reference")(q, k, v, is_causal=True, **inputs)
    for value in (5.0, torch.nan, torch.inf):
        inputs["log_weight"][0, 1, 7] = value
        out = build(backend="reference")(q, k, v, is_causal=True, **inputs)
        a = build().weights(q, k, is_causal=True, **inputs)
        assert torch.equal(out[:, :, :7], before[:, :, :7])
        assert bool(torch.isfinite(out[0, :, 7:]).all()) == (value == 5.0)
        assert bool(torch.isfinite(a[0, :, 7:]).all()) == (value == 5.0)
        assert torch.equal(out[1], before[1])


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 6], [12]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_decoding(pieces: list[int], padded: bool) -> None:
    q, k, v = qkv(12)
    inputs, key_mask = given(q, k, v), torch.rand(2, 12) > 0.3 if padded else None
    whole = build()(q, k, v, is_causal=True, key_mask=key_mask, **inputs)
    attn, rows, first = build(), [], 0
    state = attn.init_state(2, kv_heads=KV_HEADS, dtype=torch.float64)
    call = Call(q, k, v, key_mask, None, True, inputs, attn.spec.inputs)
    for count in pieces:
        here = slice(first, first + count)
        new, first = call.select(queries=here, keys=here), first + count
        out, state = attn.step(new.q, new.k, new.v, state, key_mask=new.key_mask, **new.inputs)
        rows.append(out)
    close(torch.cat(rows, 2), whole, 1e-10, "steps")


def test_gradients_and_autocast() -> None:
    q, k, v = qkv(5)
    inputs = given(q, k, v)
    leaves = [x.requires_grad_() for x in (q, k, v, *inputs.values())]
    attn = build(backend="reference")

    def run(q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, sharpness: Tensor) -> Tensor:
        return attn(q, k, v, is_causal=True, log_weight=log_weight, sharpness=sharpness)

    assert torch.autograd.gradcheck(run, leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attn(
            *(x.detach().float() for x in (q, k, v)),
            **{name: x.detach().float() for name, x in inputs.items()},
        )
    assert out.dtype == torch.bfloat16


class Around(nn.Module):
    """The inputs as tensors in order, for graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.core = build()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, sharp: Tensor) -> Tensor:
        return self.core(q, k, v, is_causal=True, log_weight=weight, sharpness=sharp)


def test_graphs_and_transforms() -> None:
    q, k, v = qkv(12)
    model: Any = Around()
    args = (q, k, v, *given(q, k, v).values())
    out = model(*args)

    def of_sample(*one: Tensor) -> Tensor:
        return model(*(x[None] for x in one))[0]

    by_sample: Any = torch.func.vmap(of_sample)(*args)
    close(by_sample, out, 1e-10, "vmap")
    close(torch.compile(model, backend="eager", fullgraph=True)(*args), out, 1e-10, "compile")
    close(torch.export.export(model, args).module()(*args), out, 1e-10, "export")
    traced: Any = torch.jit.trace(model, args, check_trace=False)
    close(traced(*args), out, 1e-10, "jit.trace")
    close(torch.fx.symbolic_trace(model)(*args), out, 1e-10, "fx")


def test_empty_calls() -> None:
    q, k, v = qkv(12)
    for cut in ({"batch": slice(0, 0)}, {"queries": slice(0, 0)}, {"keys": slice(0, 0)}):
        call = Call(q, k, v, inputs=given(q, k, v), declared=Weighted.spec.inputs).select(**cut)
        leaves = {name: x.requires_grad_() for name, x in call.inputs.items()}
        out = build()(call.q, call.k, call.v, **leaves)
        assert out.shape == call.q.shape
        out.sum().backward()
        assert all(x.grad is not None for x in leaves.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sharpness": None}, ValueError, r"weighted needs sharpness, \(batch, heads, queries\)"),
        ({"log_weigth": 1}, ValueError, r"no input 'log_weigth' \(did you mean 'log_weight'\?\)"),
        ({"key_maks": 1}, ValueError, "did you mean 'key_mask'"),
        ({"qqq": 1}, ValueError, "'qqq'; its inputs are log_weight, sharpness"),
        ({"global_mask": 1}, UnsupportedError, r"no place for global_mask: .*use longformer"),
        ({"log_weight": 1.0}, ValueError, r"is a float; give a torch tensor of shape \(batch, kv"),
        (
            {"log_weight": torch.zeros(2, KV_HEADS, 11)},
            ValueError,
            r"log_weight has shape \(2, 2, 11\); it must be \(batch, kv_heads, keys\) = \(2, 2, 12",
        ),
        (
            {"log_weight": torch.zeros(2, KV_HEADS, 12, dtype=torch.long)},
            ValueError,
            r"log_weight has dtype torch.int64; it must be floating",
        ),
        (
            {"log_weight": torch.zeros(2, KV_HEADS, 12, device="meta")},
            ValueError,
            "log_weight is on meta and q is on cpu",
        ),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = qkv(12)
    inputs = {**given(q, k, v), **change}
    attn = build()
    for run in (
        lambda: attn(q, k, v, **inputs),
        lambda: attn.weights(q, k, **inputs),
        lambda: attn.step(q, k, v, attn.init_state(2, kv_heads=KV_HEADS), **inputs),
    ):
        with pytest.raises(error, match=message):
            run()


def test_what_others_take_is_said() -> None:
    q, k, v = qkv(12)
    with pytest.raises(
        UnsupportedError, match=r"linear has no place for sharpness: .*use weighted"
    ):
        attnzoo.build("linear", HEADS, WIDTH).double()(q, k, v, sharpness=q[..., 0])
    with pytest.raises(ValueError, match=r"no input 'sharpnes' .*'sharpness'.* masks al"):
        attnzoo.build("linear", HEADS, WIDTH).double()(q, k, v, sharpnes=q[..., 0])


@pytest.mark.parametrize(
    ("axes", "more", "message"),
    [
        ("batch kv_head keys", {}, "the axis 'kv_head'; axes are batch, heads"),
        ("keys batch", {}, "its first axis must be batch"),
        ("heads", {"padded": 0.0}, "no axis of keys"),
    ],
)
def test_a_wrong_declaration_is_refused(axes: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Input("x", axes, **more)


# ---- layers


def layer(**options: Any) -> attnzoo.MultiheadAttention:
    torch.manual_seed(0)
    return attnzoo.MultiheadAttention(
        HEADS * WIDTH, HEADS, batch_first=True, attention="weighted", **options
    )


def test_a_layer_projects_them() -> None:
    mha, x = layer(), torch.randn(2, 12, HEADS * WIDTH)
    out, weights = mha(x, x, x)
    assert weights is not None and weights.shape == (2, 12, 12)
    out.square().sum().backward()
    projections: Any = mha.attention.input_projections
    assert list(projections) == ["log_weight", "sharpness"]
    for name, projection in projections.items():
        assert projection.weight.grad.abs().max() > 0, name
    q, k, v = project(mha, x, x, x, "b l (p h d) -> p b h l d")
    by_hand = {
        "log_weight": nn.functional.logsigmoid(projections["log_weight"](x)).transpose(1, 2),
        "sharpness": nn.functional.softplus(projections["sharpness"](x)).transpose(1, 2),
    }
    rows = mha.attention(q, k, v, **by_hand).transpose(1, 2).flatten(2)
    close(out, mha.out_proj(rows), 1e-6, "the projected inputs by hand")
    own = mha(x, x, x, log_weight=by_hand["log_weight"])[0]
    close(own, out, 1e-6, "given")
    assert (mha(x, x, x, log_weight=-by_hand["log_weight"])[0] - out).abs().max() > 1e-3


def test_layouts_of_a_layer() -> None:
    mha, x = layer(), torch.randn(2, 12, HEADS * WIDTH)
    memory = torch.randn(2, 7, HEADS * WIDTH)
    out = mha(x, memory, memory)[0]
    other = layer()
    other.batch_first = False
    other.load_state_dict(mha.state_dict())
    first = [y.transpose(0, 1) for y in (x, memory, memory)]
    close(other(*first)[0].transpose(0, 1), out, 1e-6, "length first")
    close(mha(x[0], memory[0], memory[0])[0], out[0], 1e-6, "one sample without its batch")
    weight = torch.randn(2, HEADS, 7)
    close(
        mha(x[0], memory[0], memory[0], log_weight=weight[0])[0],
        mha(x, memory, memory, log_weight=weight)[0][0],
        1e-6,
        "a given input without its batch",
    )
    wide: Any = layer(kdim=5, vdim=6).attention.input_projections
    assert [one.in_features for one in wide.values()] == [5, HEADS * WIDTH]


def test_checkpoints_of_a_layer() -> None:
    mha, plain = layer(), nn.MultiheadAttention(HEADS * WIDTH, HEADS)
    projections: Any = mha.attention.input_projections
    kept = projections["sharpness"].weight.clone()
    mha.load_state_dict(plain.state_dict())
    assert torch.equal(mha.in_proj_weight, plain.in_proj_weight)
    assert torch.equal(projections["sharpness"].weight, kept)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, HEADS, 32, 0.0, batch_first=True),
        1,
        enable_nested_tensor=False,
    )
    x, before = torch.randn(2, 9, 32), list(model.state_dict())
    attnzoo.swap(model, "weighted")
    model(x).sum().backward()
    attnzoo.unswap(model)
    assert list(model.state_dict()) == before


def test_nested_tensors_bring_none() -> None:
    x = torch.nested.nested_tensor([torch.randn(3, 32), torch.randn(5, 32)])
    with pytest.raises(ValueError, match="takes no log_weight"):
        layer()(x, x, x, log_weight=torch.zeros(2, HEADS, 5))


def test_a_process_of_some_heads_gets_their_inputs() -> None:
    """What tensor parallelism does with inputs that a call brings."""
    mha, x = layer(), torch.randn(2, 12, HEADS * WIDTH)
    inputs = {
        "log_weight": torch.randn(2, HEADS, 12),
        "sharpness": torch.rand(2, HEADS, 12),
    }
    heads = slice(2, 4)
    for batched in (True, False):
        some = inputs if batched else {name: y[0] for name, y in inputs.items()}
        _, own = tensor_parallel._own_inputs(mha, (x, x, x), {**some, "n": 1}, heads=heads)
        for name, y in inputs.items():
            assert torch.equal(own[name], y[:, heads] if batched else y[0, heads])
        assert own["n"] == 1


# ---- slicing


def test_select() -> None:
    q, k, v = qkv(12)
    mask = torch.rand(2, 1, 12, 12) > 0.5
    call = Call(q, k, v, mask[:, 0, 0], mask, True, given(q, k, v), Weighted.spec.inputs)
    some = call.select(batch=[1], heads=slice(2, 4), queries=slice(4, 9), keys=torch.tensor([3, 1]))
    assert torch.equal(some.q, q[1:, 2:4, 4:9])
    assert torch.equal(some.k, k[1:, 1:2, [3, 1]])
    assert torch.equal(some.inputs["log_weight"], call.inputs["log_weight"][1:, 1:2, [3, 1]])
    assert torch.equal(some.inputs["sharpness"], call.inputs["sharpness"][1:, 2:4, 4:9])
    assert some.key_mask is not None and torch.equal(some.key_mask, mask[1:, 0, 0, [3, 1]])
    assert some.attn_mask is not None
    assert torch.equal(some.attn_mask, mask[1:, :, 4:9][..., [3, 1]])
    assert some.is_causal and some.group == 2
    for heads in ([0, 2], [1, 3], [0, 1, 2]):
        part = call.select(heads=heads)
        wanted = [head // 2 for head in heads]
        assert torch.equal(part.k.repeat_interleave(part.group, 1), k[:, wanted])
    square = Call(q, k, v, mask[:, 0, 0], None, True, given(q, k, v), Weighted.spec.inputs)
    for part, here in zip(
        square.split(queries=[5, 7], keys=[5, 7]), (slice(0, 5), slice(5, 12)), strict=True
    ):
        same = square.select(queries=here, keys=here)
        assert torch.equal(part.q, same.q) and torch.equal(part.v, same.v)
        assert all(torch.equal(part.inputs[name], x) for name, x in same.inputs.items())


# ---- the zoo's own inputs


def call_of(name: str) -> tuple[attnzoo.Attention, Call]:
    """A call with every input that a variant declares."""
    q, k, v = qkv(12)
    attn = build_small(name, HEADS, WIDTH).double()
    return attn, Call(
        q, k, v, None, None, True, inputs_for(attn.spec.inputs, q, k, v), attn.spec.inputs
    )


def run(attn: attnzoo.Attention, call: Call, **masks: Any) -> Tensor:
    return attn(call.q, call.k, call.v, is_causal=call.is_causal, **masks, **call.inputs)


@pytest.mark.parametrize("name", WITH_INPUTS)
def test_every_declared_input_matters(name: str) -> None:
    attn, call = call_of(name)
    out = run(attn, call)
    for one in attn.spec.inputs:
        changed = inputs_for((one,), call.q, call.k, call.v, seed=7)[one.name]
        assert not torch.equal(run(attn, call.giving(one, changed)), out), one.name


@pytest.mark.parametrize("name", WITH_INPUTS)
def test_every_declared_input_is_checked(name: str) -> None:
    attn, call = call_of(name)
    for one in attn.spec.inputs:
        x = call.inputs[one.name]
        for wrong, message in (
            (torch.cat([x, x]), "has shape"),
            (x.long(), "has dtype torch.int64; it must be"),
            (x.to("meta"), "is on meta"),
            ("x", "is a str"),
        ):
            with pytest.raises(ValueError, match=f"^{one.name} {message}"):
                run(attn, call.giving(one, wrong))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", WITH_INPUTS)
def test_nothing_of_a_padded_slot_is_read(name: str) -> None:
    attn, call = call_of(name)
    key_mask = torch.ones(2, 12, dtype=torch.bool)
    key_mask[:, 9:] = False
    out = run(attn, call, key_mask=key_mask)[:, :, :9]
    for one in attn.spec.inputs:
        if "keys" in one.names and one.padded is not None:
            x = call.inputs[one.name].clone()
            x[(slice(None),) * one.names.index("keys") + (slice(9, None),)] = (
                True if one.dtype == "bool" else torch.nan
            )
            spoilt = run(attn, call.giving(one, x), key_mask=key_mask)[:, :, :9]
            assert torch.equal(spoilt, out), one.name


@pytest.mark.parametrize("name", WITH_INPUTS)
def test_heads_alone(name: str) -> None:
    """As in a process that has some: their rows from their part of every input."""
    attn, call = call_of(name)
    out = run(attn, call)
    for first in range(0, HEADS, 2):
        part = build_small(name, HEADS, WIDTH).double()
        part.keep_heads(first, 2)
        heads = slice(first, first + 2)
        close(run(part, call.select(heads=heads)), out[:, heads], 1e-10, "rows")


@pytest.mark.parametrize("name", WITH_INPUTS)
def test_the_first_step_is_the_forward(name: str) -> None:
    attn, call = call_of(name)
    if not attn.spec.decodes:
        return
    state = attn.init_state(2, kv_heads=KV_HEADS, dtype=torch.float64)
    rows, _ = attn.step(call.q, call.k, call.v, state, **call.inputs)
    close(rows, run(attn, call), 1e-10, "rows")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"name": "q"}, "an input cannot be called 'q'"),
        ({"name": "two words"}, "an input cannot be called 'two words'"),
        ({"axes": ["batch", "keys"]}, "give names in one string"),
        ({"axes": "batch keys keys"}, "names an axis twice"),
        ({"dtype": "complex"}, "dtype is float, bool or int"),
        ({"like": "z"}, "like is q, k, v or None"),
    ],
)
def test_a_declaration_that_cannot_be(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Input(**{"name": "gate", "axes": "batch keys", **wrong})


def test_a_spec_declares_inputs_once() -> None:
    gate, make = (
        Input("gate", "batch keys"),
        partial(Spec, "gated", "", "", "", "", "kernel", False),
    )
    for inputs, sentence in (
        ((gate, gate), "two inputs of one name"),
        (("gate",), "give an Input"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make(inputs=inputs)  # pyright: ignore[reportArgumentType]


def test_a_layer_projects_no_input_of_pairs() -> None:
    assert Input("gate", "batch heads keys").is_projected
    assert not Input("bias", "batch heads queries keys").is_projected


def test_a_required_input_is_asked_for_in_any_caller() -> None:
    """Of a layer, too, whose call has other names than q, k and v."""
    attn = build()
    with pytest.raises(ValueError, match=r"needs sharpness, .*: give the call sharpness=\.\.\.$"):
        attn(*qkv())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_swap_makes_inputs_of_hidden_states(family: str) -> None:
    """Required ones too, in a model that knows nothing of them."""
    model = attnzoo.swap(swap_models.make(family), "weighted")
    model(swap_models.tokens(9), use_cache=False).logits.sum().backward()
    made = [x for name, x in model.named_parameters() if "input_projections" in name]
    assert len(made) == 2 * 2 * 3 and all(x.grad is not None for x in made)


def test_a_model_that_cannot_give_a_required_input_is_not_swapped() -> None:
    model = nn.Sequential(TimmAttentionLike())
    with pytest.raises(
        UnsupportedError,
        match=r"layer 0 .*weighted needs sharpness in every call, which .* does not",
    ):
        attnzoo.swap(model, "weighted")
    attnzoo.swap(model, "standard")
