"""What an attack is: whom it may poison, what label it wants, and how its trigger changes images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.errors import MethodError, OptionError
from bdbench.models.classifier import Classifier
from bdbench.options import Options
from bdbench.seeds import addressed
from bdbench.training.engine import Engine

CHUNK = 256

Labels = Literal["all-to-one", "all-to-all", "source-specific", "clean"]
Use = Literal["poison", "cover", "test"]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Lab:
    """What an attacker has beside the images: a seed, and the means to train networks.

    Attributes:
        engine: what trains and evaluates; its seed is the attack's.
        model: builds a fresh classifier from the architecture's name (``auto``: the benchmark's), the images it is
            for, a seed, and what it is for.
        augment: how the dataset's images are augmented.
        cache: folder for what several attacks can share, such as a surrogate; None keeps none.
        surrogates: those trained so far, by what determines them.
    """

    engine: Engine
    model: Callable[[str, ImageDataset, int, str], Classifier]
    augment: str = "none"
    cache: Path | None = None
    surrogates: dict[str, Classifier] = field(default_factory=dict, compare=False)

    @property
    def seed(self) -> int:
        """Streams are drawn from it by purpose."""
        return self.engine.seed

    def new_model(self, name: str, images: ImageDataset, purpose: str) -> Classifier:
        """Return a fresh classifier; equal purposes give equal weights."""
        return self.model(name, images, self.seed, purpose)


@dataclass(frozen=True)
class Occasion:
    """When and where triggers are put. What a trigger draws goes by the image's row, never by the batch.

    Attributes:
        use: for a poisoned or cover training sample, or for testing.
        rows: (B,) int64, the rows of the batch in their split.
        split: the images and true labels of the whole split, for triggers that take part of another image.
        seed: of the attack.
    """

    use: Use
    rows: Tensor
    split: ImageDataset
    seed: int

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Return the rows' own numbers (B, *shape), uniform in [0, 1); those of tests are others than of training."""
        test = ("test",) if self.use == "test" else ()
        drawn = addressed(self.rows, prod(shape), self.seed, "trigger", purpose, *test)
        return drawn.view(len(self.rows), *shape)


