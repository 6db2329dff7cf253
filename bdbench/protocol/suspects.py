"""Which training samples a defense suspects: its scores beside labels and places. The truth plays no part."""

from __future__ import annotations

import pandas as pd

from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.model import ModelArtifact
from bdbench.artifacts.scan import ScanArtifact
from bdbench.errors import ArtifactError
from bdbench.seeds import tie_order


def rank(model: ModelArtifact | ScanArtifact, data: DatasetArtifact) -> pd.DataFrame:
    """Return the training samples, the most suspect first; equal scores are told apart by `tie_order`.

    Args:
        model: of a method that scores samples, or a scan.
        data: what it was trained on.

    Returns:
        row (of the artifact), place (file, or the row again), label, class (its name), score (higher is more
        suspect; only the order of one model's scores means anything), set_aside.

    Raises:
        ArtifactError: the method scored nothing, or something is damaged.
    """
    samples = check_scored(model, data)
    labels = data.train_labels.tolist()
    frame = pd.DataFrame(
        {
            "row": samples["row"],
            "place": data.places,
            "label": labels,
            "class": [data.class_names[label] for label in labels],
            "score": samples["score"],
            "set_aside": samples["set_aside"],
        }
    )
    shuffled = frame.iloc[tie_order(len(frame)).numpy()]
    return shuffled.sort_values("score", ascending=False, kind="stable", ignore_index=True)


def check_scored(model: ModelArtifact | ScanArtifact, data: DatasetArtifact) -> pd.DataFrame:
    """Return the scores of a model's, or a scan's, training samples, in their order.

    Raises:
        ArtifactError: the method scored nothing.
    """
    samples = model.samples_of(data.manifest.facts["counts"]["train"])
    if samples is None:
        raise ArtifactError(
            f"{model.path} is by {model.manifest.ask.method}, which scores no samples; a defense such as abl does: "
            f"bdbench defend {data.path} --method abl"
        )
    return samples


def counted(ranked: pd.DataFrame, share: float) -> int:
    """Return how many samples a share of all is, at least 1."""
    return max(1, round(share * len(ranked)))


def by_class(ranked: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return how the `count` most suspect samples spread over the labels.

    Args:
        ranked: from `rank`.
        count: at least 1.

    Returns:
        label, class, images, suspects, share (of the class's images that are suspect), the largest share first.
    """
    groups = ranked.groupby(["label", "class"])["row"].agg(images="size").reset_index()
    suspects = ranked.head(count)["label"].value_counts()
    groups["suspects"] = groups["label"].map(suspects).fillna(0).astype(int)
    groups["share"] = groups["suspects"] / groups["images"]
    return groups.sort_values(["share", "label"], ascending=[False, True], ignore_index=True)
