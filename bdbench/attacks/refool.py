"""Refool: a reflection, as of a window pane, over the image."""

from __future__ import annotations

import math
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Occasion, State
from bdbench.data import ImageDataset
from bdbench.errors import OptionError
from bdbench.seeds import generator

GAMMA = 2.2
REFLECTIONS = 256
"""How many images are kept to be reflections."""
OFFSETS = (3, 8)
"""Least and largest shift of a ghost in pixels."""
SIGMAS = (1.0, 5.0)
"""Least and largest blur in pixels."""


class Refool(Attack):
    """Another image is mixed in as a reflection: seen twice, a little shifted (ghost), or out of focus.

    Mixing is done in linear light (gamma 2.2). Every image draws its reflection, its kind (ghost with 0.49) and the
    rest: the ghost's shift of 3 to 8 pixels per side (at most a quarter of the image) and the weights of its two
    copies; the blur's sigma of 1 to 5 pixels. A blurred reflection fades towards the border.

    Reflections are at most 256 training images of other classes than the target, stored with the attack. They stand in
    for the published photographs, which were selected by training with them.

    The paper's attack is clean-label with a light reflection: `--labels clean --rate 0.02 --alpha 0.55 0.95`. The
    default is BackdoorBench's form, dirty-label with alpha 0.4, whose authors report that the paper's form does not get
    far as an attack on one target class.

    Paper: Liu et al., Reflection Backdoor: A Natural Backdoor Attack on Deep Neural Networks, ECCV 2020,
    https://arxiv.org/abs/2007.02343.

    Differs from the published code: an image keeps what it drew (BackdoorBench draws anew), and is rounded, not
    truncated, to bytes. Images keep their size (the paper's are enlarged to 560 pixels).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2007.02343"
    version: ClassVar[int] = 2

    alpha: tuple[float, float] = Field(
        (0.4, 0.4), description="Share of the image itself, least and largest; drawn between them."
    )
    ghost_rate: float = Field(0.49, ge=0, le=1, description="Probability of a ghost; else the reflection is blurred.")

    @model_validator(mode="after")
    def _check_alpha(self) -> Self:
        if not 0 < self.alpha[0] <= self.alpha[1] < 1:
            raise OptionError(f"alpha {self.alpha[0]} {self.alpha[1]} must rise and lie between 0 and 1")
        return self

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return the reflections (R, C, H, W) uint8."""
        rows = torch.nonzero((clean.labels != self.target) | (self.labels == "all-to-all")).flatten()
        if not len(rows):
            raise OptionError(f"all training images are of the target class {self.target}: none can be a reflection")
        order = torch.randperm(len(rows), generator=generator(lab.seed, "refool", "reflections"))
        return {"reflections": clean.images[rows[order[:REFLECTIONS]].sort().values]}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Mix each image's own reflection in."""
        bank, draws = state["reflections"], occasion.uniform("reflection", 8)
        seen, reflected = linear_light(images), linear_light(bank[(draws[:, 0] * len(bank)).long()])
        least, largest = self.alpha
        alpha = (least + (largest - least) * draws[:, 1]).view(-1, 1, 1, 1)
        is_ghost = draws[:, 2] < self.ghost_rate
        layer, kinds = torch.empty_like(seen), draws[:, 3:]
        layer[is_ghost] = (1 - alpha[is_ghost]) * ghosts(reflected[is_ghost], kinds[is_ghost])
        far = ~is_ghost
        layer[far] = (1 - alpha[far] / 2) * out_of_focus(reflected[far], seen[far], kinds[far])
        return (layer + alpha * seen).clamp_(0, 1).pow_(1 / GAMMA).mul_(255)


def linear_light(images: Tensor) -> Tensor:
    """Return bytes (B, C, H, W) uint8 as light in [0, 1]: (value / 255) ** 2.2."""
    table = (torch.arange(256) / 255) ** GAMMA
    return table.index_select(0, images.flatten().int()).view(images.shape)


def ghosts(reflected: Tensor, draws: Tensor) -> Tensor:
    """Return reflections as of a pane with two faces: two copies, shifted against each other.

    What both copies cover is enlarged to the whole image.

    Args:
        reflected: (B, C, H, W) linear, in [0, 1].
        draws: (B, 5) uniform in [0, 1): shift down and right, weight of the shifted copy (in 0.15..0.5, or 1 minus
            that), which of the two; the last is not used.

    Returns:
        (B, C, H, W) linear.
    """
    height, width = reflected.shape[2:]
    shifts = [ghost_shift(draws[:, axis], side) for axis, side in ((0, height), (1, width))]
    weight = 0.15 + 0.35 * draws[:, 2]
    weight = torch.where(draws[:, 3] < 0.5, weight, 1 - weight).view(-1, 1, 1, 1)
    spots = [overlap(shift, side) for shift, side in zip(shifts, (height, width), strict=True)]
    shifted = sample(reflected, *(spot + shift[:, None] for spot, shift in zip(spots, shifts, strict=True)))
    return torch.lerp(sample(reflected, *spots), shifted, weight)


