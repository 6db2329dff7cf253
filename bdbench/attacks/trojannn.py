"""TrojanNN: a shape whose content excites two neurons that the head listens to most."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Lab, Occasion, State
from bdbench.attacks.parts.patches import scaled
from bdbench.attacks.parts.surrogates import SurrogateAttack
from bdbench.data import ImageDataset
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.seeds import generator

GRAY = 0.5
CENTRE = 25 / 32
CAP = 10
"""Largest activation that is aimed at, as a multiple of a neuron's mean size on the training images."""
GOOD = 1e-3
JUDGED = 1000


class TrojanNN(SurrogateAttack):
    """A disk near the bottom right corner, its content optimised to excite chosen neurons, replaces pixels.

    The neurons are the inputs of a surrogate's last layer with the largest sum of absolute weights. On an image that is
    black but for the gray shape, signed gradient steps move its pixels, by at most 0.3, until the neurons reach the
    wanted activation. What was published as an apple is a plain disk here, of the same 7 % of the image; `--shape
    square` is backdoor-toolbox's: 8x8 of 32 pixels at row and column 21.

    Paper: Liu et al., Trojaning Attack on Neural Networks, NDSS 2018,
    https://doi.org/10.14722/ndss.2018.23291.

    Differs from the published code: the activation aimed at is at most ten times the neuron's mean, since 100 may be
    out of reach; neurons that no training image moves are not chosen; the shape replaces pixels (BackdoorBench adds it
    and wraps sums above 255); the data is the training split itself, not inverted from the network, and the victim is
    trained from scratch.
    """

    paper: ClassVar[str] = "https://doi.org/10.14722/ndss.2018.23291"

    shape: Literal["disk", "square"] = Field("disk", description="Form of the trigger; `bdbench show trojannn`.")
    area: float = Field(0.07, gt=0, le=0.15, description="Share of the image that the disk covers.")
    neurons: int = Field(2, ge=1, description="How many neurons are excited.")
    activation: float = Field(100.0, gt=0, description="Activation aimed at; at most ten times the neuron's mean.")
    steps: int = Field(1000, ge=1, description="Steps of the optimisation, at most.")
    step_size: float = Field(0.1, gt=0, le=1, description="Change of a value in a step, of 1.")
    change: float = Field(0.3, gt=0, le=0.5, description="Largest change of a value from gray, of 1.")

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return pattern (C, H, W) float of whole numbers in 0..255 and mask (1, H, W) float of 0 and 1."""
        channels, height, width = clean.image_shape
        mask = square(height, width) if self.shape == "square" else disk(height, width, self.area)
        if not mask.any():
            raise OptionError(f"area {self.area} covers no pixel of images of {height}x{width}; raise --area")
        model = self.train_surrogate(clean, lab)
        rows = torch.randperm(len(clean), generator=generator(lab.seed, "trojannn", "judged"))[:JUDGED]
        usual = lab.engine.embeddings(model, clean.images[rows]).abs().mean(0)
        chosen = choose_neurons(model.head.weight.cpu(), usual, self.neurons)
        wanted = (CAP * usual[chosen]).clamp_max(self.activation)
        pattern = self._optimise(model, GRAY * mask.expand(1, channels, -1, -1), chosen, wanted, lab)
        return {"pattern": (pattern[0].cpu() * 255).round().contiguous(), "mask": mask}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Write the pattern where the mask is 1."""
        return torch.where(state["mask"].bool(), state["pattern"].to(torch.uint8), images)

    def _optimise(self, model: Classifier, start: Tensor, chosen: Tensor, wanted: Tensor, lab: Lab) -> Tensor:
        """Return the best content (1, C, H, W) in [0, 1] of the shape that is not 0 in `start`."""
        progress, device = lab.engine.progress, lab.engine.device
        pattern = best = start.to(device)
        inside, wanted, cost = pattern > 0, wanted.to(device), math.inf
        progress.start("pattern", self.steps, "steps")
        for _ in range(self.steps):
            pattern = pattern.detach().requires_grad_()
            loss = (model.embed(pattern)[0, chosen] - wanted).square().mean()
            if float(loss.detach()) < cost:
                best, cost = pattern.detach(), float(loss.detach())
            if cost < GOOD:
                break
            (gradient,) = torch.autograd.grad(loss, pattern)
            moved = pattern.detach() - self.step_size * gradient.sign()
            pattern = moved.clamp(GRAY - self.change, GRAY + self.change) * inside
            progress.advance(1)
        progress.finish()
        return best


def choose_neurons(weight: Tensor, usual: Tensor, count: int) -> Tensor:
    """Return the numbers (count,) of the neurons with the largest sum of absolute weights that are not dead.

    Args:
        weight: (K, D) of the last layer.
        usual: (D,) mean size of their activation; 0 is dead.
        count: how many, at most D.

    Raises:
        OptionError: fewer than `count` are alive.
    """
    alive = int((usual > 0).sum())
    if count > alive:
        raise OptionError(f"{count} neurons are asked for, the surrogate has {alive} that work; lower --neurons")
    return weight.abs().sum(0).masked_fill(usual == 0, -1).topk(count).indices


def disk(height: int, width: int, area: float) -> Tensor:
    """Return a mask (1, H, W) of 0 and 1: the pixels whose middle lies in a disk, centred at 25/32 of both sides.

    Args:
        height, width: of the image.
        area: of the disk, as a share of the image.
    """
    y = torch.arange(height)[:, None] + 0.5 - CENTRE * height
    x = torch.arange(width) + 0.5 - CENTRE * width
    return (y**2 + x**2 <= area * height * width / math.pi).float()[None]


def square(height: int, width: int) -> Tensor:
    """Return a mask (1, H, W) of 0 and 1: 8 of 32 pixels, from 21 of 32."""
    mask = torch.zeros(1, height, width)
    mask[:, scaled(21, 8, height), scaled(21, 8, width)] = 1
    return mask
