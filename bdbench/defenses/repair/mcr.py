"""MCR: repair by mode connectivity, a point between the suspect and its fine-tuned copy on a trained curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.holding import accuracy, halves, strongest, unmet
from bdbench.defenses.parts.refreshing import refresh_norms
from bdbench.defenses.parts.replacing import called
from bdbench.defenses.repair.base import ChoosingRepair, copied
from bdbench.defenses.repair.ft import FAST, TINY, TUNING
from bdbench.models.classifier import Classifier
from bdbench.training.loop import Batch, mean_cross_entropy

POINTS = (0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5)
"""Points of a curve, from the weakest repair to the strongest: those near an end are near what is to be left; of two
as near, the one at the suspect's end is the weaker."""


class ModeConnectivity(ChoosingRepair):
    """Trains a curve of weights from the suspect to its fine-tuned copy, and returns a point far from both ends.

    With a and b the weights at the ends and m the bend, the curve is (1 - t)^2 a + 2 t (1 - t) m + t^2 b, t from 0 to
    1. The bend begins in the middle of the ends, and is trained on trusted images, each batch at another t drawn
    evenly: all of the curve classifies well, but what only its ends know is lost between them. Batch-norm statistics of
    a point are counted anew from the images that were trained with. The point is the one nearest to the middle whose
    accuracy on held-out images keeps within the tolerance; `--point 0.1`, the code's, is near the suspect.

    Paper: Zhao et al., Bridging Mode Connectivity in Loss Landscapes and Adversarial Robustness, ICLR 2020,
    https://arxiv.org/abs/2005.00060.

    The authors' code has two backdoored models as ends, takes half of the test set to train with, and prints the
    attack's success at many points, from which the reader chooses. The code in BackdoorBench never clears its
    gradients while it trains the curve, and moves the batch-norm statistics of the middle a little towards those of the
    point, in place of counting them anew. As in the authors' code the weight decay is of the weights of the curve, not
    of the bend; the learning rate falls by a cosine, where theirs is flat up to the middle and then falls in a line.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2005.00060"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": TUNING,
        "fast": {**FAST, "curve_epochs": 20},
        "tiny": {**TINY, "curve_epochs": 40, "curve_lr": 0.05},
    }

    curve_epochs: int = Field(100, ge=1, description="Passes over the trusted images to train the curve.")
    curve_lr: float = Field(0.01, gt=0, description="Learning rate of the curve.")
    point: float | None = Field(
        None, ge=0, le=1, description="Point of the curve, 0 at the suspect, 1 at its fine-tuned copy; default: chosen."
    )

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Fine-tune the other end, train the curve, choose a point."""
        engine = task.engine
        tune, held = halves(trusted, self.holdout, engine.seed) if self.point is None else (trusted, None)
        tuned = engine.fit(copied(suspect), tune, mean_cross_entropy, task.recipe, phase="tune")
        curve = Curve(suspect, tuned)
        self._train(task, curve, copied(suspect).train(), tune)

        def repaired(point: float) -> Classifier:
            model = copied(suspect)
            model.load_state_dict(curve.at(torch.tensor(point)), strict=False)
            refresh_norms(engine, model, tune.images, task.recipe.augment)
            return model

        if held is None or self.point is not None:
            return Defended(repaired(self.point or 0.0), findings={"chosen": self.point})
        before = accuracy(engine, suspect, held)
        choice = strongest(
            POINTS, lambda point: accuracy(engine, repaired(point), held), before, len(held), self.tolerance
        )
        if choice.setting is None:
            return Defended(suspect, findings={**choice.findings, "said": unmet(choice.findings), "unchanged": True})
        return Defended(repaired(choice.setting), findings=choice.findings)

    def _train(self, task: Task, curve: Curve, network: Classifier, data: ImageDataset) -> None:
        """Train the bend of a curve; `network` lends its structure, and its weights are not used."""
        recipe = task.recipe.model_copy(update={"epochs": self.curve_epochs, "lr": self.curve_lr, "weight_decay": 0.0})

        def loss(curve: Curve, batch: Batch) -> Tensor:
            weights = curve.at(torch.rand((), device=batch.images.device))
            decay = torch.stack([weight.square().sum() for weight in weights.values()]).sum()
            logits = called(network, weights, batch.images)
            return F.cross_entropy(logits, batch.labels) + task.recipe.weight_decay / 2 * decay

        task.engine.fit(curve, data, loss, recipe, phase="curve", compiled=False, lr_flag="--curve-lr")


class Curve(nn.Module):
    """A quadratic Bezier curve of all weights of a network; its bend is what is trained.

    Args:
        first, last: networks of one architecture, the ends; neither is a part of the curve.
    """

    def __init__(self, first: Classifier, last: Classifier) -> None:
        super().__init__()
        self.first, self.last = (dict(detached(end)) for end in (first, last))
        self.bend = nn.ParameterList([(self.first[name] + self.last[name]) / 2 for name in self.first])

    def at(self, point: Tensor) -> dict[str, Tensor]:
        """Return the weights at a point, () in [0, 1], by name."""
        rest = 1 - point
        return {
            name: rest.square() * self.first[name] + 2 * point * rest * bend + point.square() * self.last[name]
            for name, bend in zip(self.first, self.bend, strict=True)
        }


def detached(model: Classifier) -> dict[str, Tensor]:
    """Return the parameters of a network by name, without gradients."""
    return {name: weight.detach() for name, weight in model.named_parameters()}
