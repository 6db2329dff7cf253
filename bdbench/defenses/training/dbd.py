"""DBD: learn features without labels, fit a head on them, then trust only the labels that it finds credible."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Defense, Task, lowest
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.seeds import generator, scoped
from bdbench.training.augment import parse_augment
from bdbench.training.engine import Engine
from bdbench.training.loop import Batch
from bdbench.training.recipe import Recipe
from bdbench.training.views import CROP_AREA, contrastive_view

PROJECTION = 128
ENCODERS = 1
"""Version of the first stage: raised where equal settings give other features."""
CHUNK = 4096


class DBD(Defense):
    """Learns features without labels, fits a head to them, and fine-tunes with the labels that look credible.

    1. `simclr`: self-supervised training of the features, without labels, so that triggered images get no cluster of
    their own. 2. `head`: the features frozen, a linear head learns all labels with symmetric cross entropy.
    3. `mixmatch`: before every epoch the `credible_rate` of samples with the lowest loss keep their labels, the others
    lose them, and MixMatch fine-tunes the whole network on both. The scores are the losses of the delivered model.

    The recipe (`--epochs`, `--batch-size`, `--lr`, `--weight-decay`, `--schedule`) is that of the third stage, whose
    steps are Adam's and whose epochs are `steps_per_epoch` long. The weight of the unlabelled part rises over as many
    epochs as the third stage has, counted from the first epoch of the head. Trained features are kept in the cache
    folder by what determines them (images, first weights, options, seed): labels play no part, so runs that differ in
    labels or in later stages reuse them.

    Paper: Huang et al., Backdoor Defense via Decoupling the Training Process, ICLR 2022,
    https://arxiv.org/abs/2202.03423.

    Differs from the published code: there only the first view is an anchor (`--no-symmetric`), the features come from
    epoch 100 of a schedule of 1000 (`--ssl-horizon 1000`), batch-norm statistics of the "frozen" features move while
    the head learns (here nothing of them does), the split is by losses on augmented images (`--split-augmented`), and a
    resumed run begins its ramp again. As there, guessing runs in training mode and moves batch-norm statistics, one
    Adam serves head and fine-tuning, there is one mixing weight a batch, and weights are not averaged. Batches cycle
    through shuffled samples without dropping any, but the head leaves out a last batch of one. The learning rate of
    the first stage falls with every step, there with every epoch. Ranking by symmetric cross entropy is ranking by
    plain cross entropy, which is what is computed. `--split-by class` is ours: with features of few epochs the joint
    ranking soon keeps labels of some classes only, and the others are forgotten; the presets `fast` and `tiny` use it.
    Views are mirrored only where `--augment` flips, so digits are not. How many epochs the paper gives the first stage
    is not verified: 100 is what its code loads.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2202.03423"
    threat: ClassVar[str] = "the defender controls training; has the poisoned set only, no clean data"
    version: ClassVar[int] = 2
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"epochs": 190, "batch_size": 64, "lr": 0.002, "schedule": "constant", "weight_decay": 0.0},
        "fast": {
            "ssl_epochs": 10, "ssl_batch_size": 256, "ssl_warmup": 1.0, "head_epochs": 2, "steps_per_epoch": 256,
            "split_by": "class", "epochs": 8, "batch_size": 64, "lr": 0.002, "schedule": "cosine", "weight_decay": 0.0,
        },
        "tiny": {
            "ssl_epochs": 30, "ssl_batch_size": 128, "ssl_warmup": 2.0, "head_epochs": 10, "head_batch_size": 64,
            "split_by": "class", "unlabelled_weight": 5.0, "steps_per_epoch": 40, "epochs": 8, "batch_size": 32,
            "lr": 0.002, "schedule": "cosine", "weight_decay": 0.0,
        },
    }  # fmt: skip

    ssl_epochs: int = Field(100, ge=1, description="Epochs of self-supervised training.")
    ssl_horizon: int = Field(
        0, ge=0, description="Epochs over which its learning rate falls to 0; 0: those that run (code: 1000)."
    )
    ssl_batch_size: int = Field(512, ge=2, description="Images, of two views each, in a step of it.")
    ssl_lr: float = Field(0.4, gt=0, description="Its peak learning rate (stochastic gradient descent).")
    ssl_weight_decay: float = Field(1e-4, ge=0, description="Its weight decay, on all weights.")
    ssl_warmup: float = Field(0.0, ge=0, description="Epochs of linear warm-up of it.")
    ssl_crop: float = Field(
        CROP_AREA, gt=0, le=1, description="Share of the image that the smallest crop of a view shows."
    )
    temperature: float = Field(0.5, gt=0, description="Temperature of the contrastive loss.")
    symmetric: bool = Field(
        True, description="Both views are anchors of the contrastive loss; off: the first one only."
    )
    head_epochs: int = Field(10, ge=1, description="Epochs of the linear head on frozen features.")
    head_batch_size: int = Field(128, ge=2, description="Images in a step of the head.")
    sce_alpha: float = Field(0.1, ge=0, description="Weight of the cross entropy while the head learns.")
    sce_beta: float = Field(1.0, ge=0, description="Weight of the reverse cross entropy while the head learns.")
    credible_rate: float = Field(0.5, gt=0, lt=1, description="Share of samples that keep their labels.")
    split_by: Literal["all", "class"] = Field(
        "all", description="Rank all samples together (paper), or those of each label apart, so that no class is lost."
    )
    split_augmented: bool = Field(False, description="Rank by losses on augmented images, as the published code does.")
    steps_per_epoch: int = Field(1024, ge=1, description="Steps in an epoch of the third stage.")
    sharpening: float = Field(0.5, gt=0, description="Temperature that sharpens guessed labels.")
    mixup: float = Field(0.75, gt=0, description="Parameter of the beta distribution of the mixing weight.")
    unlabelled_weight: float = Field(15.0, ge=0, description="Final weight of the unlabelled part.")
    crop_padding: Literal["reflect", "zero"] = Field(
        "reflect", description="Border of crops in the second and third stage, where --augment crops."
    )

    def run(self, task: Task) -> Defended:
        """Learn features, head, and fine-tune."""
        groups = ranked_groups(task.train.labels, self.split_by)
        count = sum(int(self.credible_rate * len(rows)) for rows in groups)
        if not 2 <= count <= len(task.train) - 2:
            raise OptionError(
                f"credible_rate {self.credible_rate} keeps the labels of {count} of {len(task.train)} samples; "
                "both parts need at least 2: move it towards 0.5"
            )
        if self.ssl_horizon and self.ssl_horizon < self.ssl_epochs:
            raise OptionError(f"ssl_horizon {self.ssl_horizon} is less than ssl_epochs {self.ssl_epochs}; 0 fits it")
        recipe = task.recipe
        if self.crop_padding == "reflect":
            names = (name.strip() for name in recipe.augment.split(","))
            augment = ",".join("crop-reflect" if name == "crop" else name for name in names)
            recipe = recipe.model_copy(update={"augment": augment})
        model = task.new_model("model")
        self._learn_features(task, model)
        optimizer = torch.optim.Adam(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
        self._learn_head(task, model, optimizer, recipe)
        mixing = _MixMatch(self, task, model, recipe, groups)
        task.engine.fit(
            model, task.train, mixing.loss, recipe, phase="mixmatch", optimizer=optimizer,
            epoch_steps=self.steps_per_epoch, before_epoch=mixing.split,
        )  # fmt: skip
        return Defended(model, scores=task.engine.margins(model, task.train))

    def _learn_features(self, task: Task, model: Classifier) -> None:
        """Train the features by contrast, or take them from the cache."""
        engine, state = task.engine, {"features": model.features}
        with scoped(engine.seed, "weights", "projection"):
            net = Contrastive(model)
        folder = task.cache / "encoders" if task.cache else None
        steps = math.ceil(len(task.train) / self.ssl_batch_size)
        recipe = task.recipe.model_copy(
            update={
                "epochs": self.ssl_horizon or self.ssl_epochs, "batch_size": self.ssl_batch_size, "lr": self.ssl_lr,
                "momentum": 0.9, "nesterov": False, "weight_decay": self.ssl_weight_decay, "schedule": "cosine",
                "warmup": self.ssl_warmup, "augment": "none",  # the views are made in the loss
            }
        )  # fmt: skip
        mirror = "flip" in parse_augment(task.recipe.augment)
        contrast = partial(self._contrast, mirror=mirror)
        train = partial(
            engine.fit, net, task.train, contrast, recipe, phase="simclr", epoch_steps=steps,
            max_steps=self.ssl_epochs * steps, lr_flag="--ssl-lr",
        )  # fmt: skip
        engine.reuse_or_train(folder, self._encoder_key(task.train, net, engine, mirror), state, "features", train)

    def _encoder_key(self, data: ImageDataset, net: Contrastive, engine: Engine, mirror: bool = True) -> str:
        """Hash what determines the features: images (not labels), first weights, options, seed, arithmetic."""
        options = {name: value for name, value in self.model_dump().items() if name.startswith("ssl_")}
        options |= {"temperature": self.temperature, "symmetric": self.symmetric, "version": ENCODERS}
        # what is as it always was has no part in the key: encoders that were kept before stay of use
        options |= {} if mirror else {"mirror": False}
        if self.ssl_crop == CROP_AREA:
            del options["ssl_crop"]
        said = [options, engine.seed, engine.bf16, engine.device.type, tuple(data.images.shape)]
        said += ["compiled"] if engine.may_compile else []
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        digest.update(np.ascontiguousarray(data.images.numpy()).data)
        for name, value in net.state_dict().items():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(value.cpu().numpy()).data)
        return digest.hexdigest()

    def _contrast(self, net: Contrastive, batch: Batch, *, mirror: bool) -> Tensor:
        twice = torch.cat([batch.images, batch.images])
        one, other = net(contrastive_view(twice, least_area=self.ssl_crop, mirror=mirror)).chunk(2)
        return contrastive_loss(one, other, self.temperature, symmetric=self.symmetric)

    def _learn_head(self, task: Task, model: Classifier, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        """Fit the head on features that nothing changes: neither weights nor batch-norm statistics."""
        model.to(task.engine.device).to(memory_format=torch.channels_last).eval()

        def loss(_: nn.Module, batch: Batch) -> Tensor:
            with torch.no_grad():
                embedding = model.embed(batch.images)
            return symmetric_losses(model.classify(embedding), batch.labels, self.sce_alpha, self.sce_beta).mean()

        recipe = recipe.model_copy(
            update={
                "epochs": self.head_epochs,
                "batch_size": self.head_batch_size,
                "schedule": "constant",
                "warmup": 0.0,
            }
        )
        task.engine.fit(model.head, task.train, loss, recipe, phase="head", optimizer=optimizer)


class Contrastive(nn.Module):
    """A classifier's features with SimCLR's projection: linear, batch norm, ReLU, linear, onto the unit sphere.

    Args:
        model: its head plays no part.
    """

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        size = model.embedding_size
        self.classifier = model
        self.projection = nn.Sequential(
            nn.Linear(size, size), nn.BatchNorm1d(size), nn.ReLU(), nn.Linear(size, PROJECTION)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] to unit vectors (B, 128) float32."""
        embedding = self.classifier.embed(images)
        with torch.autocast(embedding.device.type, enabled=False):
            return F.normalize(self.projection(embedding), dim=1)


def contrastive_loss(one: Tensor, other: Tensor, temperature: float, *, symmetric: bool = True) -> Tensor:
    """Return SimCLR's NT-Xent: cross entropy of finding the other view of an image among all views but itself.

    Args:
        one, other: (B, D) unit vectors, two views of the same B images.
        temperature: divides the cosines.
        symmetric: both views are anchors, else only `one` is.

    Returns:
        A scalar; ln(2 B - 1) where all vectors are equal.
    """
    with torch.autocast(one.device.type, enabled=False):
        views, index = torch.cat([one, other]), torch.arange(len(one), device=one.device)
        anchors, own = (views, torch.cat([index, index + len(one)])) if symmetric else (one, index)
        cosines = (anchors @ views.T / temperature).scatter(1, own[:, None], -math.inf)
        return F.cross_entropy(cosines, (own + len(one)) % len(views))


def symmetric_losses(logits: Tensor, labels: Tensor, alpha: float, beta: float) -> Tensor:
    """Return alpha * CE + beta * RCE of each sample, (B,).

    RCE swaps prediction and label, with ln 0 taken as ln 1e-4: about 9.21 times the probability of all other classes.

    Source: Wang et al., Symmetric Cross Entropy for Robust Learning with Noisy Labels, ICCV 2019.
    """
    plain = F.cross_entropy(logits, labels, reduction="none")
    wanted = F.one_hot(labels, logits.shape[1]).clamp(min=1e-4).log()
    return alpha * plain - beta * (logits.softmax(1).clamp(1e-7, 1) * wanted).sum(1)


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """Raise rows (B, K) to 1 / temperature and scale them to sum 1: surer below a temperature of 1."""
    raised = probabilities.pow(1 / temperature)
    return raised / raised.sum(1, keepdim=True)


def interleave(batches: Sequence[Tensor]) -> list[Tensor]:
    """Swap parts between n equal batches so that each holds samples of the first; doing it twice gives them back.

    Each batch is cut into n parts, and part i of the first batch changes places with part i of batch i.
    """
    parts = [list(batch.tensor_split(len(batches))) for batch in batches]
    for i in range(1, len(parts)):
        parts[0][i], parts[i][i] = parts[i][i], parts[0][i]
    return [torch.cat(part) for part in parts]


class _MixMatch:
    """The third stage: the split before an epoch, and the loss of a step."""

    def __init__(self, options: DBD, task: Task, model: Classifier, recipe: Recipe, groups: list[Tensor]) -> None:
        self.options, self.model, self.recipe, self.groups = options, model, recipe, groups
        self.engine, self.data = task.engine, task.train
        self.feed = task.engine.feed(task.train)
        self.operations = parse_augment(recipe.augment)
        self.doubted = torch.empty(0, dtype=torch.int64)

    def split(self, epoch: int) -> Tensor:
        """Rank all samples, keep the rows that lose their labels, and return those of this epoch that keep them."""
        rng = generator(self.engine.seed, "mixmatch", "split", epoch)
        data = self._augmented(rng) if self.options.split_augmented else self.data
        credible = self._credible(self.engine.margins(self.model, data))
        length = self.options.steps_per_epoch * self.recipe.batch_size
        self.doubted = _cycle(torch.nonzero(~credible).flatten(), length, rng).to(self.engine.device)
        return _cycle(torch.nonzero(credible).flatten(), length, rng)

    def _credible(self, losses: Tensor) -> Tensor:
        """Return a mask (N,) of the samples that keep their labels: of each group those of the lowest losses."""
        mask = torch.zeros(len(losses), dtype=torch.bool)
        for rows in self.groups:
            mask[rows] = lowest(losses[rows], int(self.options.credible_rate * len(rows)))
        return mask

    def _augmented(self, rng: torch.Generator) -> ImageDataset:
        rows = torch.arange(len(self.data))
        chunks = [self.feed.batch(part, self.operations, rng) for part in rows.split(CHUNK)]
        images = torch.cat([(chunk * 255).round().byte().cpu() for chunk in chunks])
        return ImageDataset(images, self.data.labels, self.data.class_names)

    def loss(self, model: Classifier, batch: Batch) -> Tensor:
        options, size = self.options, len(batch.labels)
        start = batch.step % options.steps_per_epoch * size
        rows = self.doubted[start : start + size]
        rng = generator(self.engine.seed, "mixmatch", "views", batch.step)
        views = [self.feed.batch(rows, self.operations, rng) for _ in range(2)]
        with torch.no_grad():
            guess = sharpen(sum(model(view).softmax(1) for view in views) / 2, options.sharpening)
        torch.clear_autocast_cache()  # older torch would reuse weights that were cast without gradient
        images = torch.cat([batch.images, *views])
        targets = torch.cat([F.one_hot(batch.labels, guess.shape[1]).to(guess), guess, guess])
        share = mixing_share(options.mixup)
        partner = torch.randperm(len(images), device=images.device)
        images = share * images + (1 - share) * images[partner]
        targets = share * targets + (1 - share) * targets[partner]
        logits = torch.cat(interleave([model(chunk) for chunk in interleave(images.split(size))]))
        labelled = F.cross_entropy(logits[:size], targets[:size])
        unlabelled = (logits[size:].softmax(1) - targets[size:]).square().mean()
        epoch = options.head_epochs + batch.step / options.steps_per_epoch
        return labelled + options.unlabelled_weight * ramp(epoch, self.recipe.epochs) * unlabelled


def ranked_groups(labels: Tensor, split_by: Literal["all", "class"]) -> list[Tensor]:
    """Return the rows that are ranked together: all N, or those of each label that occurs."""
    if split_by == "all":
        return [torch.arange(len(labels))]
    return [torch.nonzero(labels == label).flatten() for label in labels.unique()]


def ramp(epoch: float, length: int) -> float:
    """Return the share of the final weight after so many epochs: 0 at the start, 1 from `length` on."""
    return min(max(epoch / length, 0.0), 1.0)


def mixing_share(parameter: float) -> float:
    """Draw MixUp's weight from Beta(parameter, parameter), the larger side of it: in [0.5, 1]."""
    share = float(torch.distributions.Beta(parameter, parameter).sample())
    return max(share, 1 - share)


def _cycle(rows: Tensor, length: int, rng: torch.Generator) -> Tensor:
    """Return `length` of the rows (M,), shuffled anew whenever all were used."""
    rounds = [rows[torch.randperm(len(rows), generator=rng)] for _ in range(math.ceil(length / len(rows)))]
    return torch.cat(rounds)[:length]
