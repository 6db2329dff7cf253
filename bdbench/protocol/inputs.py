"""What a stage starts from: the dataset of a model, the model that a method repairs, trusted images."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdbench.artifacts import finding
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.model import ModelArtifact
from bdbench.artifacts.scan import ScanArtifact
from bdbench.datasets.cache import cache_folder
from bdbench.defenses.base import Defense, Task, Truth
from bdbench.errors import ArtifactError, OptionError
from bdbench.models.bounds import BOUND
from bdbench.models.classifier import Classifier
from bdbench.protocol.networks import fresh_model
from bdbench.training.engine import Engine
from bdbench.training.recipe import Recipe


def open_suspect(
    defense: Defense, method: str, suspect: str | Path | None, data: DatasetArtifact, model: str, preset: str, seed: int
) -> ModelArtifact | None:
    """Return the model that a method mends: the one given, else the newest undefended one of this dataset and seed.

    One that was trained with the same preset goes before: it is what the method's row is compared with.
    """
    if not defense.needs_suspect:
        if suspect is not None:
            raise OptionError(f"method '{method}' trains from scratch and takes no --suspect")
        return None
    if suspect is not None:
        found = ModelArtifact.open(finding.locate(suspect, "model"))
        if found.dataset_id != data.id:
            raise ArtifactError(
                f"suspect {found.path} was trained on dataset {found.dataset_id}, not on {data.id} ({data.path}); name "
                "the dataset that it was trained on, or a suspect of this one"
            )
        if model not in ("auto", found.manifest.facts["model"]):
            raise OptionError(f"suspect {found.path} is a {found.manifest.facts['model']}, not a {model}; drop --model")
        return found
    for root in (data.path.parent, finding.ROOT):
        fitting = [
            ModelArtifact(path, manifest)
            for path, manifest in reversed(finding.find_artifacts(root, "model"))
            if manifest.ask.method == "none" and manifest.ask.seed == seed
            and manifest.ask.inputs.get("dataset") == data.id and model in ("auto", manifest.facts["model"])
        ]  # fmt: skip
        if fitting:
            return next((found for found in fitting if found.option("preset") == preset), fitting[0])
    raise ArtifactError(
        f"method '{method}' repairs a model; no undefended {'one' if model == 'auto' else model} of {data.path} with "
        f"seed {seed} is beside it or under {finding.ROOT}/; make one with: {_training_command(data, model, seed)} (or "
        "give --suspect PATH)"
    )


def unusual_suspect(suspect: ModelArtifact | None, preset: str) -> dict[str, Any]:
    """Return what tells a suspect from the one that is repaired by default, which is plain training of the same preset.

    Nothing for such a one, and where nothing is repaired; else its method, its preset if that is another one, and
    options that differ from its preset.
    """
    if suspect is None:
        return {}
    asked = suspect.manifest.ask
    changed = [name for name in suspect.manifest.facts.get("changed", []) if name in asked.config]
    own = suspect.option("preset")
    told = {"preset": own} if asked.method != "victim" and own != preset else {}
    told |= {name: asked.config[name] for name in changed}
    return {"method": asked.method, **told} if told or asked.method != "none" else {}


def suspect_line(suspect: ModelArtifact) -> str:
    """Return where a suspect lies, and what made it if that is not plain training."""
    method = suspect.manifest.ask.method
    made_by = {"none": "", "victim": " (the attacker's own model)"}
    return f"{suspect.path}{made_by.get(method, f' (made by {method})')}"


def check_place(out: str | Path, suspect: ModelArtifact | None) -> None:
    """Refuse to put a repaired model in the place of its suspect.

    Raises:
        OptionError: it would be.
    """
    if suspect is not None and Path(out).resolve() == suspect.path.resolve():
        raise OptionError(f"{out} is the suspect itself, which a repair must not replace; choose another --out")


def suspect_network(suspect: ModelArtifact | None, data: DatasetArtifact) -> Classifier | None:
    """Return the network of a suspect, if there is one, which is to be repaired with images of a dataset.

    Raises:
        ArtifactError: see `ModelArtifact.network`; or it takes other images, has other classes, or its weights are not
            finite.
    """
    if suspect is None:
        return None
    facts = suspect.manifest.facts
    if facts["image_shape"] != list(data.image_shape) or facts["class_names"] != list(data.class_names):
        raise ArtifactError(
            f"suspect {suspect.path} takes images of {facts['image_shape']} for {len(facts['class_names'])} classes, "
            f"not those of {data.path} ({list(data.image_shape)}, {len(data.class_names)} classes, by name); give "
            "another --suspect"
        )
    network = suspect.network()
    for name, value in network.state_dict().items():
        is_bound = name.rpartition(".")[2] == BOUND  # which may be infinite
        if bool(value.isnan().any()) or not (is_bound or bool(value.isfinite().all())):
            raise ArtifactError(
                f"suspect {suspect.path} cannot be repaired: its weights {name} are not all finite numbers; train it "
                "again at a lower rate, or give another --suspect"
            )
    return network


def find_suspect(wanted: str, near: Path) -> Path | None:
    """Return the folder of the model of an id under a folder or ``runs/``; None if it is not there."""
    for root in (near, finding.ROOT):
        for path, manifest in finding.find_artifacts(root, "model"):
            if manifest.id == wanted:
                return path
    return None


def _training_command(data: DatasetArtifact, model: str, seed: int) -> str:
    """Return the command that trains the undefended model of a network and a seed."""
    words = ["bdbench", "train", str(data.path)]
    if model != "auto":
        words += ["--model", model]
    if seed != data.manifest.ask.seed:
        words += ["--seed", str(seed)]
    return shlex.join(words)


def open_scan(
    defense: Defense, method: str, without: str | Path | None, data: DatasetArtifact
) -> tuple[ScanArtifact | None, Tensor | None]:
    """Return the scan that a method goes by, and the samples (N,) bool that it set aside.

    Raises:
        OptionError: none is given and the method needs one, or the other way round, or it took no decision.
        ArtifactError: it is of another dataset.
    """
    if not defense.needs_scan:
        if without is not None:
            raise OptionError(f"method '{method}' takes no --without; retrain does")
        return None, None
    if without is None:
        raise OptionError(
            f"method '{method}' goes by a scan; name it with --without (make one: bdbench scan {data.path})"
        )
    found = ScanArtifact.open(finding.locate(without, "scan"))
    if found.dataset_id != data.id:
        raise ArtifactError(f"scan {found.path} is of dataset {found.dataset_id}, not of {data.id}")
    if not found.manifest.facts["sets_aside"]:
        raise OptionError(
            f"scan {found.path} took no decision (--decide none); scan again with another --decide, such as budget:0.01"
        )
    samples = found.samples_of(data.manifest.facts["counts"]["train"])
    return found, torch.from_numpy(samples["set_aside"].to_numpy(copy=True))


def check_known(defense: Defense, method: str, data: DatasetArtifact) -> None:
    """Refuse a method that reads the truth where nobody knows it, or needs trusted images where there are none."""
    if defense.needs_truth and data.is_taken:
        raise OptionError(
            f"'{method}' reads which samples are poisoned, and of {data.path}, taken as it was found, nobody knows it; "
            "choose a defense"
        )
    if defense.needs_trusted and not data.manifest.facts["counts"]["trusted"]:
        attack, place = data.manifest.ask.method, shlex.quote(f"{data.path}-trusted")
        way_out = "store it again with: bdbench take --trusted IMAGES, which somebody vouches for"
        if not data.is_taken:
            way_out = (
                f"make some with: bdbench poison --attack {attack} --trusted 0.05 --out {place}, and what else it was "
                "made with, and train on it again; `clp` and `ep` repair without any"
            )
        raise ArtifactError(f"method '{method}' needs trusted clean images, and {data.path} has none; {way_out}")


def dataset_of(model: ModelArtifact | ScanArtifact, data: str | Path | None = None) -> DatasetArtifact:
    """Return the dataset of a model or a scan: the one given, else found by id beside it or under ``runs/``.

    Raises:
        ArtifactError: it is another one, or is not found.
    """
    wanted = model.dataset_id
    if data is not None:
        found = DatasetArtifact.open(finding.locate(data, "dataset"))
        if found.id != wanted:
            raise ArtifactError(f"{model.path} is of dataset {wanted}, but {found.path} is {found.id}")
        return found
    near = find_dataset(wanted, model.path.parent)
    if near is None:
        raise ArtifactError(
            f"the dataset {wanted} of {model.path} is neither beside it nor under {finding.ROOT}/; give --data PATH"
        )
    return near


def find_dataset(wanted: str, folder: Path, data: str | Path | None = None) -> DatasetArtifact | None:
    """Return the dataset artifact of an id: the one given, else under a folder or ``runs/``; None if it is not there.

    Raises:
        ArtifactError: the one given has another id.
    """
    if data is not None:
        found = DatasetArtifact.open(finding.locate(data, "dataset"))
        if found.id != wanted:
            raise ArtifactError(f"{found.path} is dataset {found.id}, not {wanted}")
        return found
    for root in (folder, finding.ROOT):
        for path, manifest in finding.find_artifacts(root, "dataset"):
            if manifest.id == wanted:
                return DatasetArtifact(path, manifest)
    return None


def task_for(
    data: DatasetArtifact,
    defense: Defense,
    recipe: Recipe,
    engine: Engine,
    model: str,
    suspect: Classifier | None,
    set_aside: Tensor | None = None,
) -> Task:
    """Return what a defense may use, and nothing else."""
    return Task(
        train=data.train,
        new_model=lambda purpose: fresh_model(model, data.train, engine.seed, purpose),
        recipe=recipe,
        engine=engine,
        trusted=data.trusted if defense.needs_trusted else None,
        suspect=suspect,
        set_aside=set_aside,
        truth=Truth(data.is_poison, data.unpoisoned) if defense.needs_truth else None,
        cache=cache_folder(),
    )
