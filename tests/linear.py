"""A surrogate that one can compute by hand: embeddings are the pixels, logits a matrix times them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bdbench.attacks.parts.surrogates import SurrogateAttack
from bdbench.models.classifier import Classifier
from bdbench.models.structure import frozen
from bdbench.progress import Silent


class Pixels(nn.Module):
    """Pixels in order of channel, row, column."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def linear_model(weight: Tensor, channels: int = 1) -> Classifier:
    """A frozen classifier whose logits for images (B, C, H, W) are weight (K, C*H*W) times the pixels."""
    zeros = torch.zeros(channels)
    model = Classifier(Pixels(weight.shape[1]), len(weight), zeros, torch.ones(channels))
    model.head.weight.data.copy_(weight)
    return frozen(model)


def give_surrogate(monkeypatch: pytest.MonkeyPatch, model: Classifier) -> None:
    """Let attacks have this model in place of a surrogate that they train."""
    monkeypatch.setattr(SurrogateAttack, "train_surrogate", lambda *_: model)


class Steps(Silent):
    """A progress that counts the steps of every bar."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.label = ""

    def start(self, label: str, total: int, unit: str = "images") -> None:  # noqa: ARG002
        self.label = label
        self.counts[label] = 0

    def advance(self, amount: int, status: str = "") -> None:  # noqa: ARG002
        self.counts[self.label] += 1
