"""NPD: a linear map of channels inside the suspect that turns perturbed features back, folded into its convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.perturbing import Ball, perturb
from bdbench.defenses.parts.replacing import called
from bdbench.defenses.repair.base import Repair, copied
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import convolutions
from bdbench.training.engine import others_over_own
from bdbench.training.loop import Batch

PAPER: Mapping[str, Any] = {
    "epochs": 50, "batch_size": 128, "lr": 0.01, "weight_decay": 5e-4, "nesterov": False, "augment": "none",
}  # fmt: skip
ENOUGH = 0.6
"""Share of a batch that answers the wanted class, from which its perturbations rest."""


class Search(NamedTuple):
    """How perturbations are looked for: radius, steps, change of a pixel in one, value of a pixel at first."""

    radius: float
    steps: int
    step: float
    start: float


SEARCHES = {"l2": Search(3.0, 2, 0.1, 0.0), "linf": Search(0.2, 10, 0.44, 0.2)}
"""Those of the published code."""


class NPD(Repair):
    """Trains a linear map of the channels inside the suspect, a neural polarizer; every weight of the suspect stays.

    The map, at first the identity, stands before a convolution of the last stage. For every batch each trusted image
    gets a perturbation towards the most likely class that is not its label. The map learns the labels of the clean
    images (`clean_weight`), the suspect's answers to the clean images on the perturbed ones (`same_weight`), and to
    give neither the most likely wrong class (`wrong_weight`) nor the wanted one (`wanted_weight`) there. A linear map
    and a convolution are one convolution, so the mended network has the suspect's architecture.

    Paper: Zhu et al., Neural Polarizer: A Lightweight and Effective Backdoor Defense via Purifying Poisoned Features,
    NeurIPS 2023, https://arxiv.org/abs/2306.16697. Its code puts a batch norm behind the map and first settles that for
    5 epochs; a norm cannot be folded, so there is none here, and nothing to settle. It knows one network, and puts the
    map before the first convolution of the last block; here that is the last but one of all, of any network, unless
    `--place` names another. `--ball linf` is its second variant.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2306.16697"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": PAPER,
        "fast": {**PAPER, "epochs": 10},
        "tiny": {**PAPER, "epochs": 30, "batch_size": 16, "lr": 0.05},
    }

    ball: Literal["l2", "linf"] = Field("l2", description="Norm that bounds the perturbations.")
    radius: float | None = Field(
        None, ge=0, description="Its largest value, pixels from 0 to 1; default: the ball's, 3 for l2, 0.2 for linf."
    )
    place: str | None = Field(
        None, description="Name of the convolution that takes the map; default: the last but one."
    )
    clean_weight: float = Field(1.0, ge=0, description="Weight of the clean images.")
    same_weight: float = Field(0.4, ge=0, description="Weight of the suspect's clean answers on perturbed images.")
    wrong_weight: float = Field(0.4, ge=0, description="Weight against the most likely wrong class.")
    wanted_weight: float = Field(0.4, ge=0, description="Weight against the class that a perturbation wants.")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Train the map, and fold it."""
        name = self._place(suspect, trusted)
        weight = f"{name}.weight"
        convolution = cast("nn.Conv2d", suspect.get_submodule(name))
        search = SEARCHES[self.ball]
        radius = search.radius if self.radius is None else self.radius

        def loss(polarizer: Polarizer, batch: Batch) -> Tensor:
            folded = {weight: polarizer.folded(convolution.weight)}
            clean = called(suspect, folded, batch.images)
            wanted = most_likely_wrong(clean.detach(), batch.labels)
            fixed = {weight: folded[weight].detach()}
            delta = perturb(
                batch.images, lambda seen: towards(called(suspect, fixed, seen), wanted),
                Ball(self.ball, radius), steps=search.steps, step=search.step, start=min(search.start, radius),
                valid=True,
            )  # fmt: skip
            perturbed = called(suspect, folded, batch.images + delta)
            with torch.no_grad():
                known = suspect(batch.images).argmax(1)
            return (
                self.clean_weight * F.cross_entropy(clean, batch.labels)
                + self.same_weight * F.cross_entropy(perturbed, known)
                + self.wrong_weight * avoided(perturbed, most_likely_wrong(perturbed.detach(), batch.labels))
                + self.wanted_weight * avoided(perturbed, wanted)
            )

        polarizer = task.engine.fit(Polarizer(convolution.in_channels), trusted, loss, task.recipe, phase="polarize")
        model = copied(suspect).eval()
        with torch.no_grad():
            model.get_parameter(weight).copy_(polarizer.folded(convolution.weight))
        return Defended(model, findings={"place": name})

    def _place(self, suspect: Classifier, trusted: ImageDataset) -> str:
        """Return the name of the convolution that takes the map."""
        names = convolutions(suspect, trusted.image_shape)
        if not names:
            raise OptionError(
                "method 'npd' puts a map before a convolution of all channels, and this network has none; choose a "
                "network that has, such as wrn-16-1, preact-resnet-18, resnet-18 or convnet"
            )
        if self.place is None:
            return names[-2:][0]
        if self.place not in names:
            raise OptionError(f"place '{self.place}' is no convolution of this network; choose of {', '.join(names)}")
        return self.place


class Polarizer(nn.Module):
    """A linear map of channels, at first the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(channels))

    def folded(self, weight: Tensor) -> Tensor:
        """Return the weight (O, I, h, w) of the convolution that does both, the map first."""
        return torch.einsum("ojhw,ji->oihw", weight, self.matrix)


def most_likely_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the most likely class (B,) but the label, of logits (B, K)."""
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


def towards(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the cross entropy to the wanted classes; where enough of the batch answers them, with a gradient of 0."""
    hits = (logits.argmax(1) == wanted).float().mean()
    return F.cross_entropy(logits, wanted) * (hits < ENOUGH)


def avoided(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the mean of -log(1 - p), p the probability (B,) of classes, from logits (B, K)."""
    return F.softplus(-others_over_own(logits, classes)).mean()
