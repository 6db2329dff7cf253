"""LBA: a square whose content makes any image look like the target class, deep inside a network."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from bdbench.attacks.base import Lab, Labels, Occasion, State
from bdbench.attacks.parts.surrogates import SurrogateAttack, rows_of_target
from bdbench.data import ImageDataset
from bdbench.errors import OptionError
from bdbench.seeds import generator
from bdbench.training.loop import Batch
from bdbench.training.recipe import Recipe


class LatentBackdoor(SurrogateAttack):
    """A square patch, optimised so that images which carry it have the features of the target class, replaces pixels.

    The patch, 0.2 of the image's side, one pixel from the bottom right corner, minimises the squared distance of a
    surrogate's embedding of patched images of other classes to the mean embedding of the target class; its values are
    a tanh of what Adam changes.

    Paper: Yao et al., Latent Backdoor Attacks on Deep Neural Networks, CCS 2019, https://arxiv.org/abs/1905.10447.

    Differs from the published code: the paper also trains a teacher network that carries the backdoor into its
    students; here the attacker only poisons data with the optimised patch. The mean is of all images of the target
    class (TrojanZoo: 100).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1905.10447"
    label_modes: ClassVar[tuple[Labels, ...]] = ("all-to-one", "source-specific", "clean")

    patch_size: int | None = Field(None, ge=1, description="Side in pixels; default: 0.2 of the image's, at least 2.")
    samples: int = Field(1000, ge=2, description="Images of other classes that the patch is optimised on, at most.")
    epochs: int = Field(100, ge=1, description="Passes over them.")
    lr: float = Field(0.1, gt=0, description="Learning rate of Adam.")

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return pattern (C, H, W) float of whole numbers in 0..255 and mask (1, H, W) float of 0 and 1."""
        mask = self._mask(*clean.image_shape[1:])
        model = self.train_surrogate(clean, lab)
        wanted = lab.engine.embeddings(model, clean.images[rows_of_target(clean, self.target)]).mean(0)
        wanted = wanted.to(lab.engine.device)
        rng = generator(lab.seed, "lba", "samples")
        others = torch.nonzero(clean.labels != self.target).flatten()
        chosen = others[torch.randperm(len(others), generator=rng)[: self.samples]]
        patch = Patch(torch.randn(1, *clean.image_shape, generator=generator(lab.seed, "lba", "start")), mask)

        def loss(patch: Patch, batch: Batch) -> Tensor:
            return feature_distance(model.embed(patch(batch.images)), wanted)

        recipe = Recipe(epochs=self.epochs, lr=self.lr, schedule="constant", augment="none")
        learner = torch.optim.Adam(patch.parameters(), self.lr)
        lab.engine.fit(patch, clean.take(chosen), loss, recipe, phase="patch", optimizer=learner)
        pattern = (patch.pattern().detach()[0].cpu() * 255).round() * mask
        return {"pattern": pattern.contiguous(), "mask": mask}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Write the pattern where the mask is 1."""
        return torch.where(state["mask"].bool(), state["pattern"].to(torch.uint8), images)

    def _mask(self, height: int, width: int) -> Tensor:
        side = min(height, width)
        size = self.patch_size or max(2, round(0.2 * side))
        if size >= side:
            raise OptionError(
                f"a patch of {size} pixels, one from the border, does not fit images of {height}x{width}; lower "
                "--patch-size"
            )
        mask = torch.zeros(1, height, width)
        mask[:, -1 - size : -1, -1 - size : -1] = 1
        return mask


class Patch(nn.Module):
    """A pattern that replaces pixels of images; what is learned may be any number.

    Args:
        free: (1, C, H, W), where to start.
        mask: (1, H, W) of 0 and 1.
    """

    mask: Tensor

    def __init__(self, free: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.free = nn.Parameter(free)
        self.register_buffer("mask", mask)

    def pattern(self) -> Tensor:
        """Return the pattern (1, C, H, W) in [0, 1]."""
        return (self.free.tanh() + 1) / 2

    def forward(self, images: Tensor) -> Tensor:
        """Put the pattern on images (B, C, H, W) in [0, 1]."""
        return torch.lerp(images, self.pattern(), self.mask)


def feature_distance(features: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared Euclidean distance of features (B, D) to one wanted feature (D,)."""
    return (features - wanted).square().sum(1).mean()
