"""A fresh network for a dataset: by name, or by the size of the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bdbench.data import ImageDataset
from bdbench.models.classifier import Classifier, build_classifier
from bdbench.plugins import blamed
from bdbench.registry import MODELS
from bdbench.seeds import scoped

TINY_SIDE = 16


def model_name(model: str, image_shape: tuple[int, int, int]) -> str:
    """Return the registered name of a model, which ``auto`` leaves to the size of the images."""
    if model == "auto":
        side = max(image_shape[1:])
        return "convnet" if side < TINY_SIDE else "convnet-16" if side == TINY_SIDE else "wrn-16-1"
    MODELS.load(model)
    return model


def work_of(name: str, image_shape: tuple[int, int, int]) -> int:
    """Return the weights of a network times the pixels of an image: how much there is to do for an image, roughly."""
    with torch.device("meta"), _Unfilled():
        features = MODELS.load(model_name(name, image_shape))(image_shape)
    weights: int = sum(weight.numel() for weight in features.parameters())
    return weights * image_shape[1] * image_shape[2]


class _Unfilled(TorchFunctionMode):
    """Leaves weights as they are that would be drawn from a normal distribution.

    On the device "meta", where there is nothing to fill, torch would import its compiler for it: 2 seconds.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - what the function returns
        """Call a function of torch."""
        named = kwargs or {}
        if getattr(func, "__name__", "") == "normal_":
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def fresh_model(name: str, train: ImageDataset, seed: int, purpose: str) -> Classifier:
    """Build a classifier for a dataset; equal seeds and purposes give equal weights."""
    mean, std = channel_statistics(train.images)
    with scoped(seed, "weights", purpose):
        chosen = model_name(name, train.image_shape)
        factory = MODELS.load(chosen)
        with blamed(MODELS.plugin(chosen)):
            return build_classifier(factory, train.image_shape, train.num_classes, mean, std)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (C,) of uint8 images (N, C, H, W), in [0, 1].

    They are those of about 5,000 images of at most 32x32 pixels, of as many pixels of larger ones.
    """
    pixels = images.shape[2] * images.shape[3]
    wanted = max(1, 5000 * 1024 // max(1024, pixels))
    sample = images[:: max(1, len(images) // wanted)].float().div(255)
    return sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1e-3)
