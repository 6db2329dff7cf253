"""What repairs share that learn a mask for every channel of every batch norm, and prune the channels it drops."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.holding import accuracy, halves, strongest, unmet
from bdbench.defenses.parts.masks import Masks, prune
from bdbench.defenses.repair.base import ChoosingRepair
from bdbench.models.classifier import Classifier
from bdbench.seeds import generator
from bdbench.training.engine import Engine
from bdbench.wording import counted

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(19))
"""From 0 to 0.9: those that published codes print."""


class Learned(NamedTuple):
    """Masks, and what to tell of how they were learned."""

    masks: Masks
    findings: dict[str, Any]


class MaskingRepair(ChoosingRepair):
    """Base of those that fill in `learn`."""

    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Prune channels whose mask is at most this; default: the largest of 0, 0.05, ..., 0.9 that keeps "
        "the accuracy on the held-out images.",
    )

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Learn the masks, choose the threshold unless it is given, prune."""
        if self.threshold is not None:
            masks, told = self.learn(task, suspect, trusted)
            return _pruned(task.engine, suspect, masks, self.threshold, {**told, "chosen": self.threshold})
        tune, held = halves(trusted, self.holdout, task.engine.seed)
        masks, told = self.learn(task, suspect, tune)
        trial = _Trial(task.engine, suspect, masks, held)
        choice = strongest(THRESHOLDS, trial.accuracy_at, trial.before, len(held), self.tolerance)
        findings = {**told, **choice.findings}
        if choice.setting is None:
            return _unchanged(task.engine, suspect, {**findings, "pruned": {}}, unmet(findings))
        return _pruned(task.engine, suspect, masks, choice.setting, findings)

    @abstractmethod
    def learn(self, task: Task, suspect: Classifier, tune: ImageDataset) -> Learned:
        """Return the masks of a suspect, learned from trusted images."""


def drawn(images: ImageDataset, size: int, seed: int, phase: str) -> Callable[[int], Tensor]:
    """Return what draws so many rows of images for each epoch of a phase, with replacement: a hook for `Engine.fit`."""

    def rows(epoch: int) -> Tensor:
        return torch.randint(len(images), (size,), generator=generator(seed, phase, "drawn", epoch))

    return rows


class _Trial:
    """A copy of the suspect that is pruned further and further, by rising thresholds."""

    def __init__(self, engine: Engine, suspect: Classifier, masks: Masks, held: ImageDataset) -> None:
        self.engine, self.masks, self.held = engine, masks.by_norm(), held
        self.before = accuracy(engine, suspect, held)
        self.model, self.known = copy.deepcopy(suspect), {0: self.before}

    def accuracy_at(self, threshold: float) -> float:
        """Return the accuracy on the held-out images, measured where more channels are pruned than before."""
        count = sum(prune(self.model, below(self.masks, threshold), bias=False).values())
        if count not in self.known:
            self.known[count] = accuracy(self.engine, self.model, self.held)
        return self.known[count]


def below(masks: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Return which channels have a mask of at most the threshold, (C,) bool by the name of the norm."""
    return {name: mask <= threshold for name, mask in masks.items()}


def _pruned(engine: Engine, suspect: Classifier, masks: Masks, threshold: float, findings: dict[str, Any]) -> Defended:
    model = copy.deepcopy(suspect)
    pruned = prune(model, below(masks.by_norm(), threshold), bias=False)
    findings = {**findings, "pruned": pruned}
    if not pruned:
        said = f"no channel has a mask of at most {threshold:g}: nothing to prune; model unchanged"
        return _unchanged(engine, suspect, findings, said)
    channels = counted(sum(pruned.values()), "channel")
    said = f"pruned {channels} in {counted(len(pruned), 'norm')}, whose masks are at most {threshold:g}"
    engine.progress.note(said)
    return Defended(model, findings={**findings, "said": said})


def _unchanged(engine: Engine, suspect: Classifier, findings: dict[str, Any], said: str) -> Defended:
    engine.progress.note(said)
    return Defended(suspect, findings={**findings, "unchanged": True, "said": said})
