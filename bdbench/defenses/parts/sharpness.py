"""Sharpness-aware minimisation as a loss: its gradient is that of the loss a step uphill."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bdbench.models.classifier import Classifier
from bdbench.models.structure import untracked_norms


def uphill(model: Classifier, loss: Callable[[Mapping[str, Tensor]], Tensor], rho: float, *, adaptive: bool) -> Tensor:
    """Return the loss at the weights plus a step of length `rho` along its gradient.

    As a function of the weights w it has exactly the gradient at w + e, where e = rho * g / |g|, or, adaptive,
    e = rho * w^2 * g / | |w| * g |, each with one norm over all parameters. Running statistics of norms move in the
    first pass only.

    Sources: Foret et al., Sharpness-Aware Minimization, ICLR 2021; Kwon et al., ASAM, ICML 2021.

    Args:
        model: whose parameters with gradients are meant.
        loss: from parameters by name to the loss.
        rho: length of the step.
        adaptive: measure it in units of the weights.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    slopes = torch.autograd.grad(loss(weights), list(weights.values()))
    scales = [weight.detach().abs() if adaptive else torch.ones_like(weight) for weight in weights.values()]
    length = torch.stack([(scale * slope).norm() for scale, slope in zip(scales, slopes, strict=True)]).norm()
    factor = rho / length.clamp_min(1e-12)
    moved = {
        name: weight + factor * scale.square() * slope
        for (name, weight), scale, slope in zip(weights.items(), scales, slopes, strict=True)
    }
    with untracked_norms(model):
        return loss(moved)
