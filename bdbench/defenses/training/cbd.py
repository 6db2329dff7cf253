"""CBD: train away from a twin that was stopped early and has learned the backdoor only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from bdbench.defenses.base import Defended, Defense, Task
from bdbench.models.classifier import Classifier
from bdbench.models.structure import frozen
from bdbench.seeds import generator, scoped
from bdbench.training.augment import parse_augment
from bdbench.training.loop import Batch, mean_cross_entropy

EPSILON = 1e-8
POWER_ITERATIONS = 5

Norm = Literal["spectral", "root"]


class CBD(Defense):
    """Trains a clean model whose samples weigh less the better a backdoored twin already fits them.

    The twin trains first, plainly and briefly: the trigger is learned before the classes. Then it is frozen, and the
    clean model minimises, with R the twin's embedding and Z its own,
    mean(w * CE) + information_weight * I(R; Z) + bottleneck * |Z|^2 / 2, where w = loss_twin / (loss_twin + loss) is
    scaled to mean 1 in each batch and I is a critic's Wasserstein estimate of the dependence.

    Paper: Zhang et al., Backdoor Defense via Deconfounded Representation Learning, CVPR 2023,
    https://arxiv.org/abs/2303.06818.

    The published code is `--preset paper --augment crop,flip,cutout --bottleneck 0`: it has no bottleneck term. Its
    default is reweighting alone, `--information-weight 0`. Its disentangled mode is
    `--critic-pass epoch --critic-lr 0.2 --critic-decay 20 --critic-norm root --critic-judges-with-dropout`:
    before each epoch a whole pass over the data teaches the critic, with the clean model in training mode, whose
    batch-norm statistics it therefore moves; after each of its steps every parameter of the critic, biases too, is
    divided by the root of its largest singular value. There the 0.01 of the information term stands inside the
    estimate and scales the critic's own loss too, which Adam does not notice.

    Four options are ours, off in `paper`, on in `fast`, chosen on training data (benchmarks, `ablation`). Without
    crops and flips (`--twin-augment none`) the twin learns a trigger in a fraction of the steps, before the classes;
    so on a large set fewer epochs than five do (`--twin-step-limit 1500`). A learning rate that falls to 0
    (`--twin-schedule cosine`) keeps what it knows from hanging on its last steps. And `--twin-judges once` has it judge
    the images as it knows them, so that no pass over the twin is left in the model's steps. `tiny` has the falling rate
    only.

    Differs from the published code in every mode: batches that the twin fits exactly, and parameters of zeros under
    `root`, give no NaN; a last batch of one image is left out; all runs are seeded. The critic's defaults (a step in
    each step of the model, the spectral norm of its weights, no dropout while it judges) are ours. The weight of the
    bottleneck is not verified against the paper.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2303.06818"
    threat: ClassVar[str] = "the defender controls training; has the poisoned set only, no clean data"
    version: ClassVar[int] = 2
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"twin_epochs": 5, "epochs": 100, "batch_size": 64, "schedule": "step"},
        "fast": {
            "twin_epochs": 5, "twin_step_limit": 1500, "twin_schedule": "cosine", "twin_augment": "none",
            "twin_judges": "once", "epochs": 12, "batch_size": 64,
        },
        "tiny": {
            "twin_epochs": 2, "twin_lr": 0.05, "twin_schedule": "cosine", "epochs": 25, "batch_size": 32, "lr": 0.05,
        },
    }  # fmt: skip

    twin_epochs: int = Field(
        5, ge=1, description="Epochs of the backdoored twin: few, so that it learns the trigger only."
    )
    twin_step_limit: int = Field(
        0, ge=0, description="Leave out the twin's last whole epochs beyond about so many steps; 0: all stay."
    )
    twin_lr: float = Field(0.1, gt=0, description="Learning rate of the twin.")
    twin_schedule: Literal["constant", "cosine"] = Field(
        "constant",
        description="The twin's learning rate stays (paper), or falls to 0, so that its last steps decide less.",
    )
    twin_augment: str = Field(
        "auto", description="Augmentation of the twin's training, see --augment; auto: the model's own."
    )
    twin_judges: Literal["batch", "once"] = Field(
        "batch",
        description="What the twin judges: each batch as it is augmented (paper), or all images as they are, once.",
    )
    information_weight: float = Field(0.01, ge=0, description="Weight of the information term; 0 leaves it out.")
    bottleneck: float = Field(1e-4, ge=0, description="Weight of the bottleneck term; 0 leaves it out.")
    reweight: bool = Field(True, description="Weigh the samples by the twin's losses; off: all weigh 1.")
    critic_pass: Literal["step", "epoch"] = Field(
        "step", description="The critic learns in each step of the model, or in a pass over the data before each epoch."
    )
    critic_steps: int = Field(1, ge=1, description="Steps of the critic on each batch that it learns from.")
    critic_lr: float = Field(1e-3, gt=0, description="Learning rate of the critic (Adam).")
    critic_decay: int = Field(
        0,
        ge=0,
        description="Divide the critic's learning rate by 10 every so many epochs (20: from the 20th, the 40th, ... "
        "epoch on); 0: never.",
    )
    critic_norm: Norm = Field(
        "spectral",
        description="What keeps the critic smooth: spectral norm of its weights, or division of all its parameters by "
        "the root of theirs after each step (code).",
    )
    critic_dropout: float = Field(0.2, ge=0, lt=1, description="Dropout of the critic while it learns.")
    critic_judges_with_dropout: bool = Field(False, description="Dropout of the critic also while it judges.")

    def run(self, task: Task) -> Defended:
        """Train the twin, freeze it, train the clean model; the scores rank the twin's losses, lowest first."""
        engine = task.engine
        twin_recipe = task.recipe.model_copy(
            update={
                "epochs": self.epochs_of_twin(len(task.train) / task.recipe.batch_size), "lr": self.twin_lr,
                "schedule": self.twin_schedule, "warmup": 0.0,
                "augment": task.recipe.augment if self.twin_augment == "auto" else self.twin_augment,
            }
        )  # fmt: skip
        trained = engine.fit(
            task.new_model("twin"), task.train, mean_cross_entropy, twin_recipe, phase="twin", lr_flag="--twin-lr"
        )
        frozen(trained)
        once = self.twin_judges == "once"
        twin = Twin(trained, engine.embeddings(trained, task.train.images).to(engine.device) if once else None)
        model = task.new_model("model")
        with scoped(engine.seed, "critic", "init"):
            critic = Critic(model.embedding_size, self.critic_dropout, self.critic_norm).to(engine.device)
        tutor = _Tutor(self, critic)

        def before_epoch(epoch: int) -> None:
            tutor.set_rate(epoch)
            if self.critic_pass == "epoch":  # noqa: S105 - a pass over the data
                tutor.teach_all(task, twin, model, epoch)

        model = engine.fit(
            model, task.train, _Objective(self, twin, tutor), task.recipe, phase="clean",
            before_epoch=before_epoch if self.information_weight else None,
            companions={"critic": critic, "learner": tutor.learner},
        )  # fmt: skip
        return Defended(model, scores=-engine.margins(trained, task.train))

    def epochs_of_twin(self, epoch_steps: float) -> int:
        """Return the twin's epochs, where one has so many steps: as many as come closest to the limit, at least 1."""
        most = max(1, round(self.twin_step_limit / epoch_steps)) if self.twin_step_limit else self.twin_epochs
        return min(self.twin_epochs, most)


