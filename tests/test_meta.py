"""Built or swapped on the meta device, emptied elsewhere: what an attention draws and learns has
values, and never those of the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, cases, usual_cases
from small import build_small, layer_masks, small
from stages import only
from torch import Tensor, nn

import attnzoo
from attnzoo.registry import spec_of

LENGTH = 20
SIZES_OF = {"batch": 1, "heads": 2, "kv_heads": 2, "queries": 30, "keys": 30, "width": 8}


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(3)
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 8, 0.0, batch_first=True), 2, enable_nested_tensor=False
    )


def numbers(module: nn.Module) -> dict[str, Tensor]:
    return dict((*module.named_parameters(), *module.named_buffers()))


def poison(module: nn.Module) -> None:
    """As memory may be that nobody wrote to."""
    with torch.no_grad():
        for tensor in numbers(module).values():
            tensor.fill_(5 if tensor.dtype == torch.int64 else float("nan"))


@pytest.mark.parametrize("name", attnzoo.names())
def test_a_plain_checkpoint_in_a_model_swapped_on_meta(name: str) -> None:
    plain = encoder()
    checkpoint = {key: value.clone() for key, value in plain.state_dict().items()}
    swapped = attnzoo.swap(plain, name, **small(name))
    with torch.device("meta"):
        model = encoder()
    attnzoo.swap(model, name, **small(name))
    model.to_empty(device="cpu")
    model.load_state_dict(checkpoint)
    for key, tensor in numbers(model).items():
        assert torch.isfinite(tensor).all(), key
    if name == "linformer":  # learned, so drawn anew
        # 1/√rank.
        assert (
            0.3
            < float(
                torch.cat(
                    [
                        x.detach().flatten()
                        for key, x in numbers(model).items()
                        if "projection.weight" in key
                    ]
                ).std()
            )
            < 0.7
        )
    drawn_anew = any(one.is_projected for one in spec_of(name).inputs)
    if drawn_anew or name in ("linformer", "differential"):
        model.load_state_dict(swapped.state_dict())
    x, masks = torch.randn(2, LENGTH, 16), layer_masks(spec_of(name), LENGTH)
    if masks:
        masks = {"mask": masks["src_mask"], "is_causal": True}
    torch.testing.assert_close(model(x, **masks), swapped(x, **masks), rtol=0.0, atol=1e-6)


MORE = [
    ("linear", {"feature_map": "taylor"}),
    ("nystromformer", {"convolution": 3}),
    ("sliding_window", {"sink_logits": True}),
]


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in attnzoo.names()), *MORE])
@pytest.mark.parametrize("times", [1, 2])  # a module that layers share is emptied once for each
def test_emptied_is_as_built(name: str, options: dict[str, Any], times: int) -> None:
    built, emptied = (build_small(name, 2, 8, **options) for _ in range(2))
    poison(emptied)
    for _ in range(times):
        emptied._apply(lambda x: torch.full_like(x, 7))  # what to_empty does, with bad luck
    for key, tensor in numbers(built).items():
        found = dict(numbers(emptied))[key]
        if isinstance(tensor, nn.Parameter) and tensor.any() and tensor.numel() < 16:
            assert 0 < float(found.detach().abs().max()) < 1, key  # too few to tell their spread
        elif isinstance(tensor, nn.Parameter) and tensor.any():
            assert 0.5 < float(found.detach().std() / tensor.detach().std()) < 2.0, key
        else:
            assert torch.equal(found, tensor), key
    emptied.to(torch.float64).to(torch.bfloat16).share_memory()
    for key, tensor in numbers(built).items():
        if not isinstance(tensor, nn.Parameter):
            torch.testing.assert_close(
                dict(numbers(emptied))[key].to(tensor.dtype), tensor, rtol=0.01, atol=0.0
            )


def test_a_draw_that_was_replaced_comes_back_by_its_own_seed() -> None:
    for name in ("performer", "reformer"):
        attn: Any = build_small(name, 2, 8)
        attn.redraw(11)
        wanted = {key: tensor.clone() for key, tensor in numbers(attn).items()}
        poison(attn)
        attn.reset_parameters()
        for key, tensor in numbers(attn).items():
            assert torch.equal(tensor, wanted[key]), key


@pytest.mark.parametrize(
    ("name", "options"),
    [("performer", {}), ("reformer", {}), ("linformer", {}), ("linear", {"feature_map": "taylor"})],
)
def test_numbers_left_on_meta_are_refused(name: str, options: dict[str, Any]) -> None:
    attn, x = build_small(name, 2, 8, **options).to("meta"), torch.randn(1, 2, LENGTH, 8)
    with pytest.raises(
        ValueError,
        match=r"on the meta device, where they have no values; call "
        r"to_empty\(device='cpu'\) on this attention",
    ):
        attn(x, x, x)
    assert torch.isfinite(attn.to_empty(device="cpu")(x, x, x)).all()
    assert attn.to("meta")(*[x.to("meta")] * 3).is_meta


@pytest.mark.parametrize("case", only(usual_cases(), cases()))
def test_tensors_stay_where_they_are_under_another_default_device(case: Case) -> None:
    """By every backend that takes the call, forward and backward."""
    inputs: dict[str, Any] = {
        one.name: torch.rand([SIZES_OF[axis] for axis in one.names])
        * (-1 if one.name == "log_decay" else 1)
        for one in case.spec.inputs
        if one.required
    }
    for backend in ("auto", *case.build(2, 8).engine.backend_names()):
        attn = case.build(2, 8)
        attn.backend = backend
        q, k, v = (torch.randn(1, 2, 30, 8).requires_grad_() for _ in range(3))
        for is_causal in case.spec.forms:
            try:
                with torch.device("meta"):
                    out = attn(q, k, v, is_causal=is_causal, **inputs)
                    out.sum().backward()
            except attnzoo.UnsupportedError:
                continue
            assert out.device == q.device and out.isfinite().all()
