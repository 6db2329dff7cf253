"""From images to a dataset artifact: poisoned, or as it was found."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from bdbench import files
from bdbench.artifacts import finding, store
from bdbench.artifacts.dataset import UNPOISONED, DatasetArtifact, write_dataset
from bdbench.artifacts.made import Stopwatch, plain, plugins_of
from bdbench.artifacts.manifests import Ask
from bdbench.artifacts.model import write_model
from bdbench.artifacts.sources import address_of, as_given, open_source
from bdbench.attacks.base import Attack, Lab, TrainingAttack
from bdbench.attacks.none import NoAttack
from bdbench.data import ImageDataset, PoisonedDataset, Role, SourceData, joined
from bdbench.datasets.base import Source
from bdbench.datasets.cache import cache_folder
from bdbench.datasets.paths import PathSource
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.plugins import blamed
from bdbench.progress import Progress, Silent
from bdbench.protocol import naming
from bdbench.protocol.networks import fresh_model, model_name, work_of
from bdbench.protocol.poisoning import choose_rows, poison_source, trusted_config, trusted_images, unpoisoned
from bdbench.registry import ATTACKS, DATASETS
from bdbench.text import printable
from bdbench.training.devices import Precision, resolve_device, suited_threads, use_bf16
from bdbench.training.engine import Engine
from bdbench.wording import counted

TAKEN_FRACTION = 0.05
"""Share of the images that `take` lends to a test split where the source has none: only the others are scored."""


FEW_POISONED = 50
"""With fewer poisoned samples a user is told that the attack may fail."""


def poison(
    dataset: str | Path = "digits",
    attack: str = "badnets",
    *,
    options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
    trusted: float | None = None,
    trusted_per_class: int | None = None,
    seed: int = 0,
    out: Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    differences: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> DatasetArtifact:
    """Poison a dataset once, on disk, before any augmentation.

    An attack that controls training also leaves the attacker's own model beside the dataset: ``<out>-victim``.

    Args:
        dataset: a registered name, or the path of an image folder, Parquet or .npz.
        attack: a registered name; ``none`` poisons and triggers nothing.
        options: of the attack, such as ``{"rate": 0.05, "target": 3}``.
        source_options: of the source: data_root, download, image_size, images, test_images, test_fraction; of a path
            also image_column, label_column, skip_unreadable.
        trusted: share of the training split reserved as clean, for defenses that need clean images; 0 for none.
            Default: 0.05.
        trusted_per_class: in place of a share, so many images of every class.
        seed: of every random choice.
        out: folder of the artifact; default ``runs/<dataset>-<attack>-s<seed>``, and what differs from the defaults,
            such as ``-rate0.05``.
        device: auto, cpu, cuda, cuda:N or mps, for attacks that train networks.
        precision: auto, fp32 or bf16, for the same.
        differences: store only what differs from the source, a fifth of the space; it opens only where the source is.
        force: make it again even if it is there, and replace another dataset that is at `out`.
        progress: who is told how far it is.

    Raises:
        BdbenchError: an option, the images or the place do not fit; the message has the way out.
    """
    watch, progress = Stopwatch(), progress or Silent()
    place = resolve_device(device)
    bf16 = use_bf16(precision, place)
    reserved = trusted_images(trusted, trusted_per_class)
    attack = ATTACKS.spelled(attack)
    plugin = ATTACKS.plugin(attack)
    with blamed(plugin):
        ATTACKS.check_options(attack, options or {})
        method = cast("type[Attack | NoAttack]", ATTACKS.load(attack)).parse(options or {})
    origin = open_source(dataset, source_options or {})
    with blamed(DATASETS.plugin(str(dataset))):
        source = origin.open(progress)
    config = {"dataset": source.name, **trusted_config(reserved), **plain(method.model_dump())}
    inputs = {"source": source.fingerprint[:16], **_guessed(origin, source)}
    inputs |= {path.name: files.file_sha256(path)[:16] for path in method.files() if path.is_file()}
    ask = Ask("dataset", attack, method.version, config, seed, inputs)
    choose_rows(source, method, seed, reserved)  # what cannot be is said before a look at the place
    facts = {"replay": isinstance(method, TrainingAttack), **_source_facts(dataset, origin, source)}
    facts |= plugins_of((ATTACKS, attack))
    if out is None:
        plain_place = finding.ROOT / f"{source.name}-{attack}-s{seed}"
        parts = naming.dataset_parts(method, reserved, facts["source_options"])
        out = naming.place(plain_place, ask, parts, force=force, progress=progress)
    asked = {out: ask}
    if isinstance(method, TrainingAttack):
        config = {"model": model_name(method.victim, source.train.image_shape), "preset": "attacker"}
        asked[out.with_name(f"{out.name}-victim")] = Ask("model", "victim", 1, config, seed, {"dataset": ask.id})
    there = [store.existing(path, wanted, force=force, facts=facts) for path, wanted in asked.items()]
    if all(there):
        progress.note(f"{out} is there already ({ask.id}); --force makes it again")
        return DatasetArtifact.open(out)
    network = getattr(method, "victim", getattr(method, "surrogate", "auto"))
    threads = suited_threads(place, work_of(network, source.train.image_shape), progress.note)
    with threads, store.create(out, ask) as draft:
        engine = Engine(place, bf16, seed, draft.work, progress)
        lab = Lab(engine, fresh_model, source.augment, cache_folder())
        with blamed(plugin):
            poisoned = poison_source(source, method, lab, reserved)
        # The attacker's model comes first: a dataset that is sealed is complete.
        for path, wanted in asked.items():
            if wanted is not ask:
                made = watch.made(place, bf16=bf16) | {"training_seconds": engine.trained_seconds}
                _write_victim(path, wanted, poisoned, engine, made)
        address = {**address_of(dataset, origin), "fingerprint": source.fingerprint} if differences else None
        write_dataset(draft, poisoned, name=source.name, augment=source.augment, origin=address)
        draft.facts |= facts
        draft.made |= watch.made(place, bf16=bf16) | {"training_seconds": engine.trained_seconds}
    few = int((poisoned.roles == Role.POISON).sum())
    if 0 < few < FEW_POISONED:
        progress.note(f"only {counted(few, 'poisoned sample')}: the attack may well fail; raise --rate")
    if reserved and not len(poisoned.trusted):
        progress.note(
            f"no trusted images: {reserved:g} of {counted(len(source.train), 'image')} is none; raise --trusted for "
            "defenses that need them"
        )
    return DatasetArtifact.open(out, is_new=True)


def take(
    dataset: str | Path,
    *,
    trusted: str | Path | None = None,
    source_options: Mapping[str, Any] | None = None,
    out: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> DatasetArtifact:
    """Take a dataset as it is found, for training on what may be poisoned already; nothing is triggered or reserved.

    Args:
        dataset, force, progress: see `poison`.
        trusted: images that somebody vouches for, as `dataset` is given: of its classes (not all need be there) and
            opened with its options. They calibrate scans, and repairs learn from them.
        source_options: see `poison`; test_fraction is 0.05 unless it is given, since only training images are scored.
        out: folder of the artifact; default ``runs/<dataset>``, and what differs from the defaults.

    Raises:
        BdbenchError: the images or the place do not fit; the message has the way out.
    """
    watch, progress = Stopwatch(), progress or Silent()
    origin = open_source(dataset, {"test_fraction": TAKEN_FRACTION, **(source_options or {})})
    with blamed(DATASETS.plugin(str(dataset))):
        source = origin.open(progress)
        files = origin.files(source)
    data = unpoisoned(source)
    if trusted is not None:
        vouched = open_source(trusted, {"test_fraction": TAKEN_FRACTION, **(source_options or {})}).open(progress)
        data = replace(data, trusted=vouched_for(vouched, source))
    inputs = {"source": source.fingerprint[:16], **_guessed(origin, source)}
    if files is not None:
        inputs["files"] = hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
    if trusted is not None:
        inputs["trusted"] = data.trusted.fingerprint[:16]
    ask = Ask("dataset", UNPOISONED, 1, {"dataset": source.name}, 0, inputs)
    facts = {"replay": False, **_source_facts(dataset, origin, source)}
    if out is None:
        parts = naming.differing(
            facts["source_options"],
            {"test_fraction": TAKEN_FRACTION, "images": origin.images, "test_images": origin.test_images},
        )
        parts += ["trusted"] if trusted is not None else []
        out = naming.place(finding.ROOT / source.name, ask, parts, force=force, progress=progress)
    if store.existing(out, ask, force=force, facts=facts):
        progress.note(f"{out} is there already ({ask.id}); --force makes it again")
        return DatasetArtifact.open(out)
    with store.create(out, ask) as draft:
        write_dataset(draft, data, name=source.name, augment=source.augment, files=files)
        draft.facts |= facts
        draft.made |= watch.made(resolve_device("cpu"), bf16=False) | {"training_seconds": 0.0}
    return DatasetArtifact.open(out, is_new=True)


def vouched_for(vouched: SourceData, source: SourceData) -> ImageDataset:
    """Return all images of a source, labelled as the classes of the same names in another one are.

    Raises:
        OptionError: a class or the image shape is another.
    """
    ours, theirs = source.train.class_names, vouched.train.class_names
    strangers = [name for name in theirs if name not in ours]
    if strangers:
        raise OptionError(
            f"--trusted has images of class {strangers[0]}, which the dataset has not; its classes are "
            f"{', '.join(ours[:10])}{' ...' if len(ours) > 10 else ''}"
        )
    if vouched.train.image_shape != source.train.image_shape:
        raise OptionError(
            f"--trusted has images of {vouched.train.image_shape}, the dataset of {source.train.image_shape}; give "
            "both one size with --image-size"
        )
    images = joined(vouched.train, vouched.test)
    places = torch.tensor([ours.index(name) for name in theirs])
    return ImageDataset(images.images, places[images.labels], ours)


def _guessed(origin: Source, source: SourceData) -> dict[str, str]:
    """Return what was guessed of images of the user's own, as a part of an artifact's identity."""
    return {"augment": source.augment} if isinstance(origin, PathSource) else {}


def _source_facts(dataset: str | Path, origin: Source, source: SourceData) -> dict[str, Any]:
    """Return what was named and chosen of a source, and what reading it left out, guessed or changed."""
    return {
        "given": as_given(dataset, origin),
        "source_options": origin.chosen(),
        "remarks": list(source.remarks),
        "unreadable": [printable(place) for place in source.unreadable],
        "guessed": _guessed(origin, source),
    }


def _write_victim(path: Path, ask: Ask, data: PoisonedDataset, engine: Engine, made: dict[str, Any]) -> None:
    """Write the attacker's own model as an artifact."""
    with store.create(path, ask) as draft:
        model = cast("Classifier", data.victim)
        write_model(draft, ask.config["model"], model, data.visible, engine.history)
        draft.made |= made
