"""NAD: fine-tune the suspect while its attention is drawn to that of a copy that was fine-tuned before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.repair.base import Repair, copied
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import embed_with_stages, frozen, stages_of
from bdbench.training.loop import Batch, mean_cross_entropy

PAPER: Mapping[str, Any] = {
    "teacher_epochs": 10, "epochs": 20, "batch_size": 64, "lr": 0.1, "weight_decay": 1e-4,
    "schedule": "step", "milestones": (0.1, 1.0),
}  # fmt: skip


class NeuralAttentionDistillation(Repair):
    """Fine-tunes the suspect while its attention is drawn to that of a copy that was fine-tuned before.

    1. `teacher`: a copy of the suspect is fine-tuned on the trusted images, and frozen. 2. `student`: another copy is
    fine-tuned on them, with cross entropy plus, for each of the last three stages, a weight times the squared distance
    between the attention of both. Attention is the sum over channels of |map|^power, scaled to length 1. The last epoch
    is kept.

    Paper: Li et al., Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks, ICLR 2021,
    https://arxiv.org/abs/2101.05930.

    The published weights, 500, 1,000 and 1,000, are for a mean over the 32x32, 16x16 and 8x8 places of a map; here they
    are for the sum, 500 / 1,024 and so on, which does not change with the size of the images. The code also cuts 3x3
    pixels out of the images (`--augment crop,flip,cutout` cuts larger ones), and keeps the epoch that looks best on
    test images and their triggered copies; here the last one is kept. Its learning rate falls after two epochs, in
    both phases; here after a tenth of each. In BackdoorBench the last stage of a pre-activation ResNet is taken behind
    its average, where attention is always 1 and nothing is distilled.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2101.05930"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": PAPER, "fast": {**PAPER, "teacher_epochs": 5, "epochs": 10}, "tiny": {**PAPER, "batch_size": 16},
    }  # fmt: skip

    teacher_epochs: int = Field(10, ge=1, description="Passes over the trusted images for the teacher.")
    attention: tuple[float, float, float] = Field(
        (500 / 1024, 1000 / 256, 1000 / 64), description="Weights of the attention of the last three stages."
    )
    power: float = Field(2.0, gt=0, description="Power of a map's values that attention sums over channels.")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Fine-tune the teacher, then the student."""
        stages = stages_of(suspect, trusted.image_shape)[-3:]
        if not stages:
            raise OptionError(
                "method 'nad' works on the maps that end the stages of a network, and this network has none; choose a "
                "network of convolutions, such as wrn-16-1, preact-resnet-18, resnet-18 or convnet"
            )
        recipe = task.recipe.model_copy(update={"epochs": self.teacher_epochs})
        teacher = frozen(task.engine.fit(copied(suspect), trusted, mean_cross_entropy, recipe, phase="teacher"))

        def loss(model: Classifier, batch: Batch) -> Tensor:
            embedding, maps = embed_with_stages(model, stages, batch.images)
            with torch.no_grad():
                _, wanted = embed_with_stages(teacher, stages, batch.images)
            apart = distances(maps, wanted, self.power)
            total = F.cross_entropy(model.classify(embedding), batch.labels)
            weighted = zip(self.attention[-len(stages) :], apart, strict=True)
            return sum((weight * distance for weight, distance in weighted), total)

        return Defended(task.engine.fit(copied(suspect), trusted, loss, task.recipe, phase="student", compiled=False))


def attention_of(maps: Tensor, power: float) -> Tensor:
    """Return where maps (B, C, h, w) are large: (B, h * w), not negative, of length 1 (0 where all is 0)."""
    summed = maps.float().abs().pow(power).sum(1).flatten(1)
    length: Tensor = summed.norm(dim=1, keepdim=True)
    return summed / (length + 1e-6)


def distances(maps: Sequence[Tensor], wanted: Sequence[Tensor], power: float) -> list[Tensor]:
    """Return for each stage the mean over images of the squared distance of attention, each at most 2.

    Args:
        maps, wanted: (B, C, h, w) of each stage.
        power: see `attention_of`.
    """
    return [
        (attention_of(own, power) - attention_of(other, power)).square().sum(1).mean()
        for own, other in zip(maps, wanted, strict=True)
    ]
