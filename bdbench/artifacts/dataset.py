"""Dataset artifacts: what a defender sees, and in files of their own the truth and the test images."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import pandas as pd  # pyarrow would import it in the middle of its own work, where a Ctrl-C is lost
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bdbench.artifacts.base import Artifact, write_frame
from bdbench.artifacts.manifests import AGAIN
from bdbench.artifacts.sources import open_source
from bdbench.artifacts.store import Draft
from bdbench.data import ImageDataset, MappedFile, PoisonedDataset, Role, SourceData
from bdbench.errors import ArtifactError, BdbenchError, DamagedError, DataError, OriginWarning
from bdbench.progress import Silent
from bdbench.text import printable
from bdbench.training.checkpoints import save_tensors

UNPOISONED = "none"
"""The method of a dataset that nobody poisoned here: taken as found, or left clean on purpose."""


class DatasetArtifact(Artifact):
    """A poisoned dataset. `train` and `trusted` are what a defender may see; the rest is for evaluation."""

    kind = "dataset"

    @cached_property
    def train(self) -> ImageDataset:
        """The visible training split: N images with the labels as poisoned."""
        return self._split("train")

    @cached_property
    def test(self) -> ImageDataset:
        """All clean test images."""
        return self._split("test")

    @cached_property
    def triggered(self) -> ImageDataset:
        """The triggered test images of eligible classes, labelled with what the attacker wants."""
        return self._split("triggered")

    @property
    def trusted(self) -> ImageDataset | None:
        """The reserved clean images, if there are any."""
        return self._split("trusted") if self.manifest.facts["counts"]["trusted"] else None

    @property
    def truth(self) -> pd.DataFrame:
        """row, clean_label, role, source_row of every training sample: for evaluation and inspection only."""
        return self.frame("truth.parquet")

    @property
    def unpoisoned(self) -> ImageDataset:
        """The training split as it was before the attack: for reference rows and inspection only."""
        labels = self.column("truth.parquet", "clean_label")
        with self._fitting("the truth"):
            if len(labels) != self.manifest.facts["counts"]["train"]:
                raise DataError(f"{len(labels)} rows of {self.manifest.facts['counts']['train']} images")
            if "origin" in self.manifest.facts:
                images = self._origin.train.images[self.column("truth.parquet", "source_row")]
            else:
                images = self.train.images.clone()
                images[self.roles != Role.CLEAN] = self.tensors("originals.safetensors")["images"]
            return ImageDataset(images, labels, self.class_names)

    @property
    def roles(self) -> Tensor:
        """(N,) uint8 of `Role`, of every training sample: for reference rows and evaluation only."""
        return self.column("truth.parquet", "role")

    @property
    def is_poison(self) -> Tensor:
        """(N,) bool, which training samples are poisoned: for reference rows and evaluation only."""
        return self.roles == Role.POISON

    @property
    def is_attacked(self) -> bool:
        """Whether it has an attack, whose trigger is known; else it was taken as found, or left clean on purpose."""
        return self.manifest.ask.method != UNPOISONED

    @property
    def is_taken(self) -> bool:
        """Whether it was taken as found: nothing was asked of it, and which samples are poisoned is not known."""
        return not self.is_attacked and self.manifest.ask.config.keys() <= {"dataset"}

    @property
    def target(self) -> int | None:
        """The class that the attacker wants, None where it depends on the image's own."""
        if self.option("labels") == "all-to-all":
            return None
        target = self.option("target")
        if type(target) is not int or not 0 <= target < len(self.class_names):
            raise DamagedError(self.path, f"{self.path} has no class {target}, its target; {AGAIN}")
        return target

    @property
    def content(self) -> str:
        """16 digits of a hash of what a defender sees; another under the same id: made by other code, or hardware."""
        seen = ("train.", "trusted.", "delta.")
        said = {name: file["sha256"] for name, file in self.manifest.files.items() if name.startswith(seen)}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def places(self) -> list[str]:
        """The file of each training sample, where each has its own, else its row of the training split."""
        count = self.manifest.facts["counts"]["train"]
        if "places.parquet" not in self.manifest.files:
            return [f"row {row}" for row in range(count)]
        places = [str(record["file"]) for record in self.records("places.parquet")]
        if len(places) != count:
            raise DamagedError(self.path, f"{self.path} names {len(places)} files of {count} images; {AGAIN}")
        return places

    @property
    def train_labels(self) -> Tensor:
        """(N,) int64 in [0, K): the labels of the visible training split, without its images."""
        labels = self.column("train.parquet", "label")
        outside = (labels < 0) | (labels >= len(self.class_names))
        if len(labels) != self.manifest.facts["counts"]["train"] or bool(outside.any()):
            raise DamagedError(self.path, f"{self.path / 'train.parquet'} does not hold its labels; {AGAIN}")
        return labels

    @property
    def triggered_rows(self) -> Tensor:
        """(M,) int64: the test row that each triggered image was made from."""
        return self.column("triggered.parquet", "test_row")

    @property
    def trigger_state(self) -> dict[str, Tensor]:
        """Pattern, mask, grid: what the attack needs to trigger new images."""
        return self.tensors("attack.safetensors")

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names."""
        return tuple(printable(name) for name in self.manifest.facts["class_names"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.manifest.facts["image_shape"]
        return channels, height, width

    @cached_property
    def _origin(self) -> SourceData:
        """The clean source of a dataset that holds differences only; reading an artifact downloads nothing."""
        origin = self.manifest.facts["origin"]
        place = origin["options"].get("data_root") or origin["dataset"]
        if "/" in str(place):
            message = f"{self.path} holds only what differs from {place}: images are read from there"
            warnings.warn(message, OriginWarning, stacklevel=2)
        try:
            source = open_source(origin["dataset"], {**origin["options"], "download": False}).open(Silent())
        except BdbenchError as error:
            raise ArtifactError(
                f"{self.path} holds only what differs from {origin['dataset']}, which cannot be opened: {error}; put "
                "it back, or poison again without --differences"
            ) from error
        if source.fingerprint != origin["fingerprint"]:
            raise ArtifactError(
                f"{self.path} holds only what differs from {origin['dataset']}, and that has other images now; put the "
                "old ones back, or poison again"
            )
        return source

    def _from_origin(self, name: str) -> Tensor:
        """Return the images of a split from the source and the differences."""
        source = self._origin
        if name == "test":
            return source.test.images
        stored = self.tensors("delta.safetensors")
        with self._fitting("delta.safetensors"):
            if name == "trusted":
                return source.train.images[stored["trusted_rows"]]
            images = source.train.images[stored["source_rows"]]
            images[stored["rows"]] = stored["images"]
            return images

    def _split(self, name: str) -> ImageDataset:
        images: Tensor | None
        file: MappedFile | None = None
        if "origin" in self.manifest.facts and name != "triggered":
            images = self._from_origin(name)
        else:
            images = self.tensors(f"{name}.safetensors").get("images")
            file = MappedFile.of(self.path / f"{name}.safetensors")
        labels = self.column(f"{name}.parquet", "label")
        if images is None or tuple(images.shape[1:]) != self.image_shape:
            message = f"{self.path / name}.safetensors does not hold images of {self.image_shape}; {AGAIN}"
            raise DamagedError(self.path, message)
        with self._fitting(f"split {name}"):
            return ImageDataset(images, labels, self.class_names, file)

    @contextmanager
    def _fitting(self, what: str) -> Iterator[None]:
        """Say of tensors that do not fit each other that the artifact is damaged."""
        try:
            yield
        except (DataError, KeyError, IndexError, RuntimeError, TypeError) as error:
            raise DamagedError(self.path, f"{self.path}, {what}: {error}; {AGAIN}") from error


def write_dataset(
    draft: Draft,
    data: PoisonedDataset,
    *,
    name: str,
    augment: str,
    origin: Mapping[str, Any] | None = None,
    files: Sequence[str] | None = None,
) -> None:
    """Write the files and facts of a dataset artifact.

    Args:
        draft: from `store.create`.
        data: what to write.
        name: of the source, for tables.
        augment: what `--augment auto` means for it.
        origin: store only what differs from the clean source: its address (`bdbench.artifacts.sources.address_of`) and
            `fingerprint`. None stores every image.
        files: the file of every training image, where each has its own.
    """
    splits = {"train": data.visible, "test": data.test, "triggered": data.triggered, "trusted": data.trusted}
    extra: dict[str, dict[str, Tensor]] = {"triggered": {"test_row": data.triggered_rows}}
    for split, content in splits.items():
        if len(content) or split != "trusted":
            if origin is None or split == "triggered":
                save_tensors({"images": content.images.contiguous()}, draft.folder / f"{split}.safetensors")
            write_frame(draft, f"{split}.parquet", {"label": content.labels, **extra.get(split, {})})
    truth = {"clean_label": data.clean_labels, "role": data.roles, "source_row": data.source_rows}
    write_frame(draft, "truth.parquet", truth)
    if files is not None:
        pq.write_table(pa.table({"file": list(files)}), draft.folder / "places.parquet")
    if origin is None:
        save_tensors({"images": data.originals.contiguous()}, draft.folder / "originals.safetensors")
    else:
        save_tensors(_differences(data), draft.folder / "delta.safetensors")
        draft.facts["origin"] = dict(origin)
    save_tensors(
        {key: value.contiguous() for key, value in data.trigger_state.items()}, draft.folder / "attack.safetensors"
    )
    draft.facts |= {
        "name": name,
        "augment": augment,
        "class_names": list(data.visible.class_names),
        "image_shape": list(data.visible.image_shape),
        "counts": {split: len(content) for split, content in splits.items()},
    }


def _differences(data: PoisonedDataset) -> dict[str, Tensor]:
    """Return the images that the attack changed, and the rows of the source where the others are."""
    changed = torch.nonzero(data.roles != Role.CLEAN).flatten()
    kept = torch.zeros(len(data.source_rows) + len(data.trusted), dtype=torch.bool)
    kept[data.source_rows] = True
    return {
        "images": data.visible.images[changed],
        "rows": changed,
        "source_rows": data.source_rows.contiguous(),
        "trusted_rows": torch.nonzero(~kept).flatten(),
    }


def verify_dataset(artifact: DatasetArtifact) -> None:
    """Check that an artifact's splits have as many images as its manifest says, and its triggers a test image.

    Raises:
        ArtifactError: says what does not fit.
    """
    counts = artifact.manifest.facts["counts"]
    splits = {
        "train": artifact.train,
        "test": artifact.test,
        "triggered": artifact.triggered,
        "trusted": artifact.trusted,
    }
    for name, split in splits.items():
        if split is not None and len(split) != counts[name]:
            raise ArtifactError(f"{artifact.path}: {len(split)} images in {name}, the manifest says {counts[name]}")
    if len(artifact.truth) != counts["train"]:
        raise ArtifactError(
            f"{artifact.path}: truth.parquet has {len(artifact.truth)} rows for {counts['train']} images"
        )
    rows = artifact.triggered_rows
    if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= counts["test"]):
        raise ArtifactError(f"{artifact.path}: triggered.parquet names a test row that does not exist")
