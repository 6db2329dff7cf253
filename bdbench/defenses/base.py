"""What a defense gets, gives and declares. Nothing here knows the truth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.errors import MethodError, OptionError
from bdbench.models.classifier import Classifier
from bdbench.options import Options
from bdbench.seeds import tie_order
from bdbench.training.engine import Engine
from bdbench.training.recipe import Recipe


@dataclass(frozen=True)
class Truth:
    """What no defense may know; only reference rows read it.

    Attributes:
        is_poison: (N,) bool, which training samples are poisoned.
        unpoisoned: the training split as it was before the attack, N images with their true labels.
    """

    is_poison: Tensor
    unpoisoned: ImageDataset


@dataclass(frozen=True)
class Task:
    """All that a defense may use.

    Attributes:
        train: the training split as it came, perhaps poisoned.
        new_model: a fresh network of the benchmark's architecture; the argument names what it is for, and equal names
            give equal weights.
        recipe: how the benchmark trains.
        engine: what trains and evaluates.
        trusted: clean images, only for a method with `needs_trusted`.
        suspect: the undefended model, only for a method with `needs_suspect`.
        set_aside: (N,) bool, what a scan set aside, only for a method with `needs_scan`.
        truth: only for a reference row, with `needs_truth`.
        cache: folder for what several runs can share, such as an encoder trained without labels; None keeps none.
    """

    train: ImageDataset
    new_model: Callable[[str], Classifier]
    recipe: Recipe
    engine: Engine
    trusted: ImageDataset | None = None
    suspect: Classifier | None = None
    set_aside: Tensor | None = None
    truth: Truth | None = None
    cache: Path | None = None

    def known_truth(self) -> Truth:
        """Return the truth.

        Raises:
            OptionError: there is none here.
        """
        if self.truth is None:
            raise OptionError("a reference row reads which samples are poisoned, and nothing here tells it")
        return self.truth


class Round(NamedTuple):
    """What a defense would set aside if it chose after this epoch.

    Attributes:
        phase, epoch: as in the engine's history, where epochs count from 1.
        rows: (M,) int64, the samples.
    """

    phase: str
    epoch: int
    rows: Tensor


class Defended(NamedTuple):
    """What a defense delivers.

    Attributes:
        model: the classifier.
        scores: (N,) float, how suspect each training sample is, higher is more; None if it scores none.
        set_aside: (N,) bool, the samples it took for poison; None if it takes no decision.
        findings: JSON values that a reader of the model should know, such as the target class it inferred.
        rounds: of a method that chooses epoch by epoch, what it would set aside after each, the last one included.
            Stored with the model; `evaluate` says how many of them are poison.
    """

    model: Classifier
    scores: Tensor | None = None
    set_aside: Tensor | None = None
    findings: Mapping[str, Any] = MappingProxyType({})
    rounds: Sequence[Round] = ()


class Defense(Options, ABC):
    """Base of defenses: fields are options, the docstring is the help, `run` is the method.

    `presets` name budgets, as values for the method's own options and for those of `Recipe`: ``paper``, ``fast`` (a
    small one for CPUs) and ``tiny`` (a few thousand tiny images).
    """

    paper: ClassVar[str]
    threat: ClassVar[str]
    version: ClassVar[int] = 1
    needs_trusted: ClassVar[bool] = False
    needs_suspect: ClassVar[bool] = False
    needs_scan: ClassVar[bool] = False
    needs_truth: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]

    @abstractmethod
    def run(self, task: Task) -> Defended:
        """Train (or mend) a classifier."""


def check_defended(result: Defended, count: int, method: str) -> None:
    """Refuse what a defense must not give.

    Raises:
        MethodError: no `Defended`, scores or a decision of another length than the training set's, or a round that
            names an epoch twice, a sample twice, or a sample that is not there.
    """
    if not isinstance(result, Defended) or not isinstance(result.model, Classifier):
        raise MethodError(f"`run` of defense '{method}' must return Defended(model=...), a Classifier first")
    for name, values in (("scores", result.scores), ("set_aside", result.set_aside)):
        if values is not None and values.shape != (count,):
            raise MethodError(f"defense '{method}' returned {name} of shape {tuple(values.shape)} for {count} samples")
    told = [(each.phase, each.epoch) for each in result.rounds]
    if len(set(told)) < len(told):
        raise MethodError(f"defense '{method}' returned two rounds of one epoch")
    for phase, epoch, rows in result.rounds:
        if rows.dtype != torch.int64 or rows.dim() != 1 or not are_samples(rows, count):
            raise MethodError(
                f"defense '{method}' returned a round ({phase} {epoch}) that does not name different samples of {count}"
            )


def are_samples(rows: Tensor, count: int) -> bool:
    """Say whether integers (M,) name different ones of `count` samples."""
    return not len(rows) or bool(rows.min() >= 0 and rows.max() < count and len(rows.unique()) == len(rows))


def lowest(losses: Tensor, count: int) -> Tensor:
    """Return a mask (N,) of the `count` lowest losses; equal ones win by `tie_order`, never by where they lie.

    Of samples that a model is sure of, cross entropies are equal: rank by `Engine.margins`.
    """
    mask, order = torch.zeros(len(losses), dtype=torch.bool), tie_order(len(losses))
    mask[order[torch.argsort(losses[order], stable=True)[:count]]] = True
    return mask
