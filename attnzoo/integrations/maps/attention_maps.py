"""`attention_maps`: A of every layer of a model while it reads, exact, swapped or recurrent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.attention import Attention
from attnzoo.call import UnsupportedError
from attnzoo.conventions.watched import watching
from attnzoo.integrations.chosen_layers import Layers, parse_layers
from attnzoo.integrations.evaluating import uncompiled
from attnzoo.integrations.huggingface import interface
from attnzoo.integrations.huggingface.fallbacks.recurrent_layer import (
    RealTokens,
    ReplacedLayer,
    real_tokens,
)
from attnzoo.integrations.huggingface.fallbacks.replace_fallbacks import (
    is_recurrent,
    replace_fallbacks,
    restore_fallbacks,
)
from attnzoo.integrations.maps.selective_scan import scans, watch_scans
from attnzoo.integrations.record import RECORD
from attnzoo.integrations.swapping import part_of, swap_in, unswap


class AttentionMaps(Mapping[int, Tensor]):
    """A of the layers of a model: by number, in the order of the layers, or by the path of one.

    Each is (batch, heads, queries, keys), in float32 or float64, without gradients, of the last
    forward inside the context. A of n tokens takes heads · n² numbers a layer.
    """

    def __init__(self, paths: list[str], chosen: list[int] | None) -> None:
        """paths: of the layers; chosen: places of those that are asked for; None: all, and what
        else shows its A, such as a decoder's look at its encoder."""
        self.paths = paths
        self._all = chosen is None
        self._chosen = list(range(len(paths))) if chosen is None else chosen
        self._found: dict[str, Tensor] = {}

    def __getitem__(self, layer: int | str) -> Tensor:
        path = layer if isinstance(layer, str) else self._path(layer)
        if path not in self._found:
            known = path in self.paths
            raise KeyError(
                f"layer {path!r} has shown no A: run model(**inputs) inside the context first, "
                "whole and without a decoding state"
                if known
                else f"the model has no attention {path!r}; it has {', '.join(self.paths)}"
            )
        return self._found[path]

    def _path(self, layer: int) -> str:
        if not (isinstance(layer, int) and 0 <= layer < len(self.paths)):
            raise KeyError(
                f"layer {layer!r} is none of the {len(self.paths)} attentions of the model, 0 to "
                f"{len(self.paths) - 1}"
            )
        return self.paths[layer]

    def __iter__(self) -> Iterator[int]:
        return (layer for layer in self._chosen if self.paths[layer] in self._found)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        shapes = (f"{layer}: {tuple(self[layer].shape)}" for layer in self)
        return f"AttentionMaps({', '.join(shapes)})"

    def as_tuple(self) -> tuple[Tensor, ...]:
        """One tensor a layer, as transformers' `attentions` and BertViz have them."""
        return tuple(self[layer] for layer in self)

    def keep(self, path: str, weights: Callable[[], Tensor]) -> None:
        """Form A of a layer, if it is one of those that are asked for."""
        if self._all and path not in self.paths:
            self._chosen.append(len(self.paths))
            self.paths.append(path)
        if path in self.paths and self.paths.index(path) in self._chosen:
            with torch.no_grad():
                self._found[path] = weights().detach()


