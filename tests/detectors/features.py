"""Features that tests make up: what a suspect's embeddings could be."""

from __future__ import annotations

import torch
from torch import Tensor
from toys import toy_engine

from bdbench.data import ImageDataset
from bdbench.detectors.base import Seen, Sight
from bdbench.seeds import generator


def sight_of(
    features: Tensor, labels: Tensor, reference: ImageDataset | None = None, known: Tensor | None = None
) -> Sight:
    """A sight whose features are given, and those of the reference images."""
    classes = tuple(str(label) for label in range(max(2, int(labels.max()) + 1)))
    images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    data = ImageDataset(images, labels, classes)
    seen = Seen(features.float(), None if known is None else known.float())
    return Sight(data, toy_engine(), lambda: seen, reference=reference)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal values."""
    return torch.randn(*shape, generator=generator(seed, "noise"), dtype=torch.float64)
