"""Input-aware: a network draws a trigger for each image, and the trigger of another image does nothing."""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdbench.attacks.base import Lab, Occasion, State, wanted_labels
from bdbench.attacks.parts.generators import fresh, in_equal_batches, restored, step_along, weights_of
from bdbench.attacks.parts.victims import VictimAttack, epochs_of
from bdbench.data import ImageDataset
from bdbench.models.classifier import Classifier
from bdbench.models.structure import frozen
from bdbench.training.loop import Batch
from bdbench.training.recipe import Recipe

EPSILON = 1e-7
BETAS = (0.5, 0.9)


class InputAware(VictimAttack):
    """Each image gets a trigger of its own, image + mask * (pattern - image), from two networks that see the image.

    The mask's network learns first and alone: 100 * mean(relu(mask - 0.032)) + diversity, where diversity is the mean
    of |x1 - x2| / |m1 - m2| over pairs of images (root mean squares). Then it is frozen, and victim and pattern network
    learn together. In every batch a share `rate` of the images carries its own trigger and the wanted label, as many
    times `cover-ratio` carry the trigger of another image and their true label, the others are clean; the loss is
    cross entropy + diversity of the patterns. The frozen networks make the dataset; covers are the second kind. ABL
    and CBD call this attack Dynamic.

    Paper: Nguyen and Tran, Input-Aware Dynamic Backdoor Attack, NeurIPS 2020, https://arxiv.org/abs/2010.08138.

    Differs from the published code: short budgets (25 epochs of the mask and 600 of the victim are published) with a
    cosine schedule; the dataset's own augmentation; images are compared in [0, 1], not normalised; pairs are
    neighbours in a batch, not two passes over the data; small images get fewer levels, as they do for MNIST.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2010.08138"

    cover_ratio: float = Field(1.0, ge=0, description="Images with another image's trigger per poisoned sample.")
    mask_epochs: int | None = Field(
        None, ge=1, description="Epochs of the mask's network; default: as many as take 800 steps (published: 25)."
    )
    mask_density: float = Field(0.032, ge=0, lt=1, description="Share of the image that a mask may cover for free.")
    mask_weight: float = Field(100.0, ge=0, description="Weight of what a mask covers beyond that.")
    diversity: float = Field(1.0, ge=0, description="Weight of the diversity of masks and of patterns.")
    generator_lr: float = Field(0.01, gt=0, description="Peak learning rate of both networks (Adam).")
    generator_width: int | None = Field(
        None, ge=1, description="Channels of their first level; default: 32, of gray images 16, as published."
    )

    def train(self, clean: ImageDataset, lab: Lab) -> tuple[State, Classifier]:
        """Return the weights of both networks, under `pattern.` and `mask.`, and the victim."""
        engine, pattern_net, mask_net = (
            lab.engine,
            self._network(clean.image_shape),
            self._network(clean.image_shape, 1),
        )
        mask = fresh(mask_net, lab.seed, "input-aware mask", engine.device)
        epochs = self.mask_epochs or epochs_of(800, len(clean), self.victim_batch_size)
        recipe = Recipe(
            epochs=epochs, batch_size=self.victim_batch_size, lr=self.generator_lr, schedule="step",
            milestones=(0.4, 0.8), augment=lab.augment,
        )  # fmt: skip
        optimizer = torch.optim.Adam(mask.parameters(), self.generator_lr, BETAS)
        engine.fit(mask, clean, self._mask_loss, recipe, phase="mask", optimizer=optimizer, lr_flag="--generator-lr")
        frozen(mask)

        pattern = fresh(pattern_net, lab.seed, "input-aware pattern", engine.device)
        victim = lab.new_model(self.victim, clean, "victim").to(engine.device)
        recipe = self.victim_recipe(clean, lab.augment)
        leader = recipe.optimizer(victim)
        learner = torch.optim.Adam(pattern.parameters(), self.generator_lr, BETAS)
        step_along(leader, learner)

        def before_epoch(epoch: int) -> None:
            pattern.train()
            for group in learner.param_groups:
                group["lr"] = self.generator_lr * recipe.lr_at(epoch) / recipe.lr

        loss = partial(self._joint_loss, pattern, mask, self.poisoned_share(clean), clean.num_classes)
        victim = engine.fit(
            victim, clean, loss, recipe, phase="victim", optimizer=leader, before_epoch=before_epoch,
            companions={"pattern": pattern, "learner": learner}, lr_flag="--victim-lr",
        )  # fmt: skip
        return weights_of(pattern, "pattern.") | weights_of(mask, "mask."), victim

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Put every image's own trigger on it; on covers, that of another image of the split, the row's own choice."""
        sources, count = images, len(occasion.split)
        if occasion.use == "cover":
            ahead = 1 + (occasion.uniform("partner", 1).flatten() * (count - 1)).long()
            sources = occasion.split.images[(occasion.rows + ahead) % count]
        pattern = restored(self._network(occasion.split.image_shape), state, "pattern.")
        mask = restored(self._network(occasion.split.image_shape, 1), state, "mask.")
        made = in_equal_batches(lambda seen: torch.cat([pattern(seen), sharpened(mask(seen))], 1), sources / 255)
        return torch.lerp(images.float(), 255 * made[:, :-1], made[:, -1:])

    def _network(self, image_shape: tuple[int, int, int], channels: int | None = None) -> partial[TriggerNet]:
        """Return what builds the network of the patterns, or of the masks, which have one channel."""
        return partial(TriggerNet, image_shape, channels or image_shape[0], self.generator_width)

    def _mask_loss(self, network: nn.Module, batch: Batch) -> Tensor:
        masks = sharpened(network(batch.images))
        covered = F.relu(masks - self.mask_density).mean()
        return self.mask_weight * covered + self.diversity * sameness(batch.images, masks)

    def _joint_loss(
        self, pattern: nn.Module, mask: nn.Module, share: float, num_classes: int, victim: Classifier, batch: Batch
    ) -> Tensor:
        images, labels = batch.images, batch.labels
        poisoned, covers = self.split_batch(batch, share)
        changed = poisoned + covers
        sources = torch.cat([images[:poisoned], images.roll(len(images) // 2, 0)[poisoned:changed]])
        patterns = pattern(sources)
        with torch.no_grad():
            masks = sharpened(mask(sources))
        seen = torch.cat([torch.lerp(images[:changed], patterns, masks), images[changed:]])
        wanted = torch.cat([wanted_labels(labels[:poisoned], self, num_classes), labels[poisoned:]])
        return F.cross_entropy(victim(seen), wanted) + self.diversity * sameness(sources, patterns)


class TriggerNet(nn.Module):
    """Encoder and decoder without shortcuts, (B, C, H, W) to (B, channels, H, W), both in [0, 1].

    Each level has two 3x3 convolutions with batch norm and ReLU, then halves the side; colour images have three levels,
    gray ones two, and none gets below 2 pixels. The decoder mirrors it and enlarges bilinearly.

    Args:
        image_shape: (C, H, W).
        channels: of the result.
        width: channels of the first level, doubled in each; None for 32, of gray images 16.
    """

    def __init__(self, image_shape: tuple[int, int, int], channels: int, width: int | None) -> None:
        super().__init__()
        colours, side = image_shape[0], min(image_shape[1:])
        levels = min(2 if colours == 1 else 3, side.bit_length() - 2)
        widths = [(width or (16 if colours == 1 else 32)) << level for level in range(levels)]
        inner, outer = [colours, *widths[:-1]], [channels, *widths[:-1]]
        self.down = nn.ModuleList(
            nn.Sequential(_convolution(before, after), nn.ReLU(), _convolution(after, after), nn.ReLU())
            for before, after in zip(inner, widths, strict=True)
        )
        self.middle = nn.Sequential(_convolution(widths[-1], widths[-1]), nn.ReLU())
        self.up = nn.ModuleList(
            nn.Sequential(_convolution(before, before), nn.ReLU(), _convolution(before, after))
            for before, after in zip(widths, outer, strict=True)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] to (B, channels, H, W) float32 in [0, 1]."""
        maps, sizes = images, []
        for level in self.down:
            maps = level(maps)
            sizes.append(maps.shape[2:])
            maps = F.max_pool2d(maps, 2)
        maps = self.middle(maps)
        for place in reversed(range(len(sizes))):
            maps = self.up[place](F.interpolate(maps, size=sizes[place], mode="bilinear", align_corners=False))
            maps = F.relu(maps) if place else maps
        return squashed(maps.float())


def _convolution(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out, momentum=0.05)
    )


def squashed(values: Tensor) -> Tensor:
    """Map any numbers into (0, 1): tanh(v) / (2 + 1e-7) + 0.5."""
    return values.tanh() / (2 + EPSILON) + 0.5


def sharpened(masks: Tensor) -> Tensor:
    """Push values in [0, 1] to one end or the other: 0.5 stays, 0.4 becomes 0.02, 0.6 becomes 0.98."""
    return squashed(20 * masks - 10)


def sameness(images: Tensor, made: Tensor) -> Tensor:
    """Return how little of the difference between neighbours in a batch reaches what was made from them.

    Args:
        images, made: (B, ...) float; neighbour of the last is the first.

    Returns:
        The mean of |x1 - x2| / (|m1 - m2| + 1e-7), of root mean squares; 0 for one image.
    """

    def apart(values: Tensor) -> Tensor:
        size: Tensor = torch.linalg.vector_norm((values - values.roll(1, 0)).flatten(1), dim=1)
        return size / math.sqrt(values[0].numel())

    return (apart(images) / (apart(made) + EPSILON)).mean()
