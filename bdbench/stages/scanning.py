"""From a dataset artifact to scan artifacts: which training samples look poisoned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bdbench.artifacts import finding, store
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.kinds import EvaluationArtifact
from bdbench.artifacts.made import Stopwatch, plain, plugins_of
from bdbench.artifacts.manifests import Ask
from bdbench.artifacts.model import ModelArtifact
from bdbench.artifacts.scan import ScanArtifact, write_scan
from bdbench.data import ImageDataset, joined
from bdbench.datasets.cache import cache_folder
from bdbench.defenses.parts.holding import held_rows
from bdbench.detectors.base import DatasetDetector, Scanned, Seen, Sight, check_scanned
from bdbench.errors import ArtifactError, OptionError
from bdbench.models.classifier import Classifier
from bdbench.plugins import blamed
from bdbench.progress import Progress, Silent
from bdbench.protocol import deciding, judging, naming
from bdbench.protocol.inputs import dataset_of
from bdbench.protocol.networks import model_name, work_of
from bdbench.registry import DETECTORS
from bdbench.stages.models import defend
from bdbench.training.devices import Precision, resolve_device, suited_threads, use_bf16
from bdbench.training.engine import Engine


def scan(
    dataset: str | Path,
    method: str,
    *,
    decide: str = "auto",
    options: Mapping[str, Any] | None = None,
    suspect: str | Path | None = None,
    model: str = "auto",
    preset: str = "auto",
    seed: int | None = None,
    out: Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> ScanArtifact:
    """Score the training samples of a dataset artifact by how poisoned they look, and set some aside.

    Nothing here opens the truth, test or triggered images.

    Trusted images of the dataset calibrate: the suspect learns them like all others, the detector scores them without
    knowing which they are, and a training sample is compared with them.

    Args:
        dataset: path or id of a dataset artifact.
        method: a registered detector.
        decide: none, budget:SHARE, alarm:RATE, fdr:SHARE, native, or auto: fdr:0.1 with trusted images, else native
            where the method has a rule, else none; see `protocol.deciding.decide`.
        options: of the detector.
        suspect: path or id of the model to look at. Default: one that learned the training and the trusted images, the
            newest that fits or a new one. A given one that was trained without the trusted images finds these less
            familiar than training samples: the scan says so.
        model, preset, seed: of a new suspect; see `defend`.
        out: folder; default: the dataset's folder name, "scan", the method's and what differs from the defaults.
        device, precision, force, progress: see `defend`.

    Raises:
        BdbenchError: see `defend`.
    """
    watch, progress = Stopwatch(), progress or Silent()
    place = resolve_device(device)
    bf16 = use_bf16(precision, place)
    data = DatasetArtifact.open(finding.locate(dataset, "dataset"))
    method = DETECTORS.spelled(method)
    detector = _detector(method, options or {})
    rule = deciding.parse_rule(decide)
    seed = data.manifest.ask.seed if seed is None else seed
    has_trusted = bool(data.manifest.facts["counts"]["trusted"])
    if detector.needs_trusted and not has_trusted:
        raise ArtifactError(
            f"detector '{method}' compares with trusted images, and {data.path} has none; make it with `poison "
            "--trusted` or `take --trusted`, or choose a detector that needs none, such as spectral"
        )
    looked_at = None
    if detector.needs_suspect:
        looked_at = _suspect(
            data, suspect, "none-trusted" if has_trusted else "none",
            {"model": model, "preset": preset, "seed": seed, "device": device, "precision": precision}, progress,
        )  # fmt: skip
    config = {**plain(detector.model_dump()), "decide": str(rule)}
    inputs = {"dataset": data.id, **({"suspect": looked_at.id} if looked_at else {})}
    ask = Ask("scan", method, detector.version, config, seed, inputs)
    if out is None:
        usual = {**plain(type(detector)().model_dump()), "decide": "auto"}
        parts = naming.differing({**config, "decide": str(rule).replace(":", "")}, usual)
        parts += [] if seed == data.manifest.ask.seed else [f"s{seed}"]
        out = naming.place(
            data.path.with_name(f"{data.path.name}-scan-{method}"), ask, parts, force=force, progress=progress
        )
    facts = plugins_of((DETECTORS, method), made_from=[item.manifest for item in (data, looked_at) if item])
    if store.existing(out, ask, force=force, facts=facts):
        progress.note(f"{out} is there already ({ask.id}); --force makes it again")
        return ScanArtifact.open(out)
    name = looked_at.manifest.facts["model"] if looked_at else model_name(model, data.image_shape)
    threads = suited_threads(place, work_of(name, data.image_shape), progress.note)
    with threads, store.held(data.path, *([looked_at.path] if looked_at else [])), store.create(out, ask) as draft:
        engine, trusted = Engine(place, bf16, seed, draft.work, progress), data.trusted
        network = looked_at.network() if looked_at else None
        calibrates = None if trusted is None else _calibrating(detector, trusted, seed)
        null = None if trusted is None or calibrates is None else trusted.take(calibrates)
        reference = trusted.take(~calibrates) if trusted and calibrates is not None and detector.needs_trusted else None
        sight = Sight(
            data.train if null is None else joined(data.train, null), engine,
            partial(_look, engine, network, looked_at, data, calibrates), network, reference,
        )  # fmt: skip
        with blamed(DETECTORS.plugin(method)):
            found = detector.run(sight)
            check_scanned(found, len(sight.data), method)
        write(draft, data, found, rule, null)
        familiar = looked_at is None or looked_at.manifest.ask.method == "none-trusted"
        draft.facts |= {
            **facts,
            "scanned": data.content,
            "null_learned": familiar,
            "suspect": name if looked_at else "",
        }
        draft.made |= watch.made(place, bf16=bf16)
    return ScanArtifact.open(out, is_new=True)


def write(
    draft: store.Draft, data: DatasetArtifact, found: Scanned, rule: deciding.Rule, trusted: ImageDataset | None
) -> None:
    """Part scores of training samples and of the trusted images behind them, decide, and write what a scan holds."""
    count = len(data.train)
    scores = found.scores[:count]
    null = None if trusted is None else deciding.Null(found.scores[count:], trusted.labels)
    own = found._replace(scores=scores, native=None if found.native is None else found.native[:count])
    asked = deciding.usual_rule(null is not None, own) if rule.name == "auto" else rule
    decision = deciding.decide(asked, own, data.train.labels, null)
    facts = {**decision.facts, "class_names": list(data.class_names), "findings": plain(dict(found.findings))}
    write_scan(draft, scores, decision.set_aside, null.scores if null else None, found.classes, facts)


def _detector(method: str, options: Mapping[str, Any]) -> DatasetDetector:
    DETECTORS.check_options(method, options)
    return cast("type[DatasetDetector]", DETECTORS.load(method)).parse(options)


def _look(
    engine: Engine,
    network: Classifier | None,
    looked_at: ModelArtifact | None,
    data: DatasetArtifact,
    calibrates: Tensor | None,
) -> Seen:
    """Return the suspect's embeddings, from the cache where another detector has looked before."""
    if network is None or looked_at is None:
        raise OptionError("a detector asks for features, and declares no need of a suspect")
    weights = looked_at.manifest.files["model.safetensors"]["sha256"]
    key = hashlib.sha256(json.dumps([weights, data.content, engine.bf16, engine.device.type]).encode()).hexdigest()
    kept, trusted = Kept(), data.trusted

    def look() -> None:
        kept.tensors = {"train": engine.embeddings(network, data.train.images)}
        if trusted is not None:
            kept.tensors["trusted"] = engine.embeddings(network, trusted.images)

    engine.reuse_or_train(cache_folder() / "features", key, {"features": kept}, "features of the suspect", look)
    if trusted is None or calibrates is None:
        return Seen(kept.tensors["train"])
    of_trusted = kept.tensors["trusted"]
    return Seen(torch.cat([kept.tensors["train"], of_trusted[calibrates]]), of_trusted[~calibrates])


