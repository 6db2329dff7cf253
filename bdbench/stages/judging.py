"""From a model artifact to an evaluation artifact, and what else is asked of what was made."""

from __future__ import annotations

from pathlib import Path

from bdbench.artifacts import finding, manifests, store
from bdbench.artifacts.base import Artifact
from bdbench.artifacts.dataset import DatasetArtifact, write_dataset
from bdbench.artifacts.kinds import OPENERS, EvaluationArtifact
from bdbench.artifacts.made import Stopwatch, plain, plugins_of
from bdbench.artifacts.manifests import Ask
from bdbench.artifacts.model import ModelArtifact
from bdbench.attacks.base import Lab
from bdbench.errors import ArtifactError
from bdbench.progress import Progress, Silent
from bdbench.protocol import judging, planting, suspects
from bdbench.protocol.inputs import dataset_of
from bdbench.protocol.networks import fresh_model, work_of
from bdbench.protocol.poisoning import poison_source
from bdbench.stages.models import defend
from bdbench.training.devices import Precision, resolve_device, suited_threads, use_bf16
from bdbench.training.engine import Engine


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
        if (epochs := judging.epochs_frame(source, judged)) is not None:
            epochs.to_parquet(draft.folder / "epochs.parquet", index=False)
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
