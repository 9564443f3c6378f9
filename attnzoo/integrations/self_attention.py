"""Which nn.MultiheadAttention of a model is self-attention, found by letting the modules around it
run on a few numbers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.integrations.evaluating import evaluating, unheard
from attnzoo.integrations.places import place_of

BATCH_SIZE = 2
#: Of the first argument; each later one is longer by LONGER, so that an attention to another
#: argument sees other lengths. Two, so that an attention to something of a fixed length (learned
#: queries) is not taken for one to itself.
LENGTHS, LONGER = (3, 4), 4


def which_look_at_themselves(
    model: nn.Module, attentions: list[nn.MultiheadAttention]
) -> dict[nn.Module, bool | None]:
    """For each: True for self-attention, False where queries and keys differ in number, None where
    no try reached it or tries disagree.

    Of torch's own Transformer layers it is known. What is inside another is tried from the whole
    model inwards, the attentions answering zeros meanwhile, so that only what they are given
    counts.
    """
    found = _known(model)
    unsettled = [attention for attention in attentions if attention not in found]
    if unsettled:
        with evaluating(model), unheard(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for around in _from_outside(model, unsettled):
                inside = [
                    attention
                    for attention in unsettled
                    if attention in set(around.modules()) and attention not in found
                ]
                if inside:
                    found.update(_try(around, inside))
    return {attention: found.get(attention) for attention in attentions}


def _known(model: nn.Module) -> dict[nn.Module, bool | None]:
    known: dict[nn.Module, bool | None] = {}
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and _as_torch_wrote(
            layer, nn.TransformerEncoderLayer, "_sa_block"
        ):
            known[layer.self_attn] = True
        if isinstance(layer, nn.TransformerDecoderLayer) and _as_torch_wrote(
            layer, nn.TransformerDecoderLayer, "_sa_block", "_mha_block"
        ):
            known.update({layer.self_attn: True, layer.multihead_attn: False})
    return known


def _as_torch_wrote(layer: nn.Module, kind: type, *names: str) -> bool:
    return "forward" not in vars(layer) and all(
        getattr(type(layer), name) is getattr(kind, name) for name in ("forward", *names)
    )


def _from_outside(model: nn.Module, attentions: list[nn.MultiheadAttention]) -> list[nn.Module]:
    """The modules around any of the attentions, the model first."""
    inside = [
        path for path, module in model.named_modules(remove_duplicate=False) if module in attentions
    ]
    around = {path.rpartition(".")[0] for path in inside}
    while more := {path.rpartition(".")[0] for path in around if path} - around:
        around |= more
    return [
        model.get_submodule(path)
        for path in sorted(around, key=lambda path: path.count(".") + bool(path))
    ]


def _try(
    around: nn.Module, attentions: list[nn.MultiheadAttention]
) -> dict[nn.Module, bool | None]:
    """What the tries of one module tell of the attentions in it; those that they do not reach are
    left out."""
    plain: dict[nn.Module, set[bool]] = {attention: set() for attention in attentions}
    more: dict[nn.Module, set[bool]] = {attention: set() for attention in attentions}
    for length in LENGTHS:
        for seen, optional in ((plain, False), (more, True)):
            for args, kwargs in _arguments(around, attentions, length, optional):
                with _answering_zeros(seen):
                    try:
                        around(*args, **kwargs)
                    except Exception:  # what it reached before counts
                        continue
    told: dict[nn.Module, bool | None] = {}
    for attention in attentions:
        always, sometimes = plain[attention], more[attention]
        if always or sometimes:
            told[attention] = (
                False
                if False in always
                else None
                if always and False in sometimes
                else False not in sometimes
            )
    return told


@contextmanager
def _answering_zeros(seen: dict[nn.Module, set[bool]]) -> Iterator[None]:
    """Every attention answers zeros, and `seen` gets whether its queries were as many as its
    keys."""
    before = {attention: vars(attention).get("forward") for attention in seen}

    def zeros(
        attention: Any, query: Tensor, key: Tensor, value: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not (query.is_floating_point() and key.is_floating_point()):
            raise TypeError("tokens are no vectors, so this try tells nothing")
        seen[attention].add(query.shape[:-1] == key.shape[:-1])
        first = attention.batch_first and query.dim() == 3
        q, k = (x if first or x.dim() == 2 else x.transpose(0, 1) for x in (query, key))
        return torch.zeros_like(query), query.new_zeros(*q.shape[:-1], k.shape[-2])

    try:
        for attention in seen:
            attention.forward = zeros.__get__(attention)
        yield
    finally:
        for attention, forward in before.items():
            if forward is None:
                del attention.forward
            else:
                attention.forward = forward


def _arguments(
    around: nn.Module, attentions: list[nn.MultiheadAttention], length: int, optional: bool
) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Calls to try: sequences of vectors or of tokens for what must be given, and for what may be
    and is None by default too if `optional`."""
    if type(around).forward is nn.Module.forward:
        return
    like, (device, dtype) = attentions[0], place_of(attentions[0])
    parameters = list(inspect.signature(around.forward).parameters.values())
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        parameters = [
            parameter for parameter in parameters if parameter.default is parameter.empty
        ][:1]
    wanted = [parameter for parameter in parameters if _is_wanted(parameter, optional)]
    if optional and all(parameter.default is parameter.empty for parameter in wanted):
        return

    def vectors(place: int, width: int) -> Tensor:
        size = length + LONGER * place
        return torch.zeros(
            *((BATCH_SIZE, size) if like.batch_first else (size, BATCH_SIZE)),
            width,
            device=device,
            dtype=dtype,
        )

    for width in dict.fromkeys((like.embed_dim, *(attention.kdim for attention in attentions))):
        yield _call(
            wanted,
            [vectors(place, width if place else like.embed_dim) for place in range(len(wanted))],
        )
    yield _call(wanted, [vectors(place, 1)[..., 0].long() for place in range(len(wanted))])


def _is_wanted(parameter: inspect.Parameter, optional: bool) -> bool:
    return (
        parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ) or (optional and parameter.default is None)


def _call(
    wanted: list[inspect.Parameter], values: list[Tensor]
) -> tuple[list[Any], dict[str, Any]]:
    """The values as arguments; a mask is not given."""
    given = [
        None if "mask" in parameter.name or "bias" in parameter.name else value
        for parameter, value in zip(wanted, values, strict=True)
    ]
    pairs = list(zip(wanted, given, strict=True))
    first = [
        value
        for parameter, value in pairs
        if parameter.kind is parameter.POSITIONAL_ONLY or parameter.kind is parameter.VAR_POSITIONAL
    ]
    named = {
        parameter.name: value
        for parameter, value in pairs
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    return first, named
