"""The stages: images -> dataset artifact -> model artifact -> evaluation artifact. The Python API.

    from bdbench import stages

    data = stages.poison("digits", "badnets", options={"rate": 0.1}, seed=0)
    plain = stages.defend(data.path, "none")
    model = stages.defend(data.path, "cbd", preset="tiny", seed=1)
    result = stages.evaluate(model.path)
    print(result.metrics)

Each stage returns the artifact it made, or the equal one that was there. Options are those of the command line, with
underscores. A defense gets the visible training images and nothing that tells which are poisoned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from bdbench import files
from bdbench.artifacts import finding, manifests, store
from bdbench.artifacts.base import Artifact
from bdbench.artifacts.dataset import UNPOISONED, DatasetArtifact, write_dataset
from bdbench.artifacts.kinds import OPENERS, EvaluationArtifact
from bdbench.artifacts.made import Stopwatch, plain, plugins_of
from bdbench.artifacts.manifests import Ask
from bdbench.artifacts.model import ModelArtifact, write_model
from bdbench.artifacts.sources import address_of, as_given, open_source
from bdbench.attacks.base import Attack, Lab, TrainingAttack
from bdbench.attacks.none import NoAttack
from bdbench.data import PoisonedDataset, Role, SourceData
from bdbench.datasets.base import Source
from bdbench.datasets.cache import cache_folder
from bdbench.datasets.paths import PathSource
from bdbench.defenses.base import check_defended
from bdbench.errors import ArtifactError, OptionError
from bdbench.limits import MEMORY_GB
from bdbench.models.classifier import Classifier
from bdbench.plugins import blamed
from bdbench.progress import Progress, Silent
from bdbench.protocol import judging, naming, planting, suspects
from bdbench.protocol.budget import resolve_budget, settings_of, usual_preset, usual_settings
from bdbench.protocol.inputs import check_trusted, dataset_of, open_suspect, task_for
from bdbench.protocol.networks import fresh_model, model_name, work_of
from bdbench.protocol.planning import plan_text, planned_seconds
from bdbench.protocol.poisoning import choose_rows, poison_source, trusted_config, trusted_images, unpoisoned
from bdbench.registry import ATTACKS, DATASETS, DEFENSES, MODELS
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
                made = watch.made(place, bf16=bf16) | {"training_seconds": _training_seconds(engine)}
                _write_victim(path, wanted, poisoned, engine, made)
        address = {**address_of(dataset, origin), "fingerprint": source.fingerprint} if differences else None
        write_dataset(draft, poisoned, name=source.name, augment=source.augment, origin=address)
        draft.facts |= facts
        draft.made |= watch.made(place, bf16=bf16) | {"training_seconds": _training_seconds(engine)}
    few = int((poisoned.roles == Role.POISON).sum())
    if 0 < few < FEW_POISONED:
        progress.note(f"only {counted(few, 'poisoned sample')}: the attack may well fail; raise --rate")
    return DatasetArtifact.open(out, is_new=True)


def take(
    dataset: str | Path,
    *,
    source_options: Mapping[str, Any] | None = None,
    out: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> DatasetArtifact:
    """Take a dataset as it is found, for training on what may be poisoned already; nothing is triggered or reserved.

    Args:
        dataset, force, progress: see `poison`.
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
    inputs = {"source": source.fingerprint[:16], **_guessed(origin, source)}
    if files is not None:
        inputs["files"] = hashlib.sha256("\n".join(files).encode()).hexdigest()[:16]
    ask = Ask("dataset", UNPOISONED, 1, {"dataset": source.name}, 0, inputs)
    facts = {"replay": False, **_source_facts(dataset, origin, source)}
    if out is None:
        parts = naming.differing(
            facts["source_options"],
            {"test_fraction": TAKEN_FRACTION, "images": origin.images, "test_images": origin.test_images},
        )
        out = naming.place(finding.ROOT / source.name, ask, parts, force=force, progress=progress)
    if store.existing(out, ask, force=force, facts=facts):
        progress.note(f"{out} is there already ({ask.id}); --force makes it again")
        return DatasetArtifact.open(out)
    with store.create(out, ask) as draft:
        write_dataset(draft, unpoisoned(source), name=source.name, augment=source.augment, files=files)
        draft.facts |= facts
        draft.made |= watch.made(resolve_device("cpu"), bf16=False) | {"training_seconds": 0.0}
    return DatasetArtifact.open(out, is_new=True)


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
    estimate: bool = False,
    progress: Progress | None = None,
) -> ModelArtifact:
    """Train a model on a dataset artifact with a defense; ``none`` is plain training.

    Interrupted, the same call goes on from the last finished epoch that was saved.

    Args:
        dataset: path or id of a dataset artifact.
        method: a registered defense.
        model: a registered model, ``torchvision:NAME``, or ``auto``: convnet below 16 pixels, convnet-16 at
            16, wrn-16-1 above.
        preset: budget: paper, fast, tiny, ``code`` where a method has it, or ``auto``: tiny for small sets of tiny
            images, else fast.
        options: of the method and of the recipe (epochs, lr, batch_size, ...); they win over the preset.
        suspect: path or id of the undefended model, for methods that mend one.
        seed: of weights, order and augmentation; default: the dataset's.
        out: folder; default: the dataset's folder name, the method's, and what differs from the defaults, such as
            ``-s5-epochs20``.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto, fp32 or bf16.
        image_memory: gigabytes (10^9 bytes) of training images that may lie on the device; more are streamed from the
            artifact, with the same result. Default: half of what a GPU has free, half of all RAM.
        compile: let torch compile the networks that are trained; where it cannot, say why and go on without. Results
            differ from those of a run without it by rounding.
        force: see `poison`.
        estimate: take a few steps of every phase first, and say how long all of them will take.
        progress: who is told how far it is.

    Raises:
        BdbenchError: see `poison`.
    """
    watch, progress = Stopwatch(), progress or Silent()
    place = resolve_device(device)
    bf16 = use_bf16(precision, place)
    data = DatasetArtifact.open(finding.locate(dataset, "dataset"))
    method = DEFENSES.spelled(method)
    plugin = DEFENSES.plugin(method)
    with blamed(plugin):
        preset, defense, recipe = resolve_budget(method, preset, options or {}, data)
    limit = _image_bytes(image_memory)
    if defense.needs_truth and data.is_taken:
        raise OptionError(
            f"'{method}' reads which samples are poisoned, and of {data.path}, taken as it was found, nobody knows it; "
            "choose a defense"
        )
    seed = data.manifest.ask.seed if seed is None else seed
    inputs = {"dataset": data.id}
    check_trusted(defense, method, data)
    suspect_model = open_suspect(defense, method, suspect, data, model, preset, seed)
    if suspect_model is not None:
        inputs["suspect"] = suspect_model.id
        model = suspect_model.manifest.facts["model"]
        progress.note(f"suspect: {suspect_model.path}")
    model = model_name(model, data.image_shape)
    if data.manifest.facts.get("guessed", {}).get("augment") == recipe.augment:
        progress.note(f"augmentation: {recipe.augment}, nothing mirrored; --augment crop,flip mirrors too")
    settings = settings_of(recipe, defense)
    config = {"model": model, "preset": preset, **settings}
    ask = Ask("model", method, defense.version, config, seed, inputs)
    usual = usual_settings(method, preset, data)
    if out is None:
        parts = naming.model_parts(
            data.path, preset=(preset, usual_preset(data)), seed=(seed, data.manifest.ask.seed),
            model=(model, model_name("auto", data.image_shape)), suspect=suspect_model,
            changed=naming.differing(settings, usual),
        )  # fmt: skip
        plain_place = data.path.with_name(f"{data.path.name}-{method}")
        out = naming.place(plain_place, ask, parts, force=force, progress=progress)
    facts = plugins_of(
        (DEFENSES, method), (MODELS, model), made_from=[item.manifest for item in (data, suspect_model) if item]
    )
    if store.existing(out, ask, force=force, facts=facts):
        progress.note(f"{out} is there already ({ask.id}); --force makes it again")
        return ModelArtifact.open(out)
    threads = suited_threads(place, work_of(model, data.image_shape), progress.note)
    read = [data.path, *([suspect_model.path] if suspect_model else [])]
    with threads, store.held(*read), store.create(out, ask) as draft:
        engine = Engine(place, bf16, seed, draft.work, progress, image_memory=limit, compile=compile)
        task = task_for(data, defense, recipe, engine, model, suspect_model.network() if suspect_model else None)
        with blamed(plugin):
            if estimate:
                progress.note(plan_text(method, planned_seconds(defense, task)))
            result = defense.run(task)
            check_defended(result, len(data.train), method)
        write_model(draft, model, result.model, data.train, engine.history, result.scores, result.set_aside)
        draft.facts |= {**facts, "findings": plain(dict(result.findings)), "reads_truth": defense.needs_truth}
        draft.facts["trained_on"] = data.content
        draft.facts["changed"] = [name for name, value in settings.items() if value != usual[name]]
        draft.made |= watch.made(place, bf16=bf16) | {"training_seconds": _training_seconds(engine)}
        draft.made["compiled"] = engine.compiled
    return ModelArtifact.open(out, is_new=True)


