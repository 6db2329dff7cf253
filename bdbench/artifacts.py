"""Data set, model and evaluation artifacts: tensors and tables on top of `store`."""

from __future__ import annotations

import json
import platform
import textwrap
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import pandas as pd  # pyarrow would import it in the middle of its own work, where a Ctrl-C is lost
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import bdbench
from bdbench import store
from bdbench.checkpoints import save_tensors
from bdbench.data import ImageDataset, MappedFile, PoisonedDataset, Role, SourceData
from bdbench.devices import peak_memory_bytes
from bdbench.errors import ArtifactError, BdbenchError, DataError
from bdbench.models.classifier import Classifier, build_classifier
from bdbench.progress import Silent
from bdbench.registry import MODELS
from bdbench.sources import open_source
from bdbench.store import AGAIN, Draft, Kind, Manifest

AS_FOUND = "none"
"""The method of a data set that nobody poisoned here."""


class Artifact:
    """A sealed folder; its files are checked against the manifest when they are first read.

    Attributes:
        path: the folder.
        manifest: what it says of itself.
    """

    kind: ClassVar[Kind]

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an artifact of this kind.

        Raises:
            ArtifactError: see `bdbench.store.read_manifest`.
        """
        return cls(path, store.read_manifest(path, cls.kind))

    @property
    def id(self) -> str:
        """The hash of what was asked."""
        return self.manifest.id

    def verify(self) -> None:
        """Check every file's hash.

        Raises:
            ArtifactError: a file is missing, changed, or not in the manifest.
        """
        for name in self.manifest.files:
            store.checked_file(self.path, self.manifest, name)
        extra = sorted({file.name for file in self.path.iterdir()} - {store.MANIFEST, *self.manifest.files})
        if extra:
            raise ArtifactError(f"{self.path} holds files that its manifest does not know: {', '.join(extra)}")

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read a safetensors file, memory-mapped, after checking its hash."""
        try:
            return load_file(store.checked_file(self.path, self.manifest, name))
        except SafetensorError as error:
            raise ArtifactError(f"{self.path / name} is not a safetensors file ({error}); {AGAIN}") from error

    def frame(self, name: str) -> pd.DataFrame:
        """Read a Parquet file after checking its hash."""
        return cast("pd.DataFrame", self._table(name).to_pandas())

    def records(self, name: str) -> list[dict[str, Any]]:
        """Read the rows of a small Parquet file after checking its hash: five times faster than `frame`."""
        return cast("list[dict[str, Any]]", self._table(name).to_pylist())

    def column(self, name: str, column: str) -> Tensor:
        """Read one column of a Parquet file after checking its hash."""
        return torch.from_numpy(self._table(name, [column])[column].to_numpy().copy())

    def _table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        try:
            return pq.ParquetFile(store.checked_file(self.path, self.manifest, name)).read(columns)
        except (ValueError, OSError) as error:
            raise ArtifactError(f"{self.path / name} is not a Parquet file ({error}); {AGAIN}") from error


