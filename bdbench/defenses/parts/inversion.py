"""Trigger inversion: for every class, the smallest change of images that turns a frozen model's answer to it."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

SUCCESS = 0.9
"""Share of the images of other classes that a trigger must turn to its class."""


def anomaly(sizes: Tensor) -> Tensor:
    """Return how many median absolute deviations (times 1.4826) each size (K,) lies below the median; 0 above it.

    Infinite where all but a few sizes are equal and this one is smaller. Source: Wang et al., Neural Cleanse, S&P 2019.
    """
    median = sizes.quantile(0.5)  # of an even number the mean of the middle two; torch.median takes the lower
    below = (median - sizes).clamp_min(0)
    spread = 1.4826 * (sizes - median).abs().quantile(0.5)
    return torch.where(below > 0, below / spread, torch.zeros_like(below))


def smallest_p(sizes: Tensor) -> float:
    """Return how often the smallest of K sizes would lie so far below the others if nothing were special about it.

    The null: logarithms of all sizes are draws from one normal distribution, of unknown mean and width. The statistic
    is the smallest one's distance from the mean of the others in units of their own spread (Student's t, K - 2 degrees
    of freedom), times K, since any class might have been the smallest. So one number means the same for 10 classes and
    for 200, unlike the index of `anomaly`, which is over 2 for a third of such draws of ten. It rises where several
    classes are small together.

    Source: Grubbs, Sample Criteria for Testing Outlying Observations, 1950.

    Args:
        sizes: (K,), positive.

    Returns:
        In [0, 1]; 1 where the smallest is no smaller than the others, or K is under 3.
    """
    from scipy.stats import t

    logs = sizes.double().clamp_min(1e-9).log().sort().values
    smallest, others = logs[0], logs[1:]
    below = float(others.mean() - smallest)
    if len(others) < 2 or below <= 1e-6:
        return 1.0
    spread = float(others.std()) * math.sqrt(1 + 1 / len(others))
    if spread == 0:
        return 0.0
    return min(1.0, len(logs) * float(t.sf(below / spread, len(logs) - 2)))


class Stamp(NamedTuple):
    """A trigger: images are scaled by `keep` and `add` is added, both (..., C or 1, H, W), within [0, 1]."""

    keep: Tensor
    add: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Stamp images (B, C, H, W) in [0, 1]."""
        return (self.keep * images + self.add).clamp(0, 1)


class Triggers(nn.Module):
    """A trigger for each of k classes, trained together; keeps the best of every class.

    Args:
        classes: (k,) int64.
        image_shape: (C, H, W).
        cost: weight of the size, None for the form's own.
        keep: ``best``, the smallest that works, or ``last``.
    """

    lr: ClassVar[float]
    betas: ClassVar[tuple[float, float]]
    first_cost: ClassVar[float]
    patience_share: ClassVar[float]
    """Epochs without news after which something happens, as a share of all."""

    classes: Tensor
    cost: Tensor
    hits: Tensor
    tries: Tensor
    streak: Tensor
    smallest: Tensor
    best_size: Tensor
    best_success: Tensor
    best_keep: Tensor
    best_add: Tensor

    def __init__(
        self, classes: Tensor, image_shape: tuple[int, int, int], cost: float | None, keep: Literal["best", "last"]
    ) -> None:
        super().__init__()
        count, (channels, height, width) = len(classes), image_shape
        self.keep, self.patience = keep, 1
        self._draw(count, image_shape)
        self.register_buffer("classes", classes)
        self.register_buffer("cost", torch.full((count,), self.first_cost if cost is None else cost))
        for name in ("hits", "tries", "streak", "best_success"):
            self.register_buffer(name, torch.zeros(count))
        self.register_buffer("smallest", torch.full((count,), torch.inf))  # that ever worked, kept or not
        self.register_buffer("best_size", torch.full((count,), float(height * width)))
        self.register_buffer("best_keep", torch.ones(count, 1, height, width))
        self.register_buffer("best_add", torch.zeros(count, channels, height, width))

    @abstractmethod
    def _draw(self, count: int, image_shape: tuple[int, int, int]) -> None:
        """Make the parameters, at random."""

    @abstractmethod
    def current(self) -> Stamp:
        """Return the k triggers as they are: keep (k, 1, H, W), add (k, C, H, W)."""

    @abstractmethod
    def penalty(self) -> Tensor:
        """Return what the cost multiplies, (k,)."""

    @abstractmethod
    def sizes(self) -> Tensor:
        """Return the sizes that are compared, (k,): pixels, weighted."""

    @abstractmethod
    def adapt(self, success: Tensor, improved: Tensor) -> bool:
        """React to an epoch's success rates (k,) and to which classes improved (k,); True ends the inversion."""

    def clamp(self) -> None:
        """Bring the parameters back into their range."""

    def kept(self) -> Stamp:
        """Return the k triggers as they are kept."""
        return self.current()

    def stamp(self, images: Tensor) -> Tensor:
        """Stamp images (B, C, H, W) with every trigger: (k, B, C, H, W)."""
        keep, add = self.current()
        return keep[:, None] * images + add[:, None]

    def count(self, before: Tensor, after: Tensor) -> None:
        """Count, per class, the images (B,) that were not of it before, and those of them (k, B) that are after."""
        open_ = before != self.classes[:, None]
        self.tries += open_.sum(1)
        self.hits += (open_ & (after == self.classes[:, None])).sum(1)

    @torch.no_grad()
    def finish_epoch(self) -> bool:
        """Keep what got better, adapt, and say whether the inversion is over."""
        self.clamp()
        success = self.hits / self.tries.clamp_min(1)
        sizes = self.sizes()
        improved = (success >= SUCCESS) & (sizes < self.smallest)
        taken = improved if self.keep == "best" else torch.ones_like(improved)
        taken = taken | (self.smallest.isinf() & (success >= self.best_success))
        self.smallest.copy_(torch.where(improved, sizes, self.smallest))
        keep, add = self.kept()
        for name, new in (("size", sizes), ("success", success), ("keep", keep), ("add", add)):
            old = getattr(self, f"best_{name}")
            old.copy_(torch.where(taken.view(-1, *[1] * (old.ndim - 1)), new, old))
        self.hits.zero_()
        self.tries.zero_()
        return self.adapt(success, improved)

    def stamps(self) -> list[Stamp]:
        """Return the kept trigger of every class."""
        return [Stamp(keep, add) for keep, add in zip(self.best_keep, self.best_add, strict=True)]


