"""Trying a Hugging Face model out: it reads a few made-up tokens, pixels or samples, or the
caller's own inputs, once."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.call import UnsupportedError
from attnzoo.integrations.evaluating import evaluating
from attnzoo.integrations.places import place_of

#: Sequences of tokens: a mask of the wrong shape must not pass by broadcasting.
BATCH_SIZE = 2
#: Tokens that an encoder and a decoder read. They differ, so that queries and keys differ in
#: number where a decoder looks at its encoder.
LENGTH, DECODER_LENGTH = 4, 3
#: The way out where inputs cannot be made up.
EXAMPLE = "attnzoo.swap(model, ..., example_inputs={...}) with the keyword arguments of its forward"
#: What a config calls the longest sequence that its layers read.
LONGEST = {
    True: ("max_position_embeddings", "max_target_positions"),
    False: ("max_position_embeddings", "max_source_positions"),
}

Inputs = Mapping[str, Any]


class Trial:
    """Inputs that a model may take; the first of them that it can read are read.

    is_whole: whether the ones being read are as long as the model's inputs get, such as an image of
    its size.
    """

    def __init__(self, model: Any, candidates: list[tuple[Inputs, bool]], given: bool) -> None:
        self.model = model
        self.candidates = candidates
        self.given = given
        self.is_whole = False

    @property
    def names(self) -> list[str]:
        return list(self.candidates[0][0]) if self.given else [_main_input(self.model)]

    def read(self, training: Iterable[nn.Module] = ()) -> None:
        """One forward in evaluation mode that leaves no trace in the model or in torch's CPU
        generator.

        training: modules that are told they train, themselves and not what is in them.
        Raises UnsupportedError when the model cannot be tried.
        """
        reasons = []
        for inputs, is_whole in self.candidates:
            self.is_whole = is_whole
            try:
                with evaluating(self.model):
                    for module in training:
                        module.training = True
                    self.model(**inputs)
                return
            except UnsupportedError:
                raise
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                reasons += [reason] if reason not in reasons else []
        what = "the example_inputs" if self.given else f"a few {' and '.join(self.names)}"
        raise UnsupportedError(
            f"{type(self.model).__name__} could not be tried out with {what} "
            f"({'; '.join(reasons)}); give inputs that it can read: {EXAMPLE}"
        )


def trial_of(model: Any, example_inputs: Inputs | None = None) -> Trial:
    """How to try a model: with these inputs, or with made-up ones. Raises UnsupportedError where
    none can be made up, ValueError on malformed ones."""
    if example_inputs is None:
        candidates = list(_candidates(model))
        if not candidates:
            raise UnsupportedError(
                f"{type(model).__name__} reads {_main_input(model)}, which attnzoo cannot make up "
                f"to try the swap; give some: {EXAMPLE}"
            )
        return Trial(model, candidates, given=False)
    if (
        not isinstance(example_inputs, Mapping)
        or not example_inputs
        or not all(isinstance(name, str) for name in example_inputs)
    ):
        raise ValueError(
            f"example_inputs={example_inputs!r} must be a mapping of the model's arguments, such "
            f"as {{'input_ids': ids}}"
        )
    return Trial(model, [(example_inputs, False)], given=True)


def longest_sequence(module: Any, is_causal: bool, whole: int | None) -> int | None:
    """The longest sequence that a layer reads, where its model tells: in its config, or by an input
    of the model's own size."""
    told = (getattr(module.config, name, None) for name in LONGEST[is_causal])
    return next((length for length in told if isinstance(length, int) and length > 0), whole)


def _main_input(model: Any) -> str:
    """The name of what the model reads: some parts tell that of the whole."""
    arguments = inspect.signature(model.forward).parameters
    return (
        model.main_input_name
        if model.main_input_name in arguments or "input_ids" not in arguments
        else "input_ids"
    )


