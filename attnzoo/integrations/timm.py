"""timm's vision transformers, known by the structure of their `Attention` and by trying it out;
timm is not imported."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.eager import may_branch
from attnzoo.integrations.evaluating import evaluating, unheard
from attnzoo.integrations.places import Site, no_dropout, place_of
from attnzoo.integrations.replacing import has_other_forward, replace_forwards
from attnzoo.integrations.undo import Undo
from attnzoo.registry import build
from attnzoo.sequences.masks import read_mask, visible_keys

#: The parts of an Attention that a swapped one runs. Another one (a relative position bias, a
#: rotary embedding) would be dropped.
PARTS = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")
ARGUMENTS = ("x", "attn_mask", "is_causal")


class TimmAttention(nn.Module):
    """timm's Attention with `attention`, of the zoo, between its projections: the class of a
    swapped module, beside its own."""

    qkv: nn.Module
    proj: nn.Module
    num_heads: int
    attention: Attention

    def take(self, core: Attention, place: str) -> None:
        """Let `core`, which `_refuse` does not refuse, attend between the projections."""
        if core.spec.dropout:
            engine: Any = core.engine
            engine.dropout = _dropout(self)
        self.attention = core

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x: (batch, length, features) -> the same. attn_mask: as in `Attention.forward`; one that
        is padding, packing and causality alone, as NaFlexVit gives it, serves every attention."""
        dropout = _dropout(self)
        if self.training and dropout and not self.attention.spec.dropout:
            raise UnsupportedError(
                no_dropout("timm's Attention", dropout, self.attention.spec.name)
            )
        masks: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": is_causal}
        if isinstance(attn_mask, Tensor) and not self.attention.spec.attn_mask:
            masks = _read(attn_mask, x, is_causal) or masks
        return _between_projections(self, self.attention, x, **masks)


def _read(mask: Tensor, x: Tensor, is_causal: bool) -> dict[str, Any] | None:
    """What a mask of x says beside causality, by the names of a call's arguments; None where it
    says more, or may not be looked at."""
    if not may_branch(mask):
        return None
    visible = visible_keys(mask)
    sizes = (x.shape[0], 1 if mask.dim() < 4 else mask.shape[1], x.shape[1], x.shape[1])
    found = None if visible is None else read_mask(visible.expand(sizes))
    return None if found is None else {**vars(found), "is_causal": is_causal or found.is_causal}


def _between_projections(module: Any, core: Attention, x: Tensor, **masks: Any) -> Tensor:
    """The answer of a module of timm's with `core` as its attention; plain operators, which
    torch.fx can record."""
    batch, length, _ = x.shape
    q, k, v = (
        module.qkv(x)
        .reshape(batch, length, 3, module.num_heads, core.head_dim)
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    )
    q, k = _through(module, "q_norm", q), _through(module, "k_norm", k)
    factor = float(getattr(module, "scale", core.head_dim**-0.5)) * core.head_dim**0.5
    q = q if factor == 1.0 else q * factor
    out = (
        core(q, k, v, **masks)
        .transpose(1, 2)
        .reshape(batch, length, module.num_heads * core.head_dim)
    )
    return _through(module, "proj_drop", module.proj(_through(module, "norm", out)))


def _through(module: nn.Module, part: str, x: Tensor) -> Tensor:
    inner = module._modules.get(part)
    return x if inner is None else inner(x)


def handles(model: nn.Module) -> bool:
    """Whether the model has a module built as timm's Attention, or is one."""
    return any(is_attention(module) for module in model.modules())


def find_sites(model: nn.Module) -> list[Site]:
    """Every module inside the model that is built as timm's Attention. Raises ValueError when the
    model itself is, which has no layer around it."""
    if is_attention(model):
        raise ValueError(
            f"{type(model).__name__} cannot be swapped in place; swap the model or the block that "
            "it stands in"
        )
    found: list[tuple[str, Any]] = [
        (path, module) for path, module in model.named_modules() if is_attention(module)
    ]
    longest = _longest_sequence(model)
    return [
        Site(
            path,
            module,
            module.num_heads,
            module.qkv.out_features // 3 // module.num_heads,
            is_causal=False,
            dropout=_dropout(module),
            max_length=longest,
        )
        for path, module in found
    ]


