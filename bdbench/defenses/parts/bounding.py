"""Upper bounds on outputs of a network, which are trained while its weights stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from bdbench.defenses.parts.replacing import called
from bdbench.models.bounds import BOUND, UpperBounds
from bdbench.models.classifier import Classifier
from bdbench.models.structure import frozen
from bdbench.models.wrappers import wrap


def bounded(
    model: Classifier, sites: Sequence[str], per: Literal["channel", "place"], image_shape: tuple[int, int, int]
) -> Classifier:
    """Give a network, in place, infinite bounds at some modules, and return it in evaluation mode, frozen.

    Raises:
        OptionError: it has bounds already, or a module cannot have one.
    """
    return frozen(wrap(model, UpperBounds(sites=tuple(sites), per=per), image_shape))


class Bounds(nn.Module):
    """Bounds that are trained, one tensor for each site of a network; the network is no part of it.

    Args:
        network: see `bounded`.
    """

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network = (network,)  # in a tuple, so that it is no part
        self.names = [name for name, _ in network.named_buffers() if name.rpartition(".")[2] == BOUND]
        self.limits = nn.ParameterList([network.get_buffer(name).clone() for name in self.names])

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of images (B, C, H, W) in [0, 1] with the bounds as they are."""
        return called(self.network[0], dict(zip(self.names, self.limits, strict=True)), images)

    @torch.no_grad()
    def start(self, limits: Sequence[Tensor]) -> None:
        """Set the bounds."""
        for own, limit in zip(self.limits, limits, strict=True):
            own.copy_(limit.expand_as(own))

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the bounds from being negative: at the start of every call of the loss, and after the phase."""
        for limit in self.limits:
            limit.clamp_(min=0)

    @torch.no_grad()
    def write(self) -> Classifier:
        """Set the network's bounds to these, and return it."""
        self.clamp()
        for name, limit in zip(self.names, self.limits, strict=True):
            self.network[0].get_buffer(name).copy_(limit)
        return self.network[0]
