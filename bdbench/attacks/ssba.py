"""SSBA (ISSBA): a network hides a secret in each image, by a change that the image itself decides."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdbench.attacks.base import Attack, Lab, Occasion, State
from bdbench.attacks.parts.generators import fresh, in_equal_batches, restored, weights_of
from bdbench.attacks.parts.victims import epochs_of
from bdbench.data import ImageDataset
from bdbench.errors import TrainingError
from bdbench.seeds import generator
from bdbench.training.loop import Batch
from bdbench.training.recipe import Recipe

JUDGED = 512
LEAST_BITS = 0.75
"""Share of the bits that a decoder must read from triggered training images; 0.5 is chance."""


class SSBA(Attack):
    """An encoder hides the same random bits in every image; how the pixels change differs from image to image.

    Encoder and decoder learn together on the clean training images, with random bits for each: at first the bits
    alone count, then 2 * mean(change^2) + 1.5 * visible change + 1.5 * cross entropy of the bits. The attack fails
    rather than poison with an encoder whose bits cannot be read back from bytes.

    Paper: Li et al., Invisible Backdoor Attack with Sample-Specific Triggers, ICCV 2021,
    https://arxiv.org/abs/2012.03816.

    Differs from the published code: the visible change is the mean squared change at three scales and that of its
    slopes, in place of LPIPS, which needs weights of AlexNet to download; no critic (its weight is 0.5 there, and it is
    off in the example of BackdoorBox) and no spatial transformer before the decoder, which serves photographed
    prints; fewer steps at a higher learning rate; images above `encoder-side` are encoded at that side and the change
    is enlarged. BackdoorBench instead reads images that a like encoder made beforehand.
    """

    version: ClassVar[int] = 2
    paper: ClassVar[str] = "https://arxiv.org/abs/2012.03816"

    secret_bits: int = Field(20, ge=1, description="Length of the secret.")
    encoder_epochs: int | None = Field(
        None,
        ge=1,
        description="Epochs of the encoder; default: as many as take 2,000 steps, at most 100 (published: 20).",
    )
    encoder_batch_size: int = Field(32, ge=2, description="Images in a step of the encoder (32 published).")
    encoder_lr: float = Field(1e-3, gt=0, description="Learning rate of the encoder (Adam; published: 1e-4).")
    encoder_width: int = Field(32, ge=1, description="Channels of the encoder's first level.")
    encoder_side: int = Field(64, ge=8, description="Side in pixels at which larger images are encoded.")
    secret_only: float = Field(
        0.1, ge=0, lt=1, description="Share of the steps, the first, in which the bits alone count (2 of 20 epochs)."
    )

    def fit(self, clean: ImageDataset, lab: Lab) -> State:
        """Return the secret (bits,) of 0 and 1, the encoder's weights under `encoder.`, and the decoder's accuracy.

        Raises:
            TrainingError: the decoder reads hardly more than chance, so that the change carries nothing.
        """
        hider = fresh(partial(Hider, *self._sizes(clean)), lab.seed, "ssba", lab.engine.device)
        size = self.encoder_batch_size
        epochs = self.encoder_epochs or epochs_of(2000, len(clean), size)
        recipe = Recipe(epochs=epochs, batch_size=size, lr=self.encoder_lr, augment="none")
        bits_alone = self.secret_only * epochs * (len(clean) / size)
        lab.engine.fit(
            hider, clean, partial(self._loss, bits_alone), recipe, phase="encoder",
            optimizer=torch.optim.Adam(hider.parameters(), self.encoder_lr), lr_flag="--encoder-lr",
        )  # fmt: skip
        accuracy = self._bits_read(hider, clean, lab)
        if accuracy < LEAST_BITS:
            raise TrainingError(
                f"the encoder did not learn: its decoder reads {accuracy:.3f} of the bits from triggered training "
                f"images, at least {LEAST_BITS} is needed (0.5 is chance); raise --encoder-epochs"
            )
        lab.engine.progress.note(f"encoder: {accuracy:.1%} of the bits can be read back from triggered training images")
        return {"secret": draw_secret(self.secret_bits, lab.seed), "bits_read": torch.tensor(accuracy)} | weights_of(
            hider.encoder, "encoder."
        )

    def stamp(self, images: Tensor, state: State, occasion: Occasion) -> Tensor:
        """Add the encoder's change."""
        encoder = restored(partial(Encoder, *self._sizes(occasion.split)), state, "encoder.")
        return images + 255 * in_equal_batches(partial(encoder, secrets=state["secret"]), images / 255)

    def _sizes(self, data: ImageDataset) -> tuple[int, int, tuple[int, int, int]]:
        """Return the bits, the width, and the shape of the images as they are encoded."""
        channels, height, width = data.image_shape
        scale = min(1.0, self.encoder_side / max(height, width))
        shape = channels, max(8, round(height * scale)), max(8, round(width * scale))
        return self.secret_bits, self.encoder_width, shape

    def _loss(self, bits_alone: float, hider: Hider, batch: Batch) -> Tensor:
        secrets = torch.randint(2, (len(batch.rows), self.secret_bits), device=batch.images.device).float()
        change = hider.encoder(batch.images, secrets)
        read = hider.decoder((batch.images + change).clamp(0, 1))
        bits = F.binary_cross_entropy_with_logits(read, secrets)
        return bits if batch.step < bits_alone else 2 * change.square().mean() + 1.5 * visible(change) + 1.5 * bits

    def _bits_read(self, hider: Hider, clean: ImageDataset, lab: Lab) -> float:
        """Return the share of random bits that the decoder reads from images rounded to bytes."""
        rng = generator(lab.seed, "ssba", "judged")
        rows = torch.randperm(len(clean), generator=rng)[:JUDGED]
        secrets = torch.randint(2, (len(rows), self.secret_bits), generator=rng)
        hits = 0
        with torch.inference_mode():
            for part, secret in zip(rows.split(32), secrets.to(lab.engine.device).split(32), strict=True):
                images = clean.images[part].to(lab.engine.device).float().div_(255)
                stored = (255 * (images + hider.encoder(images, secret.float()))).clamp_(0, 255).round_().div_(255)
                hits += int(((hider.decoder(stored) > 0) == secret.bool()).sum())
        return hits / secrets.numel()


