"""FT and FT-SAM: fine-tune the whole suspect on trusted images, plainly or with sharpness-aware minimisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.replacing import called
from bdbench.defenses.parts.sharpness import uphill
from bdbench.defenses.repair.base import Repair, copied
from bdbench.models.classifier import Classifier
from bdbench.training.loop import Batch, mean_cross_entropy

TUNING: Mapping[str, Any] = {"epochs": 100, "batch_size": 256, "lr": 0.01, "weight_decay": 5e-4, "nesterov": False}
"""How BackdoorBench fine-tunes, which is how most repairs are compared."""
FAST: Mapping[str, Any] = {**TUNING, "epochs": 20, "batch_size": 128}
TINY: Mapping[str, Any] = {**TUNING, "epochs": 20, "batch_size": 16, "lr": 0.05}


class FineTuning(Repair):
    """Fine-tunes the suspect on the trusted images: the baseline of every repair.

    Cross entropy, batch norm in training mode, the last epoch is kept. It has no paper of its own; `paper` is the
    setting of BackdoorBench (Wu et al., NeurIPS 2022), https://arxiv.org/abs/2206.12654. The learning rate is the
    method: 0.1 forgets far more than 0.01, of the backdoor and of the rest. `--trainable head` trains the last layer
    alone (a linear probe), `features` all but the last layer. Frozen features keep their batch-norm statistics.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2206.12654"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": TUNING, "fast": FAST, "tiny": TINY}

    trainable: Literal["all", "head", "features"] = Field("all", description="What is trained.")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Fine-tune a copy."""
        model = copied(suspect)
        model.features.requires_grad_(self.trainable != "head")
        model.head.requires_grad_(self.trainable != "features")
        tuned = task.engine.fit(
            model, trusted, mean_cross_entropy, task.recipe, phase="tune", frozen_norms=self.trainable == "head"
        )
        return Defended(tuned)


class FineTuningSAM(Repair):
    """Fine-tunes the suspect towards flat minima, which moves the weights that carry a backdoor further than FT does.

    Every step takes its gradient at the weights plus a step uphill of length `rho`, in units of the weights (adaptive).
    Two passes a step; running statistics of batch norm move in the first one only.

    Paper: Zhu et al., Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization, ICCV 2023,
    https://arxiv.org/abs/2304.11823. Its code, in BackdoorBench, steps the cosine schedule once a batch with a period
    of 100, so that its learning rate rises and falls, and the last epoch ends near the peak; here it falls once over
    all steps. Its label smoothing gives the other K - 1 classes the whole share; so it does here.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2304.11823"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": TUNING, "fast": FAST, "tiny": {**TINY, "rho": 0.5}}

    rho: float = Field(2.0, ge=0, description="Length of the step uphill.")
    adaptive: bool = Field(True, description="Measure it in units of the weights.")
    smoothing: float = Field(0.1, ge=0, lt=1, description="Share of a label that goes to the other classes.")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Fine-tune a copy."""
        others = trusted.num_classes - 1

        def loss(model: Classifier, batch: Batch) -> Tensor:
            def at(weights: Mapping[str, Tensor]) -> Tensor:
                logits = called(model, weights, batch.images)
                spread = self.smoothing * (others + 1) / max(1, others)
                return F.cross_entropy(logits, batch.labels, label_smoothing=min(spread, 1.0))

            return uphill(model, at, self.rho, adaptive=self.adaptive)

        return Defended(task.engine.fit(copied(suspect), trusted, loss, task.recipe, phase="tune", compiled=False))
