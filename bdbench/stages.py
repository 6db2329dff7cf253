"""The stages: images -> data set artifact -> model artifact -> evaluation artifact. The Python API.

    from bdbench import stages

    data = stages.poison("digits", "badnets", options={"rate": 0.1}, seed=0)
    plain = stages.defend(data.path, "none")
    model = stages.defend(data.path, "cbd", preset="tiny", options={"twin_epochs": 3})
    result = stages.evaluate(model.path)
    print(result.metrics)

Each stage returns the artifact it made, or the equal one that was there. Options are those of the command line, with
underscores. A defence gets the visible training images and nothing that tells which are poisoned.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from bdbench import judging, store
from bdbench.artifacts import (
    AS_FOUND,
    OPENERS,
    Artifact,
    DatasetArtifact,
    EvaluationArtifact,
    ModelArtifact,
    Stopwatch,
    plain,
    write_dataset,
    write_model,
)
from bdbench.attacks.base import Attack, Lab, TrainingAttack
from bdbench.augment import parse_augment
from bdbench.data import ImageDataset, PoisonedDataset, Role
from bdbench.datasets.cache import cache_folder
from bdbench.defenses.base import Defended, Defense, Task, Truth
from bdbench.devices import Precision, crowding, resolve_device, use_bf16
from bdbench.engine import Engine, Recipe
from bdbench.errors import ArtifactError, OptionError, unknown_name
from bdbench.models.classifier import Classifier, build_classifier
from bdbench.options import Options
from bdbench.poisoning import as_found, poison_source
from bdbench.progress import Progress, Silent
from bdbench.registry import ATTACKS, DEFENSES, MODELS
from bdbench.seeds import scoped
from bdbench.sources import address_of, open_source
from bdbench.store import Ask

TINY_IMAGES = 10_000
TINY_SIDE = 16
FEW_POISONED = 50
"""With fewer poisoned samples a user is told that the attack may fail."""


def poison(
    dataset: str | Path = "digits",
    attack: str = "badnets",
    *,
    options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
    trusted: float = 0.05,
    seed: int = 0,
    out: Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    differences: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> DatasetArtifact:
    """Poison a data set once, on disk, before any augmentation.

    An attack that controls training also leaves the attacker's own model beside the data set: ``<out>-victim``.

    Args:
        dataset: a registered name, or the path of an image folder, Parquet or .npz.
        attack: a registered name.
        options: of the attack, such as ``{"rate": 0.05, "target": 3}``.
        source_options: of the source: data_root, download, image_size, images, test_fraction.
        trusted: share of the training split reserved as clean, for defences that need clean images; 0 for none.
        seed: of every random choice.
        out: folder of the artifact; default ``runs/<dataset>-<attack>-s<seed>``.
        device: auto, cpu, cuda, cuda:N or mps, for attacks that train networks.
        precision: auto, fp32 or bf16, for the same.
        differences: store only what differs from the source, a fifth of the space; it opens only where the source is.
        force: make it again even if it is there, and replace another data set that is at `out`.
        progress: who is told how far it is.

    Raises:
        BdbenchError: an option, the images or the place do not fit; the message has the way out.
    """
    watch, progress = Stopwatch(), progress or Silent()
    place = resolve_device(device)
    bf16 = use_bf16(precision, place)
    if not 0 <= trusted < 1:
        raise OptionError(f"trusted {trusted} must be at least 0 and less than 1")
    method = cast("type[Attack]", ATTACKS.load(attack)).parse(options or {})
    origin = open_source(dataset, source_options or {})
    source = origin.open(progress)
    config = {"dataset": source.name, "trusted": trusted, **plain(method.model_dump())}
    inputs = {"source": source.fingerprint[:16]}
    inputs |= {path.name: store.file_sha256(path)[:16] for path in method.files() if path.is_file()}
    ask = Ask("dataset", attack, method.version, config, seed, inputs)
    out = out or store.ROOT / f"{source.name}-{attack}-s{seed}"
    asked = {out: ask}
    if isinstance(method, TrainingAttack):
        config = {"model": model_name(method.victim, source.train.image_shape), "preset": "attacker"}
        asked[out.with_name(f"{out.name}-victim")] = Ask("model", "victim", 1, config, seed, {"dataset": ask.id})
    there = [store.existing(path, wanted, force=force) for path, wanted in asked.items()]
    if all(there):
        progress.note(f"{out} is there already ({ask.id}); --force makes it again")
        return DatasetArtifact.open(out)
    with store.create(out, ask) as draft:
        engine = Engine(place, bf16, seed, draft.work, progress)
        poisoned = poison_source(source, method, Lab(engine, fresh_model, source.augment, cache_folder()), trusted)
        # The attacker's model comes first: a data set that is sealed is complete.
        for path, wanted in asked.items():
            if wanted is not ask:
                made = watch.made(place, bf16=bf16) | {"training_seconds": _training_seconds(engine)}
                _write_victim(path, wanted, poisoned, engine, made)
        address = {**address_of(dataset, origin), "fingerprint": source.fingerprint} if differences else None
        write_dataset(draft, poisoned, name=source.name, augment=source.augment, origin=address)
        draft.facts |= {"replay": isinstance(method, TrainingAttack), "source_options": origin.chosen()}
        draft.made |= watch.made(place, bf16=bf16) | {"training_seconds": _training_seconds(engine)}
    few = int((poisoned.roles == Role.POISON).sum())
    if few < FEW_POISONED:
        progress.note(f"only {few} poisoned samples: the attack may well fail; a higher --rate makes it stronger")
    return DatasetArtifact.open(out)


def take(
    dataset: str | Path,
    *,
    source_options: Mapping[str, Any] | None = None,
    out: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> DatasetArtifact:
    """Take a data set as it is found, for training on what may be poisoned already; nothing is triggered or reserved.

    Args:
        dataset, force, progress: see `poison`.
        source_options: see `poison`; test_fraction is 0.05 unless it is given, since only training images are scored.
        out: folder of the artifact; default ``runs/<dataset>``.

    Raises:
        BdbenchError: the images or the place do not fit; the message has the way out.
    """
    watch, progress = Stopwatch(), progress or Silent()
    origin = open_source(dataset, {"test_fraction": 0.05, **(source_options or {})})
    source, files = origin.open(progress), origin.files()
    inputs = {"source": source.fingerprint[:16]}
    if files is not None:
        inputs["files"] = hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
    ask = Ask("dataset", AS_FOUND, 1, {"dataset": source.name}, 0, inputs)
    out = out or store.ROOT / source.name
    if store.existing(out, ask, force=force):
        progress.note(f"{out} is there already ({ask.id}); --force makes it again")
        return DatasetArtifact.open(out)
    with store.create(out, ask) as draft:
        write_dataset(draft, as_found(source), name=source.name, augment=source.augment, files=files)
        draft.facts |= {"replay": False, "source_options": origin.chosen()}
        draft.made |= watch.made(resolve_device("cpu"), bf16=False) | {"training_seconds": 0.0}
    return DatasetArtifact.open(out)


def _write_victim(path: Path, ask: Ask, data: PoisonedDataset, engine: Engine, made: dict[str, Any]) -> None:
    """Write the attacker's own model as an artifact."""
    with store.create(path, ask) as draft:
        model = cast("Classifier", data.victim)
        write_model(draft, ask.config["model"], model, data.visible, engine.history)
        draft.made |= made


