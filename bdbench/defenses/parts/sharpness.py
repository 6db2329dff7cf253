"""Sharpness-aware minimisation as a loss: its gradient is that of the loss a step uphill, or of both together."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bdbench.models.classifier import Classifier
from bdbench.models.structure import untracked_norms

Landscape = Callable[[Mapping[str, Tensor]], Tensor]
"""From parameters by name to the loss."""


def uphill(model: Classifier, loss: Landscape, rho: float, *, adaptive: bool) -> Tensor:
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
    weights = trained(model)
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


def with_flat_gradient(model: Classifier, loss: Landscape, radius: float, share: float) -> Tensor:
    """Return (1 - share) of the loss at the weights and `share` of it a step uphill, a step in each tensor of its own.

    As a function of the weights w its gradient is (1 - share) g(w) + share g(w + e), where e = radius * g / |g| in each
    tensor: nearly that of the loss with a penalty on the length of its gradient. Running statistics of norms move in
    the first pass only.

    Source: Zhao et al., Penalizing Gradient Norm for Efficiently Improving Generalization, ICML 2022.

    Args:
        model: whose parameters with gradients are meant.
        loss: from parameters by name to the loss.
        radius: length of the step in each tensor.
        share: in [0, 1].
    """
    weights = trained(model)
    here = loss(weights)
    slopes = torch.autograd.grad(here, list(weights.values()))
    moved, pulls = {}, []
    for (name, weight), slope in zip(weights.items(), slopes, strict=True):
        moved[name] = weight + radius * slope / slope.norm().clamp_min(1e-12)
        pulls.append(((weight - weight.detach()) * slope).sum())  # 0, with the gradient that is known
    with untracked_norms(model):
        there = loss(moved)
    return (1 - share) * (here.detach() + torch.stack(pulls).sum()) + share * there


def trained(model: Classifier) -> dict[str, Tensor]:
    """Return the parameters that have gradients, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
