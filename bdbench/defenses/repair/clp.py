"""CLP: prune the channels to which small changes of an image matter too much; no images needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.masks import prune
from bdbench.defenses.repair.outliers import OutlierPruning
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import BatchNorm, named_norms, pairs


class ChannelLipschitzPruning(OutlierPruning):
    """Prunes the channels whose Lipschitz bound stands out from their layer: a trigger changes them most.

    The bound of a channel is the largest singular value of its filter, as a matrix of input channels by places, times
    |weight| / sqrt(running variance) of the batch norm that takes its output. A channel is pruned if its bound lies
    more than `deviations` standard deviations above the mean of its layer. It needs no image and takes a moment.

    Among n channels none can lie more than (n - 1) / sqrt(n) deviations out: 3.75 of 16, 2.85 of 10. Narrow networks
    lose few channels therefore; `--spread mad` has no such limit.

    Paper: Zheng et al., Data-free Backdoor Removal based on Channel Lipschitzness, ECCV 2022,
    https://arxiv.org/abs/2208.03111.

    The published codes pair convolutions and norms by the order in which modules are registered. In pre-activation
    networks that takes the norm of a sum for the norm of one convolution. Here a pair is found by data flow, and
    convolutions whose output no norm takes by itself stay (`--unpaired weight` judges them by the filter alone, and
    zeroes it). The codes divide by the root of the variance alone, which is 0 where a channel is dead; here the norm's
    eps is added.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2208.03111"
    threat: ClassVar[str] = "the defender has the backdoored model only"
    needs_trusted: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "fast": {}, "tiny": {"deviations": 2.0}}

    unpaired: Literal["skip", "weight"] = Field(
        "skip", description="Convolutions without a norm of their own: left alone, or judged by their filters."
    )

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:  # noqa: ARG002
        """Prune a copy."""
        norms = named_norms(suspect, "clp")
        fed = [pair for pair in pairs(suspect, task.train.image_shape) if _is_tracked(norms.get(pair.norm))]
        if not fed:
            raise OptionError(
                "method 'clp' needs convolutions whose output a batch norm takes, and this network has none; choose a "
                "network that has them, such as wrn-16-1, preact-resnet-18, resnet-18 or convnet"
            )
        convs = {name: part for name, part in suspect.named_modules() if isinstance(part, nn.Conv2d)}
        bounds = {pair.norm: bounds_of(convs[pair.conv], norms[pair.norm]) for pair in fed}
        if self.unpaired == "weight":
            alone = convs.keys() - {pair.conv for pair in fed}
            bounds |= {name: filter_norms(part.weight) for name, part in convs.items() if name in alone}
        return self.without(task, suspect, self.standing_out(bounds), _cut)


def bounds_of(conv: nn.Conv2d, norm: BatchNorm) -> Tensor:
    """Return the Lipschitz bounds (C,) of the channels of a convolution with its norm, float64, on the CPU."""
    assert norm.running_var is not None
    scale = norm.weight.detach().abs().cpu().double() / (norm.running_var.cpu().double() + norm.eps).sqrt()
    return filter_norms(conv.weight) * scale


def filter_norms(weight: Tensor) -> Tensor:
    """Return the largest singular value (O,) of each filter of a convolution (O, I, kh, kw), float64, on the CPU.

    A filter is taken for a matrix (I, kh * kw).
    """
    values: Tensor = torch.linalg.svdvals(weight.detach().cpu().double().flatten(2))
    return values.amax(1)


def _is_tracked(norm: BatchNorm | None) -> bool:
    """Say whether a norm, if there is one, has running statistics."""
    return norm is not None and norm.running_var is not None


@torch.no_grad()
def _cut(model: Classifier, channels: dict[str, Tensor]) -> dict[str, int]:
    """Zero channels of batch norms, with their biases, and filters of convolutions."""
    parts = dict(model.named_modules())
    filters = {name: gone for name, gone in channels.items() if isinstance(parts[name], nn.Conv2d)}
    for name, gone in filters.items():
        for parameter in parts[name].parameters():
            parameter[gone.to(parameter.device)] = 0
    pruned = prune(model, {name: gone for name, gone in channels.items() if name not in filters}, bias=True)
    return pruned | {name: int(gone.sum()) for name, gone in filters.items() if gone.any()}
