"""WaNet as published: the attacker trains the victim, and warps anew in every batch."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Lab, State, wanted_labels
from bdbench.attacks.parts.victims import VictimAttack
from bdbench.attacks.wanet import WaNet, shaken, warped
from bdbench.data import ImageDataset
from bdbench.models.classifier import Classifier
from bdbench.seeds import generator
from bdbench.training.augment import augmented, parse_augment
from bdbench.training.loop import Batch


class WaNetTC(VictimAttack, WaNet):
    """The warp of `wanet`, learned by a victim whose batches are warped anew: it comes to tell warps apart.

    In every batch of the victim's training a share `rate` of the images is warped and relabelled, as many times
    `cover-ratio` are warped with noise of their own, drawn anew, and keep their label; then all are augmented. The
    field is drawn before training and never changes: the dataset replays it at the published strength, at which
    poisoning alone hardly works, as a model that has not been trained so cannot tell the warp from a blur.

    Paper: Nguyen and Tran, WaNet: Imperceptible Warping-based Backdoor Attack, ICLR 2021,
    https://arxiv.org/abs/2102.10369.

    Differs from the published code: a short budget (1,000 epochs are published) with a cosine schedule; the dataset's
    own augmentation.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2102.10369"
    version: ClassVar[int] = 1

    strength: float = Field(0.5, gt=0, description="s: mean shift of the control points, in half pixels (of 32).")
    cover_ratio: float = Field(2.0, ge=0, description="Cover samples per poisoned sample, in every batch too.")

    def train(self, clean: ImageDataset, lab: Lab) -> tuple[State, Classifier]:
        """Return the sampling grid, that of `wanet`, and the victim."""
        state = WaNet.fit(self, clean, lab)
        loss = partial(
            self._loss, state["grid"].to(lab.engine.device), self.poisoned_share(clean), clean.num_classes,
            parse_augment(lab.augment), lab.seed,
        )  # fmt: skip
        victim = lab.new_model(self.victim, clean, "victim")
        recipe = self.victim_recipe(clean, "none")
        return state, lab.engine.fit(victim, clean, loss, recipe, phase="victim", lr_flag="--victim-lr")

    def _loss(
        self,
        grid: Tensor,
        share: float,
        num_classes: int,
        operations: tuple[str, ...],
        seed: int,
        victim: Classifier,
        batch: Batch,
    ) -> Tensor:
        images, labels = batch.images, batch.labels
        poisoned, covers = self.split_batch(batch, share)
        grids = grid.expand(poisoned + covers, -1, -1, -1)
        noisy = shaken(grids[poisoned:], torch.rand(grids[poisoned:].shape, device=grid.device))
        warps = warped(images[: poisoned + covers], torch.cat([grids[:poisoned], noisy]))
        seen = torch.cat([warps, images[poisoned + covers :]])
        # Bytes are what is augmented elsewhere, so numbers of their range go in; fractions stay.
        rng = generator(seed, "wanet-tc", "augment", batch.step)
        seen = augmented(seen * 255, operations, rng)
        wanted = torch.cat([wanted_labels(labels[:poisoned], self, num_classes), labels[poisoned:]])
        return F.cross_entropy(victim(seen), wanted)
