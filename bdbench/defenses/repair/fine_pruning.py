"""Fine-Pruning: prune the channels that clean images leave idle, as many as the accuracy bears, then fine-tune."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.channels import norm_inputs
from bdbench.defenses.parts.holding import Choice, Halves, accuracy, halves, head_accuracy, strongest, unmet
from bdbench.defenses.repair.base import ChoosingRepair, copied
from bdbench.defenses.repair.ft import FAST, TINY, TUNING
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import BatchNorm, named_norms, pairs
from bdbench.training.loop import Batch, mean_cross_entropy
from bdbench.wording import counted


class FinePruning(ChoosingRepair):
    """Prunes the channels that clean images leave idle, as many as the accuracy bears, then fine-tunes the rest.

    The channels of the last layer are put in the order of their mean size over trusted images, least first. As many of
    them are pruned, in that order, as keeps the accuracy on held-out trusted images within the tolerance. Then the
    model is fine-tuned on all trusted images, and what was pruned stays pruned.

    The last layer is the input of the head, or with `--layer conv` the last batch norm that takes the output of one
    convolution, after ReLU; in a pre-activation network the skip connection goes past that one.

    Paper: Liu et al., Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks, RAID 2018,
    https://arxiv.org/abs/1805.12185.

    The published code prunes 48 of 60 channels. BackdoorBench stops by the accuracy on test images, goes on with the
    first network that broke its rule, and orders channels by signed means, by which in a network without a last ReLU
    the most negative channels go first, however busy. Here sizes are without sign, the choice is made on held-out
    trusted images, and the last network that keeps its accuracy goes on. Fine-tuning is BackdoorBench's. No code says
    what the pruning may cost; 0.04, in the preset `paper`, is ours to compare with.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1805.12185"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {**TUNING, "tolerance": 0.04}, "fast": FAST, "tiny": TINY,
    }  # fmt: skip

    layer: Literal["head", "conv"] = Field(
        "head", description="What is pruned: inputs of the head, or channels of the last convolution with a norm."
    )
    prune_step: float = Field(0.01, ge=0.001, le=0.5, description="Share of the channels between two candidates.")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Order, choose, prune and fine-tune."""
        data = halves(trusted, self.holdout, task.engine.seed)
        norm = None if self.layer == "head" else _last_norm(suspect, trusted.image_shape)
        sizes = self._sizes(task, suspect, data.tune.images, norm)
        order = sizes.argsort(stable=True)
        choice = self._choose(task, suspect, data, norm, order)
        if choice.setting is None:
            said = unmet(choice.findings)
            task.engine.progress.note(said)
            return Defended(suspect, findings={**choice.findings, "said": said, "unchanged": True})
        gone = _first(order, choice.setting).to(task.engine.device)

        def loss(model: Classifier, batch: Batch) -> Tensor:
            _cut(model, norm, gone)
            return mean_cross_entropy(model, batch)

        pruned = int(gone.sum())
        said = f"{pruned} of {counted(len(order), 'channel')} pruned"
        task.engine.progress.note(said)
        tuned = task.engine.fit(copied(suspect), trusted, loss, task.recipe, phase="tune")
        _cut(tuned, norm, gone)
        layer = "head" if norm is None else norm
        return Defended(tuned, findings={**choice.findings, "said": said, "pruned": {layer: pruned}})

    def _sizes(self, task: Task, suspect: Classifier, images: Tensor, norm: str | None) -> Tensor:
        """Return the mean size of every channel of the layer over images, (C,)."""
        if norm is None:
            return task.engine.embeddings(suspect, images).abs().mean(0)
        norms = {norm: named_norms(suspect, "fine-pruning")[norm]}
        return norm_inputs(task.engine, suspect, images, norms, rectified_means)[norm].mean(0)

    def _choose(self, task: Task, suspect: Classifier, data: Halves, norm: str | None, order: Tensor) -> Choice:
        """Choose how many channels are pruned."""
        count, engine = len(order), task.engine
        steps = range(1, int(1 / self.prune_step) + 1)
        counts = sorted({min(count - 1, max(1, round(step * self.prune_step * count))) for step in steps})
        embeddings = engine.embeddings(suspect, data.held.images) if norm is None else torch.empty(0)

        def measure(share: float) -> float:
            gone = _first(order, share)
            if norm is None:  # a column of the head that is 0 is as good as an input that is
                return head_accuracy(suspect, embeddings.masked_fill(gone, 0), data.held.labels)
            model = copied(suspect).eval()
            _cut(model, norm, gone.to(engine.device))
            return accuracy(engine, model, data.held)

        before = accuracy(engine, suspect, data.held)
        return strongest([own / count for own in counts], measure, before, len(data.held), self.tolerance)


def rectified_means(norm: BatchNorm, inputs: Tensor) -> Tensor:
    """Return the mean over places (B, C) of what a batch norm and a ReLU make of inputs (B, C, P)."""
    normed = F.batch_norm(inputs, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return normed.relu().mean(2)


def _first(order: Tensor, share: float) -> Tensor:
    """Return which channels (C,) are in the first share of an order of them."""
    gone = torch.zeros(len(order), dtype=torch.bool)
    gone[order[: round(share * len(order))]] = True
    return gone


@torch.no_grad()
def _cut(model: Classifier, norm: str | None, gone: Tensor) -> None:
    """Zero channels (C,) of a batch norm, or inputs of the head, in place, without waiting for the device."""
    if norm is None:
        model.head.weight.masked_fill_(gone, 0)
        return
    for parameter in model.get_submodule(norm).parameters():
        parameter.masked_fill_(gone, 0)


def _last_norm(suspect: Classifier, image_shape: tuple[int, int, int]) -> str:
    """Return the name of the last batch norm that takes the output of one convolution."""
    norms = named_norms(suspect, "fine-pruning")
    fed = [
        pair.norm
        for pair in pairs(suspect, image_shape)
        if pair.norm in norms and norms[pair.norm].running_mean is not None
    ]
    if not fed:
        raise OptionError(
            "--layer conv needs a convolution whose output a batch norm takes, and this network has none; choose "
            "--layer head"
        )
    return fed[-1]