class Twin:
    """What the frozen twin says of samples: from the batch as it is augmented, or from the images as they are.

    Args:
        model: the twin.
        taken: (N, D), its embeddings of all training images as they are; None to look at each batch anew.
    """

    def __init__(self, model: Classifier, taken: Tensor | None = None) -> None:
        self.model, self.taken = model, taken

    @torch.no_grad()
    def embed(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return the embeddings (B, D) of augmented images (B, C, H, W), which are the rows (B,) of the data."""
        return self.model.embed(images) if self.taken is None else self.taken[rows]

    @torch.no_grad()
    def losses(self, twin_BD: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropies (B,) of embeddings."""
        return F.cross_entropy(self.model.classify(twin_BD), labels, reduction="none")


class Critic(nn.Module):
    """Scores pairs of embeddings; with the spectral norm of its two layers 1-Lipschitz up to its dropout.

    Args:
        size: D.
        dropout: share of inputs and hidden units dropped in training mode.
        norm: ``spectral`` is part of the layers; for ``root`` see `divide_by_root_of_norm`.
    """

    def __init__(self, size: int, dropout: float, norm: Norm = "spectral") -> None:
        super().__init__()

        def linear(inputs: int, outputs: int) -> nn.Module:
            layer = nn.Linear(inputs, outputs)
            return spectral_norm(layer) if norm == "spectral" else layer

        self.layers = nn.Sequential(
            nn.Dropout(dropout), linear(2 * size, size), nn.LeakyReLU(0.01), nn.Dropout(dropout), linear(size, 1)
        )

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
    with parametrize.cached():  # one spectral norm for both
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


def divide_by_root_of_norm(critic: nn.Module) -> None:
    """Divide every parameter in place by the square root of its largest singular value.

    Done after each step, as in the published code, it pulls that value towards 1, from below too. A bias counts as a
    matrix of one column. Where the estimate is 0 a parameter stays, where the code gets NaN.
    """
    with torch.no_grad():
        for parameter in critic.parameters():
            root = largest_singular_value(parameter if parameter.ndim > 1 else parameter[:, None]).sqrt()
            parameter.div_(torch.where(root > 0, root, 1.0))


def largest_singular_value(matrix: Tensor) -> Tensor:
    """Estimate the largest singular value of a matrix, from below, by `POWER_ITERATIONS` from an all-ones vector.

    As in the published code the vector is an input of the matrix: started as an output, estimates differ by percents.
    """
    right = torch.ones_like(matrix[0])
    for _ in range(POWER_ITERATIONS):
        left = F.normalize(matrix @ right, dim=0)
        right = F.normalize(matrix.T @ left, dim=0)
    return left @ matrix @ right


class _Tutor:
    """Lets the critic learn and judge, apart from the clean model's own training."""

    def __init__(self, options: CBD, critic: Critic) -> None:
        self.options, self.critic = options, critic
        self.learner = torch.optim.Adam(critic.parameters(), options.critic_lr)

    def set_rate(self, epoch: int) -> None:
        """Set the learning rate of an epoch, counted from 0; the code's scheduler moves before it, hence the + 1."""
        decays = (epoch + 1) // self.options.critic_decay if self.options.critic_decay else 0
        for group in self.learner.param_groups:
            group["lr"] = self.options.critic_lr * 0.1**decays

    def teach_all(self, task: Task, twin: Twin, model: Classifier, epoch: int) -> None:
        """Teach on the whole training set once; of the model only batch-norm statistics move."""
        engine, recipe = task.engine, task.recipe
        model.train()
        feed, operations = engine.feed(task.train), parse_augment(recipe.augment)
        rng = generator(engine.seed, "critic", "epoch", epoch)
        order = torch.randperm(len(task.train), generator=rng)
        with scoped(engine.seed, "critic", "global", epoch):
            for rows in order.split(recipe.batch_size):
                if len(rows) == 1:  # batch norm needs two
                    break
                batch = feed.batch(rows, operations, rng)
                with torch.no_grad(), engine.autocast():
                    twin_BD, own_BD = twin.embed(batch, rows.to(engine.device)), model.embed(batch)
                self.teach(twin_BD, own_BD)

    def teach(self, twin_BD: Tensor, own_BD: Tensor) -> None:
        """Take the critic's steps on one batch of embeddings, (B, D) without gradients."""
        self.critic.train()
        for _ in range(self.options.critic_steps):
            self.learner.zero_grad(set_to_none=True)
            (-dependence(self.critic, twin_BD, own_BD)).backward()
            self.learner.step()
            if self.options.critic_norm == "root":
                divide_by_root_of_norm(self.critic)

    def judge(self, twin_BD: Tensor, own_BD: Tensor) -> Tensor:
        """Estimate the dependence, a scalar that the model may descend."""
        self.critic.train(self.options.critic_judges_with_dropout).requires_grad_(False)
        estimate = dependence(self.critic, twin_BD, own_BD)
        self.critic.requires_grad_(True)
        return estimate


class _Objective:
    """The clean model's loss; unless a pass taught it, the critic learns inside, on the same embeddings."""

    def __init__(self, options: CBD, twin: Twin, tutor: _Tutor) -> None:
        self.options, self.twin, self.tutor = options, twin, tutor

    def __call__(self, model: Classifier, batch: Batch) -> Tensor:
        twin_BD = self.twin.embed(batch.images, batch.rows)
        twin_losses = self.twin.losses(twin_BD, batch.labels)
        own_BD = model.embed(batch.images)
        losses = F.cross_entropy(model.classify(own_BD), batch.labels, reduction="none")
        total = (sample_weights(twin_losses, losses) * losses).mean() if self.options.reweight else losses.mean()
        if self.options.information_weight:
            with torch.autocast(own_BD.device.type, enabled=False):
                if self.options.critic_pass == "step":  # noqa: S105 - see above
                    self.tutor.teach(twin_BD, own_BD.detach())
                total = total + self.options.information_weight * self.tutor.judge(twin_BD, own_BD)
        if self.options.bottleneck:
            total = total + self.options.bottleneck * own_BD.square().sum(1).mean() / 2
        return total