class Kept:
    """Tensors that the cache keeps."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return them."""
        return self.tensors

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.tensors = state_dict


def _calibrating(detector: DatasetDetector, trusted: ImageDataset, seed: int) -> Tensor:
    """Return which trusted images (m,) calibrate the scores: all, or half where a detector compares with the others.

    Raises:
        ArtifactError: they are too few for both.
    """
    if not detector.needs_trusted:
        return torch.ones(len(trusted), dtype=torch.bool)
    calibrates = held_rows(trusted, 0.5, seed)
    if not bool(calibrates.any()):
        raise ArtifactError(
            f"{len(trusted)} trusted images are too few to compare with some and to calibrate by others: at least 2 of "
            "one class; make the dataset with more: `poison` or `take` --trusted"
        )
    return calibrates


def _suspect(
    data: DatasetArtifact, given: str | Path | None, method: str, wanted: Mapping[str, Any], progress: Progress
) -> ModelArtifact:
    """Return the model that a detector looks at: the one given, else the newest that fits, else a new one.

    Raises:
        ArtifactError: the one given is of another dataset.
    """
    if given is not None:
        found = ModelArtifact.open(finding.locate(given, "model"))
        if found.dataset_id != data.id:
            raise ArtifactError(f"suspect {found.path} was trained on dataset {found.dataset_id}, not on {data.id}")
        if found.manifest.ask.method not in ("none", "none-trusted"):
            progress.note(
                f"suspect {found.path} is by {found.manifest.ask.method}: a model that was defended may not have "
                "learned what a detector looks for"
            )
        return found
    for root in dict.fromkeys((data.path.parent, finding.ROOT)):
        for path, manifest in reversed(finding.find_artifacts(root, "model")):
            asked = manifest.ask
            fits = asked.method == method and asked.seed == wanted["seed"] and asked.inputs.get("dataset") == data.id
            if fits and wanted["model"] in ("auto", asked.config.get("model")):
                progress.note(f"suspect: {path}")
                return ModelArtifact(path, manifest)
    return defend(data.path, method, estimate=True, progress=progress, **wanted)


