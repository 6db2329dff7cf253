"""LC: images of the target class, made hard to recognise, with a patch in every corner."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Lab, Labels, Occasion, State
from bdbench.attacks.parts.surrogates import SurrogateAttack, change_images
from bdbench.data import ImageDataset
from bdbench.models.classifier import Classifier

RIGHT_CORNER = [[-1, -1, 1], [-1, 1, -1], [1, -1, 1]]
"""Signs of what is added; left corners are its mirror image."""


class LabelConsistent(SurrogateAttack):
    """Images of the target class are perturbed until they are hard to learn, and get a small patch in all corners.

    Clean-label. What is left to learn from such an image is the patch; at test time the patch alone, without a
    perturbation, calls the target. The perturbation is untargeted PGD on a surrogate, away from the true class. The
    patch is added, +-255 times `amplitude`, and clipped.

    The surrogate is trained adversarially unless `--no-surrogate-adversarial`: perturbations of such a network change
    what an image shows and so carry over to the victim's. The default rate, 5 % of the set, is half of a CIFAR-10
    class.

    Paper: Turner et al., Label-Consistent Backdoor Attacks, 2019, https://arxiv.org/abs/1912.02771.

    Differs from the published code: the perturbed images are made here, not downloaded, in 100 steps of 1.5/255 within
    8/255 as in BackdoorBench and BackdoorBox. The surrogate's adversarial training takes one step a batch.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1912.02771"
    label_modes: ClassVar[tuple[Labels, ...]] = ("clean",)

    rate: float | None = Field(0.05, ge=0, le=1, description="Poisoned share of the whole training split.")
    labels: Labels = Field("clean", description="The target class only, labels kept.")
    surrogate_adversarial: bool = Field(
        True, description="Train the surrogate against perturbations of up to 8/255 (one step, random start)."
    )
    epsilon: float = Field(8.0, ge=0, le=255, description="Largest change of a value by the perturbation, of 255.")
    alpha: float = Field(1.5, gt=0, le=255, description="Step of the perturbation, of 255.")
    steps: int = Field(100, ge=1, description="Steps of the perturbation.")
    amplitude: float = Field(1.0, gt=0, le=1, description="Strength of the patch: +-255 times this is added.")

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return what is added (1, H, W) float, in -255..255."""
        _, height, width = clean.image_shape
        return {"added": 255 * self.amplitude * corner_signs(height, width)}

    def craft(self, clean: ImageDataset, rows: Tensor, state: State, lab: Lab) -> Tensor:
        """Perturb the images that will be poisoned."""
        model = self.train_surrogate(clean, lab)
        labels = clean.labels[rows].to(lab.engine.device)

        def change(images: Tensor, places: Tensor) -> Tensor:
            with lab.engine.autocast():
                return pgd(model, images, labels[places], self.epsilon / 255, self.alpha / 255, self.steps)

        return change_images(lab, "perturbation", clean.images[rows], change)

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Add the patches."""
        return images + state["added"]


def pgd(model: Classifier, images: Tensor, labels: Tensor, epsilon: float, alpha: float, steps: int) -> Tensor:
    """Return images that a frozen model finds harder: signed gradient ascent of the cross entropy, no random start.

    Args:
        model: frozen, in evaluation mode.
        images: (B, C, H, W) in [0, 1]; each is changed whatever the others are.
        labels: (B,) int64.
        epsilon: largest change of a value, of 1.
        alpha: step, of 1.
        steps: how many.

    Returns:
        (B, C, H, W) in [0, 1].

    Source: Madry et al., ICLR 2018, https://arxiv.org/abs/1706.06083.
    """
    low, high = (images - epsilon).clamp(0, 1), (images + epsilon).clamp(0, 1)
    moved = images
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(moved), labels, reduction="sum"), moved)
        moved = torch.minimum(torch.maximum(moved.detach() + alpha * gradient.sign(), low), high)
    return moved.detach()


def corner_signs(height: int, width: int) -> Tensor:
    """Return (1, H, W) float: 1 and -1 in the four corners, 0 elsewhere.

    A patch is 3 of 32 pixels wide, at least 3, and enlarged without smoothing.
    """
    size = max(3, round(3 * min(height, width) / 32))
    right = F.interpolate(torch.tensor(RIGHT_CORNER).float()[None, None], size=(size, size), mode="nearest")[0]
    signs = torch.zeros(1, height, width)
    for rows in (slice(None, size), slice(-size, None)):
        signs[:, rows, -size:] = right
        signs[:, rows, :size] = right.flip(2)
    return signs
