"""What every model is: [0, 1] images in, embedding, logits out; normalisation is its first layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from bdbench.errors import OptionError

if TYPE_CHECKING:
    from bdbench.models.wrappers import Wrapper

FeatureFactory = Callable[[tuple[int, int, int]], nn.Module]
"""From an image shape (C, H, W) to a module (B, C, H, W) -> (B, D) with an attribute `size`, D."""


class Classifier(nn.Module):
    """A feature extractor with a linear head.

    Args:
        features: maps normalised images (B, C, H, W) to embeddings (B, D); its attribute `size` is D.
        num_classes: K.
        mean, std: (C,) of the training images, in [0, 1].

    Attributes:
        wrapper: what changed its structure after it was made; see `wrappers.wrap`.
    """

    mean: Tensor
    std: Tensor
    wrapper: Wrapper | None = None

    def __init__(self, features: nn.Module, num_classes: int, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float().view(-1, 1, 1))
        self.register_buffer("std", std.float().view(-1, 1, 1))
        self.features = features
        self.head = nn.Linear(cast("int", features.size), num_classes)
        nn.init.zeros_(self.head.bias)

    @property
    def embedding_size(self) -> int:
        """D."""
        return self.head.in_features

    def embed(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] to embeddings (B, D) float32, the input of the head.

        Raises:
            ValueError: the images are not floating point.
        """
        if not images.is_floating_point():
            raise ValueError(f"images must be float in [0, 1], got {images.dtype}; bytes become images.float() / 255")
        normalised = (images - self.mean).div_(self.std)
        return cast("Tensor", self.features(normalised.contiguous(memory_format=torch.channels_last))).float()

    def classify(self, embedding: Tensor) -> Tensor:
        """Map embeddings (B, D) to logits (B, K), in float32 whatever the features were computed in."""
        with torch.autocast(embedding.device.type, enabled=False):
            return cast("Tensor", self.head(embedding))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] to logits (B, K) float32."""
        return self.classify(self.embed(images))


SLACK = 0.01
"""How far pixels may lie outside [0, 1]: resampling goes a little beyond."""


def check_range(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Refuse images outside [0, 1] in evaluation mode: a forward pre-hook of models that are handed out.

    It waits for the device; the engine's passes go without.

    Raises:
        ValueError: says what the values are.
    """
    images = inputs[0]
    if model.training or not images.numel():
        return
    low, high = (float(value) for value in torch.aminmax(images.detach()))
    if not (low >= -SLACK and high <= 1 + SLACK):
        raise ValueError(
            f"images must lie in [0, 1], got {low:.4g} to {high:.4g}; divide by 255; the model normalises itself"
        )


def build_classifier(
    factory: FeatureFactory, image_shape: tuple[int, int, int], num_classes: int, mean: Tensor, std: Tensor
) -> Classifier:
    """Build a classifier with fresh weights and try it on one blank image pair.

    Raises:
        OptionError: the model cannot take images of this shape.
    """
    try:
        model = Classifier(factory(image_shape), num_classes, mean, std)
        model.eval()
        with torch.no_grad():
            model(torch.zeros(2, *image_shape))
    except (AssertionError, RuntimeError, ValueError) as error:  # torchvision asserts the size it wants
        raise OptionError(
            f"the model cannot take images of shape {image_shape} ({str(error).partition(chr(10))[0]}); "
            "choose another --model or a larger --image-size when poisoning"
        ) from error
    return model.train()


def pool(maps: Tensor) -> Tensor:
    """Average (B, D, h, w) over its pixels to (B, D), in float32."""
    return maps.float().mean((2, 3))
