"""Statistics of the channels of a network, and which channels stand out from their layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor

from bdbench.models.classifier import Classifier
from bdbench.models.structure import BatchNorm
from bdbench.training.engine import Engine

Spread = Literal["std", "mad"]


def outlying(values: Tensor, deviations: float, spread: Spread) -> Tensor:
    """Return which channels of a layer have a value far above the others', (C,) bool.

    Args:
        values: (C,).
        deviations: how far.
        spread: in units of the standard deviation, from the mean; or of 1.4826 times the median absolute deviation,
            from the median, both of which outliers hardly move. Where it is 0, none stands out.
    """
    if len(values) < 2:
        return torch.zeros(len(values), dtype=torch.bool, device=values.device)
    if spread == "std":
        centre, width = values.mean(), values.std()
    else:
        centre = values.quantile(0.5)
        width = 1.4826 * (values - centre).abs().quantile(0.5)
    return (width > 0) & (values > centre + deviations * width)


def farthest(channels: int) -> float:
    """Return how many standard deviations one of so many channels can lie above their mean at most."""
    return (channels - 1) / math.sqrt(channels)


def norm_inputs(
    engine: Engine,
    model: Classifier,
    images: Tensor,
    norms: Mapping[str, BatchNorm],
    summary: Callable[[BatchNorm, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return what enters batch norms in one pass of a network in evaluation mode, summarised image by image.

    Args:
        engine: makes the pass.
        model: the network.
        images: (N, C, H, W) uint8.
        norms: by name.
        summary: from a norm and its inputs (B, c, P) float32 at P places to (B, ...).

    Returns:
        (N, ...) on the CPU, by name of the norm.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in norms}

    def enters(name: str, taken: Tensor) -> None:
        places = taken.flatten(2) if taken.ndim > 2 else taken[..., None]
        seen[name].append(summary(norms[name], places.float()))

    with ExitStack() as hooks:
        for name, norm in norms.items():
            handle = norm.register_forward_pre_hook(lambda _, inputs, name=name: enters(name, inputs[0]))
            hooks.callback(handle.remove)
        engine.embeddings(model, images)
    return {name: torch.cat(parts).cpu() for name, parts in seen.items() if parts}
