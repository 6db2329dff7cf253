"""STRIP: a triggered image keeps its answer when other images are laid over it."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.detectors.base import DatasetDetector, Family, Scanned, Sight
from bdbench.models.classifier import Classifier
from bdbench.seeds import generator
from bdbench.training.engine import Engine

ROWS_AT_ONCE = 4096
"""Images that are mixed at a time, so that no copy of the whole set is made."""


class Strip(DatasetDetector):
    """Scores each image by how sure the suspect's answers stay when trusted images are laid over it.

    The score is minus the mean entropy of the answers over the overlays, which are the same for every image. A strong
    trigger decides the answer whatever lies over it, so the entropy is low. It says nothing about faint triggers, and
    finds images that are easy to classify too.

    Paper: Gao et al., STRIP: A Defence Against Trojan Attacks on Deep Neural Networks, ACSAC 2019,
    https://arxiv.org/abs/1902.06531.

    Published codes add normalised images, which leaves the range of pixels and doubles the mean, or add pixels and
    clip (`--mix add`). Here two pictures are averaged. One of them reports the area under the curve of the entropy with
    poison as positive, which is one minus what it means.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1902.06531"
    threat: ClassVar[str] = "the defender has the training set, a model that learned it, and a few trusted clean images"
    family: ClassVar[Family] = "perturbation"
    needs_suspect: ClassVar[bool] = True
    needs_trusted: ClassVar[bool] = True

    overlays: int = Field(32, ge=1, le=10_000, description="Trusted images that are laid over each image.")
    mix: Literal["mean", "add"] = Field("mean", description="Average the two, or add them and clip.")

    def run(self, sight: Sight) -> Scanned:
        """Score the images by the mean entropy of their mixtures."""
        trusted = sight.known_reference
        drawn = torch.randperm(len(trusted), generator=generator(sight.engine.seed, "strip"))[: self.overlays]
        mixed = entropies(sight.engine, sight.known_suspect, sight.data, trusted.images[drawn], add=self.mix == "add")
        return Scanned(-mixed, findings={"overlays": len(drawn)})


def entropies(engine: Engine, model: Classifier, data: ImageDataset, overlays: Tensor, *, add: bool) -> Tensor:
    """Return the mean entropy (N,) float32, in nats, of a model's answers to images with overlays.

    Args:
        engine, model: what answers.
        data: N images.
        overlays: (M, C, H, W) uint8.
        add: add pixels and clip in place of averaging them.
    """
    total = torch.zeros(len(data))
    progress = engine.progress
    progress.start("strip", len(data) * len(overlays))
    for first in range(0, len(data), ROWS_AT_ONCE):
        images = data.images[first : first + ROWS_AT_ONCE].to(torch.int16)
        for overlay in overlays:
            sums = images + overlay.to(torch.int16)
            mixed = (sums.clamp_max(255) if add else sums // 2).to(torch.uint8)
            logs = F.log_softmax(engine.logits(model, mixed).double(), 1)
            total[first : first + len(images)] += -(logs.exp() * logs).sum(1).float()
            progress.advance(len(images))
    progress.finish()
    return total / len(overlays)
