"""Running a module once to try it out, without changing it."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

#: What a module calls around its forward.
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients and without compiling; every module's own mode and torch's
    CPU generator come back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), uncompiled():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def uncompiled() -> AbstractContextManager[Any]:
    """Inside, what was compiled runs as it is written: a graph does not see hooks that came after
    it."""
    compiling = "torch._dynamo" in sys.modules  # importing it takes a second
    return torch.compiler.set_stance("force_eager") if compiling else nullcontext()


@contextmanager
def unheard(model: nn.Module) -> Iterator[None]:
    """Inside, no forward hook of any module runs, and torch's encoder layers call their
    attention."""
    hooks = [
        (vars(module), name, vars(module)[name])
        for module in model.modules()
        for name in HOOKS
        if name in vars(module)
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for attributes, name, _ in hooks:
            attributes[name] = OrderedDict()
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for attributes, name, found in hooks:
            attributes[name] = found
