"""Narcissus: a faint pattern that makes images of the target class look even more like it."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdbench.attacks.base import Lab, Labels, Occasion, State
from bdbench.attacks.parts.surrogates import SurrogateAttack, rows_of_target
from bdbench.data import ImageDataset
from bdbench.training.loop import Batch
from bdbench.training.recipe import Recipe


class Narcissus(SurrogateAttack):
    """One faint pattern, optimised to make images of the target class more like it, is added to very few of them.

    Clean-label: 0.05 % of the set, 25 of 50,000. The pattern minimises a surrogate's loss of the target class on
    images of that class, within 16/255; at test time it is added three times as strong.

    Paper: Zeng et al., Narcissus: A Practical Clean-Label Backdoor Attack with Limited Information, CCS 2023,
    https://arxiv.org/abs/2204.05255.

    Differs from the published code: the paper's attacker knows the target class only, trains the surrogate on public
    images of another kind and then shortly on that class. Here the surrogate is trained on the same training split as
    the victim, all classes of it: a stronger attacker than the paper's, who needs no short training on the class. The
    pattern is optimised for 100 rounds, not 1,000 (`--rounds 1000`).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2204.05255"
    version: ClassVar[int] = 2
    label_modes: ClassVar[tuple[Labels, ...]] = ("clean",)

    rate: float | None = Field(0.0005, ge=0, le=1, description="Poisoned share of the whole training split.")
    labels: Labels = Field("clean", description="The target class only, labels kept.")
    epsilon: float = Field(16.0, gt=0, le=255, description="Largest size of the pattern, of 255.")
    magnify: float = Field(3.0, gt=0, description="How many times as strong the pattern is at test time.")
    rounds: int = Field(100, ge=1, description="Passes over the target class; 1000 as published.")
    lr: float = Field(0.005, gt=0, description="Learning rate of RAdam on [0, 1]; published: 0.01 on [-1, 1].")

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return the pattern (C, H, W) float in -epsilon..epsilon, of 255."""
        target = clean.take(rows_of_target(clean, self.target))
        model = self.train_surrogate(clean, lab)
        pattern = Pattern(clean.image_shape, self.epsilon / 255)

        def loss(pattern: Pattern, batch: Batch) -> Tensor:
            pattern.cut()
            return F.cross_entropy(model(pattern(batch.images)), batch.labels)

        recipe = Recipe(epochs=self.rounds, lr=self.lr, schedule="constant", augment="none")
        learner = torch.optim.RAdam(pattern.parameters(), self.lr)
        lab.engine.fit(pattern, target, loss, recipe, phase="pattern", optimizer=learner)
        pattern.cut()
        return {"pattern": (pattern.values.detach()[0].cpu() * 255).contiguous()}

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Add the pattern, stronger at test time."""
        return images + (self.magnify if occasion.use == "test" else 1.0) * state["pattern"]


class Pattern(nn.Module):
    """A pattern that is added to images.

    Args:
        image_shape: (C, H, W).
        epsilon: largest size, of 1.
    """

    def __init__(self, image_shape: tuple[int, int, int], epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.values = nn.Parameter(torch.zeros(1, *image_shape))

    @torch.no_grad()
    def cut(self) -> None:
        """Bring the values back to at most epsilon."""
        self.values.clamp_(-self.epsilon, self.epsilon)

    def forward(self, images: Tensor) -> Tensor:
        """Add the pattern to images (B, C, H, W) in [0, 1]."""
        changed = images + self.values
        # Unlike that of a clamp, the gradient reaches what lies on the bound, as black pixels do at first.
        return torch.minimum(torch.maximum(changed, torch.zeros_like(changed)), torch.ones_like(changed))