class MaskTriggers(Triggers):
    """(1 - mask) * image + mask * pattern; the mask's sum is penalised. Ends when no mask shrinks any more."""

    lr: ClassVar[float] = 0.005
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    first_cost: ClassVar[float] = 0.01
    patience_share: ClassVar[float] = 0.3

    def _draw(self, count: int, image_shape: tuple[int, int, int]) -> None:
        channels, height, width = image_shape
        self.pattern = nn.Parameter(torch.rand(count, channels, height, width))
        self.mask = nn.Parameter(torch.rand(count, 1, height, width))

    def current(self) -> Stamp:
        """Return 1 - mask and mask * pattern."""
        return Stamp(1 - self.mask, self.mask * self.pattern)

    def penalty(self) -> Tensor:
        """Return the masks' sums."""
        return self.mask.abs().sum((1, 2, 3))

    def sizes(self) -> Tensor:
        """Return the masks' sums."""
        return self.penalty()

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring masks and patterns back into [0, 1]."""
        self.pattern.clamp_(0, 1)
        self.mask.clamp_(0, 1)

    def adapt(self, success: Tensor, improved: Tensor) -> bool:  # noqa: ARG002
        """End when all masks work and none has shrunk for more than `patience` epochs."""
        self.streak.copy_(torch.where(improved | self.smallest.isinf(), 0, self.streak + 1))
        return bool((self.streak > self.patience).all())


class PixelTriggers(Triggers):
    """image + plus - minus, both in [0, 1]; the cost of changed pixels follows the success."""

    lr: ClassVar[float] = 0.1
    betas: ClassVar[tuple[float, float]] = (0.5, 0.9)
    first_cost: ClassVar[float] = 0.001
    patience_share: ClassVar[float] = 0.1

    def _draw(self, count: int, image_shape: tuple[int, int, int]) -> None:
        self.plus = nn.Parameter(torch.rand(count, *image_shape))
        self.minus = nn.Parameter(torch.rand(count, *image_shape))

    def current(self) -> Stamp:
        """Return the k triggers; what would leave [0, 1] is cut when they are stamped."""
        change = self.plus.clamp(0, 1) - self.minus.clamp(0, 1)
        return Stamp(torch.ones_like(change[:, :1]), change)

    def stamp(self, images: Tensor) -> Tensor:
        """Stamp images, and cut what leaves [0, 1]; masks leave it nowhere, and a cut would hold them at its bounds."""
        return super().stamp(images).clamp(0, 1)

    def kept(self) -> Stamp:
        """Return them without changes that a stored image cannot show."""
        keep, change = self.current()
        return Stamp(keep, torch.where(change.abs() < 1 / 255, 0.0, change))

    def penalty(self) -> Tensor:
        """Return the sum over pixels of the largest tanh over channels: 0.5 a pixel and side where nothing changes."""
        sides = [(side / 10).tanh() / (2 - 1e-7) + 0.5 for side in (self.plus, self.minus)]
        return sum((side.amax(1).sum((1, 2)) for side in sides), torch.zeros_like(self.cost))

    def sizes(self) -> Tensor:
        """Return the sum over pixels of the largest change over channels."""
        return self.kept().add.abs().amax(1).sum((1, 2))

    def adapt(self, success: Tensor, improved: Tensor) -> bool:  # noqa: ARG002
        """Raise the cost after `patience` epochs of success in a row, lower it after as many of failure."""
        works = success >= SUCCESS
        same = works == (self.streak > 0)
        self.streak.copy_(torch.where(same, self.streak, 0) + torch.where(works, 1, -1))
        due = self.streak.abs() >= self.patience
        self.cost.mul_(torch.where(due, torch.where(works, 1.5, 1.5**-1.5), 1.0))
        self.streak.masked_fill_(due, 0)
        return False


FORMS: dict[str, type[Triggers]] = {"mask": MaskTriggers, "pixel": PixelTriggers}