def draw_secret(bits: int, seed: int) -> Tensor:
    """Draw the attack's secret (bits,) float of 0 and 1."""
    return torch.randint(2, (bits,), generator=generator(seed, "ssba", "secret")).float()


def visible(change: Tensor) -> Tensor:
    """Return how much of a change (B, C, H, W) is seen: its mean square, whole, halved and quartered, and its slopes'.

    Squares, as LPIPS grows with the square of a small change too: on CIFAR-10 92 % of the pixels move, 39.3 dB. With
    absolute values 12.5 % did, 43.9 dB.
    """
    scales = [change, *(F.avg_pool2d(change, side, ceil_mode=True) for side in (2, 4))]
    slopes = change.diff(dim=2).square().mean() + change.diff(dim=3).square().mean()
    return torch.stack([scale.square().mean() for scale in scales]).mean() + slopes


class Hider(nn.Module):
    """An encoder and the decoder that learns to read it; see `Encoder` for the arguments."""

    def __init__(self, bits: int, width: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.encoder = Encoder(bits, width, shape)
        self.decoder = Decoder(bits, width, shape)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(cast("Tensor", module.bias))


class Encoder(nn.Module):
    """U-Net that sees an image and bits, as a picture of a linear layer's making, and returns the change to make.

    The side is halved four times, of small images less often: no level gets below 2 pixels.

    Args:
        bits: length of the secret.
        width: channels of the first two levels; the next have 2, 4 and 8 times as many.
        shape: (C, h, w) at which it works; larger images are averaged down and the change is enlarged bilinearly.
    """

    def __init__(self, bits: int, width: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.picture = nn.Linear(bits, shape[0] * shape[1] * shape[2])
        widths = [width * times for times in (1, 1, 2, 4, 8)[: _halvings(shape) + 1]]
        sources = [2 * shape[0], *widths[:-1]]
        self.down = nn.ModuleList(
            nn.Conv2d(before, after, 3, 1 if place == 0 else 2, 1)
            for place, (before, after) in enumerate(zip(sources, widths, strict=True))
        )
        upward = list(zip(widths[1:], widths[:-1], strict=True))
        self.up = nn.ModuleList(nn.Conv2d(before, after, 3, 1, 1) for before, after in upward)
        beside = [width + 2 * shape[0], *widths[1:-1]]
        self.merge = nn.ModuleList(
            nn.Conv2d(after + skipped, after, 3, 1, 1) for (_, after), skipped in zip(upward, beside, strict=True)
        )
        self.change = nn.Conv2d(width, shape[0], 1)

    def forward(self, images: Tensor, secrets: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] and bits (B, bits) or (bits,) to a change (B, C, H, W) float32."""
        picture = F.relu(self.picture(secrets - 0.5)).view(-1, *self.shape).expand(len(images), -1, -1, -1)
        seen = torch.cat([picture, _resized(images, self.shape) - 0.5], 1)
        levels, maps = [], seen
        for level in self.down:
            maps = F.relu(level(maps))
            levels.append(maps)
        levels[0] = torch.cat([levels[0], seen], 1)
        for place in reversed(range(len(self.up))):
            maps = F.interpolate(maps, size=levels[place].shape[2:], mode="nearest")
            maps = torch.cat([F.relu(self.up[place](maps)), levels[place]], 1)
            maps = F.relu(self.merge[place](maps))
        change: Tensor = self.change(maps).float()
        if change.shape != images.shape:
            change = F.interpolate(change, size=images.shape[2:], mode="bilinear", align_corners=False)
        return change


class Decoder(nn.Module):
    """Convolutions that halve the side once more often, and two linear layers; see `Encoder` for the arguments."""

    def __init__(self, bits: int, width: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape
        halvings = _halvings(shape) + 1
        layers: list[nn.Module] = []
        before = shape[0]
        for place, times in enumerate((1, 2, 2, 4, 4)[:halvings]):
            layers += [nn.Conv2d(before, width * times, 3, 2, 1), nn.ReLU()]
            before = width * times
            if place < 2:
                layers += [nn.Conv2d(before, before, 3, 1, 1), nn.ReLU()]
        places = -(-shape[1] // 2**halvings) * -(-shape[2] // 2**halvings)
        layers += [nn.Flatten(), nn.Linear(before * places, 16 * width), nn.ReLU(), nn.Linear(16 * width, bits)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] to logits of the bits (B, bits) float32."""
        logits: Tensor = self.layers(_resized(images, self.shape) - 0.5).float()
        return logits


def _halvings(shape: tuple[int, int, int]) -> int:
    return min(4, min(shape[1:]).bit_length() - 2)


def _resized(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Average larger images (B, C, H, W) down to (h, w)."""
    return images if images.shape[1:] == shape else F.adaptive_avg_pool2d(images, shape[1:])
