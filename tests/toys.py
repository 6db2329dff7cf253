"""Small true objects that tests share: images learned in seconds, a model of a few weights, an engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdbench.artifacts import manifests
from bdbench.artifacts.manifests import MANIFEST, Ask
from bdbench.attacks.base import Attack, Lab, Use
from bdbench.data import ImageDataset, SourceData
from bdbench.models.classifier import Classifier, build_classifier, pool
from bdbench.progress import Silent
from bdbench.registry import ATTACKS
from bdbench.seeds import generator, scoped
from bdbench.training.engine import Engine
from bdbench.training.loop import Batch
from bdbench.training.recipe import Recipe

CLASSES = ("ant", "bee", "cat", "dog")


def toy_data(
    count: int = 120,
    channels: int = 3,
    height: int = 8,
    width: int | None = None,
    *,
    seed: int = 0,
    classes: tuple[str, ...] = CLASSES,
) -> ImageDataset:
    """Noise in 0..199 with a brighter stripe whose place is the class; labels go 0, 1, 2, 3, 0, 1, ..."""
    shape = (count, channels, height, width or height)
    images = torch.randint(0, 200, shape, generator=generator(seed, "toy")).to(torch.uint8)
    labels = torch.arange(count) % len(classes)
    thick = max(1, height // 16)
    for row, label in enumerate(labels.tolist()):
        top = (label * height) // len(classes)
        images[row, :, top : top + thick] = 230
    return ImageDataset(images, labels, classes)


def flat(value: int, channels: int = 3, side: int = 32, count: int = 1) -> ImageDataset:
    """Images of one gray value."""
    images = torch.full((count, channels, side, side), value, dtype=torch.uint8)
    return ImageDataset(images, torch.zeros(count, dtype=torch.int64), ("a", "b"))


ATTACK_NAMES = [name for name in ATTACKS.names() if name != "none"]
"""Every registered attack that attacks."""

TRAINS_NOTHING = {"clp", "ep", "bnp"}
"""Defenses without a step of training."""

TOY_ATTACKS: dict[str, dict[str, Any]] = {
    "lc": {"steps": 5},
    "fc": {"steps": 5},
    "narcissus": {"rounds": 12, "lr": 0.05},
    "lf": {"passes": 3},
    "trojannn": {"steps": 20},
    "lba": {"epochs": 5},
    "cba": {"source": 1, "partner": 0},
    "ssba": {
        "secret_bits": 1,
        "encoder_width": 16,
        "encoder_side": 8,
        "encoder_epochs": 10,
        "encoder_batch_size": 128,
        "encoder_lr": 5e-3,
    },
    "input-aware": {"mask_epochs": 1, "victim_epochs": 1, "victim_batch_size": 16, "generator_width": 4},
    "wanet-tc": {"victim_epochs": 1, "victim_batch_size": 16},
    "lira": {"generator_epochs": 1, "victim_epochs": 1, "victim_batch_size": 16, "eps": 0.2},
}
"""Options that make an attack's own training small, by name."""


def attack_of(name: str, **options: Any) -> Attack:
    """An attack by its registered name."""
    attack: Attack = ATTACKS.load(name).parse(options)
    return attack


def toy_attack(name: str, **options: Any) -> Attack:
    """An attack with settings for toy images: a tenth of them poisoned, networks trained in a moment."""
    rate = {} if "class_rate" in options else {"rate": 0.1}
    return attack_of(name, **(rate | TOY_ATTACKS.get(name, {}) | options))


def triggered(attack: Attack, data: ImageDataset, use: Use = "test", seed: int = 0) -> Tensor:
    """Triggered copies of all images."""
    return attack.trigger(data, torch.arange(len(data)), attack.fit(data, toy_lab(seed)), use, seed)


def toy_source(channels: int = 3, side: int = 8, train: int = 120, test: int = 40) -> SourceData:
    """120 training images and 40 test images of four classes."""
    return SourceData(
        "toy", toy_data(train, channels, side), toy_data(test, channels, side, seed=1), augment="crop,flip"
    )


def toy_file(folder: Path, *, train: int = 120, test: int = 40) -> Path:
    """The same source as a file that `stages.poison` takes by path."""
    source = toy_source(1, 8, train, test)
    path = folder / "toy.npz"
    np.savez(
        path,
        x_train=source.train.images.squeeze(1).numpy(),
        y_train=source.train.labels.numpy(),
        x_test=source.test.images.squeeze(1).numpy(),
        y_test=source.test.labels.numpy(),
    )
    return path