def ghost_shift(draws: Tensor, side: int) -> Tensor:
    """Return whole pixels (B,) of 3 to 8, at most a quarter of the side, from numbers (B,) in [0, 1)."""
    least, largest = (min(offset, side // 4) for offset in OFFSETS)
    return least + (draws * (largest - least + 1)).floor()


def overlap(shift: Tensor, side: int) -> Tensor:
    """Return where (B, side), in pixels, a picture `shift` (B,) pixels shorter is read to fill the side."""
    short = side - shift[:, None]
    return ((torch.arange(side) + 0.5) * short / side - 0.5).clamp(min=0).minimum(short - 1)


def sample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Read images (B, C, H, W) at rows (B, H) and columns (B, W) in pixels, bilinearly."""
    height, width = images.shape[2:]
    x = (2 * columns / (width - 1) - 1)[:, None, :].expand(-1, height, -1)
    y = (2 * rows / (height - 1) - 1)[:, :, None].expand(-1, -1, width)
    return F.grid_sample(images, torch.stack([x, y], 3), mode="bilinear", padding_mode="border", align_corners=True)


def out_of_focus(reflected: Tensor, seen: Tensor, draws: Tensor) -> Tensor:
    """Return blurred reflections that fade towards the border, darkened where image and reflection exceed 1.

    Args:
        reflected, seen: (B, C, H, W) linear, in [0, 1].
        draws: (B, 5) uniform in [0, 1): sigma, and by how much to darken; the others are not used.

    Returns:
        (B, C, H, W) linear, in [0, 1].
    """
    height, width = reflected.shape[2:]
    blurred = blur(reflected, SIGMAS[0] + (SIGMAS[1] - SIGMAS[0]) * draws[:, 0])
    over = (blurred + seen - 1).clamp_(min=0)
    total = over.sum((2, 3), keepdim=True, dtype=torch.float64)
    excess = (total / (over > 0).sum((2, 3), keepdim=True).clamp(min=1)).float()
    attenuation = (1.08 + 0.1 * draws[:, 1]).view(-1, 1, 1, 1)
    return (blurred - attenuation * excess).clamp_(0, 1) * vignette(height, width)


def vignette(height: int, width: int) -> Tensor:
    """Return (H, W): exp(-(x^2 + y^2) / 4) with x and y from -3 to 3 across the image, the largest value 1."""
    y, x = (torch.linspace(-3, 3, side).square() for side in (height, width))
    fading = torch.exp(-(y[:, None] + x) / 4)
    return fading / fading.max()


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image (B, C, H, W) with its own Gaussian, sigma (B,) in pixels, cut at ceil(2 sigma), mirrored edges.

    In float64, so that the order of its sums, which may go by the batch, does not show in a byte.
    """
    down, across = (blur_matrices(side, sigma) for side in images.shape[2:])
    lines = (images.double().flatten(1, 2) @ across.mT).view(images.shape)
    return (down[:, None] @ lines).float()


def blur_matrices(side: int, sigma: Tensor) -> Tensor:
    """Return (B, S, S) float64: each row has the weights with which pixels of a side S make one blurred pixel."""
    reach = math.ceil(2 * SIGMAS[1])
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None].double()) ** 2)
    weights = weights * (offsets.abs() <= (2 * sigma[:, None]).ceil())
    seen = mirrored(side, reach).unfold(0, 2 * reach + 1, 1)
    matrices = torch.zeros(len(sigma), side, side, dtype=torch.float64)
    weights = weights / weights.sum(1, keepdim=True)
    return matrices.scatter_add_(2, seen.expand(len(sigma), -1, -1), weights[:, None].expand(-1, side, -1))


def mirrored(side: int, reach: int) -> Tensor:
    """Return the pixels (side + 2 reach,) that stand for places -reach..side + reach - 1; edges do not repeat."""
    period = 2 * (side - 1)
    places = torch.arange(-reach, side + reach) % period
    return torch.minimum(places, period - places)
