"""Preprocessing of images for vision-language models, differentiable with respect to the images.

The image processors of transformers with the torchvision backend resize, normalize and patchify tensors with
differentiable operations. Image processors with the PIL backend convert tensors to arrays without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longalign.functional.images import at_least_float32
from longalign.vlm.local import chat_text, processor_inputs

PIXELS = "pixel_values"


def model_inputs(processor: Any, texts: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """Returns the inputs of a vision-language model, by name, for b pairs of an image and a text.

    They are those of `longalign.vlm.local.processor_inputs`, but ``pixel_values`` is differentiable with respect to
    ``images``. Its dtype is float32, or float64 for float64 images.

    Args:
        processor: the model's processor, from `longalign.vlm.local.load_processor`.
        texts: b texts from `longalign.vlm.local.chat_text`, each with one image.
        images: ``(b, 3, h, w)`` in [0, 1].

    Raises:
        ValueError: if the processor and its image processor return pixels of different shapes.
    """
    # processors divide by 255; resized values are neither rounded nor clamped, so that every pixel receives gradient
    rows = [[255 * image] for image in at_least_float32(images)]
    # some processors copy their pixels to numpy to count the tokens of an image
    inputs = dict(processor_inputs(processor, texts, [[image.detach().cpu()] for (image,) in rows]))
    pixels = processor.image_processor(images=rows, return_tensors="pt")[PIXELS]
    if pixels.shape != inputs[PIXELS].shape:
        raise ValueError(
            f"the {type(processor).__name__} returns pixels {tuple(inputs[PIXELS].shape)}, its image processor "
            f"{tuple(pixels.shape)}; expected equal shapes: use a different vision-language model"
        )
    return {**inputs, PIXELS: pixels}


def check_differentiable(processor: Any, checkpoint: str) -> None:
    """Checks on a small image that `model_inputs` is differentiable with a processor and returns the right pixels.

    The right pixels are those that the processor returns without gradient.

    Args:
        processor: a vision-language model's processor.
        checkpoint: the model's checkpoint, for the message.

    Raises:
        ValueError: if the processor fails, the gradient is zero or not finite, or the pixels differ.
    """
    processor_type = type(processor).__name__
    image = torch.linspace(0.1, 0.9, 3 * 48 * 64).reshape(1, 3, 48, 64).requires_grad_()
    try:
        inputs = model_inputs(processor, [chat_text(processor, "", 1)], image)
        expected = processor_inputs(processor, [chat_text(processor, "", 1)], [[255 * image[0].detach()]])[PIXELS]
        pixels = inputs[PIXELS]
        (gradient,) = torch.autograd.grad(
            (pixels * torch.linspace(0.5, 1, pixels.numel()).view_as(pixels)).sum(), image
        )
        usable = bool(gradient.isfinite().all() and gradient.any()) and torch.allclose(pixels, expected, atol=1e-4)
        reason = "its pixels have no gradient, or differ from those of its image processor"
    except Exception as error:  # processors raise many types for tensors that they cannot process
        usable, reason = False, f"{type(error).__name__}: {error}"
    if not usable:
        raise ValueError(
            f"the {processor_type} of '{checkpoint}' cannot preprocess images with gradient ({reason}); use a model "
            "whose image processor has transformers' torchvision backend, such as LLaVA or Qwen2-VL, and check that "
            "torchvision is installed"
        )
