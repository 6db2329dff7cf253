"""What a report says of artifacts beside the metrics: facts, curves, commands, pictures of triggers."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bdbench import wording
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.finding import find_artifacts
from bdbench.artifacts.kinds import EvaluationArtifact
from bdbench.artifacts.made import arithmetic
from bdbench.artifacts.manifests import Kind, Manifest
from bdbench.artifacts.model import ModelArtifact, counted
from bdbench.errors import BdbenchError
from bdbench.protocol import metrics
from bdbench.protocol.metric_list import METRICS, SET_ASIDE
from bdbench.reports import commands, findings
from bdbench.reports.pictures import shared_row, triggered_example

CURVE_POINTS = 100
LOSS_POINTS = 60
LARGEST_PICTURE = 96
FALSE_POSITIVE = tuple(sorted({0.01, 0.05, *(round(float(rate), 5) for rate in np.logspace(-3, 0, CURVE_POINTS - 2))}))
"""Where detection curves are read off, the same for all of them: from 0.001, evenly on a logarithmic axis."""


@dataclass(frozen=True)
class Shelf:
    """Artifacts by id.

    Attributes:
        datasets, models, evaluations: opened lazily; what they hold is read when it is needed.
    """

    datasets: Mapping[str, DatasetArtifact]
    models: Mapping[str, ModelArtifact]
    evaluations: Mapping[str, EvaluationArtifact]

    @classmethod
    def of(cls, folders: Sequence[Path]) -> Shelf:
        """Return what lies under folders."""
        found = [item for folder in folders for item in find_artifacts(folder)]
        kinds: dict[str, list[tuple[Path, Manifest]]] = {kind: [] for kind in get_args(Kind)}
        for path, manifest in found:
            kinds[manifest.ask.kind].append((path, manifest))
        return cls(
            {manifest.id: DatasetArtifact(path, manifest) for path, manifest in kinds["dataset"]},
            {manifest.id: ModelArtifact(path, manifest) for path, manifest in kinds["model"]},
            {manifest.id: EvaluationArtifact(path, manifest) for path, manifest in kinds["evaluation"]},
        )


def describe_runs(rows: Sequence[Mapping[str, Any]], shelf: Shelf) -> list[dict[str, Any]]:
    """Return for every row what a reader can look up: facts, findings, history, detection, commands, what is missing.

    `findings` is from heading to text, `sweep` the settings that were tried; `history` is from phase to [epoch or step,
    counts of these, losses]; `rounds` from phase to {heading of a metric: [epochs, values]} of what the method would
    have set aside after each epoch; `detection` the true-positive rates at `FALSE_POSITIVE`.
    """

    @cache
    def poison_line(dataset_id: str) -> str:
        return commands.poison_command(shelf.datasets[dataset_id])

    @cache
    def is_poison(dataset_id: str) -> Tensor:
        return shelf.datasets[dataset_id].is_poison

    described = []
    for row in rows:
        data, model = shelf.datasets.get(row["dataset_id"]), shelf.models.get(row["model_id"])
        judged = shelf.evaluations.get(row["evaluation_id"])
        run: dict[str, Any] = {"missing": [], "history": {}, "rounds": {}, "detection": None, "commands": []}
        told = row.get("findings", {})
        names = model.manifest.facts["class_names"] if model else ()
        run |= {"findings": findings.lines(told, names), "sweep": findings.sweep(told)}
        if data is None:
            run["missing"].append(f"The dataset {row['dataset_id']} is not here: no detection curve, no commands.")
        if model is None:
            run["missing"].append(f"The model {row['model_id']} is not here: no curves, no commands.")
        run["facts"] = _facts(model, data, judged)
        if judged is not None:
            _fill(run, "rounds", partial(_rounds, judged))
        if model is not None:
            _fill(run, "history", partial(_history, model))
        if model is not None and data is not None:
            _fill(run, "detection", partial(_detection, model, partial(is_poison, data.id)))
            lines = [poison_line(data.id), *_model_lines(model, data, shelf, run["missing"])]
            run["commands"] = [*lines, commands.evaluate_command(model, judged)]
        described.append(run)
    return described


def _fill(run: dict[str, Any], part: str, read: Callable[[], object]) -> None:
    """Put in a part of a run, or say why it is not there."""
    try:
        run[part] = read()
    except BdbenchError as error:
        run["missing"].append(f"No {part}: {error}")


def _facts(
    model: ModelArtifact | None, data: DatasetArtifact | None, judged: EvaluationArtifact | None
) -> dict[str, Any]:
    """Return heading -> text, as short as a reader wants it."""
    facts: dict[str, Any] = {}
    if model is not None:
        made = model.manifest.made
        facts["device"] = f"{made['device']}, {arithmetic(made)}, {wording.counted(made['threads'], 'thread')}"
        facts["versions"] = f"bdbench {made['bdbench']}, torch {made['torch']}, Python {made['python']}"
        facts["trained"] = made["at"]
        facts["method version"] = model.manifest.ask.version
    if data is not None:
        counts = data.manifest.facts["counts"]
        facts["images"] = ", ".join(f"{count:,} {split}" for split, count in counts.items())
        facts["dataset made in"] = f"{data.manifest.made['seconds']:.1f} s"
    if judged is not None:
        facts["evaluated in"] = f"{judged.manifest.made['seconds']:.1f} s"
    return facts


def _history(model: ModelArtifact) -> dict[str, list[Any]]:
    history: dict[str, list[Any]] = {}
    for phase, rows in model.history.groupby("phase", sort=False):
        places = _some(len(rows))
        unit, count = counted(rows)
        history[str(phase)] = [unit, count[places].tolist(), _short(rows["loss"].to_numpy()[places])]
    return history


def _rounds(judged: EvaluationArtifact) -> dict[str, dict[str, list[Any]]]:
    rounds: dict[str, dict[str, list[Any]]] = {}
    if (epochs := judged.epochs) is None:
        return rounds
    for phase, told in epochs.groupby("phase", sort=False):
        for metric in SET_ASIDE:
            rows = told[told["metric"] == metric]
            if len(rows):
                places = _some(len(rows))
                values = [rows["epoch"].to_numpy()[places].tolist(), _short(rows["value"].to_numpy()[places])]
                rounds.setdefault(str(phase), {})[METRICS[metric].heading.removeprefix("set aside: ")] = values
    return rounds


def _some(count: int) -> np.ndarray:
    """Return at most `LOSS_POINTS` of so many places, evenly chosen, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(LOSS_POINTS, count)).round().astype(int))


