"""CBD: train away from a twin that was stopped early and has learned the backdoor only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from bdbench.defenses.base import Defended, Defense, Task, mean_cross_entropy
from bdbench.engine import Batch, frozen
from bdbench.models.classifier import Classifier
from bdbench.seeds import scoped

EPSILON = 1e-8


class CBD(Defense):
    """Trains a clean model whose samples weigh less the better a backdoored twin already fits them.

    The twin trains first, plainly and briefly: the trigger is learned before the classes. Then it is frozen, and the
    clean model minimises, with R the twin's embedding and Z its own,
    mean(w * CE) + information_weight * I(R; Z) + bottleneck * |Z|^2 / 2, where w = loss_twin / (loss_twin + loss) is
    scaled to mean 1 in each batch and I is a critic's Wasserstein estimate of the dependence.

    Paper: Zhang et al., Backdoor Defense via Deconfounded Representation Learning, CVPR 2023,
    https://arxiv.org/abs/2303.06818.

    Differs from the published code: there the information term is off unless asked for, its spectral norm divides by
    the root of the largest singular value and normalises biases too, its critic learns at 0.2 with dropout on while it
    judges, and a whole pass over the data trains it before each epoch; here the norm is the spectral norm of the
    weights, dropout is off while it judges, and it takes `critic_steps` in each step. The code has no bottleneck term.
    `--information-weight 0 --bottleneck 0` is the code's default, reweighting alone. The code's 2x2 cutout is
    `--augment crop,flip,cutout`. The weight of the bottleneck is not verified against the paper.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2303.06818"
    threat: ClassVar[str] = "the defender controls training; has the poisoned set only, no clean data"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"twin_epochs": 5, "epochs": 100, "batch_size": 64, "schedule": "step"},
        "fast": {"twin_epochs": 5, "epochs": 12, "batch_size": 64},
        "tiny": {"twin_epochs": 2, "twin_lr": 0.05, "epochs": 60, "batch_size": 32, "lr": 0.05},
    }

    twin_epochs: int = Field(
        5, ge=1, description="Epochs of the backdoored twin: few, so that it learns the trigger only."
    )
    twin_lr: float = Field(0.1, gt=0, description="Constant learning rate of the twin.")
    information_weight: float = Field(0.01, ge=0, description="Weight of the information term; 0 leaves it out.")
    bottleneck: float = Field(1e-4, ge=0, description="Weight of the bottleneck term; 0 leaves it out.")
    critic_lr: float = Field(1e-3, gt=0, description="Learning rate of the critic (Adam).")
    critic_steps: int = Field(1, ge=1, description="Steps of the critic in each step of the model.")
    critic_dropout: float = Field(0.2, ge=0, lt=1, description="Dropout of the critic while it learns.")

    def run(self, task: Task) -> Defended:
        """Train the twin, freeze it, train the clean model; the scores are the twin's negated losses."""
        engine = task.engine
        twin_recipe = task.recipe.model_copy(
            update={"epochs": self.twin_epochs, "lr": self.twin_lr, "schedule": "constant", "warmup": 0.0}
        )
        twin = frozen(engine.fit(task.new_model("twin"), task.train, mean_cross_entropy, twin_recipe, phase="twin"))
        model = task.new_model("model")
        with scoped(engine.seed, "critic", "init"):
            critic = Critic(model.embedding_size, self.critic_dropout).to(engine.device)
        learner = torch.optim.Adam(critic.parameters(), self.critic_lr)
        loss = _Objective(self, twin, critic, learner)
        model = engine.fit(
            model, task.train, loss, task.recipe, phase="clean", companions={"critic": critic, "learner": learner}
        )
        return Defended(model, scores=-engine.losses(twin, task.train))


class Critic(nn.Module):
    """Scores pairs of embeddings; 1-Lipschitz up to its dropout, by the spectral norm of its two layers.

    Args:
        size: D.
        dropout: share of inputs and hidden units dropped in training mode.
    """

    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Dropout(dropout), spectral_norm(nn.Linear(2 * size, size)), nn.LeakyReLU(0.01),
            nn.Dropout(dropout), spectral_norm(nn.Linear(size, 1)),
        )  # fmt: skip

    def forward(self, twin_BD: Tensor, own_BD: Tensor) -> Tensor:
        """Map two embeddings (B, D) to scores (B,)."""
        scores: Tensor = self.layers(torch.cat([twin_BD, own_BD], 1)).squeeze(1)
        return scores


def dependence(critic: Critic, twin_BD: Tensor, own_BD: Tensor) -> Tensor:
    """Estimate how far the embeddings are from independent: mean score of true pairs minus that of shifted pairs.

    Args:
        critic: in evaluation mode to judge, in training mode to learn.
        twin_BD, own_BD: (B, D); the shifted pairs take the own embedding of the next sample.

    Returns:
        A scalar, 0 where the own embedding is the same for all samples.
    """
    scores: Tensor = critic(twin_BD, own_BD) - critic(twin_BD, own_BD.roll(-1, 0))
    return scores.mean()


def sample_weights(twin_losses: Tensor, losses: Tensor) -> Tensor:
    """Return CBD's weights, mean 1: small where the twin fits a sample much better than the model does.

    Args:
        twin_losses, losses: (B,) cross entropies, not negative.

    Returns:
        (B,), without gradient; zero everywhere if the twin fits all samples exactly.
    """
    with torch.no_grad():
        raw = twin_losses / (losses + twin_losses + EPSILON)
        return len(raw) * raw / (raw.sum() + EPSILON)


class _Objective:
    """The clean model's loss; its critic learns inside, on the same embeddings."""

    def __init__(self, options: CBD, twin: Classifier, critic: Critic, learner: torch.optim.Optimizer) -> None:
        self.options, self.twin, self.critic, self.learner = options, twin, critic, learner

    def __call__(self, model: Classifier, batch: Batch) -> Tensor:
        with torch.no_grad():
            twin_BD = self.twin.embed(batch.images)
            twin_losses = F.cross_entropy(self.twin.classify(twin_BD), batch.labels, reduction="none")
        own_BD = model.embed(batch.images)
        losses = F.cross_entropy(model.classify(own_BD), batch.labels, reduction="none")
        total = (sample_weights(twin_losses, losses) * losses).mean()
        if self.options.information_weight:
            with torch.autocast(own_BD.device.type, enabled=False):
                self._teach(twin_BD, own_BD.detach())
                total = total + self.options.information_weight * dependence(self.critic.eval(), twin_BD, own_BD)
        if self.options.bottleneck:
            total = total + self.options.bottleneck * own_BD.square().sum(1).mean() / 2
        return total

    def _teach(self, twin_BD: Tensor, own_BD: Tensor) -> None:
        self.critic.train()
        for _ in range(self.options.critic_steps):
            self.learner.zero_grad(set_to_none=True)
            (-dependence(self.critic, twin_BD, own_BD)).backward()
            self.learner.step()
