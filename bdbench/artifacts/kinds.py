"""Dataset, model, scan and evaluation artifacts: tensors and tables on top of `store`."""

from __future__ import annotations

from pathlib import Path

import pandas as pd  # pyarrow would import it in the middle of its own work, where a Ctrl-C is lost

from bdbench.artifacts import manifests
from bdbench.artifacts.base import Artifact
from bdbench.artifacts.dataset import DatasetArtifact, verify_dataset
from bdbench.artifacts.model import ModelArtifact
from bdbench.artifacts.scan import ScanArtifact


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

    @property
    def epochs(self) -> pd.DataFrame | None:
        """phase, epoch, and the columns of `metrics`, of what the method would have set aside after each epoch.

        None where it does not choose epoch by epoch, and of evaluations of 0.1.
        """
        return self.frame("epochs.parquet") if "epochs.parquet" in self.manifest.files else None


OPENERS: dict[str, type[Artifact]] = {
    cls.kind: cls for cls in (DatasetArtifact, ModelArtifact, ScanArtifact, EvaluationArtifact)
}


def open_any(path: Path) -> Artifact:
    """Open an artifact of whatever kind is there."""
    manifest = manifests.read_manifest(path)
    return OPENERS[manifest.ask.kind](path, manifest)


def verify(path: Path) -> Artifact:
    """Check every hash of an artifact, of a dataset its counts, of a model that its weights fit, and return it.

    Raises:
        ArtifactError: says the first thing that is wrong.
        OptionError: a model is of a network that is not registered here.
    """
    artifact = open_any(path)
    artifact.verify()
    if isinstance(artifact, DatasetArtifact):
        verify_dataset(artifact)
    elif isinstance(artifact, ModelArtifact):
        artifact.network()
    return artifact