def _candidates(model: Any) -> Iterator[tuple[Inputs, bool]]:
    """What to try: the model's main input, with a decoder's own tokens; then with pixels, for a
    model that needs both at once."""
    arguments, name = inspect.signature(model.forward).parameters, _main_input(model)
    for main, is_whole in _main_inputs(model, name):
        inputs = {name: main}
        if "decoder_input_ids" in arguments:
            inputs["decoder_input_ids"] = _tokens(model, _rows(model, main), DECODER_LENGTH)
        if name == "input_ids" and "attention_mask" in arguments:
            # The last slot is padding: some families have a use of their own for the mask.
            mask = torch.tensor([1] * (LENGTH - 1) + [0], device=place_of(model)[0])
            inputs["attention_mask"] = mask.repeat(BATCH_SIZE, *[1] * (main.dim() - 1))
        yield inputs, is_whole
        vision = getattr(model.config, "vision_config", None)
        if vision is not None and "pixel_values" in arguments and name != "pixel_values":
            for pixels in _zeros(model, vision, _image):
                yield {**inputs, "pixel_values": pixels}, True


def _main_inputs(model: Any, name: str) -> Iterator[tuple[Tensor, bool]]:
    """Values of the main input, and whether they are as long as they get; none where the config
    does not tell their sizes."""
    if name == "input_ids" and _is_of_choices(model):
        yield _tokens(model, BATCH_SIZE, LENGTH)[:, None], False
    elif name == "input_ids":
        for rows in dict.fromkeys((BATCH_SIZE * _codebooks(model.config), BATCH_SIZE)):
            yield _tokens(model, rows, LENGTH), False
    for shape, is_whole in SHAPES.get(name, ()):
        for values in _zeros(model, model.config, shape):
            yield values, is_whole


def _zeros(model: Any, config: Any, shape: Any) -> Iterator[Tensor]:
    """Zeros of a shape, where the config tells its sizes."""
    try:
        yield torch.zeros(shape(config), dtype=model.dtype, device=place_of(model)[0])
    except (AttributeError, TypeError):  # no such size, or none that is fixed
        return


def _image(config: Any) -> tuple[int, ...]:
    height, width = (
        (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    )
    return BATCH_SIZE, getattr(config, "num_channels", 3), height, width


def _video(config: Any) -> tuple[int, ...]:
    batch_size, *image = _image(config)
    return batch_size, config.num_frames, *image


def _samples(config: Any) -> tuple[int, ...]:
    samples = 1
    for kernel, stride in zip(
        reversed(config.conv_kernel), reversed(config.conv_stride), strict=True
    ):
        samples = (samples - 1) * stride + kernel if samples > 1 else (LENGTH - 1) * stride + kernel
    return 1, samples


def _spectrogram(config: Any) -> tuple[int, ...]:
    return BATCH_SIZE, config.max_length, config.num_mel_bins


def _mel_features(config: Any) -> tuple[int, ...]:
    # A convolution leaves half of the positions.
    return (BATCH_SIZE, config.num_mel_bins, 2 * config.max_source_positions)


def _filter_banks(config: Any) -> tuple[int, ...]:
    return (
        BATCH_SIZE,
        LENGTH * 2**config.num_conv_layers,
        config.input_feat_per_channel * config.input_channels,
    )


def _projected_features(config: Any) -> tuple[int, ...]:
    return BATCH_SIZE, LENGTH, config.feature_projection_input_dim


def _series(config: Any) -> tuple[int, ...]:
    return BATCH_SIZE, config.context_length, config.num_input_channels


#: Shapes of what a model may read, in the order in which they are tried, and whether the model
#: reads nothing longer.
SHAPES = {
    "pixel_values": ((_video, True), (_image, True)),
    "input_values": ((_samples, False), (_spectrogram, True)),
    "input_features": ((_filter_banks, False), (_mel_features, True), (_projected_features, False)),
    "past_values": ((_series, True),),
}


def _codebooks(config: Any) -> int:
    """Rows of tokens to a sequence, in decoders of audio."""
    return (
        getattr(config, "num_codebooks", None)
        or getattr(getattr(config, "decoder", None), "num_codebooks", None)
        or 1
    )


def _is_of_choices(model: Any) -> bool:
    """Whether a model reads (batch, choices, length)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

    known = set(MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values())
    return any(kind.__name__ in known for kind in type(model).__mro__)


def _rows(model: Any, main: Tensor) -> int:
    """Rows of the decoder's tokens beside a main input."""
    return main.shape[0] * _codebooks(model.config)


def _tokens(model: Any, rows: int, length: int) -> Tensor:
    token = 1 if getattr(model.config, "pad_token_id", None) == 0 else 0
    return torch.full((rows, length), token, device=place_of(model)[0])