class Attack(Options, ABC):
    """Base of attacks: the options that all share; a subclass adds `fit` and `stamp`.

    The attacker changes part of the training images and labels, before any augmentation, and later shows the same
    trigger at test time. Rates are shares of the whole training split unless `class_rate` is given. A rate of 0 poisons
    nothing: what the trigger, and a defense, do where there is nothing to find.
    """

    paper: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when what the defaults give is no longer the same."""
    label_modes: ClassVar[tuple[Labels, ...]] = ("all-to-one", "all-to-all", "source-specific", "clean")
    """The label rules that make sense for it."""

    target: int = Field(0, ge=0, description="Class that triggered images shall be classified as (not for all-to-all).")
    source: int = Field(1, ge=0, description="Class whose images are poisoned (source-specific only).")
    rate: float | None = Field(0.1, ge=0, le=1, description="Poisoned share of the whole training split.")
    class_rate: float | None = Field(
        None, gt=0, le=1, description="Poisoned share of the target class (source-specific: source), not --rate."
    )
    labels: Labels = Field(
        "all-to-one",
        description="all-to-one: relabel to the target; all-to-all: to the next class; source-specific: the source "
        "class to the target; clean: poison only target-class images and keep their labels.",
    )
    exclude_target: bool = Field(False, description="Never draw images of the target class (all-to-one only).")
    cover_ratio: float = Field(
        0.0, ge=0, description="Cover samples (triggered, truthfully labelled) per poisoned sample."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_rate(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Let `class_rate` take the place of the default rate."""
        return {"rate": None, **values} if values.get("class_rate") is not None else values

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if self.labels not in self.label_modes:
            raise OptionError(f"{self.labels} labels make no sense here; give {' or '.join(self.label_modes)}")
        if (self.rate is None) == (self.class_rate is None):
            raise OptionError("give either rate or class_rate")
        if self.class_rate is not None and self.labels == "all-to-all":
            raise OptionError("class_rate has no meaning with all-to-all labels; give rate")
        if self.exclude_target and self.labels != "all-to-one":
            raise OptionError(f"exclude_target has no meaning with {self.labels} labels; leave it out")
        if self.labels == "source-specific" and self.source == self.target:
            raise OptionError(f"source and target are both {self.target}; give another --source")
        return self

    def files(self) -> tuple[Path, ...]:
        """Return the user's files that the trigger is made from; their content is part of the artifact's id."""
        return ()

    @abstractmethod
    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return all that triggering needs, as tensors that are stored with the dataset.

        Args:
            clean: the training split before poisoning.
            lab: seed, and the means to train networks.

        Raises:
            OptionError: the trigger does not fit the images.
        """

    def craft(self, clean: ImageDataset, rows: Tensor, state: State, lab: Lab) -> Tensor:
        """Return the images at `rows` as the trigger shall find them, for attacks that also change what it is put on.

        Args:
            clean: the training split before poisoning.
            rows: (P,) int64, the samples that will be poisoned.
            state: from `fit`.
            lab: as `fit` got it.

        Returns:
            (P, C, H, W) uint8; here, the images as they are.
        """
        return clean.images[rows]

    @abstractmethod
    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Put the trigger on a batch.

        Args:
            images: (B, C, H, W) uint8, a copy that may be changed in place.
            state: from `fit`.
            occasion: what for, and which rows; a trigger that is random draws from it.

        Returns:
            (B, C, H, W), uint8 as it is, or float, which the caller clips to [0, 255] and rounds.
        """

    def may_cover(self, labels: Tensor) -> Tensor:
        """Say which samples (N,) bool of these true labels can be covers.

        Here not the source class, nor the target class where its own images would teach the trigger: if labels are
        clean or source-specific.
        """
        if self.labels == "source-specific":
            return (labels != self.source) & (labels != self.target)
        return labels != self.target if self.labels == "clean" else torch.ones_like(labels, dtype=torch.bool)

    def trigger(self, split: ImageDataset, rows: Tensor, state: State, use: Use, seed: int) -> Tensor:
        """Return triggered copies of some images; each depends on its own row only, never on the batch.

        Args:
            split: images and true labels.
            rows: (M,) int64, which of them.
            state: from `fit`.
            use: see `Occasion`.
            seed: of the attack.

        Returns:
            (M, C, H, W) uint8, rounded to nearest.

        Raises:
            MethodError: `stamp` gives another shape, or numbers that are not finite.
        """
        out = torch.empty(len(rows), *split.image_shape, dtype=torch.uint8)
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            stamped = self.stamp(split.images[part], state, Occasion(use, part, split, seed))
            _check_stamped(stamped, (len(part), *split.image_shape))
            if stamped.dtype != torch.uint8:
                stamped = stamped.clamp(0, 255).round_()
            out[start : start + CHUNK] = stamped
        return out


def _check_stamped(images: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(images, Tensor) or images.shape != shape:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise MethodError(f"`stamp` must give images {shape}, and gives {found}")
    if images.is_floating_point() and not images.isfinite().all():
        raise MethodError("`stamp` gives numbers that are not finite (nan or inf)")


class TrainingAttack(Attack):
    """Base of attacks whose authors also control the victim's training.

    Their generator is trained with a victim and then frozen: the dataset replays it, so that defenses which train
    have something to face, and the attacker's own victim is delivered beside it for those that mend a model.
    """

    victim: str = Field("auto", description="Network that the attacker trains: as --model takes it, or auto.")

    @model_validator(mode="after")
    def _check_poisons(self) -> Self:
        if self.rate == 0:
            raise OptionError("rate 0 leaves this attack nothing to train its trigger on; raise --rate")
        return self

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return what `train` says of the trigger."""
        return self.train(clean, lab)[0]

    @abstractmethod
    def train(self, clean: ImageDataset, lab: Lab) -> tuple[State, Classifier]:
        """Train trigger and victim together; see `fit` for the arguments, the state and the errors.

        Returns:
            The state, and the victim in evaluation mode.
        """


def wanted_labels(labels: Tensor, attack: Attack, num_classes: int) -> Tensor:
    """Return what the attacker wants triggered images of these true labels (N,) to be called."""
    if attack.labels == "all-to-all":
        return (labels + 1) % num_classes
    return torch.full_like(labels, attack.target)


def pattern_for(values: Tensor, channels: int) -> Tensor:
    """Return an RGB pattern (3, H, W) for images of 3 or 1 channels; gray is its luma (0.299, 0.587, 0.114)."""
    if channels == 3:
        return values
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=values.dtype).view(3, 1, 1)
    return (values * weights).sum(0, keepdim=True)
