"""FC: images of the target class that a network takes for other ones, with a patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from bdbench.attacks.base import Lab, Labels, Occasion, State
from bdbench.attacks.parts.patches import scaled
from bdbench.attacks.parts.surrogates import SurrogateAttack, change_images, on_device, rows_of_target
from bdbench.data import ImageDataset
from bdbench.models.classifier import Classifier
from bdbench.seeds import addressed, generator

WATCHED = 2048
"""Features of the network for which the published weight of closeness was chosen."""


class FeatureCollision(SurrogateAttack):
    """Images of the target class are moved until their features are those of other images, and carry a patch.

    Clean-label. Every poisoned image x0 has a partner of another class, drawn by its row. Forward-backward splitting
    minimises |f(x) - f(partner)|^2 + b / 2 |x - x0|^2, where f is a surrogate's embedding, on images that both carry
    the patch. So the poisoned image still looks like its class, but to a network only the patch tells it from the
    partner. At test time the patch alone, on any image, calls the target.

    `--hidden` leaves the patch away from the training images: they only have the features of patched partners, as in
    Hidden Trigger Backdoor Attacks (https://arxiv.org/abs/1910.00033). That is meant for victims that keep a network's
    features and is weak where the victim is trained from scratch.

    Paper: Shafahi et al., Poison Frogs! Targeted Clean-Label Poisoning Attacks on Neural Networks, NeurIPS 2018,
    https://arxiv.org/abs/1804.00792.

    Differs from the published code: there a collision makes one chosen test image fail and there is no trigger, so no
    success rate on new images; patch, partners and test trigger are bdbench's adaptation. The patch, 4 of 32 pixels,
    black and white in equal shares in every channel, stays in one place. The step size is each image's own and is
    halved whenever a step does not help, which is then taken back; all steps are tried (the published threshold belongs
    to another network).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1804.00792"
    label_modes: ClassVar[tuple[Labels, ...]] = ("clean",)

    rate: float | None = Field(0.05, ge=0, le=1, description="Poisoned share of the whole training split.")
    labels: Labels = Field("clean", description="The target class only, labels kept.")
    hidden: bool = Field(False, description="Do not show the patch in training.")
    closeness: float = Field(0.25, ge=0, description="b = closeness * (2048 / values of an image)^2.")
    epsilon: float | None = Field(None, gt=0, le=255, description="Largest change of a value, of 255; default: none.")
    steps: int = Field(200, ge=1, description="Steps of the collision.")
    lr: float = Field(0.01, gt=0, description="First step size, for images in [0, 1].")

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return pattern (C, H, W) float, 0 or 255, and mask (1, H, W) float of 0 and 1."""
        channels, height, width = clean.image_shape
        rows, columns = scaled(27, 4, height), scaled(27, 4, width)
        tall, wide = rows.stop - rows.start, columns.stop - columns.start
        mask, pattern = torch.zeros(1, height, width), torch.zeros(channels, height, width)
        mask[:, rows, columns] = 1
        drawn = torch.rand(channels, tall * wide, generator=generator(lab.seed, "fc", "patch"))
        pattern[:, rows, columns] = 255.0 * (drawn.argsort(1) % 2).view(channels, tall, wide)
        return {"pattern": pattern, "mask": mask}

    def craft(self, clean: ImageDataset, rows: Tensor, state: State, lab: Lab) -> Tensor:
        """Move the images that will be poisoned to the features of their partners."""
        others = torch.ones(len(clean), dtype=torch.bool)
        others[rows_of_target(clean, self.target)] = False
        candidates = torch.nonzero(others).flatten()
        draws = addressed(rows, 1, lab.seed, "fc", "partner")[:, 0].double()
        partners = candidates[(draws * len(candidates)).long()]
        model = self.train_surrogate(clean, lab)
        mask, pattern = (state[name].to(lab.engine.device) for name in ("mask", "pattern"))

        def patched(images: Tensor) -> Tensor:
            return torch.lerp(images, pattern / 255, mask)

        def unpatched(images: Tensor) -> Tensor:
            return images

        def change(images: Tensor, places: Tensor) -> Tensor:
            with torch.no_grad():
                goal = model.embed(patched(on_device(clean.images[partners[places]], lab)))
            weight = self.closeness * (WATCHED / images[0].numel()) ** 2
            bound = 1.0 if self.epsilon is None else self.epsilon / 255
            shown = unpatched if self.hidden else patched
            return collide(model, images, goal, weight, bound, self.steps, self.lr, shown)

        return change_images(lab, "collision", clean.images[rows], change)

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Write the pattern where the mask is 1; not in training, if it is hidden."""
        if self.hidden and occasion.use != "test":
            return images
        return torch.where(state["mask"].bool(), state["pattern"].to(torch.uint8), images)


class Weighed(NamedTuple):
    """What a collision has reached: objectives (B,), and the gradient (B, C, H, W) of their first term."""

    objective: Tensor
    gradient: Tensor


def collide(
    model: Classifier,
    images: Tensor,
    goal: Tensor,
    closeness: float,
    bound: float,
    steps: int,
    lr: float,
    shown: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return images x near images x0 whose embeddings f(shown(x)) are near a goal.

    Every image for itself minimises |f(shown(x)) - goal|^2 + closeness / 2 |x - x0|^2: a gradient step on the first
    term, then the proximal step of the second, towards x0. A step that does not help is taken back and the step size
    of that image halved.

    The paper writes closeness |x - x0|^2; its proximal step, which is used here, is that of half of it.

    Args:
        model: frozen, in evaluation mode.
        images: x0 (B, C, H, W) in [0, 1].
        goal: (B, D).
        closeness: weight of the second term.
        bound: largest change of a value, of 1.
        steps: how many.
        lr: first step size.
        shown: what is put on images before the network sees them.

    Returns:
        (B, C, H, W) in [0, 1]; the objective of each is at most what it was at x0.
    """
    low, high = (images - bound).clamp(0, 1), (images + bound).clamp(0, 1)

    def weigh(moved: Tensor) -> Weighed:
        moved = moved.detach().requires_grad_()
        distances = (model.embed(shown(moved)) - goal).square().sum(1)
        (gradient,) = torch.autograd.grad(distances.sum(), moved)
        far = (moved.detach() - images).square().sum((1, 2, 3))
        return Weighed(distances.detach() + closeness / 2 * far, gradient)

    best, sizes = images, torch.full((len(images), 1, 1, 1), lr, device=images.device)
    now = weigh(best)
    for _ in range(steps):
        pull = sizes * closeness
        moved = (pull * images + best - sizes * now.gradient) / (1 + pull)
        moved = torch.minimum(torch.maximum(moved, low), high)
        then = weigh(moved)
        helps = (then.objective < now.objective).view(-1, 1, 1, 1)
        best = torch.where(helps, moved, best)
        now = Weighed(torch.minimum(now.objective, then.objective), torch.where(helps, then.gradient, now.gradient))
        sizes = torch.where(helps, sizes, sizes / 2)
    return best
