"""A mask for every channel of every batch norm, and pruning by it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bdbench.models.classifier import Classifier
from bdbench.models.structure import BatchNorm, named_norms


class Masks(nn.Module):
    """A factor in [0, 1] for the weight of each channel of each batch norm of a network, at first 1.

    The network is no part of it: its weights stay as they are, and `changed` says what takes their place in
    `replacing.called`.

    Args:
        model: the network.
        method: whose masks they are, for the message of the error.

    Raises:
        OptionError: the network has no batch norms.
    """

    def __init__(self, model: Classifier, method: str) -> None:
        super().__init__()
        self.norms = named_norms(model, method)
        self.factors = nn.ParameterList([torch.ones_like(norm.weight) for norm in self.norms.values()])

    def changed(self) -> dict[str, Tensor]:
        """Return the weights of all norms, times their masks, by name."""
        return {
            f"{name}.weight": norm.weight.detach() * factor
            for (name, norm), factor in zip(self.norms.items(), self.factors, strict=True)
        }

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring the masks back into [0, 1]: at the start of every call of the loss, and after the phase."""
        for factor in self.factors:
            factor.clamp_(0, 1)

    def by_norm(self) -> dict[str, Tensor]:
        """Return the masks (C,), detached, by the name of their norm."""
        return {name: factor.detach().clone() for name, factor in zip(self.norms, self.factors, strict=True)}


@torch.no_grad()
def prune(model: Classifier, channels: dict[str, Tensor], *, bias: bool) -> dict[str, int]:
    """Set the weights of channels of batch norms to 0, in place; return how many of each norm.

    After a norm that follows its convolution the channel is gone, or is what its bias makes it. In a pre-activation
    block the first norm takes a sum: the channel leaves that branch only.

    Args:
        model: the network.
        channels: (C,) bool by the name of a norm, which channels.
        bias: set their biases to 0 too.
    """
    norms = {name: part for name, part in model.named_modules() if isinstance(part, BatchNorm)}
    for name, gone in channels.items():
        norm = norms[name]
        norm.weight.masked_fill_(gone.to(norm.weight.device), 0)
        if bias:
            norm.bias.masked_fill_(gone.to(norm.bias.device), 0)
    return {name: int(gone.sum()) for name, gone in channels.items() if gone.any()}
