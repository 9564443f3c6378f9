"""timm's vision transformers, known by the structure of their `Attention` and by trying it out; timm is not imported."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.integrations.evaluating import evaluating
from attnzoo.integrations.plan import Site, no_dropout
from attnzoo.integrations.replacing import PutBack, replace_modules
from attnzoo.registry import build

#: The parts of an Attention that TimmAttention runs. Another one (a relative position bias, a rotary embedding) would be dropped.
PARTS = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "proj", "proj_drop")
ARGUMENTS = ("x", "attn_mask", "is_causal")


class TimmAttention(nn.Module):
    """timm's Attention with `core` between its projections; the projections are the module's own, under their own names."""

    qkv: nn.Module
    proj: nn.Module

    def __init__(self, module: Any, core: Attention) -> None:
        super().__init__()
        _refuse_other_attention(module)
        self.dropout = _dropout(module)
        if core.spec.dropout:
            engine: Any = core.engine
            engine.dropout = self.dropout
        self.num_heads = module.num_heads
        self.head_dim = core.head_dim
        self.factor = float(getattr(module, "scale", core.head_dim**-0.5)) * core.head_dim**0.5
        for name, part in module.named_children():
            self.add_module(name, part)
        self.attention = core
        self.training = module.training

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: (batch, length, features) -> the same. attn_mask: as in `Attention.forward`."""
        if self.training and self.dropout and not self.attention.spec.dropout:
            raise UnsupportedError(no_dropout("timm's Attention", self.dropout, self.attention.spec.name))
        q, k, v = rearrange(self.qkv(x), "b l (p h d) -> p b h l d", p=3, h=self.num_heads).unbind(0)
        q, k = self._through("q_norm", q), self._through("k_norm", k)
        q = q if self.factor == 1.0 else q * self.factor
        out = rearrange(self.attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal), "b h l d -> b l (h d)")
        return self._through("proj_drop", self.proj(self._through("norm", out)))

    def _through(self, part: str, x: Tensor) -> Tensor:
        module = self._modules.get(part)
        return x if module is None else module(x)


def handles(model: nn.Module) -> bool:
    """Whether the model has a module built as timm's Attention, or is one."""
    return any(_looks_like_attention(module) for module in model.modules())


def find_sites(model: nn.Module) -> list[Site]:
    """Every module inside the model that is built as timm's Attention. Raises ValueError when the model itself is, which has no parent."""
    if _looks_like_attention(model):
        raise ValueError(f"{type(model).__name__} cannot be swapped in place; swap the model or the block that it stands in")
    found: list[tuple[str, Any]] = [(path, module) for path, module in model.named_modules() if _looks_like_attention(module)]
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


def insert(model: nn.Module, sites: list[Site], attentions: dict[int, Attention]) -> PutBack:
    """Put the attentions in place of the modules at `sites`; the answer undoes it."""

    def wrap(module: nn.Module, attention: Attention) -> TimmAttention:
        swapped = TimmAttention(module, attention)
        _refuse_other_formula(module, attention)
        return swapped

    return replace_modules(model, sites, attentions, wrap)


def _looks_like_attention(module: Any) -> bool:
    linear = all(isinstance(getattr(module, name, None), nn.Linear) for name in ("qkv", "proj"))
    return linear and isinstance(getattr(module, "num_heads", None), int) and not isinstance(module, TimmAttention)


def _longest_sequence(model: Any) -> int | None:
    """Patches and class tokens of a vision transformer whose images have one size."""
    patches, prefix = getattr(getattr(model, "patch_embed", None), "num_patches", None), getattr(model, "num_prefix_tokens", None)
    if not isinstance(patches, int) or not isinstance(prefix, int) or getattr(model, "dynamic_img_size", False):
        return None
    return patches + prefix


def _dropout(module: nn.Module) -> float:
    return float(getattr(getattr(module, "attn_drop", None), "p", 0.0))


def _refuse_other_attention(module: Any) -> None:
    arguments = [name for name in inspect.signature(module.forward).parameters if name not in ARGUMENTS]
    own = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    extra = [name for name, _ in module.named_children() if name not in PARTS] + own + arguments
    if extra:
        raise UnsupportedError(f"{type(module).__name__} has {', '.join(extra)}, which a swapped attention would drop; this model cannot be swapped")
    if module.qkv.out_features != 3 * module.proj.in_features:
        raise UnsupportedError(
            f"{type(module).__name__} makes {module.qkv.out_features} features of which {module.proj.in_features} go on;"
            " attnzoo expects q, k and v alike"
        )


def _refuse_other_formula(module: Any, core: Attention) -> None:
    """Raise UnsupportedError unless the module is softmax attention: what has the same parts may join them otherwise, or read images."""
    weight = module.qkv.weight
    if weight.is_meta:
        return
    x = torch.randn(1, 5, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    exact = TimmAttention(module, build("standard", heads=core.heads, head_dim=core.head_dim))
    with evaluating(module), evaluating(exact):
        wanted = exact(x)
        try:
            out = module(x)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UnsupportedError(
                f"{type(module).__name__} does not take (batch, length, features) alone ({reason}); this model cannot be swapped"
            ) from None
        same = out.shape == wanted.shape and float((out - wanted).abs().max()) <= 32 * torch.finfo(weight.dtype).eps * float(wanted.abs().max())
    if not same:
        raise UnsupportedError(f"{type(module).__name__} has the parts of softmax attention and another formula; this model cannot be swapped")
