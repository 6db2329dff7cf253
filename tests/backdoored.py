"""A small backdoored model that tests of repairs share, what they are given, and how well it still works."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from toys import toy_data, toy_engine, toy_model, toy_recipe, weights_of

from bdbench.data import ImageDataset
from bdbench.defenses.base import Task
from bdbench.models.classifier import Classifier
from bdbench.training.engine import Engine
from bdbench.training.loop import Batch, mean_cross_entropy
from bdbench.training.recipe import Recipe

TARGET = 1
CHECKER = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)


def triggered(data: ImageDataset) -> ImageDataset:
    """All images with the 3x3 patch in the lower right corner."""
    images = data.images.clone()
    images[:, :, 5:, 5:] = CHECKER
    return ImageDataset(images, data.labels, data.class_names)


def trusted_data(count: int = 32) -> ImageDataset:
    return toy_data(count, seed=2)


@cache
def backdoored_weights() -> dict[str, Tensor]:
    """Weights of a model for which the patch means class 1; a fifth of its training images have it."""
    data = toy_data(120)
    is_poison = torch.arange(120) % 5 == 0
    images = torch.where(is_poison.view(-1, 1, 1, 1), triggered(data).images, data.images)
    poisoned = ImageDataset(images, torch.where(is_poison, TARGET, data.labels), data.class_names)
    recipe = toy_recipe(epochs=15, lr=0.1, weight_decay=0)
    return weights_of(toy_engine().fit(toy_model(data), poisoned, mean_cross_entropy, recipe, phase="train"))


def suspect_model() -> Classifier:
    model = toy_model(toy_data())
    model.load_state_dict(backdoored_weights())
    return model.eval()


def accuracies(model: Classifier) -> tuple[float, float]:
    """The share of clean images classified right, and of triggered images of other classes taken for the target."""
    test = toy_data(80, seed=1)
    right = toy_engine().logits(model, test.images).argmax(1) == test.labels
    taken = toy_engine().logits(model, triggered(test).images).argmax(1) == TARGET
    return right.double().mean().item(), taken[test.labels != TARGET].double().mean().item()


class Watched(Engine):
    """An engine that keeps what every phase was given."""

    def __init__(self, **settings: Any) -> None:
        base = toy_engine()
        super().__init__(base.device, base.bf16, base.seed, checkpoint_seconds=0.0, **settings)
        self.recipes: dict[str, Recipe] = {}
        self.optimizers: dict[str, Any] = {}
        self.data: dict[str, ImageDataset] = {}
        self.batches: list[Batch] = []

    def fit(self, model: Any, data: ImageDataset, loss: Any, recipe: Recipe, *, phase: str, **settings: Any) -> Any:
        self.recipes[phase], self.data[phase] = recipe, data
        self.optimizers[phase] = settings.get("optimizer")

        def seen(model: Any, batch: Batch) -> Any:
            self.batches.append(batch)
            return loss(model, batch)

        return super().fit(model, data, seen, recipe, phase=phase, **settings)

    def losses_of(self, phase: str) -> list[Any]:
        return [row["loss"] for row in self.history if row["phase"] == phase]


def task_of(
    engine: Engine | None = None,
    trusted: ImageDataset | None = None,
    suspect: Classifier | None = None,
    **recipe: Any,
) -> Task:
    chosen = {"epochs": 20, "lr": 0.1, "schedule": "constant", "nesterov": False} | recipe
    return Task(
        train=toy_data(), new_model=lambda purpose: toy_model(toy_data(), purpose), recipe=toy_recipe(**chosen),
        engine=engine or toy_engine(), trusted=trusted or trusted_data(), suspect=suspect or suspect_model(),
    )  # fmt: skip
