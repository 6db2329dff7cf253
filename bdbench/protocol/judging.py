"""What `evaluate` computes: predictions, the metrics that follow from them and the truth, and facts for tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.model import ModelArtifact
from bdbench.artifacts.scan import ScanArtifact
from bdbench.models.classifier import Classifier
from bdbench.protocol import metrics
from bdbench.training.engine import Engine

MEASURED_PAIRS = 1000


def trigger_distances(source: DatasetArtifact) -> dict[str, float]:
    """Return `metrics.image_distances` of at most 1,000 triggered test images, evenly chosen, from their clean ones."""
    rows = torch.arange(len(source.triggered))[:: math.ceil(len(source.triggered) / MEASURED_PAIRS)]
    before = source.test.images[source.triggered_rows[rows]]
    return metrics.image_distances(before, source.triggered.images[rows])


def predict(engine: Engine, model: Classifier, source: DatasetArtifact) -> pd.DataFrame:
    """Return a row per clean and per triggered test image: split, row, label, clean_label, prediction, confidence."""
    test = source.test
    frames = []
    splits = [("test", test, torch.arange(len(test)))]
    if source.is_attacked:
        splits.append(("triggered", source.triggered, source.triggered_rows))
    for name, split, rows in splits:
        confidence, prediction = engine.logits(model, split.images, name).softmax(1).max(1)
        frames.append(
            pd.DataFrame(
                {
                    "split": name,
                    "row": rows.numpy(),
                    "label": split.labels.numpy(),
                    "clean_label": test.labels[rows].numpy(),
                    "prediction": prediction.numpy(),
                    "confidence": confidence.numpy().astype(np.float32),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def measure(
    frame: pd.DataFrame, source: DatasetArtifact, model: ModelArtifact
) -> tuple[dict[str, metrics.Rate], dict[str, float]]:
    """Return the rates, and the metrics that are no rates, of predictions; opens the truth if the model scored samples.

    Of a dataset as it was found only BA is known. Where nothing was poisoned on purpose, ASR has no meaning: BA is
    measured, and how many clean samples the method set aside.

    Args:
        frame: from `predict`.
        source: the dataset, with its truth.
        model: the model artifact, for what it set aside.
    """

    def column(split: str, name: str) -> Tensor:
        return torch.from_numpy(frame.loc[frame["split"] == split, name].to_numpy(copy=True))

    if not source.is_attacked:
        rates = {"ba": metrics.rate(column("test", "prediction") == column("test", "clean_label"))}
        samples = None if source.is_taken else model.samples_of(source.manifest.facts["counts"]["train"])
        if samples is not None and model.manifest.facts["sets_aside"]:
            rates["false_alarms"] = metrics.false_alarms(_set_aside(samples), source.is_poison)
        return rates, {}
    config = source.manifest.ask.config
    said, wanted, rows = (column("triggered", name) for name in ("prediction", "label", "row"))
    counts = torch.from_numpy(counts_for_asr(column("triggered", "clean_label").numpy(), config))
    rates = metrics.classification_rates(
        predicted=column("test", "prediction"),
        labels=column("test", "clean_label"),
        triggered_predicted=said[counts],
        wanted=wanted[counts],
        triggered_rows=rows[counts],
        target=source.target,
    )
    if not counts.all():
        rates["asr_others"] = metrics.rate((said == wanted)[~counts])
    samples = model.samples_of(source.manifest.facts["counts"]["train"])
    if samples is None:
        return rates, {}
    is_poison = source.is_poison
    if model.manifest.facts["sets_aside"]:
        rates |= metrics.set_aside_rates(_set_aside(samples), is_poison)
    return rates, metrics.score_metrics(torch.from_numpy(samples["score"].to_numpy(copy=True)), is_poison)


def epochs_frame(source: DatasetArtifact, model: ModelArtifact) -> pd.DataFrame | None:
    """Return phase, epoch and the columns of `metrics_frame` of what a method would have set aside after each epoch.

    None where it told nothing of the kind, and of a dataset as it was found.
    """
    rounds = [] if source.is_taken else model.rounds_of(source.manifest.facts["counts"]["train"])
    if not rounds:
        return None
    is_poison = source.is_poison
    frames = []
    for phase, epoch, rows in rounds:
        set_aside = torch.zeros(len(is_poison), dtype=torch.bool)
        set_aside[rows] = True
        rates = metrics.set_aside_rates(set_aside, is_poison)
        if not source.is_attacked:
            rates = {"false_alarms": rates["false_alarms"]}
        frame = metrics_frame(rates, {})
        frame.insert(0, "phase", phase)
        frame.insert(1, "epoch", epoch)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _set_aside(samples: pd.DataFrame) -> Tensor:
    return torch.from_numpy(samples["set_aside"].to_numpy(copy=True))


def counts_for_asr(clean_labels: np.ndarray, attack: Mapping[str, Any]) -> np.ndarray:
    """Return which triggered test images ASR is over, (M,) bool: source-specific attacks: the source class, else all.

    Args:
        clean_labels: (M,), their true labels.
        attack: options of the attack.
    """
    if attack.get("labels") == "source-specific":
        return np.asarray(clean_labels == attack.get("source"))
    return np.ones(len(clean_labels), dtype=bool)


def metrics_frame(rates: Mapping[str, metrics.Rate], values: Mapping[str, float]) -> pd.DataFrame:
    """Return metric, value, low, high, numerator, denominator; what is no rate has a value only."""
    rows: list[dict[str, Any]] = [
        {
            "metric": name,
            "value": item.value,
            "low": item.interval[0],
            "high": item.interval[1],
            "numerator": item.numerator,
            "denominator": item.denominator,
        }
        for name, item in rates.items()
    ]
    rows += [{"metric": name, "value": value} for name, value in values.items()]
    columns = ["metric", "value", "low", "high", "numerator", "denominator"]
    return pd.DataFrame(rows, columns=columns).astype({"numerator": "Int64", "denominator": "Int64"})


def measure_scan(scan: ScanArtifact, source: DatasetArtifact) -> tuple[dict[str, metrics.Rate], dict[str, float]]:
    """Return the rates of a scan's decision, and how well its scores rank; opens the truth.

    Of a dataset as it was found nothing is known; of one without poison, how much was set aside.
    """
    samples = scan.samples_of(source.manifest.facts["counts"]["train"])
    decides = scan.manifest.facts["sets_aside"]
    if source.is_taken:
        return {}, {}
    is_poison = source.is_poison
    if not bool(is_poison.any()):
        return ({"false_alarms": metrics.false_alarms(_set_aside(samples), is_poison)} if decides else {}), {}
    scores = torch.from_numpy(samples["score"].to_numpy(copy=True))
    rates = metrics.set_aside_rates(_set_aside(samples), is_poison) if decides else {}
    ranked = metrics.ranking_metrics(scores, source.train_labels, source.roles)
    return rates, metrics.score_metrics(scores, is_poison) | ranked


def scan_facts(scan: ScanArtifact, source: DatasetArtifact, suspect: str) -> dict[str, Any]:
    """Return what a table needs to know of a scan beside the metrics; see `row_facts`.

    Args:
        scan, source: the scan and its dataset.
        suspect: name of the network that it looked at, "" if it looked at none.
    """
    return _shared_facts(scan, source) | {
        "judged": "scan",
        "model": suspect,
        "preset": "",
        "decide": scan.manifest.facts["decide"],
        "at_least": scan.manifest.facts.get("at_least"),
        "seconds": scan.manifest.made["seconds"],
    }


def row_facts(model: ModelArtifact, source: DatasetArtifact) -> dict[str, Any]:
    """Return what a table needs to know beside the metrics, so that it opens evaluations only."""
    asked, made = model.manifest.ask, model.manifest.made
    return _shared_facts(model, source) | {
        "model": model.option("model"),
        "suspect_id": asked.inputs.get("suspect"),
        "suspect": model.manifest.facts.get("suspect") if "suspect" in asked.inputs else None,
        "preset": model.option("preset"),
        "changed": list(model.manifest.facts.get("changed", [])),
        "reads_truth": model.manifest.facts.get("reads_truth", False),
        # Counted by epochs too: those before an interruption are in the history, not in the last start's seconds.
        "seconds": max(made["seconds"], made["training_seconds"]),
    }


def _shared_facts(judged: ModelArtifact | ScanArtifact, source: DatasetArtifact) -> dict[str, Any]:
    """Return what a table needs to know of a model and of a scan alike."""
    asked, attacked, made = judged.manifest.ask, source.manifest.ask, judged.manifest.made
    return {
        "dataset": source.manifest.facts["name"],
        "dataset_id": source.id,
        "source": attacked.inputs.get("source"),
        "source_options": dict(source.manifest.facts.get("source_options", {})),
        "model_id": judged.id,
        "attack": attacked.method,
        "replay": source.manifest.facts.get("replay", False),
        "attack_options": dict(attacked.config),
        "defense": asked.method,
        "defense_options": dict(asked.config),
        "findings": dict(judged.manifest.facts.get("findings", {})),
        "seed": asked.seed,
        "attack_seed": attacked.seed,
        "peak_memory_bytes": made["peak_memory_bytes"],
        "device": made["device"],
        "precision": made["precision"],
    }