class DatasetArtifact(Artifact):
    """A poisoned data set. `train` and `trusted` are what a defender may see; the rest is for evaluation."""

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
        if "origin" in self.manifest.facts:
            rows = self.column("truth.parquet", "source_row")
            return ImageDataset(self._origin.train.images[rows], labels, self.class_names)
        images, changed = self.train.images.clone(), self.roles != Role.CLEAN
        originals = self.tensors("originals.safetensors").get("images")
        if originals is None or originals.shape != (int(changed.sum()), *self.image_shape):
            raise ArtifactError(
                f"{self.path / 'originals.safetensors'} does not hold the images that the attack changed; {AGAIN}"
            )
        images[changed] = originals
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
        """Whether bdbench poisoned it; else it was taken as found, and which samples are poisoned is not known."""
        return self.manifest.ask.method != AS_FOUND

    @property
    def places(self) -> list[str]:
        """The file of each training sample, where each has its own, else its row of the training split."""
        if "places.parquet" in self.manifest.files:
            return [str(record["file"]) for record in self.records("places.parquet")]
        return [f"row {row}" for row in range(self.manifest.facts["counts"]["train"])]

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
        return tuple(self.manifest.facts["class_names"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.manifest.facts["image_shape"]
        return channels, height, width

    @cached_property
    def _origin(self) -> SourceData:
        """The clean source of a data set that holds differences only; reading an artifact downloads nothing."""
        origin = self.manifest.facts["origin"]
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
            raise ArtifactError(f"{self.path / name}.safetensors does not hold images of {self.image_shape}; {AGAIN}")
        try:
            return ImageDataset(images, labels, self.class_names, file)
        except DataError as error:
            raise ArtifactError(f"{self.path}, split {name}: {error}; {AGAIN}") from error


def write_dataset(
    draft: Draft,
    data: PoisonedDataset,
    *,
    name: str,
    augment: str,
    origin: Mapping[str, Any] | None = None,
    files: Sequence[str] | None = None,
) -> None:
    """Write the files and facts of a data set artifact.

    Args:
        draft: from `store.create`.
        data: what to write.
        name: of the source, for tables.
        augment: what `--augment auto` means for it.
        origin: store only what differs from the clean source: its address (`bdbench.sources.address_of`) and
            `fingerprint`. None stores every image.
        files: the file of every training image, where each has its own.
    """
    splits = {"train": data.visible, "test": data.test, "triggered": data.triggered, "trusted": data.trusted}
    extra: dict[str, dict[str, Tensor]] = {"triggered": {"test_row": data.triggered_rows}}
    for split, content in splits.items():
        if len(content) or split != "trusted":
            if origin is None or split == "triggered":
                save_tensors({"images": content.images.contiguous()}, draft.folder / f"{split}.safetensors")
            _write_frame(draft, f"{split}.parquet", {"label": content.labels, **extra.get(split, {})})
    truth = {"clean_label": data.clean_labels, "role": data.roles, "source_row": data.source_rows}
    _write_frame(draft, "truth.parquet", truth)
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


def _write_frame(draft: Draft, name: str, columns: Mapping[str, Tensor]) -> None:
    count = len(next(iter(columns.values())))
    table = {"row": np.arange(count), **{key: value.numpy() for key, value in columns.items()}}
    pq.write_table(pa.table(table), draft.folder / name)


HISTORY = pa.schema({
    "phase": pa.string(), "epoch": pa.int64(), "loss": pa.float64(), "lr": pa.float64(),
    "images_per_second": pa.float64(), "seconds": pa.float64(),
})  # fmt: skip
"""Columns of a model's history."""


class ModelArtifact(Artifact):
    """A trained classifier with its history and, where the method scored samples, its scores."""

    kind = "model"

    def classifier(self) -> Classifier:
        """Rebuild the network and load its weights, in evaluation mode, on the CPU.

        Raises:
            ArtifactError: damaged, or weights that do not belong to the network.
        """
        facts = self.manifest.facts
        shape = tuple(facts["image_shape"])
        blank = torch.zeros(shape[0])
        model = build_classifier(MODELS.load(facts["model"]), shape, len(facts["class_names"]), blank, blank + 1)
        try:
            model.load_state_dict(self.tensors("model.safetensors"), strict=True)
        except RuntimeError as error:
            said = textwrap.shorten(str(error), 300, placeholder=" ...")
            raise ArtifactError(f"{self.path} does not hold weights of {facts['model']} ({said}); {AGAIN}") from error
        return model.eval()

    @property
    def history(self) -> pd.DataFrame:
        """phase, epoch, loss, lr, images_per_second, seconds."""
        return self.frame("history.parquet")

    @property
    def samples(self) -> pd.DataFrame | None:
        """row, score (higher is more suspect), set_aside; None where the method scored nothing."""
        return self.frame("samples.parquet") if "samples.parquet" in self.manifest.files else None

    @property
    def dataset_id(self) -> str:
        """Id of the data set it was trained on."""
        return self.manifest.ask.inputs["dataset"]


def write_model(
    draft: Draft,
    name: str,
    model: Classifier,
    data: ImageDataset,
    history: list[dict[str, Any]],
    scores: Tensor | None = None,
    set_aside: Tensor | None = None,
) -> None:
    """Write the files and facts of a model artifact.

    Args:
        draft: from `store.create`.
        name: of the registered architecture.
        model: weights are stored on the CPU, contiguous.
        data: what it classifies: classes and image shape.
        history: rows of the engine.
        scores: (N,) float, higher is more suspect; None takes the decision, if there is one, for a score.
        set_aside: (N,) bool, the samples that the method took for poison, or None if it takes no decision.
    """
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_tensors(weights, draft.folder / "model.safetensors")
    pq.write_table(pa.Table.from_pylist(history, HISTORY), draft.folder / "history.parquet")
    if scores is None and set_aside is not None:
        scores = set_aside.float()
    if scores is not None:
        chosen = torch.zeros(len(scores), dtype=torch.bool) if set_aside is None else set_aside
        _write_frame(draft, "samples.parquet", {"score": scores.float(), "set_aside": chosen})
    draft.facts |= {
        "model": name,
        "class_names": list(data.class_names),
        "image_shape": list(data.image_shape),
        "sets_aside": set_aside is not None,
    }


class EvaluationArtifact(Artifact):
    """What a model predicts for every test image, and the metrics that follow."""

    kind = "evaluation"

    @property
    def predictions(self) -> pd.DataFrame:
        """Split (test, triggered), row, label, clean_label, prediction, confidence."""
        return self.frame("predictions.parquet")

    @property
    def metrics(self) -> pd.DataFrame:
        """metric, value, low, high, numerator, denominator."""
        return self.frame("metrics.parquet")


OPENERS: dict[str, type[Artifact]] = {cls.kind: cls for cls in (DatasetArtifact, ModelArtifact, EvaluationArtifact)}


def open_any(path: Path) -> Artifact:
    """Open an artifact of whatever kind is there."""
    manifest = store.read_manifest(path)
    return OPENERS[manifest.ask.kind](path, manifest)


def verify(path: Path) -> Artifact:
    """Check every hash of an artifact, of a data set its counts, of a model that its weights fit, and return it.

    Raises:
        ArtifactError: says the first thing that is wrong.
        OptionError: a model is of a network that is not registered here.
    """
    artifact = open_any(path)
    artifact.verify()
    if isinstance(artifact, DatasetArtifact):
        _verify_dataset(artifact)
    elif isinstance(artifact, ModelArtifact):
        artifact.classifier()
    return artifact


def _verify_dataset(artifact: DatasetArtifact) -> None:
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


def arithmetic(made: Mapping[str, Any]) -> str:
    """Say how a run computed: in which precision, and whether its networks were compiled."""
    return f"{made['precision']}, compiled" if made.get("compiled") else str(made["precision"])


class Stopwatch:
    """Measures how an artifact is made: seconds and peak memory, with versions and hardware."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()

    def made(self, device: torch.device | None = None, *, bf16: bool = False) -> dict[str, Any]:
        """Return the `made` part of a manifest."""
        device = device or torch.device("cpu")
        return {
            "bdbench": bdbench.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
            "precision": "bf16" if bf16 else "fp32",
            "seconds": round(time.perf_counter() - self._begun, 3),
            "peak_memory_bytes": peak_memory_bytes(device),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def plain(value: object) -> Any:  # noqa: ANN401 - JSON
    """Return a value as JSON would give it back (tuples become lists, paths text)."""
    return json.loads(json.dumps(value, default=str))
