"""Trying a Hugging Face model out: a few tokens, pixels or samples of nothing, read once."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.call import UnsupportedError
from attnzoo.integrations.evaluating import evaluating
from attnzoo.integrations.plan import place_of

#: Sequences of tokens: a mask of the wrong shape must not pass by broadcasting.
BATCH_SIZE = 2
#: Of the tokens of an encoder and of a decoder. They differ, so that queries and keys differ in number where a decoder looks at its encoder.
LENGTH, DECODER_LENGTH = 4, 3


def read_a_little(model: Any, training: Iterable[nn.Module] = ()) -> None:
    """One forward in evaluation mode that leaves no trace in the model or in torch's CPU generator.

    training: modules that are told they train, themselves and not what is in them. Raises UnsupportedError when the model cannot be tried.
    """
    reasons = []
    for inputs in _small_inputs(model):
        try:
            with evaluating(model):
                for module in training:
                    module.training = True
                model(**inputs)
            return
        except UnsupportedError:
            raise
        except Exception as error:
            reasons.append((str(error).strip().splitlines() or [type(error).__name__])[0])
    raise UnsupportedError(
        f"{type(model).__name__} could not be tried out with a few {model.main_input_name} ({'; '.join(reasons)}); swap its parts one by one"
    )


def _small_inputs(model: Any) -> list[dict[str, Tensor]]:
    """What to try: the model's main input, with a decoder's own tokens; then with pixels, for a model that needs both at once."""
    arguments = inspect.signature(model.forward).parameters
    try:
        inputs = {model.main_input_name: _small_input(model)}
    except (AttributeError, TypeError):  # a config that tells its sizes otherwise
        raise UnsupportedError(_unknown_input(model)) from None
    if "decoder_input_ids" in arguments:
        inputs["decoder_input_ids"] = _tokens(model, DECODER_LENGTH)
    if model.main_input_name == "input_ids" and "attention_mask" in arguments:
        # The last slot is padding: some families have a use of their own for the mask.
        inputs["attention_mask"] = torch.tensor([[1] * (LENGTH - 1) + [0]] * BATCH_SIZE, device=place_of(model)[0])
    vision = getattr(model.config, "vision_config", None)
    if vision is None or "pixel_values" not in arguments or "pixel_values" in inputs:
        return [inputs]
    try:
        return [inputs, {**inputs, "pixel_values": _pixels(model, vision)}]
    except (AttributeError, TypeError):  # images of no fixed size
        return [inputs]


def _small_input(model: Any) -> Tensor:
    name, config = model.main_input_name, model.config
    if name == "input_ids":
        return _tokens(model, LENGTH)
    if name == "pixel_values":
        return _pixels(model, config)
    if name == "input_values":
        samples = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel if samples > 1 else (LENGTH - 1) * stride + kernel
        return torch.zeros(1, samples, dtype=model.dtype, device=place_of(model)[0])
    raise UnsupportedError(_unknown_input(model))


def _unknown_input(model: Any) -> str:
    return f"{type(model).__name__} reads {model.main_input_name}, which attnzoo cannot make up to try the swap; swap its parts one by one"


def _tokens(model: Any, length: int) -> Tensor:
    token = 1 if getattr(model.config, "pad_token_id", None) == 0 else 0
    return torch.full((BATCH_SIZE, length), token, device=place_of(model)[0])


def _pixels(model: Any, config: Any) -> Tensor:
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    return torch.zeros(BATCH_SIZE, getattr(config, "num_channels", 3), height, width, dtype=model.dtype, device=place_of(model)[0])
