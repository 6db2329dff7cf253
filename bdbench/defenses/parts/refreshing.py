"""Running statistics of batch norm, counted anew."""

from __future__ import annotations

import torch
from torch import Tensor

from bdbench.models.classifier import Classifier
from bdbench.models.structure import norms_of
from bdbench.seeds import generator
from bdbench.training.augment import augmented, parse_augment
from bdbench.training.engine import Engine

AT_ONCE = 256
"""Images in a batch, at most: that of the usual fine-tuning."""


def refresh_norms(engine: Engine, model: Classifier, images: Tensor, augment: str) -> None:
    """Set the running statistics of a model's norms, in place, to the means over batches of some images.

    After weights were changed by other means than training, the statistics are those of another network. The model is
    in evaluation mode before and after; layers that are no norms stay in it, so that nothing is dropped.

    Args:
        engine: says where, and draws which images share a batch.
        model: changed in place; moved to the engine's device.
        images: (N, C, H, W) uint8, N at least 2; every batch has about as many.
        augment: as the network's training augmented, whose images its statistics are of: zeros around a crop, for one,
            move those of the first layers.
    """
    model.to(engine.device).to(memory_format=torch.channels_last).eval()
    norms = [norm for norm in norms_of(model) if norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
        norm.train()
    operations, rng = parse_augment(augment), generator(engine.seed, "refreshed norms")
    order = torch.randperm(len(images), generator=rng)
    with torch.no_grad(), engine.autocast():
        for rows in order.tensor_split(-(-len(order) // AT_ONCE)):
            model(augmented(images[rows].to(engine.device), operations, rng))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
