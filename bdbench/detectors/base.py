"""What a detector gets, gives and declares. Nothing here knows the truth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.errors import MethodError, OptionError
from bdbench.models.classifier import Classifier
from bdbench.options import Options
from bdbench.training.engine import Engine

Family = Literal["representation", "dynamics", "perturbation", "label-free", "inversion", "weights", "control"]
"""What a detector looks at: those of one family err together, so a combination takes one of each."""


class Seen(NamedTuple):
    """The suspect's embeddings, float32 on the CPU: of the data (N, D), and of the reference images (M, D) if any."""

    data: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class Sight:
    """All that a detector of training samples may use.

    Attributes:
        data: the N samples to score: the training set as it came and, behind it, trusted images that calibrate. A
            detector cannot tell the two apart: so their scores compare.
        engine: what evaluates, and trains.
        suspect: a model that learned the training set undefended, only for a detector with `needs_suspect`.
        reference: trusted images that calibrate nothing, only for a detector with `needs_trusted`.
        look: gives the suspect's embeddings; called once, by those that ask for features.
    """

    data: ImageDataset
    engine: Engine
    look: Callable[[], Seen]
    suspect: Classifier | None = None
    reference: ImageDataset | None = None

    @property
    def known_suspect(self) -> Classifier:
        """The suspect.

        Raises:
            OptionError: there is none here.
        """
        if self.suspect is None:
            raise OptionError("this detector looks at a model that learned the dataset, and none was given")
        return self.suspect

    @property
    def known_reference(self) -> ImageDataset:
        """The reference images.

        Raises:
            OptionError: there are none here.
        """
        if self.reference is None:
            raise OptionError("this detector compares with trusted images, and the dataset has none")
        return self.reference

    @cached_property
    def seen(self) -> Seen:
        """What the suspect makes of the images."""
        return self.look()

    @property
    def features(self) -> Tensor:
        """The suspect's embeddings of the data, (N, D) float32 on the CPU."""
        return self.seen.data

    @property
    def reference_features(self) -> Tensor:
        """The suspect's embeddings of the reference images, (M, D) float32 on the CPU.

        Raises:
            OptionError: there are no reference images here.
        """
        if self.seen.reference is None:
            raise OptionError("this detector compares with trusted images, and the dataset has none")
        return self.seen.reference


class ClassEvidence(NamedTuple):
    """What speaks for a class being a target.

    Attributes:
        label: the class.
        statistic: of the method, larger is more suspect.
        deviations: how many deviations (1.4826 MAD) the statistic lies above the median of all classes.
        p: how often the largest number of deviations of as many classes would be as large without a backdoor; None if
            that is not known, as of fewer than 5 classes.
    """

    label: int
    statistic: float
    deviations: float
    p: float | None


class Scanned(NamedTuple):
    """What a detector of training samples delivers.

    Attributes:
        scores: (N,) float, finite, how suspect each sample is, higher is more.
        native: (N,) bool, the samples that the method's own rule takes for poison; None if it has no rule.
        classes: what speaks for each class, if the method judges classes.
        findings: JSON values that a reader of the scan should know.
    """

    scores: Tensor
    native: Tensor | None = None
    classes: Sequence[ClassEvidence] = ()
    findings: Mapping[str, Any] = MappingProxyType({})


class Detector(Options, ABC):
    """Base of all detectors: fields are options, the docstring is the help."""

    paper: ClassVar[str]
    threat: ClassVar[str]
    family: ClassVar[Family]
    version: ClassVar[int] = 1
    needs_suspect: ClassVar[bool] = False
    needs_trusted: ClassVar[bool] = False


class DatasetDetector(Detector):
    """Base of detectors that score the samples of a training set: they fill in `run`."""

    @abstractmethod
    def run(self, sight: Sight) -> Scanned:
        """Score the samples."""


def check_scanned(result: Scanned, count: int, method: str) -> None:
    """Refuse what a detector must not give.

    Raises:
        MethodError: no `Scanned`, another length than the data's, or scores that are not finite.
    """
    if not isinstance(result, Scanned):
        raise MethodError(f"`run` of detector '{method}' must return Scanned(scores=...)")
    for name, values in (("scores", result.scores), ("native", result.native)):
        if values is not None and values.shape != (count,):
            raise MethodError(f"detector '{method}' returned {name} of shape {tuple(values.shape)} for {count} samples")
    if not bool(torch.isfinite(result.scores).all()):
        raise MethodError(f"detector '{method}' returned scores that are not finite")
