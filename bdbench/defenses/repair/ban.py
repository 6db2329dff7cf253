"""BAN's repair: fine-tune the suspect while noise on its batch norms harms it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.noise import harmful, noisy
from bdbench.defenses.parts.replacing import called
from bdbench.defenses.repair.base import Repair, copied
from bdbench.models.classifier import Classifier
from bdbench.models.structure import named_norms, untracked_norms
from bdbench.training.loop import Batch

TUNING: Mapping[str, Any] = {
    "epochs": 25, "batch_size": 128, "lr": 0.005, "weight_decay": 5e-4, "nesterov": False, "schedule": "constant",
}  # fmt: skip


class BAN(Repair):
    """Fine-tunes the suspect until noise on its batch norms, which wakes the backdoor, harms it no more.

    In each step noise (d on weights, x on biases) is drawn from [-eps, eps] and moved up the loss; then all weights
    fall along CE(f) + noise_weight * CE(f with w (1 + d), b (1 + x)). There is no mask and no threshold: the noise of
    ANP, as fine-tuning. Running statistics of batch norm follow the pass without noise.

    Paper: Xu et al., BAN: Detecting Backdoors Activated by Adversarial Neuron Noise, NeurIPS 2024,
    https://arxiv.org/abs/2405.19928. Its detection is another method.

    The settings are those of the official README; the code's own differ (a weight of 0.2, a rate of 0.01). As there,
    noise may reach 2 * eps; of 25 epochs the code runs 24. There the noise is among what the optimiser moves, which has
    no effect: it is drawn again for each batch.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2405.19928"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": TUNING,
        "fast": {**TUNING, "epochs": 12},
        "tiny": {**TUNING, "batch_size": 16, "lr": 0.02},
    }

    eps: float = Field(0.3, ge=0, description="Size of the noise, relative to weights and biases.")
    noise_steps: int = Field(1, ge=1, description="Steps up the loss that the noise takes.")
    noise_weight: float = Field(0.5, ge=0, description="Weight of the loss under noise.")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Fine-tune a copy."""
        tuned = copied(suspect)
        norms = named_norms(tuned, "ban")

        def loss(model: Classifier, batch: Batch) -> Tensor:
            def under(noise: Tensor) -> Tensor:
                return F.cross_entropy(called(model, noisy(norms, noise), batch.images), batch.labels)

            clean = F.cross_entropy(model(batch.images), batch.labels)
            with untracked_norms(model):
                noise = harmful(norms, under, self.eps, self.noise_steps, project=False)
                return clean + self.noise_weight * under(noise)

        return Defended(task.engine.fit(tuned, trusted, loss, task.recipe, phase="tune", compiled=False))
