"""LIRA: a network learns a faint noise for each image, against a victim that learns with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdbench.attacks.base import Lab, Occasion, State, wanted_labels
from bdbench.attacks.parts.generators import fresh, in_equal_batches, restored, weights_of
from bdbench.attacks.parts.victims import VictimAttack, epochs_of
from bdbench.data import ImageDataset
from bdbench.models.classifier import Classifier
from bdbench.training.loop import Batch

WIDTHS = (16, 32, 64, 128)


class Lira(VictimAttack):
    """Each image gets a faint noise of its own, eps * A(image), from a network A that learned it with the victim.

    First A and the victim take turns: A lowers the victim's cross entropy to the wanted labels, the victim that of
    clean images and of images under A as it was when the epoch began, half and half. Then A is frozen and the victim is
    trained further on the same loss. All images of a batch are attacked, `rate` is of the replayed dataset only.

    An eps of 0.01 is 2.55 of 255, and datasets are bytes: the noise is rounded to whole gray levels of -3 to 3, and
    what is below half a level is lost. The attacker's victim has learned the noise unrounded.

    Paper: Doan et al., LIRA: Learnable, Imperceptible and Robust Backdoor Attacks, ICCV 2021,
    https://openaccess.thecvf.com/content/ICCV2021/html/Doan_LIRA_Learnable_Imperceptible_and_Robust_Backdoor_Attacks_ICCV_2021_paper.html.

    Differs from the published code: A learns against the victim as it is, without a look one step ahead; in the first
    stage the victim sees clean images too; eps is of images in [0, 1] (of normalised ones, on CIFAR-10 there, it is a
    quarter of that); A is the small autoencoder for all images (published for MNIST and GTSRB; U-Net for CIFAR-10);
    short budgets.
    """

    paper: ClassVar[str] = (
        "https://openaccess.thecvf.com/content/ICCV2021/html/"
        "Doan_LIRA_Learnable_Imperceptible_and_Robust_Backdoor_Attacks_ICCV_2021_paper.html"
    )

    eps: float = Field(0.01, gt=0, le=1, description="Largest change of a pixel, of 1 (0.01 published).")
    generator_epochs: int | None = Field(
        None, ge=1, description="Epochs of the first stage; default: as many as take 4,000 steps (published: 50)."
    )
    generator_lr: float = Field(1e-3, gt=0, description="Learning rate of the generator (Adam; published: 1e-4).")
    clean_weight: float = Field(0.5, gt=0, lt=1, description="Weight of the clean images; attacked ones have the rest.")

    def train(self, clean: ImageDataset, lab: Lab) -> tuple[State, Classifier]:
        """Return the generator's weights, under `generator.`, and the victim."""
        engine = lab.engine
        build = partial(NoiseNet, clean.image_shape)
        learning, settled = (fresh(build, lab.seed, "lira", engine.device) for _ in range(2))
        learner = torch.optim.Adam(learning.parameters(), self.generator_lr)
        want = partial(wanted_labels, attack=self, num_classes=clean.num_classes)
        settled.requires_grad_(False)

        def settle(_: int) -> None:
            learning.train()
            settled.load_state_dict(learning.state_dict())
            settled.eval()

        epochs = self.generator_epochs or epochs_of(4000, len(clean), self.victim_batch_size)
        victim = engine.fit(
            lab.new_model(self.victim, clean, "victim"), clean,
            partial(self._first_loss, learning, learner, settled, want),
            self.victim_recipe(clean, lab.augment, epochs).model_copy(update={"schedule": "constant"}),
            phase="generator", before_epoch=settle, companions={"generator": learning, "learner": learner},
            lr_flag="--victim-lr",
        )  # fmt: skip
        settle(0)
        recipe = self.victim_recipe(clean, lab.augment)
        victim = engine.fit(
            victim, clean, partial(self._loss, settled, want), recipe, phase="victim", lr_flag="--victim-lr"
        )
        return weights_of(settled, "generator."), victim

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Add the noise."""
        network = restored(partial(NoiseNet, occasion.split.image_shape), state, "generator.")
        return images + 255 * self.eps * in_equal_batches(network, images / 255)

    def _first_loss(
        self,
        learning: nn.Module,
        learner: torch.optim.Optimizer,
        settled: nn.Module,
        want: Callable[[Tensor], Tensor],
        victim: Classifier,
        batch: Batch,
    ) -> Tensor:
        """Let the generator take its step; return the victim's loss."""
        loss = F.cross_entropy(victim(attacked(batch.images, learning, self.eps)), want(batch.labels))
        parameters = list(learning.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        learner.step()
        return self._loss(settled, want, victim, batch)

    def _loss(self, settled: nn.Module, want: Callable[[Tensor], Tensor], victim: Classifier, batch: Batch) -> Tensor:
        on_clean = F.cross_entropy(victim(batch.images), batch.labels)
        on_attacked = F.cross_entropy(victim(attacked(batch.images, settled, self.eps)), want(batch.labels))
        return self.clean_weight * on_clean + (1 - self.clean_weight) * on_attacked


def attacked(images: Tensor, generator: nn.Module, eps: float) -> Tensor:
    """Return images (B, C, H, W) in [0, 1] with the generator's noise, clipped to [0, 1]."""
    changed: Tensor = images + eps * generator(images)
    return changed.clamp(0, 1)


class NoiseNet(nn.Module):
    """Autoencoder of 4x4 convolutions that halve the side, to 16, 32, 64 and 128 channels, and back, with batch norm.

    Sides below 16 have fewer levels, so that none gets below one pixel.

    Args:
        image_shape: (C, H, W).
    """

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        widths = WIDTHS[: min(image_shape[1:]).bit_length() - 1]
        pairs = list(zip((image_shape[0], *widths), widths, strict=False))
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 4, 2, 1), nn.BatchNorm2d(after)) for before, after in pairs
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(after, before, 4, 2, 1) for before, after in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(before) for before in widths[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] to noise (B, C, H, W) float32 in [-1, 1]."""
        maps, sizes = images, []
        for level in self.down:
            sizes.append(list(maps.shape[2:]))
            maps = F.relu(level(maps))
        for place in reversed(range(len(sizes))):
            up = cast("nn.ConvTranspose2d", self.up[place])
            maps = up(maps, output_size=sizes[place])
            maps = F.relu(self.norms[place - 1](maps)) if place else maps
        return maps.float().tanh()
