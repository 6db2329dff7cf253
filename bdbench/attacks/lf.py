"""LF: a pattern without high frequencies, which filters do not find, added to the whole image."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Lab, Labels, Occasion, State
from bdbench.attacks.parts.surrogates import CHANGED_AT_ONCE, SurrogateAttack, on_device, rows_of_target
from bdbench.data import ImageDataset
from bdbench.models.classifier import Classifier
from bdbench.seeds import generator

STD = 6 / 32
"""Standard deviation of the filter, as a share of the side."""
CUT = 2.5
"""Where the filter ends, in standard deviations."""
OVERSHOOT = 1.02
TURNED = 0.8
STEADY = 0.01
JUDGED = 10
"""Images a class that are asked whether the pattern works."""


class LowFrequency(SurrogateAttack):
    """One smooth pattern, of values from 0 to 0.2 of the range, is added to the whole image.

    The pattern starts at 0. In every pass it grows by what would lead a surrogate from its answer to the target, by
    DeepFool's linear step, on 100 training images whose class it has not yet changed; it is then smoothed by a Gaussian
    (std 6 of 32 pixels) and stretched to [0, 0.2]. Passes end when 80 % of held-apart training images change class,
    when that share has been steady for five passes, or after 50.

    `--noise` needs no surrogate and trains none: smoothed Gaussian noise of the same range, the same spectrum without
    the optimisation.

    Paper: Zeng et al., Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective, ICCV 2021,
    https://arxiv.org/abs/2104.03413.

    Differs from the published code: all images of a pass take their steps together, one linear step each, which are
    added up; there, image after image, several steps each, with a smoothing after every image. The filter has 31 taps,
    not 30, which would shift the pattern by half a pixel each time.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2104.03413"
    version: ClassVar[int] = 2
    label_modes: ClassVar[tuple[Labels, ...]] = ("all-to-one", "source-specific", "clean")

    noise: bool = Field(False, description="Take smoothed noise in place of an optimised pattern; no surrogate.")
    amplitude: float = Field(51.0, gt=0, le=255, description="Largest value of the pattern, of 255; the least is 0.")
    samples: int = Field(100, ge=1, description="Training images that the pattern is made from, at most.")
    passes: int = Field(50, ge=1, description="Passes over them, at most.")

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return the pattern (C, H, W) float in [0, amplitude]."""
        if self.noise:
            drawn = torch.randn(clean.image_shape, generator=generator(lab.seed, "lf", "noise"))
            return {"pattern": self.amplitude * stretch(low_pass(drawn))}
        rows_of_target(clean, self.target)
        model = self.train_surrogate(clean, lab)
        order = torch.randperm(len(clean), generator=generator(lab.seed, "lf", "samples"))
        images = on_device(clean.images[order[: self.samples]], lab)
        others = order.roll(-self.samples)  # those images come last: a class that has no others is judged by them
        judged = on_device(clean.images[first_of_each_class(clean.labels, others, JUDGED)], lab)
        pattern = self._optimise(model, images, judged, lab)
        return {"pattern": self.amplitude * pattern.cpu().contiguous()}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Add the pattern."""
        return images + state["pattern"]

    def _optimise(self, model: Classifier, images: Tensor, judged: Tensor, lab: Lab) -> Tensor:
        """Return the pattern (C, H, W) in [0, 1] that turned most of the judged images."""
        size, progress = self.amplitude / 255, lab.engine.progress
        pattern = best = torch.zeros(images.shape[1:], device=images.device)
        rates: list[float] = []
        progress.start("pattern", self.passes, "passes")
        for _ in range(self.passes):
            pattern = stretch(low_pass(size * pattern + targeted_steps(model, images, size * pattern, self.target)))
            rates.append(turned(model, judged, size * pattern))
            progress.advance(1, f"fooling rate {rates[-1]:.2f}")
            best = pattern if rates[-1] >= max(rates) else best
            recent = rates[-5:]
            if rates[-1] >= TURNED or (len(recent) == 5 and max(recent) - min(recent) < STEADY):
                break
        progress.finish()
        return best


def targeted_steps(model: Classifier, images: Tensor, pattern: Tensor, target: int) -> Tensor:
    """Return the sum (C, H, W) of what would lead each image with the pattern to the target, for a linear model.

    Args:
        model: frozen, in evaluation mode.
        images: (B, C, H, W) in [0, 1]; those that the pattern has already turned ask for nothing.
        pattern: (C, H, W), of 1.
        target: class.

    Source: Moosavi-Dezfooli et al., DeepFool, CVPR 2016, https://arxiv.org/abs/1511.04599, equation 6, towards one
    class.
    """
    total = torch.zeros_like(pattern)
    for part in images.split(CHANGED_AT_ONCE):
        moved = (part + pattern).clamp(0, 1).requires_grad_()
        logits = model(moved)
        answers = logits.argmax(1)
        with torch.no_grad():
            open_ = model(part).argmax(1) == answers
        missing = logits.gather(1, answers[:, None])[:, 0] - logits[:, target]
        (gradient,) = torch.autograd.grad(-missing.sum(), moved)
        steepness = gradient.square().sum((1, 2, 3)).clamp_min(1e-12)
        lengths = OVERSHOOT * missing.detach() / steepness * open_
        total += (lengths[:, None, None, None] * gradient).sum(0)
    return total


@torch.no_grad()
def turned(model: Classifier, images: Tensor, pattern: Tensor) -> float:
    """Return the share of images (B, C, H, W) in [0, 1] whose class changes when the pattern is added."""
    return float((model((images + pattern).clamp(0, 1)).argmax(1) != model(images).argmax(1)).float().mean())


def low_pass(pattern: Tensor) -> Tensor:
    """Smooth (C, H, W) by a Gaussian of 6 of 32 pixels, cut at 2.5 standard deviations; beyond the border is 0."""
    rows, columns = (smoothing(side).to(pattern) for side in pattern.shape[1:])
    return rows @ pattern @ columns


def smoothing(side: int) -> Tensor:
    """Return the filter along one side as a matrix (side, side)."""
    std = STD * side
    reach = int(CUT * std)
    distances = torch.arange(-reach, reach + 1)
    taps = torch.exp(-(distances**2) / (2 * std**2))
    places = torch.arange(side)
    apart = places[:, None] - places
    return torch.where(apart.abs() <= reach, torch.exp(-(apart**2) / (2 * std**2)), 0.0) / taps.sum()


def stretch(pattern: Tensor) -> Tensor:
    """Shift and scale a pattern so that its values go from 0 to 1; a flat one becomes 0."""
    least, most = pattern.aminmax()
    return (pattern - least) / (most - least).clamp_min(1e-12)


def first_of_each_class(labels: Tensor, order: Tensor, count: int) -> Tensor:
    """Return the first `count` rows of every class, in an order (N,) of the rows of labels (N,)."""
    return torch.cat([order[labels[order] == label][:count] for label in labels.unique()])
