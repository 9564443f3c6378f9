"""attnzoo.swap on timm's own models, random weights, nothing downloaded."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from small import cannot, in_models, of_each_family, small
from stages import in_turn, only

import attnzoo
from attnzoo import UnsupportedError

APART = Path(sys.prefix) / "timm"  # where dev.py puts timm and torchvision
if APART.is_dir():
    sys.path.append(str(APART))
if find_spec("timm") is None:
    pytest.skip(
        "timm is not installed: python3 dev.py setup puts it and its torchvision into .venv/timm",
        allow_module_level=True,
    )


def import_timm() -> Any:
    """timm, which imports torchvision whole. The index's torchvision is built for CUDA and its
    operators do not load beside a CPU torch; it then imports once the two that it describes are
    declared. No vision transformer calls them."""
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for operator in ("nms", "qnms"):
            DECLARED.define(
                f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        return importlib.import_module("timm")


DECLARED = torch.library.Library("torchvision", "FRAGMENT")  # its operators last as long as it does
timm = import_timm()

#: Plain, with a distillation token, with layer scale, with register tokens, with normalised queries
#: and keys, with SwiGLU and no class token; all of one small width.
NARROW: dict[str, Any] = {"num_heads": 4, "embed_dim": 64}
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": NARROW,
    "deit_tiny_distilled_patch16_224": NARROW,
    "deit3_small_patch16_224": {**NARROW, "init_values": 0.5},
    "vit_small_patch14_reg4_dinov2": {**NARROW, "img_size": 56, "init_values": 0.5},
    "vit_small_patch16_224": {**NARROW, "qk_norm": True},
    "vit_base_patch16_siglip_224": NARROW,
}


def make(name: str, **options: Any) -> Any:
    """In float64, weights large enough for attention to tell keys apart."""
    torch.manual_seed(0)
    model = (
        timm.create_model(name, **{"img_size": 64, "depth": 2, "num_classes": 10, **options})
        .eval()
        .double()
    )
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("qkv.weight"):
                parameter.normal_(0.0, 2 * parameter.shape[1] ** -0.5)
    return model


def read(model: Any) -> torch.Tensor:
    size = model.patch_embed.img_size
    with torch.no_grad():
        return model(
            torch.randn(
                2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
            )
        )


@pytest.mark.parametrize(("name", "family"), in_turn(in_models(), [*MODELS]))
def test_it_runs(family: str, name: str, tmp_path: Path) -> None:
    model = make(family, **MODELS[family])
    if not attnzoo.describe(name).spec.bidirectional:
        with pytest.raises(
            UnsupportedError, match=rf"layer 0 \(blocks.0.attn\): {cannot(name, False)}"
        ):
            attnzoo.swap(model, name, **small(name))
        return
    exact, keys = read(model), list(model.state_dict())
    attnzoo.swap(model, name, **small(name))
    cores = [module for module in model.modules() if isinstance(module, attnzoo.Attention)]
    swapped = read(model)
    assert len(cores) == 2 and all(core.last_backend for core in cores)
    moved = float((swapped - exact).abs().max()) / float(exact.abs().max())
    assert moved < 1e-12 if attnzoo.describe(name).spec.family == "exact" else moved > 1e-4
    attnzoo.save(model, tmp_path / "swap.safetensors")
    assert torch.equal(
        read(attnzoo.load(make(family, **MODELS[family]), tmp_path / "swap.safetensors")), swapped
    )
    attnzoo.unswap(model)
    assert torch.equal(read(model), exact) and list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("family", "options", "sentence"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1, 1)},
            r"layer 0 \(layers.0.blocks.0.attn\): WindowAttention has .*position_bias_table",
        ),
        ("swinv2_tiny_window8_256", {"depths": (1, 1)}, "WindowAttention has .*logit_scale"),
        ("eva02_tiny_patch14_224", {"depth": 1}, "EvaAttention has .*rope"),
        ("beit_base_patch16_224", {"depth": 1}, "Attention has .*relative_position_bias_table"),
        ("vit_relpos_small_patch16_224", {"depth": 1}, "RelPosAttention has .*rel_pos"),
        ("cait_xxs24_224", {"depth": 1}, "TalkingHeadAttn has proj_l"),
        ("xcit_nano_12_p16_224", {"depth": 1}, "XCA has temperature"),
        ("volo_d1_224", {}, r"Attention does not take \(batch, length, features\) alone"),
    ],
)
def test_an_attention_with_more_than_softmax_is_refused(
    family: str, options: dict[str, Any], sentence: str
) -> None:
    model = timm.create_model(family, **options).eval()
    with pytest.raises(UnsupportedError, match=sentence):
        attnzoo.swap(model, "linear")
    assert not any(isinstance(module, attnzoo.Attention) for module in model.modules())


def test_models_without_such_an_attention() -> None:
    for family in ("resnet18", "poolformer_s12", "vit_base_patch16_xp_224"):
        with pytest.raises(ValueError, match="has no attention that attnzoo can swap"):
            attnzoo.swap(timm.create_model(family), "linear")


@pytest.mark.thorough
@pytest.mark.parametrize("family", MODELS)
def test_symbolic_traces_and_scripting(family: str) -> None:
    """timm's own feature extraction by torch.fx: the names of before, but for the attention
    itself."""
    layers = importlib.import_module("timm.layers")
    model = make(family, **MODELS[family])
    before = layers.get_graph_node_names(model)[1]
    attnzoo.swap(model, "performer", num_features=16)
    after = layers.get_graph_node_names(model)[1]
    assert {name.rpartition(".")[2] for name in {*after} - {*before}} == {"attention"}
    heard: dict[str, torch.Tensor] = {}
    model.blocks[0].register_forward_hook(lambda module, args, out: heard.update(block=out))
    features = layers.create_feature_extractor(
        model, {"blocks.0.attn.proj": "attention", "blocks.0": "block"}
    )
    x = torch.randn(
        2,
        3,
        *model.patch_embed.img_size,
        generator=torch.Generator().manual_seed(1),
        dtype=torch.float64,
    )
    out = read(model)
    assert (
        torch.equal(features(x)["block"], heard["block"])
        and features(x)["attention"].shape == heard["block"].shape
    )
    assert torch.equal(torch.fx.symbolic_trace(model)(x), out)
    with pytest.raises(UnsupportedError, match=r"torch\.jit\.script cannot compile performer"):
        torch.jit.script(model)


@pytest.mark.parametrize("name", only(of_each_family(), in_models()))
def test_torchvisions_feature_extractor(name: str) -> None:
    """Of its vision transformer, made of nn.MultiheadAttention, which it takes as a leaf."""
    vision = importlib.import_module("torchvision.models.vision_transformer")
    extraction = importlib.import_module("torchvision.models.feature_extraction")
    model = vision.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=48,
        num_classes=5,
    ).eval()
    before = extraction.get_graph_node_names(model)
    attnzoo.swap(model, name, **small(name))
    assert extraction.get_graph_node_names(model) == before
    place, x = "encoder.layers.encoder_layer_0.self_attention", torch.randn(2, 3, 32, 32)
    features = extraction.create_feature_extractor(model, [place, "heads"])
    if attnzoo.describe(name).spec.bidirectional:
        found = features(x)
        assert found[place][0].shape == (2, 17, 32) and torch.equal(found["heads"], model(x))
    attnzoo.unswap(model)
    assert extraction.get_graph_node_names(model) == before


@pytest.mark.parametrize(
    "name", [name for name in attnzoo.names() if attnzoo.describe(name).spec.needs_max_length]
)
def test_the_longest_sequence_is_the_models_own(name: str) -> None:
    """Patches and class tokens; images of any size have none. torchvision's transformers, in
    torch's attention, tell of theirs."""
    model = attnzoo.swap(make("vit_tiny_patch16_224"), name)
    assert {
        module.max_length for module in model.modules() if isinstance(module, attnzoo.Attention)
    } == {17}
    read(model)
    with pytest.raises(ValueError, match=f"{name} needs max_length, and this model does not tell"):
        attnzoo.swap(make("vit_tiny_patch16_224", dynamic_img_size=True), name)
    transformer = importlib.import_module("torchvision.models.vision_transformer").VisionTransformer
    vision = transformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16
    ).eval()
    attnzoo.swap(vision, name)
    assert {
        module.max_length for module in vision.modules() if isinstance(module, attnzoo.Attention)
    } == {5}
    vision(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("standard", {}),
        ("linear", {}),
        ("sliding_window", {"window": 5}),
        ("bigbird", {"block_size": 4, "num_random_blocks": 1}),
        ("nystromformer", {"num_landmarks": 4}),
    ],
)
def test_padded_patches_of_naflex_are_absent(name: str, options: dict[str, Any]) -> None:
    """NaFlexVit tells padded patches by a mask of queries and keys, which every attention takes:
    an image's answer is that of its own patches alone."""
    naflex = importlib.import_module("timm.models.naflexvit")
    config = naflex.NaFlexVitCfg(
        embed_dim=32, depth=2, num_heads=4, patch_size=4, pos_embed_grid_size=(4, 4)
    )
    torch.manual_seed(0)
    model = naflex.NaFlexVit(config, num_classes=5).double().eval()
    patches, valid = torch.randn(2, 20, 48).double(), torch.ones(2, 20, dtype=torch.bool)
    valid[1, 12:] = False
    places = torch.stack([torch.arange(20) // 5, torch.arange(20) % 5], 1).repeat(2, 1, 1)
    places[1, 12:] = 0  # the grid of an image is told by its farthest patch

    @torch.no_grad()
    def read(some: slice, count: int) -> torch.Tensor:
        given = {"patches": patches, "patch_coord": places, "patch_valid": valid}
        return model({key: x[some, :count] for key, x in given.items()})

    exact = read(slice(None), 20)
    attnzoo.swap(model, name, **options)
    found = read(slice(None), 20)
    torch.testing.assert_close(found[1:], read(slice(1, 2), 12), rtol=0, atol=1e-12)
    if name == "standard":
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    if name != "standard":
        odd = torch.rand(2, 1, 7, 7) > 0.5
        with pytest.raises(UnsupportedError, match=f"{name} cannot apply an arbitrary attn_mask"):
            model.blocks[0].attn(torch.randn(2, 7, 32).double(), attn_mask=odd)