def insert(model: nn.Module, sites: list[Site], attentions: dict[int, Attention]) -> Undo:
    """Give the modules at `sites` their attentions; the answer undoes it."""
    return replace_forwards(sites, attentions, TimmAttention, _refuse, TimmAttention.take)


def is_attention(module: Any) -> bool:
    """Whether a module is built as timm's Attention, its projections linear layers or what stands
    for them (adapters, integers)."""
    projections = [getattr(module, name, None) for name in ("qkv", "proj")]
    linear = all(
        isinstance(part, nn.Module) and isinstance(getattr(part, size, None), int)
        for part in projections
        for size in ("in_features", "out_features")
    )
    return (
        linear
        and isinstance(getattr(module, "num_heads", None), int)
        and not isinstance(module, TimmAttention)
    )


def _longest_sequence(model: Any) -> int | None:
    """Patches and class tokens of a vision transformer whose images have one size."""
    patches, prefix = (
        getattr(getattr(model, "patch_embed", None), "num_patches", None),
        getattr(model, "num_prefix_tokens", None),
    )
    if (
        not isinstance(patches, int)
        or not isinstance(prefix, int)
        or getattr(model, "dynamic_img_size", False)
    ):
        return None
    return patches + prefix


def _dropout(module: nn.Module) -> float:
    return float(getattr(getattr(module, "attn_drop", None), "p", 0.0))


def _refuse(module: nn.Module, core: Attention) -> None:
    """Raise UnsupportedError unless the module is softmax attention and no more."""
    _refuse_other_attention(module)
    _refuse_other_formula(module, core)


def _refuse_other_attention(module: Any) -> None:
    if has_other_forward(module):
        raise UnsupportedError(
            f"{type(module).__name__} was given a forward of its own, which a swap would drop; "
            "delete that attribute first"
        )
    arguments = [
        name for name in inspect.signature(module.forward).parameters if name not in ARGUMENTS
    ]
    own = [
        name
        for name, _ in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        )
    ]
    extra = [name for name, _ in module.named_children() if name not in PARTS] + own + arguments
    if extra:
        raise UnsupportedError(
            f"{type(module).__name__} has {', '.join(extra)}, which a swapped attention would "
            "drop; this model cannot be swapped"
        )
    if module.qkv.out_features != 3 * module.proj.in_features:
        raise UnsupportedError(
            f"{type(module).__name__} makes {module.qkv.out_features} features of which "
            f"{module.proj.in_features} go on;"
            " attnzoo expects q, k and v alike"
        )


def _refuse_other_formula(module: Any, core: Attention) -> None:
    """Raise UnsupportedError unless the module is softmax attention: what has the same parts may
    join them otherwise, or read images."""
    device, dtype = place_of(module, core)
    if device.type == "meta":
        return
    x = torch.randn(1, 5, module.qkv.in_features, generator=torch.Generator().manual_seed(0)).to(
        device, dtype
    )
    with evaluating(module), unheard(module):
        wanted = _between_projections(
            module, build("standard", heads=core.heads, head_dim=core.head_dim).eval(), x
        )
        try:
            out = module(x)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnsupportedError(
                f"{type(module).__name__} does not take (batch, length, features) alone "
                f"({reason}); this model cannot be swapped"
            ) from None
        same = out.shape == wanted.shape and float((out - wanted).abs().max()) <= 32 * torch.finfo(
            dtype
        ).eps * float(wanted.abs().max())
    if not same:
        raise UnsupportedError(
            f"{type(module).__name__} has the parts of softmax attention and another formula; this "
            "model cannot be swapped"
        )
