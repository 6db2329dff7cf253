"""Perturbations that stay in a ball: each image its own, or one for all images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bdbench.data import ImageDataset
from bdbench.training.engine import Engine
from bdbench.training.loop import Batch
from bdbench.training.recipe import Recipe

Norm = Literal["linf", "l2", "l1"]


class Ball(NamedTuple):
    """The perturbations (C, H, W) whose norm is at most the radius, in pixel units: images are in [0, 1]."""

    norm: Norm
    radius: float


def projected(delta: Tensor, ball: Ball) -> Tensor:
    """Return the nearest point of a ball, for each of the perturbations (N, C, H, W) by itself.

    What is not finite stays so, or makes its whole perturbation so. The L1 ball takes the same amount off the size of
    every pixel, down to 0: Duchi et al., Efficient Projections onto the l1-Ball, ICML 2008.
    """
    if ball.norm == "linf":
        return torch.where(delta.isfinite(), delta.clamp(-ball.radius, ball.radius), delta)
    sizes = delta.abs()
    largest = sizes.amax((1, 2, 3), keepdim=True)
    if ball.norm == "l2":
        scale = largest.clamp_min(1e-12)  # else large numbers, squared, would be infinite
        length: Tensor = scale * torch.linalg.vector_norm(delta / scale, dim=(1, 2, 3), keepdim=True)
        return delta * (ball.radius / length.clamp_min(1e-12)).clamp_max(1)
    # no pixel keeps more than the radius: all lowered until the largest is there, large numbers need not cancel
    sizes = torch.where(largest > ball.radius, (ball.radius - (largest - sizes)).clamp_min(0), sizes)
    totals = sizes.flatten(1).sort(1, descending=True).values.cumsum(1)
    excess = (totals - ball.radius) / torch.arange(1, totals.shape[1] + 1, device=delta.device)
    taken = excess.amax(1).clamp_min(0).view(-1, 1, 1, 1)
    return delta.sign() * (sizes - taken).clamp_min(0)


def perturb(
    images: Tensor, objective: Callable[[Tensor], Tensor], ball: Ball, *, steps: int, step: float,
    start: float = 0.0, valid: bool = False,
) -> Tensor:  # fmt: skip
    """Return a perturbation (B, C, H, W) of each image, detached, after steps along the sign of the gradient.

    A gradient that is not finite makes the perturbation so: the sign of nan would be 0, and nobody would know. Nothing
    waits for the device. No gradient reaches weights.

    Args:
        images: (B, C, H, W) in [0, 1].
        objective: from perturbed images to the scalar that is to fall.
        ball: where each perturbation stays.
        steps: how many.
        step: how far a pixel moves in one, in pixel units.
        start: the value of every pixel of the perturbation at first; projected.
        valid: keep perturbed images in [0, 1] too.
    """

    def fitted(delta: Tensor) -> Tensor:
        inside = projected(delta, ball)
        return (images + inside).clamp(0, 1) - images if valid else inside

    delta = fitted(torch.full_like(images, start))
    for _ in range(steps):
        delta.requires_grad_()
        (slope,) = torch.autograd.grad(objective(images + delta), delta)
        direction = torch.where(slope.isfinite(), slope.sign(), math.nan)
        delta = fitted(delta.detach() - step * direction)
    return delta


class Universal(nn.Module):
    """One perturbation (1, C, H, W) of all images, at first 0.

    Args:
        image_shape: (C, H, W).
        ball: where it stays; None for anywhere.
        valid: keep perturbed images in [0, 1].
    """

    def __init__(self, image_shape: tuple[int, int, int], ball: Ball | None, *, valid: bool) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(1, *image_shape))
        self.ball, self.valid = ball, valid

    def forward(self, images: Tensor) -> Tensor:
        """Perturb images (B, C, H, W) in [0, 1]."""
        return added(images, self.delta, valid=self.valid)

    @torch.no_grad()
    def project(self) -> None:
        """Bring it back into its ball: at the start of every call of the loss, and after the phase."""
        if self.ball is not None:
            self.delta.copy_(projected(self.delta, self.ball))


def added(images: Tensor, delta: Tensor, *, valid: bool) -> Tensor:
    """Return images (B, C, H, W) with a perturbation, cut to [0, 1] if they are to be valid."""
    return (images + delta).clamp(0, 1) if valid else images + delta


def universal(
    engine: Engine, data: ImageDataset, objective: Callable[[Universal, Batch], Tensor], recipe: Recipe, *,
    phase: str, ball: Ball | None, valid: bool, lr_flag: str,
) -> Tensor:  # fmt: skip
    """Return one perturbation (1, C, H, W) of all images, on the engine's device, found by plain gradient descent.

    Args:
        engine: trains it, as a phase of its own.
        data: the images.
        objective: from the perturbation and a batch to the scalar that is to fall; its networks are frozen.
        recipe: epochs, batch size and rate; its momentum and weight decay play no part.
        phase: see `Engine.fit`.
        ball: where it stays; None for anywhere.
        valid: keep perturbed images in [0, 1].
        lr_flag: what sets the rate, for the message of an error.

    Raises:
        TrainingError: it is not finite.
    """

    def loss(perturbation: Universal, batch: Batch) -> Tensor:
        perturbation.project()
        return objective(perturbation, batch)

    found = Universal(data.image_shape, ball, valid=valid)
    descent = torch.optim.SGD(found.parameters(), recipe.lr)
    engine.fit(found, data, loss, recipe, phase=phase, optimizer=descent, lr_flag=lr_flag)
    found.project()
    return found.delta.detach()
