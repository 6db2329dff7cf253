"""Where training images lie, and how batches of them reach the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from bdbench.data import ImageDataset
from bdbench.errors import OptionError
from bdbench.training.augment import augmented
from bdbench.training.devices import sent

AHEAD = 2
"""Batches that are read while the device works on another."""


class Feed:
    """The images of a dataset, batch by batch, on a device.

    Images of at most `limit` bytes move there once. Others stay where they are, mapped from their file, and come
    through pinned buffers, read ahead by a thread. Both ways give the same batches.

    Args:
        data: N images.
        device: where batches are wanted.
        limit: bytes of images that may lie on the device.
    """

    def __init__(self, data: ImageDataset, device: torch.device, limit: int) -> None:
        self.data, self.device, self.limit = data, device, limit
        self.streamed = data.images.nbytes > limit
        self.images = data.images if self.streamed else data.images.to(device)

    def take(self, rows: Tensor) -> Tensor:
        """Return the images at rows (B,) int64, on any device, as a new (B, C, H, W) uint8 on the feed's device.

        Raises:
            ArtifactError: the file of the images changed.
        """
        if self.streamed:
            return self._read(rows.cpu()).to(self.device, non_blocking=True)
        self._check_file()
        return self.images.index_select(0, sent(rows, self.images.device))

    def batch(self, rows: Tensor, operations: tuple[str, ...], rng: torch.Generator) -> Tensor:
        """Return the images at rows (B,), augmented anew: (B, C, H, W) float in [0, 1]. See `training.augment`."""
        return augmented(self.take(rows), operations, rng)

    def batches(self, order: Tensor, size: int) -> Iterator[Tensor]:
        """Yield `take` of one part of `order` (M,) after the other, `size` rows each but perhaps the last.

        Raises:
            OptionError: the batches that are read ahead and the one in use do not fit in the limit.
            ArtifactError: see `take`.
        """
        if not self.streamed:
            yield from (self.take(rows) for rows in order.split(size))
            return
        image = self.images[0].nbytes
        need = (AHEAD + 1) * size * image
        if need > self.limit:
            raise OptionError(
                f"{self.limit / 1e9:g} GB for images cannot hold {AHEAD + 1} batches of {size}, {image:,} bytes each; "
                f"raise --image-memory to at least {math.ceil(need / 1e6) / 1e3:g} or lower the batch size"
            )
        waiting: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(1, "images") as reader:
            try:
                for rows in order.cpu().split(size):
                    waiting.append(reader.submit(self._read, rows))
                    if len(waiting) > AHEAD:
                        yield waiting.popleft().result().to(self.device, non_blocking=True)
                while waiting:
                    yield waiting.popleft().result().to(self.device, non_blocking=True)
            finally:
                for future in waiting:
                    future.cancel()

    def _read(self, rows: Tensor) -> Tensor:
        self._check_file()
        # numpy copies in this thread alone; torch would wake a second team of threads beside the one that computes
        taken = torch.from_numpy(self.images.numpy()[rows.numpy()])
        return taken.pin_memory() if self.device.type == "cuda" else taken

    def _check_file(self) -> None:
        if self.data.file is not None and self.images.device.type == "cpu":
            self.data.file.check()
