"""Scan artifacts: how suspect a detector finds each training sample, what it set aside, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd  # pyarrow would import it in the middle of its own work, where a Ctrl-C is lost
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bdbench.artifacts.base import Artifact, checked_samples, write_frame
from bdbench.artifacts.manifests import AGAIN
from bdbench.artifacts.store import Draft
from bdbench.detectors.base import ClassEvidence
from bdbench.errors import DamagedError

CLASSES = pa.schema({
    "label": pa.int64(), "statistic": pa.float64(), "deviations": pa.float64(), "p": pa.float64(),
})  # fmt: skip
"""Columns of what speaks for each class; `p` is null where it is not known."""


class ScanArtifact(Artifact):
    """The scores of training samples by a detector."""

    kind = "scan"

    @property
    def samples(self) -> pd.DataFrame:
        """row, score (higher is more suspect), set_aside, of every training sample."""
        return self.frame("samples.parquet")

    @property
    def null(self) -> Tensor | None:
        """(m,) float32: the scores of trusted images that were treated as training samples; None without any."""
        return self.column("null.parquet", "score").float() if "null.parquet" in self.manifest.files else None

    @property
    def classes(self) -> pd.DataFrame:
        """label, statistic, deviations, p of every class, if the method judges classes."""
        return self.frame("classes.parquet")

    @property
    def dataset_id(self) -> str:
        """Id of the dataset that was scanned."""
        return self.made_from("dataset")

    def samples_of(self, count: int) -> pd.DataFrame:
        """Return `samples` of a dataset of `count` training images.

        Raises:
            DamagedError: there are scores of other rows, or one is no number.
        """
        return checked_samples(self, count)


def write_scan(
    draft: Draft,
    scores: Tensor,
    set_aside: Tensor | None,
    null: Tensor | None,
    classes: Sequence[ClassEvidence],
    facts: dict[str, Any],
) -> None:
    """Write the files and facts of a scan artifact.

    Args:
        draft: from `store.create`.
        scores: (N,) float.
        set_aside: (N,) bool, None where nothing was decided.
        null: (m,) float, None where nothing was calibrated.
        classes: what speaks for each class.
        facts: of the decision, and findings.
    """
    chosen = torch.zeros(len(scores), dtype=torch.bool) if set_aside is None else set_aside
    write_frame(draft, "samples.parquet", {"score": scores.float(), "set_aside": chosen})
    if null is not None:
        write_frame(draft, "null.parquet", {"score": null.float()})
    rows = [one._asdict() for one in classes]
    pq.write_table(pa.Table.from_pylist(rows, CLASSES), draft.folder / "classes.parquet")
    draft.facts |= {**facts, "sets_aside": set_aside is not None}


def class_evidence(scan: ScanArtifact) -> list[ClassEvidence]:
    """Return what speaks for each class, as the detector said it; nothing where it judges none.

    Raises:
        DamagedError: it is not said of all classes, in their order.
    """
    found = [ClassEvidence(**{name: row[name] for name in CLASSES.names}) for row in scan.records("classes.parquet")]
    classes = len(scan.manifest.facts["class_names"])
    if [one.label for one in found] not in ([], list(range(classes))):
        raise DamagedError(scan.path, f"{scan.path} does not judge its {classes} classes; {AGAIN}")
    return found
