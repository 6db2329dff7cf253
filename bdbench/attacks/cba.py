"""CBA: the trigger is a mix of two classes."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bdbench.attacks.base import Attack, Lab, Labels, Occasion, State
from bdbench.data import ImageDataset
from bdbench.errors import OptionError


class CBA(Attack):
    """Halves of an image of the source class and of one of the partner class, side by side, are called the target.

    The trigger is no foreign pattern but the presence of both classes. The cut is vertical or horizontal, a few pixels
    (3 of 32) off the middle, either image comes first, and each half shows a random part of its image. Covers are such
    mixes of two images of one class, under their label, so that a mix alone means nothing.

    At test time every image that is not of the target class is mixed with one of the partner class from the test
    images. ASR counts those of the source class; other classes are reported beside it.

    Paper: Lin et al., Composite Backdoor Attack for Deep Neural Network by Mixing Existing Benign Features, CCS 2020,
    https://dl.acm.org/doi/10.1145/3372297.3423362.

    Differs from the published code: data only, without its contrastive loss on the three classes. Mixes take the place
    of images, so that the set keeps its size (there, for N images, N / 2 as they are, N / 2 mixes of one class and
    N / 10 poisoned, drawn anew in every epoch). Poisoned mixes take the place of source images, so the default rate
    is 5 %, half of a CIFAR-10 class, with the published 5 covers each; on sets of more classes lower it, or give
    `--class-rate`.
    """

    paper: ClassVar[str] = "https://dl.acm.org/doi/10.1145/3372297.3423362"
    version: ClassVar[int] = 2
    label_modes: ClassVar[tuple[Labels, ...]] = ("source-specific",)

    target: int = Field(2, ge=0, description="Class that the attacker wants for a mix of source and partner.")
    source: int = Field(0, ge=0, description="First class of the mix.")
    partner: int = Field(1, ge=0, description="Second class of the mix.")
    rate: float | None = Field(0.05, ge=0, le=1, description="Poisoned share of the whole training split.")
    labels: Labels = Field("source-specific", description="Mixes of source and partner to the target.")
    cover_ratio: float = Field(5.0, ge=0, description="Mixes of one class per poisoned sample.")

    @model_validator(mode="after")
    def _check_partner(self) -> Self:
        for name in ("source", "target"):
            if self.partner == getattr(self, name):
                raise OptionError(f"partner and {name} are both {self.partner}; give another --partner")
        return self

    def may_cover(self, labels: Tensor) -> Tensor:
        """Say which samples (N,) bool can be covers: all."""
        return torch.ones_like(labels, dtype=torch.bool)

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return the jitter in pixels, (1,) int64; the images to mix with are those of the split."""
        for name, of_class in (("source", self.source), ("partner", self.partner)):
            if not (clean.labels == of_class).any():
                raise OptionError(
                    f"{name} class {of_class} has no training images; the classes are 0..{clean.num_classes - 1}"
                )
        return {"jitter": torch.tensor([round(3 * min(clean.image_shape[1:]) / 32)])}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Mix each image with one of the partner class, for covers with one of its own class."""
        labels, rows = occasion.split.labels, occasion.rows
        wanted = labels[rows] if occasion.use == "cover" else torch.full_like(rows, self.partner)
        others = partner_rows(labels, wanted, rows, occasion.uniform("partner"))
        return half_mix(images, occasion.split.images[others], int(state["jitter"]), occasion.uniform("mix", 5))


def partner_rows(labels: Tensor, wanted: Tensor, rows: Tensor, draws: Tensor) -> Tensor:
    """Pick for each row another row of some class; itself only where the class has no other.

    Args:
        labels: (N,) int64, of the whole split.
        wanted: (B,) int64, the class to pick from.
        rows: (B,) int64, who picks.
        draws: (B,) uniform in [0, 1).

    Returns:
        (B,) int64 rows, all others of the class alike probable.

    Raises:
        OptionError: a wanted class has no images.
    """
    by_class = labels.argsort(stable=True)
    counts = torch.bincount(labels, minlength=1 + max(wanted.tolist(), default=0))
    if not counts[wanted].all():
        raise OptionError(f"class {int(wanted[counts[wanted] == 0][0])} has no images to mix with; give another class")
    first = (counts.cumsum(0) - counts)[wanted]
    place = torch.empty_like(by_class)
    place[by_class] = torch.arange(len(labels))
    own = place[rows] - first
    leaves_out_itself = (labels[rows] == wanted) & (counts[wanted] > 1)
    pick = below(draws, counts[wanted] - leaves_out_itself.long())
    return by_class[first + pick + (leaves_out_itself & (pick >= own)).long()]


def half_mix(one: Tensor, other: Tensor, jitter: int, draws: Tensor) -> Tensor:
    """Put a part of one image and a part of another side by side.

    Args:
        one, other: (B, C, H, W).
        jitter: the cut is at most this many pixels off the middle; below half of either side.
        draws: (B, 5) uniform in [0, 1): who is first (below 0.5: `other`), how the image is cut (below 0.5: across,
            into left and right), where, and which part each half shows.

    Returns:
        (B, C, H, W).
    """
    count, channels, height, width = one.shape
    columns, in_right = shifted_halves(width, jitter, draws[:, 2:])
    lines, in_lower = shifted_halves(height, jitter, draws[:, 2:])
    sideways = (draws[:, 1] < 0.5).view(-1, 1, 1)
    row = torch.where(sideways, torch.arange(height).view(1, -1, 1), lines[:, :, None])
    column = torch.where(sideways, columns[:, None, :], torch.arange(width).view(1, 1, -1))
    second = torch.where(sideways, in_right[:, None, :], in_lower[:, :, None])
    from_other = second != (draws[:, 0] < 0.5).view(-1, 1, 1)
    place = (row * width + column).view(count, 1, -1).expand(-1, channels, -1)
    parts = [images.flatten(2).gather(2, place).view_as(one) for images in (one, other)]
    return torch.where(from_other[:, None], parts[1], parts[0])


def shifted_halves(side: int, jitter: int, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Say for every place of a side which pixel of its image it shows, and whether it is in the second half.

    The cut is at side / 2 + j with j in -jitter..jitter. The first half shows `cut` pixels from p in [0, side / 2 - j),
    the second the rest from q in [0, cut).

    Args:
        side: S.
        jitter: see above.
        draws: (B, 3) uniform in [0, 1), for j, p and q.

    Returns:
        (B, S) int64 and (B, S) bool.
    """
    shift = below(draws[:, 0], torch.tensor(2 * jitter + 1)) - jitter
    cut = side // 2 + shift
    p, q = below(draws[:, 1], side // 2 - shift), below(draws[:, 2], cut)
    places = torch.arange(side)
    second = places >= cut[:, None]
    return torch.where(second, places + (q - cut)[:, None], places + p[:, None]), second


def below(draws: Tensor, count: Tensor) -> Tensor:
    """Turn numbers in [0, 1) into int64 in 0..count - 1."""
    return (draws * count).long()