def evaluate_scan(
    scanned: str | Path, *, data: str | Path | None = None, out: Path | None = None, force: bool = False
) -> EvaluationArtifact:
    """Judge a scan by the truth of its dataset: how it ranks the poison, and what its decision is worth.

    Args:
        scanned: path or id of a scan artifact.
        data: the dataset artifact; default: found by id beside the scan or under ``runs/``.
        out: folder; default: the scan's folder name and ``-eval``.
        force: see `poison`.

    Raises:
        BdbenchError: the scan or its dataset is missing, damaged, or they do not belong together.
    """
    watch = Stopwatch()
    judged = ScanArtifact.open(finding.locate(scanned, "scan"))
    source = dataset_of(judged, data)
    if judged.manifest.facts["scanned"] != source.content:
        raise ArtifactError(
            f"{judged.path} looked at other images or labels than {source.path} holds now; scan it again with --force"
        )
    ask = Ask("evaluation", "evaluate", 1, {}, judged.manifest.ask.seed, {"scan": judged.id, "dataset": source.id})
    out = out or judged.path.with_name(f"{judged.path.name}-eval")
    facts = plugins_of(made_from=[judged.manifest, source.manifest])
    if store.existing(out, ask, force=force, facts=facts):
        return EvaluationArtifact.open(out)
    with store.held(judged.path, source.path), store.create(out, ask) as draft:
        rates, values = judging.measure_scan(judged, source)
        judging.metrics_frame(rates, values).to_parquet(draft.folder / "metrics.parquet", index=False)
        draft.facts |= {**facts, **judging.scan_facts(judged, source, judged.manifest.facts.get("suspect", ""))}
        draft.made |= watch.made(resolve_device("cpu"), bf16=False)
    return EvaluationArtifact.open(out, is_new=True)