def estimate_seconds(
    dataset: str | Path,
    method: str = "none",
    *,
    model: str = "auto",
    preset: str = "auto",
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> dict[str, float]:
    """Return about how many seconds each phase of a training would take, by a few steps of each; see `defend`.

    A phase that depends on what an earlier one finds may be missing.
    """
    place = resolve_device(device)
    data = DatasetArtifact.open(finding.locate(dataset, "dataset"))
    _, defense, recipe = resolve_budget(method, preset, options or {}, data)
    check_trusted(defense, method, data)
    name = model_name(model, data.image_shape)
    engine = Engine(place, use_bf16(precision, place), data.manifest.ask.seed)
    suspect = fresh_model(name, data.train, engine.seed, "suspect").eval() if defense.needs_suspect else None
    with suited_threads(place, work_of(name, data.image_shape), lambda _: None):
        return planned_seconds(defense, task_for(data, defense, recipe, engine, name, suspect))


def _training_seconds(engine: Engine) -> float:
    """Return the seconds of all epochs, those before an interruption too."""
    return round(sum(float(row["seconds"]) for row in engine.history), 3)


def _image_bytes(gigabytes: float | None) -> int | None:
    if gigabytes is not None and not 0 <= gigabytes <= MEMORY_GB:
        raise OptionError(f"image_memory {gigabytes} must lie in 0..{MEMORY_GB:,} GB")
    return None if gigabytes is None else int(gigabytes * 1e9)


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
    """Judge a model on the clean and the triggered test images of its dataset.

    If its method scored training samples, these scores are judged by the truth.

    Args:
        model: path or id of a model artifact.
        data: the dataset artifact it was trained on; default: found by id beside the model or under ``runs/``.
        out: folder; default: the model's folder name and ``-eval``.
        device, precision, force, progress: see `defend`.

    Raises:
        BdbenchError: the model or its dataset is missing, damaged, or they do not belong together.
    """
    watch, progress = Stopwatch(), progress or Silent()
    place = resolve_device(device)
    bf16 = use_bf16(precision, place)
    judged = ModelArtifact.open(finding.locate(model, "model"))
    source = dataset_of(judged, data)
    ask = Ask("evaluation", "evaluate", 1, {}, judged.manifest.ask.seed, {"model": judged.id, "dataset": source.id})
    out = out or judged.path.with_name(f"{judged.path.name}-eval")
    facts = plugins_of(made_from=[judged.manifest, source.manifest])
    if store.existing(out, ask, force=force, facts=facts):
        return EvaluationArtifact.open(out)
    if judged.manifest.facts.get("trained_on", source.content) != source.content:
        raise ArtifactError(
            f"{judged.path} was trained on other images or labels than {source.path} holds now (the dataset was made "
            "again, by other code or on other hardware); train it again: bdbench defend with --force"
        )
    engine = Engine(place, bf16, ask.seed, progress=progress)
    threads = suited_threads(place, work_of(judged.manifest.facts["model"], source.image_shape), progress.note)
    with threads, store.held(judged.path, source.path), store.create(out, ask) as draft:
        frame = judging.predict(engine, judged.network(), source)
        frame.to_parquet(draft.folder / "predictions.parquet", index=False)
        rates, values = judging.measure(frame, source, judged)
        judging.metrics_frame(rates, values).to_parquet(draft.folder / "metrics.parquet", index=False)
        draft.facts |= {**facts, **judging.row_facts(judged, source)}
        draft.made |= watch.made(place, bf16=bf16)
    return EvaluationArtifact.open(out, is_new=True)


def self_test(
    model: str | Path,
    *,
    data: str | Path | None = None,
    rate: float = planting.RATE,
    share: float = 0.01,
    device: str = "auto",
    progress: Progress | None = None,
) -> planting.SelfTest:
    """Plant a known patch in a copy of a model's dataset, run the same defense on it, and say where it is ranked.

    The copy and its model lie in ``.selftest`` beside the model, where no other command takes them for the newest;
    the same call again takes what is there.

    Args:
        model: path or id of a model whose method scores samples.
        data: see `evaluate`.
        rate: share of the training images that get the patch.
        share: of the samples that are not planted, how many of the most suspect are looked at.
        device, progress: see `defend`.

    Raises:
        BdbenchError: the method needs more than the training images, or scores none; or see `poison`.
    """
    watch, progress = Stopwatch(), progress or Silent()
    judged = ModelArtifact.open(finding.locate(model, "model"))
    source, asked = dataset_of(judged, data), judged.manifest.ask
    planting.check_method(asked.method)
    suspects.check_scored(judged, source)
    patch = planting.planted_patch(source, rate, asked.seed)
    ask = Ask("dataset", "badnets", patch.version, plain(patch.model_dump()), asked.seed, {"planted-in": source.id})
    copy = judged.path.parent / ".selftest" / f"{source.path.name}-{ask.id[:8]}"
    if not store.existing(copy, ask, force=False):
        with store.create(copy, ask) as draft:
            place, clean = resolve_device("cpu"), planting.as_source(source)
            engine = Engine(place, bf16=False, seed=asked.seed, work=draft.work, progress=progress)
            planted = poison_source(clean, patch, Lab(engine, fresh_model, clean.augment), trusted=0.0)
            write_dataset(draft, planted, name=clean.name, augment=clean.augment)
            draft.facts |= {"replay": False, "given": {"path": str(source.path)}}
            draft.made |= watch.made(place, bf16=False) | {"training_seconds": 0.0}
    options = dict(asked.config)
    network, preset = options.pop("model"), options.pop("preset")
    trained = defend(
        copy, asked.method, model=network, preset=preset, options=options, seed=asked.seed,
        out=copy.with_name(f"{judged.path.name}-{judged.id[:8]}-{ask.id[:8]}"), device=device,
        precision=judged.manifest.made["precision"], progress=progress,
    )  # fmt: skip
    opened = DatasetArtifact.open(copy)
    ranked = suspects.rank(trained, opened)
    count = suspects.counted(ranked, share)
    return planting.judge(ranked, opened.is_poison, opened.class_names[patch.target], count)


def latest(kind: manifests.Kind, root: Path = finding.ROOT) -> Artifact | None:
    """Return the newest artifact of a kind under a folder, or None."""
    found = finding.find_artifacts(root, kind)
    return OPENERS[kind](*found[-1]) if found else None