def defend(
    dataset: str | Path,
    method: str = "none",
    *,
    model: str = "auto",
    preset: str = "auto",
    options: Mapping[str, Any] | None = None,
    suspect: str | Path | None = None,
    seed: int | None = None,
    out: Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    image_memory: float | None = None,
    compile: bool = False,  # noqa: A002
    force: bool = False,
    progress: Progress | None = None,
) -> ModelArtifact:
    """Train a model on a data set artifact with a defence; ``none`` is plain training.

    Interrupted, the same call goes on from the last finished epoch that was saved.

    Args:
        dataset: path or id of a data set artifact.
        method: a registered defence.
        model: a registered model, ``torchvision:NAME``, or ``auto``: convnet up to 16 pixels, wrn-16-1 above.
        preset: budget: paper, fast, tiny, or ``auto``: tiny for small sets of tiny images, else fast.
        options: of the method and of the recipe (epochs, lr, batch_size, ...); they win over the preset.
        suspect: path or id of the undefended model, for methods that mend one.
        seed: of weights, order and augmentation; default: the data set's.
        out: folder; default: the data set's folder name and the method's.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto, fp32 or bf16.
        image_memory: gigabytes (10^9 bytes) of training images that may lie on the device; more are streamed from the
            artifact, with the same result. Default: half of what a GPU has free, half of all RAM.
        compile: let torch compile the networks that are trained; where it cannot, say why and go on without. Results
            differ from those of a run without it by rounding.
        force: see `poison`.
        progress: who is told how far it is.

    Raises:
        BdbenchError: see `poison`.
    """
    watch, progress = Stopwatch(), progress or Silent()
    place = resolve_device(device)
    bf16 = use_bf16(precision, place)
    data = DatasetArtifact.open(store.locate(dataset, "dataset"))
    preset, defense, recipe = resolve_budget(method, preset, options or {}, data)
    if defense.needs_truth and not data.is_attacked:
        raise OptionError(
            f"'{method}' reads which samples are poisoned, and of {data.path}, taken as it was found, nobody knows it; "
            "choose a defence"
        )
    seed = data.manifest.ask.seed if seed is None else seed
    inputs = {"dataset": data.id}
    _check_trusted(defense, method, data)
    suspect_model = _open_suspect(defense, method, suspect, data, model, preset, seed)
    if suspect_model is not None:
        inputs["suspect"] = suspect_model.id
        model = suspect_model.manifest.facts["model"]
        progress.note(f"suspect: {suspect_model.path}")
    model = model_name(model, data.image_shape)
    settings = _settings(recipe, defense)
    config = {"model": model, "preset": preset, **settings}
    ask = Ask("model", method, defense.version, config, seed, inputs)
    out = out or data.path.with_name(f"{data.path.name}-{method}")
    if store.existing(out, ask, force=force):
        progress.note(f"{out} is there already ({ask.id}); --force makes it again")
        return ModelArtifact.open(out)
    if crowded := crowding(place):
        progress.note(crowded)

    with store.create(out, ask) as draft:
        limit = None if image_memory is None else int(image_memory * 1e9)
        engine = Engine(place, bf16, seed, draft.work, progress, image_memory=limit, compile=compile)
        task = Task(
            train=data.train,
            new_model=lambda purpose: fresh_model(model, data.train, seed, purpose),
            recipe=recipe,
            engine=engine,
            trusted=data.trusted if defense.needs_trusted else None,
            suspect=suspect_model.classifier() if suspect_model else None,
            truth=Truth(data.is_poison, data.unpoisoned) if defense.needs_truth else None,
            cache=cache_folder(),
        )
        result = defense.run(task)
        _check_result(result, len(data.train), method)
        write_model(draft, model, result.model, data.train, engine.history, result.scores, result.set_aside)
        draft.facts |= {"findings": plain(dict(result.findings)), "reads_truth": defense.needs_truth}
        _, usual, usual_recipe = resolve_budget(method, preset, {}, data)
        usual_settings = _settings(usual_recipe, usual)
        draft.facts["changed"] = [name for name, value in settings.items() if value != usual_settings[name]]
        draft.made |= watch.made(place, bf16=bf16) | {"training_seconds": _training_seconds(engine)}
        draft.made["compiled"] = engine.compiled
    return ModelArtifact.open(out)