@contextmanager
def attention_maps(model: nn.Module, layers: Layers | None = None) -> Iterator[AttentionMaps]:
    """A of every layer, as the model reads inside the context:

        with attnzoo.attention_maps(model, layers="0-3") as maps:
            model(**inputs)
        maps[2]  # (batch, heads, queries, keys)

    model: as `swap` takes it, swapped or not: its attention is exact, or what was put there; and
        the recurrent layers of transformers' hybrids that `replace_fallbacks` knows and the scans
        of Mamba, Falcon Mamba and Jamba, whose heads are channels; entries of both may be negative
    layers: which, as `swap` takes them, recurrent ones counted too; default: all
    raises: ValueError on a model without such layers, and on layers that it does not have;
        UnsupportedError where a layer's attention cannot be had

    Inside, the model runs this library's attention of the same rows, uncompiled; afterwards it is
    what it was. A swapped layer that reads from a decoding state forms no A and shows none.
    """
    part = part_of(model)
    with ExitStack() as stack:
        sites = stack.enter_context(_running_ours(part))
        paths = _in_order(part, [*sites, *_recurrent(part), *scans(part)])
        if not paths:
            raise ValueError(f"{type(model).__name__} has no attention that attnzoo can show")
        maps = AttentionMaps(paths, None if layers is None else parse_layers(layers, paths))
        for hook in (*_hooks(part, maps), *watch_scans(part, maps.keep)):
            stack.callback(hook.remove)
        names = {id(module): path for path, module in part.named_modules()}
        running: list[tuple[str, RealTokens | None]] = []
        for path in _recurrent(part):
            layer = part.get_submodule(path)

            def begin(layer: Any, args: Any, kwargs: Any, path: str = path) -> None:
                running.append((path, real_tokens(layer, args, kwargs)))

            before = layer.register_forward_pre_hook(begin, with_kwargs=True)
            behind = layer.register_forward_hook(lambda *_: _popped(running), always_call=True)
            stack.callback(before.remove)
            stack.callback(behind.remove)

        def watch(layer: Any, weights: Callable[[], Tensor]) -> None:
            if layer is not None:
                if id(layer) in names:
                    maps.keep(names[id(layer)], weights)
            elif running:
                path, real = running[-1]
                maps.keep(path, weights if real is None else lambda: real.spread(weights()))

        stack.enter_context(watching(watch))
        stack.enter_context(uncompiled())
        yield maps


def _popped(running: list[Any]) -> None:
    running.pop()  # and None, since what a forward hook returns takes the place of the output


@contextmanager
def _running_ours(part: nn.Module) -> Iterator[list[str]]:
    """Inside, every attention of the model runs by this library; the paths of those that are not
    recurrent."""
    with ExitStack() as stack:
        if interface.handles(part) and any(is_recurrent(module) for module in part.modules()):
            replace_fallbacks(part)
            stack.callback(restore_fallbacks, part)
        recurrent = bool(_recurrent(part) or scans(part))
        if RECORD in vars(part):
            yield [path for path, *_ in vars(part)[RECORD].sites]
            return
        if interface.handles(part):
            yield _told_by_transformers(part, stack, recurrent)
        elif any(isinstance(module, Attention) for module in part.modules()):
            yield _holding(part)
        else:
            swap_in(part, "standard", None, None, {})
            stack.callback(unswap, part)
            yield _holding(part)


def _told_by_transformers(part: nn.Module, stack: ExitStack, recurrent: bool) -> list[str]:
    """Let exact layers of a transformers model run by this library; their paths."""
    try:
        swap_in(part, "standard", None, None, {})
        stack.callback(unswap, part)
        return [path for path, *_ in vars(part)[RECORD].sites]
    except UnsupportedError:  # such as windows of its own, which are left to it
        pass
    try:
        sites = interface.find_sites(part)
    except UnsupportedError:
        if not recurrent and any("Attention" in type(one).__name__ for one in part.modules()):
            raise
        return []  # it has recurrent layers alone, or none
    stack.callback(interface.insert(part, sites, {}), part)
    return [site.path for site in sites]


def _recurrent(part: nn.Module) -> list[str]:
    return [path for path, module in part.named_modules() if isinstance(module, ReplacedLayer)]


def _holding(part: nn.Module) -> list[str]:
    """The paths of what an attention of the zoo is in."""
    found = [path for path, one in part.named_modules() if isinstance(one, Attention)]
    return list(dict.fromkeys(path.rpartition(".")[0] for path in found))


def _in_order(part: nn.Module, paths: list[str]) -> list[str]:
    order = {path: place for place, (path, _) in enumerate(part.named_modules())}
    return sorted(set(paths), key=order.__getitem__)


def _hooks(part: nn.Module, maps: AttentionMaps) -> Iterator[Any]:
    """Hooks on every attention of the zoo, which form A of the call that it gets."""
    for path, module in part.named_modules():
        if isinstance(module, Attention):
            owner = path.rpartition(".")[0]

            def look(
                attention: Attention,
                args: tuple[Tensor, ...],
                kwargs: dict[str, Any],
                owner: str = owner,
            ) -> None:
                q, k, *_ = args
                maps.keep(owner, lambda: attention.weights(q, k, **kwargs))

            yield module.register_forward_pre_hook(look, with_kwargs=True)
