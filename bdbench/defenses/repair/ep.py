"""EP and BNP: prune the channels whose inputs, before the batch norm, are distributed as a backdoor's are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.channels import norm_inputs
from bdbench.defenses.parts.masks import prune
from bdbench.defenses.repair.outliers import OutlierPruning
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import BatchNorm, named_norms
from bdbench.seeds import generator
from bdbench.training.augment import augmented, parse_augment

PAPER = "https://proceedings.neurips.cc/paper_files/paper/2022/hash/76917808731dae9e6d62c2a7a6afb542-Abstract-Conference.html"


class NormPruning(OutlierPruning):
    """Base of those that look at what enters batch norms over some images."""

    images: int = Field(2000, ge=2, description="Images that are looked at, drawn at random.")
    zeroed: Literal["weight", "both"] = Field(
        "weight", description="What of a pruned channel becomes 0: its norm's weight, or weight and bias."
    )

    def sample(self, task: Task, images: Tensor) -> Tensor:
        """Return some of the images (N, C, H, W)."""
        if len(images) < 2:
            raise OptionError(f"statistics of channels take at least 2 images, and here are {len(images)}")
        order = torch.randperm(len(images), generator=generator(task.engine.seed, "statistics"))
        return images.index_select(0, order[: self.images].sort().values)

    def without_norms(self, task: Task, suspect: Classifier, channels: dict[str, Tensor]) -> Defended:
        """Return the suspect without some channels of its batch norms."""
        return self.without(task, suspect, channels, partial(prune, bias=self.zeroed == "both"))


class EntropyPruning(NormPruning):
    """Prunes the channels whose inputs over the training images fall into two groups, clean and poisoned.

    For every channel of every batch norm, take its largest input over all places of an image, standardise it over the
    images, and compute the entropy of its histogram. A channel is pruned if its entropy lies more than `deviations`
    standard deviations below the mean of its layer. The training images are looked at, poisoned ones among them; their
    labels are not, and no trusted image is needed. A channel that is constant over the images takes no part.

    Among n channels none can lie more than (n - 1) / sqrt(n) deviations out: 3.75 of 16. `--spread mad` has no such
    limit.

    Paper: Zheng et al., Pre-activation Distributions Expose Backdoor Neurons, NeurIPS 2022,
    https://proceedings.neurips.cc/paper_files/paper/2022/hash/76917808731dae9e6d62c2a7a6afb542-Abstract-Conference.html.

    The published code looks at 500 images in bins of 0.01 deviations, so that nearly every image has a bin of its own,
    and the entropy says little. Here it is 2,000 images in bins of 0.1, which is the width in BackdoorBench. There the
    bias of a pruned channel becomes 0 too (`--zeroed both`), and images are augmented first; here they are not.
    """

    paper: ClassVar[str] = PAPER
    threat: ClassVar[str] = "the defender has the backdoored model and the poisoned training set, no clean data"
    needs_trusted: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "fast": {}, "tiny": {"deviations": 2.0}}

    bin_width: float = Field(0.1, ge=0.001, le=10, description="Width of the histogram's bins, in deviations.")

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:  # noqa: ARG002
        """Prune a copy."""
        norms = named_norms(suspect, "ep")
        images = self.sample(task, task.train.images)
        peaks = norm_inputs(task.engine, suspect, images, norms, lambda _, inputs: inputs.amax(2))
        found = {name: entropies(largest, self.bin_width) for name, largest in peaks.items()}
        varied = {name: entropy > 0 for name, entropy in found.items()}
        low = self.standing_out({name: -entropy[varied[name]] for name, entropy in found.items()})
        return self.without_norms(
            task, suspect, {name: own.masked_scatter(own, low[name]) for name, own in varied.items()}
        )


class MomentPruning(NormPruning):
    """Prunes the channels whose inputs over clean images differ most from what the batch norm saw in training.

    A batch norm remembers mean and variance of its inputs over the training set, poisoned images among them. Where a
    backdoor lives they differ from those over trusted images. Both are taken for normal distributions; a channel is
    pruned if their Kullback-Leibler divergence lies more than `deviations` standard deviations above the mean of its
    layer. Labels of the trusted images are not used. The images are augmented with `--augment`, as those of the
    suspect were in training: the black border of a crop alone changes the statistics more than a backdoor does.

    Among n channels none can lie more than (n - 1) / sqrt(n) deviations out: 3.75 of 16. `--spread mad` has no such
    limit.

    Paper: Zheng et al., Pre-activation Distributions Expose Backdoor Neurons, NeurIPS 2022,
    https://proceedings.neurips.cc/paper_files/paper/2022/hash/76917808731dae9e6d62c2a7a6afb542-Abstract-Conference.html.

    The published code takes one batch of 500 clean images. The code in BackdoorBench compares with the statistics of
    whatever went through the network last, a batch of training images, so that nothing can stand out; its divergence
    leaves out a factor of one half and may be negative; the bias becomes 0 too (`--zeroed both`).
    """

    paper: ClassVar[str] = PAPER
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "fast": {}, "tiny": {"deviations": 2.0}}

    def mend(self, task: Task, suspect: Classifier, trusted: ImageDataset) -> Defended:
        """Prune a copy."""
        norms = {name: norm for name, norm in named_norms(suspect, "bnp").items() if norm.running_var is not None}
        if not norms:
            raise OptionError(
                "method 'bnp' works on the running statistics of batch norms, and those of this network keep none; "
                "choose a network whose norms do, such as wrn-16-1, preact-resnet-18, resnet-18 or convnet"
            )
        images = as_in_training(self.sample(task, trusted.images), task)
        moments = norm_inputs(task.engine, suspect, images, norms, centred_moments)
        found = {name: divergence(norms[name], *own.double().mean(0)) for name, own in moments.items()}
        return self.without_norms(task, suspect, self.standing_out(found))


def as_in_training(images: Tensor, task: Task) -> Tensor:
    """Return images (N, C, H, W) uint8 augmented as the recipe says."""
    operations, rng = parse_augment(task.recipe.augment), generator(task.engine.seed, "statistics", "augment")
    parts = [augmented(part, operations, rng).mul_(255).round_().to(torch.uint8) for part in images.split(256)]
    return torch.cat(parts)


def entropies(values: Tensor, width: float) -> Tensor:
    """Return the entropy (C,) of the histogram of each column of values (N, C), in nats; 0 of a constant column.

    Args:
        values: standardised first, column by column.
        width: of a bin, in standard deviations.
    """
    values = values.double()
    centred = values - values.mean(0)
    spread = centred.square().mean(0).sqrt()
    constant = values.amax(0) == values.amin(0)
    bins = torch.where(constant, 0.0, centred / spread / width).floor().long()
    bins -= bins.amin(0)
    count = int(bins.max()) + 1
    columns = torch.arange(bins.shape[1]) * count
    shares = torch.bincount((bins + columns).flatten(), minlength=bins.shape[1] * count).view(-1, count) / len(bins)
    return -torch.xlogy(shares, shares).sum(1)


def centred_moments(norm: BatchNorm, inputs: Tensor) -> Tensor:
    """Return mean and mean square over places (B, 2, C) of inputs (B, C, P), less the running mean of their norm."""
    assert norm.running_mean is not None
    mean = inputs.mean(2) - norm.running_mean
    return torch.stack([mean, inputs.var(2, correction=0) + mean.square()], 1)


def divergence(norm: BatchNorm, mean: Tensor, square: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence (C,) of the running statistics of a norm from those of other inputs.

    KL(N1 || N2) of two normal distributions: N2 has the running mean and variance, N1 those of the inputs. Both
    variances have the eps of the norm added, which is what it divides by.

    Args:
        norm: with running statistics.
        mean, square: (C,) of the inputs less the running mean, float64, on the CPU.
    """
    assert norm.running_var is not None
    own, usual = square - mean.square() + norm.eps, norm.running_var.cpu().double() + norm.eps
    return ((usual / own).log() + (own + mean.square()) / usual - 1) / 2