class ToyFeatures(nn.Module):
    """A convolution of 6 channels, batch norm, ReLU, average over each quarter of the rows; D is 24."""

    size = 24

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(image_shape[0], 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        maps = F.adaptive_avg_pool2d(self.layers(images).float(), (4, 1))
        return maps.flatten(1)


class DroppedFeatures(nn.Module):
    """The toy network with dropout: its training draws from the global stream."""

    size = 6

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(image_shape[0], 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, images: Tensor) -> Tensor:
        return pool(self.layers(images))


def toy_model(
    data: ImageDataset, purpose: str = "model", *, features: type[nn.Module] = ToyFeatures, seed: int = 0
) -> Classifier:
    """A classifier of some hundred weights; equal purposes give equal weights."""
    with scoped(seed, "weights", purpose):
        half = torch.full((data.image_shape[0],), 0.5)
        return build_classifier(features, data.image_shape, data.num_classes, half, half.clone())


def toy_engine(work: Path | None = None, **changes: Any) -> Engine:
    """An engine on the CPU in float32 that checkpoints after every epoch."""
    engine = Engine(torch.device("cpu"), bf16=False, seed=0, work=work, checkpoint_seconds=0.0)
    return replace(engine, **changes)


def toy_lab(seed: int = 0, **changes: Any) -> Lab:
    """An attacker's lab whose networks are the toy network."""
    engine = toy_engine(seed=seed)
    return Lab(engine, lambda _, images, seed, purpose: toy_model(images, purpose, seed=seed), **changes)


def toy_recipe(**changes: Any) -> Recipe:
    """Two epochs of batches of 16 at a small rate, without augmentation."""
    return Recipe.parse({"epochs": 2, "batch_size": 16, "lr": 0.05, "augment": "none"} | changes)


def toy_batch(data: ImageDataset, rows: Tensor | None = None) -> Batch:
    """A batch as a loss sees it, of all images or of some."""
    rows = torch.arange(len(data)) if rows is None else rows
    images = (data.images[rows].float() / 255).contiguous(memory_format=torch.channels_last)
    return Batch(images, data.labels[rows], rows, 0)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def are_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Say whether two states are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Fuse(Silent):
    """A progress that ends the work, as Ctrl-C or the machine's end would, after so many steps of one phase or of all.

    Steps are told from the jump of a resumed phase by their size, where that is given.
    """

    def __init__(self, steps: int, phase: str = "", size: int = 0) -> None:
        self.left, self.phase, self.size = steps, phase, size
        self.started: list[str] = []

    def start(self, label: str, total: int, unit: str = "images") -> None:  # noqa: ARG002
        self.started.append(label)

    def advance(self, amount: int, status: str = "") -> None:
        counts = amount == self.size if self.size else amount > 0
        if counts and not status and self.phase in ("", self.started[-1]):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a manifest with the seal that belongs to it."""
    said = manifests.Manifest(**{**manifest, "ask": manifests.Ask(**manifest["ask"])})
    return manifest | {"seal": said.expected_seal}


def cannot_compile() -> RuntimeError:
    """What torch raises where it cannot compile."""
    kind = type("Failed", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    return kind("no C++ compiler\nand more")


@dataclass
class ToyCompiler:
    """In the place of torch's: counts what runs compiled, and raises an error, if one is given, after some of it.

    Attributes:
        error: what it raises where it cannot compile.
        good: calls before it cannot.
        calls: how often something ran compiled.
        stances: those that are taken.
        resets: how often what was compiled was forgotten.
    """

    error: Exception | None = None
    good: int = 0
    calls: int = 0
    stances: list[str] = field(default_factory=list)
    resets: int = 0

    def compiled(self, function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if self.stances[-1:] != ["force_eager"]:
                if self.error is not None and self.calls == self.good:
                    raise self.error
                self.calls += 1
            return function(*args)

        return run

    def reset(self) -> None:
        self.resets += 1

    @contextmanager
    def set_stance(self, stance: str) -> Iterator[None]:
        self.stances.append(stance)
        try:
            yield
        finally:
            self.stances.pop()


def toy_compiler(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None, good: int = 0) -> ToyCompiler:
    """Put a compiler that raises an error, or does nothing, in the place of torch's."""
    compiler = ToyCompiler(error, good)
    monkeypatch.setattr(torch, "compile", compiler.compiled)
    monkeypatch.setattr(torch.compiler, "set_stance", compiler.set_stance)
    monkeypatch.setattr(torch.compiler, "reset", compiler.reset)
    return compiler


MADE: dict[str, Any] = {
    "bdbench": "0.1.0", "python": "3.11", "torch": "2.6", "device": "cpu", "threads": 1, "precision": "fp32",
    "seconds": 1.0, "peak_memory_bytes": 1, "at": "2026-01-01T00:00:00+00:00", "training_seconds": 1.0,
}  # fmt: skip
FACTS: dict[str, dict[str, Any]] = {
    "dataset": {
        "name": "toy", "augment": "none", "class_names": ["a", "b"], "image_shape": [1, 8, 8],
        "counts": {"train": 1, "test": 1, "triggered": 1, "trusted": 0},
    },
    "model": {"model": "convnet", "class_names": ["a", "b"], "image_shape": [1, 8, 8], "sets_aside": False},
    "evaluation": {
        "dataset": "toy", "dataset_id": "d", "model": "convnet", "model_id": "m", "attack": "badnets",
        "attack_options": {}, "defense": "none", "defense_options": {}, "preset": "tiny", "seed": 0, "attack_seed": 0,
        "seconds": 1.0, "peak_memory_bytes": 1, "device": "cpu", "precision": "fp32",
    },
}  # fmt: skip
"""What a manifest of each kind says at the least."""

FAST = ("--epochs", "2", "--batch-size", "64")
"""Flags of a training on the digits that takes a moment and learns the backdoor."""


def seal_again(folder: Path, raw: dict[str, Any]) -> None:
    """Write a manifest whose hashes, id and seal are right, as who prepares an artifact would."""
    with suppress(KeyError, TypeError, AttributeError):
        for name in raw["files"]:
            if (folder / name).is_file():
                content = (folder / name).read_bytes()
                raw["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        raw["id"] = Ask(**raw["ask"]).id
        manifest = manifests.Manifest(**{**raw, "ask": Ask(**raw["ask"])})
        raw["seal"] = manifest.expected_seal
    (folder / MANIFEST).write_text(json.dumps(raw))
