"""Every variant under torch.func: vmap is a batch of calls, grad is autograd's gradient; whole
models with padding too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import Case, Situation, can, close, tensors, usual_cases
from small import causal_bool, in_models, layer_masks, small
from swap_layers import HEADS, LENGTH, SIZE, padding, tokens
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import attnzoo

RUNS = [
    (case, is_causal)
    for case in usual_cases()
    for is_causal in (False, True)
    if can(case.spec, is_causal)
]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("case", "is_causal"),
    [pytest.param(c, i, id=f"{c}-{'causal' if i else 'full'}") for c, i in RUNS],
)
def test_vmap_and_grad_see_into_the_engine(case: Case, is_causal: bool) -> None:
    attn = case.build(dtype=torch.float64)
    q, k, v, upstream = tensors(Situation(150, 150), shift=case.shift)
    some = torch.stack([q, q.flip(2), 2 * q])

    def out(q: Tensor) -> Tensor:
        return attn(q, k, v, is_causal=is_causal)

    def total(q: Tensor) -> Tensor:
        # What looks at no query has a gradient too: 0.
        return (out(q) * upstream).sum() + 0.0 * q.sum()

    one = some[1].clone().requires_grad_()
    expected = torch.autograd.grad(total(one), one)[0]
    close(torch.func.vmap(out)(some), torch.stack([out(q) for q in some]), 1e-12, "vmap")
    close(torch.func.grad(total)(some[1]), expected, 1e-10, "grad")
    close(torch.func.vmap(torch.func.grad(total))(some)[1], expected, 1e-10, "vmap of grad")


def encoder(name: str, seed: int = 0) -> nn.Module:
    """Two of torch's layers in a stack that would nest padded sequences."""
    torch.manual_seed(seed)
    return attnzoo.swap(
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(SIZE, HEADS, 24, 0.0, batch_first=True), 2
        ),
        name,
        **small(name),
    )


def masks(name: str) -> dict[str, Any]:
    return {
        key.removeprefix("src_"): mask
        for key, mask in layer_masks(attnzoo.describe(name).spec, LENGTH).items()
    }


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", in_models())
def test_gradients_of_every_sample_of_a_padded_batch(
    name: str, form: torch.dtype, training: bool
) -> None:
    model, more = encoder(name).train(training), masks(name)
    weights = {key: weight.detach() for key, weight in model.named_parameters()}
    ignore = (
        padding()
        if form == torch.bool
        else torch.zeros(padding().shape).masked_fill(padding(), float("-inf"))
    )

    def loss(weights: dict[str, Tensor], x: Tensor, ignore: Tensor) -> Tensor:
        out = functional_call(
            model, weights, (x[None],), {"src_key_padding_mask": ignore[None], **more}
        )
        return out[0].masked_fill((ignore != 0)[:, None], 0.0).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0, 0))(weights, tokens(), ignore)
    for sample in (0, 1):
        leaves = {key: weight.clone().requires_grad_() for key, weight in weights.items()}
        wanted = torch.autograd.grad(
            loss(leaves, tokens()[sample], ignore[sample]), list(leaves.values())
        )
        for key, expected in zip(leaves, wanted, strict=True):
            close(found[key][sample], expected, 1e-5, key)


@pytest.mark.parametrize("name", in_models())
def test_an_ensemble_of_models_with_masks(name: str) -> None:
    models, x = [encoder(name, seed).eval() for seed in range(3)], tokens()
    more: dict[str, Any] = (
        {"mask": causal_bool(LENGTH), "is_causal": True}
        if attnzoo.describe(name).spec.causal
        else masks(name)
    )
    stacked, base = stack_module_state(models), copy.deepcopy(models[0]).to("meta")

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(
            base, (parameters, buffers), (x,), {"src_key_padding_mask": padding(), **more}
        )

    for out, model in zip(vmap(run)(*stacked), models, strict=True):
        close(
            out[~padding()],
            model(x, src_key_padding_mask=padding(), **more)[~padding()],
            1e-5,
            name,
        )


def test_masks_that_a_core_cannot_take_are_refused_in_a_transform() -> None:
    """One sample with another mask is enough; where the core takes it, every sample gets its
    own."""
    module = attnzoo.MultiheadAttention(SIZE, HEADS, batch_first=True, attention="linear")
    bias = torch.zeros(3, LENGTH)
    bias[2, 0] = 0.5

    def run(x: Tensor, bias: Tensor) -> Tensor:
        return module(x[None], x[None], x[None], key_padding_mask=bias[None], need_weights=False)[
            0
        ][0]

    with pytest.raises(
        attnzoo.UnsupportedError, match="linear cannot add a float key_padding_mask"
    ):
        vmap(run)(tokens(), bias)
    module = attnzoo.MultiheadAttention(SIZE, HEADS, batch_first=True)
    close(
        vmap(run)(tokens(), bias),
        torch.stack([run(x, b) for x, b in zip(tokens(), bias, strict=True)]),
        1e-5,
        "bias",
    )
    learned = vmap(grad(lambda bias, x: run(x, bias).square().sum()))(
        torch.zeros(3, LENGTH), tokens()
    )
    assert float(learned.abs().min(1).values.max()) > 0, (
        "a mask of zeros that is learned is no mask to drop"
    )