def _short(values: np.ndarray) -> list[float | None]:
    """Return four digits of each number, None of what is none."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]


def _detection(model: ModelArtifact, truth: Callable[[], Tensor]) -> list[float] | None:
    """Return the share of poison that is found at each of `FALSE_POSITIVE`, as `metrics.score_metrics` reads it off."""
    if "samples.parquet" not in model.manifest.files:
        return None
    is_poison = truth()
    samples = model.samples_of(len(is_poison))
    if samples is None:
        return None
    curve = metrics.detection_curve(torch.from_numpy(samples["score"].to_numpy(copy=True)), is_poison)
    if curve is None:
        return None
    false_positive, true_positive = curve
    places = np.searchsorted(false_positive, FALSE_POSITIVE, side="right") - 1
    return [round(float(rate), 3) for rate in true_positive[places]]


def _model_lines(model: ModelArtifact, data: DatasetArtifact, shelf: Shelf, missing: list[str]) -> list[str]:
    """Return the commands that train a model, the model that it mends first."""
    wanted = model.manifest.ask.inputs.get("suspect")
    suspect = None if wanted is None else shelf.models.get(wanted)
    if wanted is not None and suspect is None:
        missing.append(f"The undefended model {wanted} that it mends is not here: its command is missing.")
    lines = [] if suspect is None else [commands.model_command(suspect, data)]
    name = suspect.path.name if suspect else f"model-{wanted}" if wanted else None
    return [line for line in [*lines, commands.model_command(model, data, name)] if line is not None]


class Picture(NamedTuple):
    """One test image under a trigger; pictures are data URIs."""

    dataset: str
    attack: str
    label: str
    clean: str
    triggered: str
    change: str
    gain: float


def trigger_gallery(labels: Mapping[str, tuple[str, str]], shelf: Shelf) -> tuple[list[Picture], list[str]]:
    """Return a picture per attacked dataset, of the same image where that is possible, and what could not be shown.

    Args:
        labels: id of a dataset -> name of its source and of its attack.
        shelf: where they are.
    """
    sources: dict[str, list[DatasetArtifact]] = {}
    missing = []
    for dataset_id, (name, attack) in labels.items():
        data = shelf.datasets.get(dataset_id)
        if data is None:
            missing.append(f"{name}, {attack}: the dataset {dataset_id} is not here")
        elif data.is_attacked:
            sources.setdefault(name, []).append(data)
    pictures = []
    for alike in sources.values():
        shared = _row(alike)
        for data in alike:
            name, attack = labels[data.id]
            try:
                pictures.append(_picture(data, shared_row([data]) if shared is None else shared, name, attack))
            except BdbenchError as error:
                missing.append(f"{name}, {attack}: {error}")
    return pictures, missing


def _row(alike: Sequence[DatasetArtifact]) -> int | None:
    try:
        return shared_row(alike)
    except BdbenchError:
        return None


def _picture(data: DatasetArtifact, row: int, name: str, attack: str) -> Picture:
    shown = triggered_example(data, row)
    true, wanted = int(data.test.labels[row]), data.triggered.labels[data.triggered_rows.tolist().index(row)]
    label = f"{data.class_names[true]} → {data.class_names[int(wanted)]}"
    return Picture(
        name, attack, label, png_uri(shown.clean), png_uri(shown.triggered), png_uri(shown.change), round(shown.gain, 1)
    )


def png_uri(pixels: Tensor) -> str:
    """Return an image (C, H, W) float in [0, 255] as a data URI of a PNG of at most 96 pixels a side."""
    if max(pixels.shape[1:]) > LARGEST_PICTURE:
        pixels = F.interpolate(pixels[None], scale_factor=LARGEST_PICTURE / max(pixels.shape[1:]), mode="area").squeeze(
            0
        )
    values = pixels.round().clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values.squeeze(-1) if values.shape[2] == 1 else values).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
