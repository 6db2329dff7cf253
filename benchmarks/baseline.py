"""The pipeline that people write by hand, from standard parts: the slow side of `speed.py`. Knows nothing of bdbench.

PIL images, torchvision transforms, a DataLoader, fp32, NCHW; poisoning image by image with a PNG each; losses one
sample at a time. Plain, but as good as plain gets: nothing here is slower than it has to be in this style.

    python benchmarks/baseline.py FOLDER     # poison scikit-learn's digits, a PNG per poisoned image
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms

WORKERS = (0, 2, 4)

Transform = Callable[[Image.Image], Tensor]
Trigger = Callable[[Image.Image], Image.Image]
Loader = Iterable[tuple[Tensor, Tensor]]
"""Batches: images (B, C, H, W), labels (B,)."""

Pixels = np.ndarray


# Images and batches.


class ArrayImages(Dataset[tuple[Tensor, int]]):
    """Pixels in memory that become PIL images one by one, as in torchvision's CIFAR10.

    Args:
        pixels: (N, H, W, 3) uint8.
        labels: N classes.
        transform: from a PIL image to a tensor.
    """

    def __init__(self, pixels: np.ndarray, labels: Sequence[int], transform: Transform) -> None:
        self.pixels, self.labels, self.transform = pixels, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def transform_for(side: int, mean: Sequence[float], std: Sequence[float], *, augmented: bool) -> Transform:
    """Return ToTensor and Normalize, after a crop with a padding of an eighth and a flip where augmented."""
    steps = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    if augmented:
        steps = [transforms.RandomCrop(side, padding=side // 8), transforms.RandomHorizontalFlip(), *steps]
    return cast("Transform", transforms.Compose(steps))


def loaders(data: Dataset[tuple[Tensor, int]], batch_size: int, *, shuffle: bool, pinned: bool) -> dict[int, Loader]:
    """Return a loader for each number of workers; they stay alive between epochs, as in a long run."""
    return {
        workers: DataLoader(
            data, batch_size, shuffle=shuffle, num_workers=workers, persistent_workers=workers > 0, pin_memory=pinned
        )
        for workers in WORKERS
    }


def load_epoch(loader: Loader) -> int:
    """Take every batch, do nothing with it, and return the number of images."""
    return sum(len(labels) for _, labels in loader)


# Networks.


def classifier(features: nn.Module, size: int, classes: int) -> nn.Module:
    """Return features (B, C, H, W) -> (B, size) with a linear head."""
    return nn.Sequential(features, nn.Linear(size, classes))


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    """Return the usual optimiser."""
    return torch.optim.SGD(network.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)


def train_epoch(network: nn.Module, loader: Loader, optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """Train for an epoch and return the mean loss."""
    criterion = nn.CrossEntropyLoss()
    network.train()
    total, seen = 0.0, 0
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        loss = criterion(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
        seen += len(labels)
    return total / seen


@torch.no_grad()
def accuracy(network: nn.Module, loader: Loader, device: torch.device) -> float:
    """Return the share of images that are classified as labelled."""
    network.eval()
    correct, seen = 0, 0
    for images, labels in loader:
        predicted = network(images.to(device, non_blocking=True)).argmax(1).cpu()
        correct += int((predicted == labels).sum())
        seen += len(labels)
    return correct / seen


@torch.no_grad()
def losses(network: nn.Module, loader: Loader, device: torch.device) -> list[float]:
    """Return the loss of every sample; the loader says how many at a time (1 in the published code of ABL)."""
    criterion = nn.CrossEntropyLoss(reduction="none")
    network.eval()
    found: list[float] = []
    for images, labels in loader:
        found += criterion(network(images.to(device)), labels.to(device)).tolist()
    return found


def isolate(
    pixels: np.ndarray, labels: Sequence[int], found: Sequence[float], share: float
) -> tuple[list[tuple[np.ndarray, int]], list[tuple[np.ndarray, int]]]:
    """Split samples into two lists: the share with the lowest losses, and the others."""
    order = np.argsort(found)
    chosen = set(order[: int(share * len(order))].tolist())
    pairs = list(zip(pixels, labels, strict=True))
    isolated = [pair for row, pair in enumerate(pairs) if row in chosen]
    return isolated, [pair for row, pair in enumerate(pairs) if row not in chosen]


def invert(
    network: nn.Module, loader: Loader, shape: Sequence[int], classes: int, device: torch.device
) -> list[Tensor]:
    """Reconstruct mask and pattern for one class after another, one epoch each, and return the masks.

    The network takes images (C, H, W) in [0, 1], frozen and in evaluation mode.
    """
    masks = []
    for target in range(classes):
        pattern = torch.rand(*shape, device=device, requires_grad=True)
        mask = torch.rand(*shape[1:], device=device, requires_grad=True)
        optimizer = torch.optim.Adam([pattern, mask], 0.005)
        for images, _ in loader:
            images = images.to(device)
            logits = network((1 - mask) * images + mask * pattern)
            wanted = torch.full((len(images),), target, device=device)
            loss = F.cross_entropy(logits, wanted) + 0.01 * mask.abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                pattern.clamp_(0, 1)
                mask.clamp_(0, 1)
        masks.append(mask.detach())
    return masks


# Triggers and poisoning.


def patch(pattern: Image.Image, mask: Image.Image) -> Trigger:
    """Show a pattern where the mask is white."""
    return lambda image: Image.composite(pattern, image, mask)


def blend(picture: Image.Image, alpha: float) -> Trigger:
    """Mix a picture into the whole image."""
    return lambda image: Image.blend(image, picture, alpha)


def add_wave(wave: np.ndarray) -> Trigger:
    """Add a signal over the columns (W,), in gray levels, to every row and channel."""

    def trigger(image: Image.Image) -> Image.Image:
        pixels = np.asarray(image, dtype=np.float32) + wave[None, :, None]
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    return trigger


def warp(grid: Tensor, noise: float = 0.0) -> Trigger:
    """Sample the image at a grid (H, W, 2) in [-1, 1], moved by up to `noise`, anew for each image."""
    to_tensor, to_image = transforms.ToTensor(), transforms.ToPILImage()

    def trigger(image: Image.Image) -> Image.Image:
        places = grid if noise == 0 else (grid + (torch.rand_like(grid) * 2 - 1) * noise).clamp(-1, 1)
        warped = F.grid_sample(to_tensor(image)[None], places[None], align_corners=True)[0]
        return cast("Image.Image", to_image(warped))

    return trigger


def poison_to_png(images: Sequence[Image.Image], triggers: Mapping[int, Trigger], folder: Path, prefix: str) -> None:
    """Trigger the images at some rows and write a PNG of each; the others are left alone."""
    for row, trigger in triggers.items():
        trigger(images[row]).save(folder / f"{prefix}-{row}.png")


def poison_digits(folder: Path) -> None:
    """Poison a tenth of scikit-learn's digits and all test images of other classes than 0, and write a PNG of each."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    folder.mkdir()
    digits = load_digits()
    images = [Image.fromarray((pixels / 16 * 255).astype(np.uint8)) for pixels in digits.images]
    train, test = train_test_split(range(len(images)), test_size=0.2, random_state=0)
    square = Image.fromarray(np.array([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=np.uint8))

    def stamp(image: Image.Image) -> Image.Image:
        stamped = image.copy()
        stamped.paste(square, (5, 5))
        return stamped

    random.seed(0)
    rows = [*random.sample(train, len(train) // 10), *(row for row in test if digits.target[row])]
    poison_to_png(images, dict.fromkeys(rows, stamp), folder, "digit")


# Files.


def decode(encoded: Iterable[bytes]) -> np.ndarray:
    """Decode image files of one size, one by one: (N, H, W, 3) uint8."""
    return np.stack([np.asarray(Image.open(BytesIO(content)).convert("RGB")) for content in encoded])


def read_parquet(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and the labels of a file in the Hugging Face layout."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return decode(image["bytes"] for image in table["image"].to_pylist()), table["label"].to_numpy()


def read_folder(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and the labels of a tree with one folder per class."""
    pairs = [(np.asarray(image), label) for image, label in datasets.ImageFolder(str(root))]
    return np.stack([pixels for pixels, _ in pairs]), np.array([label for _, label in pairs])


if __name__ == "__main__":
    poison_digits(Path(sys.argv[1]))
