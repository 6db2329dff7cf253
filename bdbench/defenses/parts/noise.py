"""Noise on the weights and biases of batch norms that raises a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bdbench.models.structure import BatchNorm


def noisy(norms: Mapping[str, BatchNorm], noise: Tensor, factors: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
    """Return the weights and biases of norms under noise, by name, for `replacing.called`.

    A weight w becomes w * (m + d), a bias b becomes b * (1 + x).

    Args:
        norms: by name, with C channels in all.
        noise: (2, C), d and x, in the order of the norms.
        factors: m for each norm; default: 1.
    """
    sizes = [len(norm.weight) for norm in norms.values()]
    changed: dict[str, Tensor] = {}
    for index, ((name, norm), d, x) in enumerate(
        zip(norms.items(), noise[0].split(sizes), noise[1].split(sizes), strict=True)
    ):
        changed[f"{name}.weight"] = norm.weight * (d + (1 if factors is None else factors[index]))
        changed[f"{name}.bias"] = norm.bias * (1 + x)
    return changed


def harmful(
    norms: Mapping[str, BatchNorm], loss: Callable[[Tensor], Tensor], eps: float, steps: int, *, project: bool
) -> Tensor:
    """Return noise (2, C) for `noisy`, drawn evenly from [-eps, eps] and moved up the loss.

    Every step moves each value by eps / steps, as the sign of its gradient says. So a value ends within 2 * eps, and
    within eps if it is projected.

    Args:
        norms: by name, with C channels in all.
        loss: from noise to the loss.
        eps: how large the noise is when it is drawn.
        steps: up the loss.
        project: clip it to [-eps, eps] after every step.
    """
    first = next(iter(norms.values())).weight
    noise = torch.empty(2, sum(len(norm.weight) for norm in norms.values()), device=first.device).uniform_(-eps, eps)
    for _ in range(steps):
        (slope,) = torch.autograd.grad(loss(noise.requires_grad_()), noise)
        noise = noise.detach() + eps / steps * slope.sign()
        if project:
            noise = noise.clamp(-eps, eps)
    return noise.detach()