def resolve_budget(
    method: str, preset: str, options: Mapping[str, Any], data: DatasetArtifact
) -> tuple[str, Defense, Recipe]:
    """Return the preset's name, the defence and the recipe: preset first, then what the user gave.

    Raises:
        OptionError: unknown method, preset or option, or a value out of bounds.
    """
    cls = cast("type[Defense]", DEFENSES.load(method))
    if preset == "auto":
        small = data.manifest.facts["counts"]["train"] < TINY_IMAGES and max(data.image_shape[1:]) <= TINY_SIDE
        preset = "tiny" if small else "fast"
    if preset not in cls.presets:
        raise unknown_name(f"preset of {method}", preset, cls.presets)
    recipe_values, method_values = split_options({**cls.presets[preset], **options}, cls)
    recipe = Recipe.parse(recipe_values)
    if recipe.augment == "auto":
        recipe = recipe.model_copy(update={"augment": data.manifest.facts["augment"]})
    parse_augment(recipe.augment)
    return preset, cls.parse(method_values), recipe


def _settings(recipe: Recipe, defense: Defense) -> dict[str, Any]:
    """Return all options of a run as JSON values."""
    return {**plain(recipe.model_dump()), **plain(defense.model_dump())}


def split_options(values: Mapping[str, Any], cls: type[Options]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split values into those of `Recipe` and those of the method.

    Raises:
        OptionError: a name that neither has.
    """
    known = {*Recipe.model_fields, *cls.model_fields}
    for name in values:
        if name not in known:
            raise unknown_name("option", name, known)
    recipe = {name: value for name, value in values.items() if name in Recipe.model_fields}
    return recipe, {name: value for name, value in values.items() if name not in recipe}


def _training_seconds(engine: Engine) -> float:
    """Return the seconds of all epochs, those before an interruption too."""
    return round(sum(float(row["seconds"]) for row in engine.history), 3)


def model_name(model: str, image_shape: tuple[int, int, int]) -> str:
    """Return the registered name of a model, which ``auto`` leaves to the size of the images."""
    if model == "auto":
        return "convnet" if max(image_shape[1:]) <= TINY_SIDE else "wrn-16-1"
    MODELS.load(model)
    return model


def fresh_model(name: str, train: ImageDataset, seed: int, purpose: str) -> Classifier:
    """Build a classifier for a data set; equal seeds and purposes give equal weights."""
    mean, std = channel_statistics(train.images)
    with scoped(seed, "weights", purpose):
        factory = MODELS.load(model_name(name, train.image_shape))
        return build_classifier(factory, train.image_shape, train.num_classes, mean, std)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (C,) of uint8 images (N, C, H, W), in [0, 1].

    They are those of about 5,000 images of at most 32x32 pixels, of as many pixels of larger ones.
    """
    pixels = images.shape[2] * images.shape[3]
    wanted = max(1, 5000 * 1024 // max(1024, pixels))
    sample = images[:: max(1, len(images) // wanted)].float().div(255)
    return sample.mean((0, 2, 3)), sample.std((0, 2, 3)).clamp_min(1e-3)


def _open_suspect(
    defense: Defense, method: str, suspect: str | Path | None, data: DatasetArtifact, model: str, preset: str, seed: int
) -> ModelArtifact | None:
    """Return the model that a method mends: the one given, else the newest undefended one of this data set and seed.

    One that was trained with the same preset goes before: it is what the method's row is compared with.
    """
    if not defense.needs_suspect:
        if suspect is not None:
            raise OptionError(f"method '{method}' trains from scratch and takes no --suspect")
        return None
    if suspect is not None:
        found = ModelArtifact.open(store.locate(suspect, "model"))
        if found.dataset_id != data.id:
            raise ArtifactError(f"suspect {found.path} was trained on data set {found.dataset_id}, not on {data.id}")
        if model not in ("auto", found.manifest.facts["model"]):
            raise OptionError(f"suspect {found.path} is a {found.manifest.facts['model']}, not a {model}; drop --model")
        return found
    for root in (data.path.parent, store.ROOT):
        fitting = [
            ModelArtifact(path, manifest)
            for path, manifest in reversed(store.find_artifacts(root, "model"))
            if manifest.ask.method == "none" and manifest.ask.seed == seed
            and manifest.ask.inputs["dataset"] == data.id and model in ("auto", manifest.facts["model"])
        ]  # fmt: skip
        if fitting:
            return next((found for found in fitting if found.manifest.ask.config["preset"] == preset), fitting[0])
    raise OptionError(
        f"method '{method}' mends a model, and no undefended {'one' if model == 'auto' else model} of {data.path} with "
        f"seed {seed} is beside it or under {store.ROOT}/; make one with: {_training_command(data, model, seed)} (or "
        "give --suspect PATH)"
    )


def _training_command(data: DatasetArtifact, model: str, seed: int) -> str:
    """Return the command that trains the undefended model of a network and a seed, where nothing is in its way."""
    words = ["bdbench", "train", str(data.path)]
    usual = data.path.with_name(f"{data.path.name}-none")
    if model != "auto":
        words += ["--model", model]
    if seed != data.manifest.ask.seed:
        words += ["--seed", str(seed)]
    if usual.exists():
        words += ["--out", f"{usual}-{'' if model == 'auto' else model.replace(':', '-') + '-'}s{seed}"]
    return shlex.join(words)


def _check_trusted(defense: Defense, method: str, data: DatasetArtifact) -> None:
    """Refuse a method that needs trusted images where there are none."""
    if defense.needs_trusted and not data.manifest.facts["counts"]["trusted"]:
        attack, place = data.manifest.ask.method, shlex.quote(f"{data.path}-trusted")
        way_out = "nobody vouches for data taken as found"
        if data.is_attacked:
            way_out = (
                f"make some with: bdbench poison --attack {attack} --trusted 0.05 --out {place}, and what else it was "
                "made with"
            )
        raise ArtifactError(f"method '{method}' needs trusted clean images, and {data.path} has none; {way_out}")


def _check_result(result: Defended, count: int, method: str) -> None:
    for name, values in (("scores", result.scores), ("set_aside", result.set_aside)):
        if values is not None and values.shape != (count,):
            raise ValueError(f"defense '{method}' returned {name} of shape {tuple(values.shape)} for {count} samples")


def evaluate(
    model: str | Path,
    *,
    data: str | Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> EvaluationArtifact:
    """Judge a model on the clean and the triggered test images of its data set.

    If its method scored training samples, these scores are judged by the truth.

    Args:
        model: path or id of a model artifact.
        data: the data set artifact it was trained on; default: found by id beside the model or under ``runs/``.
        out: folder; default: the model's folder name and ``-eval``.
        device, precision, force, progress: see `defend`.

    Raises:
        BdbenchError: the model or its data set is missing, damaged, or they do not belong together.
    """
    watch, progress = Stopwatch(), progress or Silent()
    place = resolve_device(device)
    bf16 = use_bf16(precision, place)
    judged = ModelArtifact.open(store.locate(model, "model"))
    source = dataset_of(judged, data)
    ask = Ask("evaluation", "evaluate", 1, {}, judged.manifest.ask.seed, {"model": judged.id, "dataset": source.id})
    out = out or judged.path.with_name(f"{judged.path.name}-eval")
    if store.existing(out, ask, force=force):
        return EvaluationArtifact.open(out)
    engine = Engine(place, bf16, ask.seed, progress=progress)
    with store.create(out, ask) as draft:
        frame = judging.predict(engine, judged.classifier(), source)
        frame.to_parquet(draft.folder / "predictions.parquet", index=False)
        rates, values = judging.measure(frame, source, judged)
        judging.metrics_frame(rates, values).to_parquet(draft.folder / "metrics.parquet", index=False)
        draft.facts |= judging.row_facts(judged, source)
        draft.made |= watch.made(place, bf16=bf16)
    return EvaluationArtifact.open(out)


def dataset_of(model: ModelArtifact, data: str | Path | None = None) -> DatasetArtifact:
    """Return the data set that a model was trained on: the one given, else found by id beside it or under ``runs/``.

    Raises:
        ArtifactError: it is another one, or is not found.
    """
    wanted = model.dataset_id
    if data is not None:
        found = DatasetArtifact.open(store.locate(data, "dataset"))
        if found.id != wanted:
            raise ArtifactError(f"{model.path} was trained on data set {wanted}, but {found.path} is {found.id}")
        return found
    for root in (model.path.parent, store.ROOT):
        for path, manifest in store.find_artifacts(root, "dataset"):
            if manifest.id == wanted:
                return DatasetArtifact(path, manifest)
    raise ArtifactError(
        f"the data set {wanted} of {model.path} is neither beside it nor under {store.ROOT}/; give --data PATH"
    )


def latest(kind: store.Kind, root: Path = store.ROOT) -> Artifact | None:
    """Return the newest artifact of a kind under a folder, or None."""
    found = store.find_artifacts(root, kind)
    return OPENERS[kind](*found[-1]) if found else None
