"""RNP: unlearn the trusted images, recover them by masks on batch norms, prune the channels that the masks drop."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdbench.data import ImageDataset
from bdbench.defenses.base import Task
from bdbench.defenses.parts.holding import accuracy
from bdbench.defenses.parts.masks import Masks
from bdbench.defenses.parts.replacing import called
from bdbench.defenses.repair.base import copied
from bdbench.defenses.repair.masking import Learned, MaskingRepair, drawn
from bdbench.models.classifier import Classifier
from bdbench.models.structure import frozen, named_norms
from bdbench.training.loop import Batch
from bdbench.wording import counted

UNLEARNING: Mapping[str, Any] = {
    "weight_decay": 5e-4, "schedule": "step", "milestones": (0.5, 1.0), "warmup": 0.0
}  # fmt: skip
"""What the code's unlearning has beside its options; the rate falls after half of the epochs."""

LOOKS = 4
"""Steps between two looks at the accuracy: an epoch of the official code, on 500 images in batches of 128."""

RECOVERY: Mapping[str, Any] = {
    "epochs": 20, "batch_size": 128, "lr": 0.04, "nesterov": False, "weight_decay": 0.0, "schedule": "constant",
}  # fmt: skip


class RNP(MaskingRepair):
    """Prunes the channels that the network does not need to recover what it has unlearned.

    1. `unlearn`: a copy of the suspect ascends the cross entropy of trusted images until its accuracy on them is at
    most `unlearn_stop`; its backdoor survives that. 2. `recover`: with its weights frozen, a mask in [0, 1] for each
    channel of each batch norm descends the same loss. 3. Channels whose mask is at most a threshold are pruned from
    the suspect itself: their weight in the norm becomes 0, their bias stays. In a pre-activation block the channel
    leaves that branch only. The threshold is the largest one that half of the trusted images, held out, allow; on
    fewer than 100 of them it decides little.

    Paper: Li et al., Reconstructive Neuron Pruning for Backdoor Defense, ICML 2023, https://arxiv.org/abs/2305.14876.

    The official code prints thresholds beside the test ASR; BackdoorBench takes the one with the lowest test ASR, and
    backdoor-toolbox chooses it, and ends the unlearning, by test accuracy. Nothing of that is done here. The gradient
    of the ascent is clipped; in the published codes it is clipped before it is there, which does nothing. Where the
    accuracy never falls so far, the official code goes on with the file of an earlier run; here it goes on with the
    model as it is, and the findings say so. The ascent looks at the accuracy after every 4 steps, an epoch of the
    official code with its 500 images. Each image's loss ascends up to a cap, `--unlearn-cap`; there it has no end. The
    published recovery has a rate of 0.2 on a loss times 0.2, which is `--lr 0.04`. On small networks an ascent without
    an end ruins so much that the accuracy allows no threshold; `fast` and `tiny` end it at the loss of guessing, and
    `fast` recovers at 0.01, at which fewer masks fall to 0 at once.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2305.14876"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": RECOVERY,
        "fast": {**RECOVERY, "lr": 0.01, "unlearn_cap": 1.0},
        "tiny": {**RECOVERY, "batch_size": 16, "unlearn_stop": 0.25, "unlearn_cap": 1.0},
    }  # fmt: skip

    unlearn_steps: int = Field(80, ge=1, description="The most steps of unlearning.")
    unlearn_lr: float = Field(0.01, gt=0, description="Learning rate of unlearning.")
    unlearn_stop: float = Field(0.2, ge=0, le=1, description="Accuracy on the trusted images at which it ends.")
    unlearn_cap: float = Field(10.0, gt=0, description="Cap of each image's loss, in units of ln(K), that of guessing.")
    unlearn_clip: float = Field(20.0, gt=0, description="The longest gradient of unlearning; a longer one is cut.")

    def learn(self, task: Task, suspect: Classifier, tune: ImageDataset) -> Learned:
        """Unlearn, recover."""
        named_norms(suspect, "rnp")
        unlearned = self._unlearned(task, suspect, tune)
        left = accuracy(task.engine, unlearned, tune)
        reached = left <= self.unlearn_stop
        if not reached:
            task.engine.progress.note(
                f"unlearning did not take: the accuracy on the trusted images is {left:.3f} after "
                f"{counted(self.unlearn_steps, 'step')} (limit {self.unlearn_stop:g}); raise --unlearn-lr or "
                "--unlearn-steps"
            )
        findings = {"unlearned_accuracy": round(left, 4), "took": reached}
        return Learned(_recovering(task, unlearned, tune), findings)

    def _unlearned(self, task: Task, suspect: Classifier, tune: ImageDataset) -> Classifier:
        """Return a copy of the suspect that has unlearned the images."""
        model, cap = copied(suspect), self.unlearn_cap * math.log(tune.num_classes)
        budget = {"epochs": math.ceil(self.unlearn_steps / LOOKS), "lr": self.unlearn_lr}
        recipe = task.recipe.model_copy(update={**UNLEARNING, **budget})
        optimizer = recipe.optimizer(model)
        weights = list(model.parameters())
        optimizer.register_step_pre_hook(lambda *_: _clip(weights, self.unlearn_clip))

        def loss(model: Classifier, batch: Batch) -> Tensor:
            losses = F.cross_entropy(model(batch.images), batch.labels, reduction="none")
            return -losses.clamp_max(cap).mean()

        def has_unlearned(model: Classifier) -> bool:
            return accuracy(task.engine, model, tune) <= self.unlearn_stop

        return task.engine.fit(
            model, tune, loss, recipe, phase="unlearn", optimizer=optimizer, epoch_steps=LOOKS,
            max_steps=self.unlearn_steps, stop=has_unlearned, lr_flag="--unlearn-lr", unit="step",
            before_epoch=drawn(tune, LOOKS * recipe.batch_size, task.engine.seed, "unlearn"),
        )  # fmt: skip


def _clip(weights: list[nn.Parameter], limit: float) -> None:
    nn.utils.clip_grad_norm_(weights, limit)


def _recovering(task: Task, unlearned: Classifier, tune: ImageDataset) -> Masks:
    """Return masks with which an unlearned network, as it is, knows the images again."""
    network = frozen(copy.deepcopy(unlearned)).train()
    masks = Masks(network, "rnp")

    def loss(masks: Masks, batch: Batch) -> Tensor:
        masks.clamp()
        return F.cross_entropy(called(network, masks.changed(), batch.images), batch.labels)

    task.engine.fit(masks, tune, loss, task.recipe, phase="recover", compiled=False)
    masks.clamp()
    return masks
