"""The metrics: what each counts, over what; `metrics` computes them. Tables, help and `--assert` name them so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from bdbench.errors import OptionError, did_you_mean


class Metric(NamedTuple):
    """One metric.

    Attributes:
        heading: of its column.
        kind: rate: a share with its count and 95 % interval; score: a number in [0, 1]; change: a difference of two
            rates; cost: seconds or bytes.
        counts: what is counted or measured.
        over: of what.
        better: which values are good for a defender; "" where neither is.
    """

    heading: str
    kind: Literal["rate", "score", "change", "cost"]
    counts: str
    over: str
    better: Literal["high", "low", ""] = ""


METRICS = {
    "ba": Metric(
        "BA", "rate", "clean test images that are classified as their label", "all clean test images", "high"
    ),
    "asr": Metric(
        "ASR",
        "rate",
        "triggered test images that are classified as the attacker wants",
        "test images of other classes than the target (all-to-all: all; source-specific: the source class)",
        "low",
    ),
    "asr_others": Metric(
        "ASR, other classes",
        "rate",
        "triggered test images that are classified as the target",
        "source-specific attacks: test images of neither the source class nor the target",
        "low",
    ),
    "floor": Metric(
        "floor",
        "rate",
        "the test images of ASR that are classified as the attacker wants without any trigger",
        "the same images as ASR; an ASR near its floor is no attack",
    ),
    "ra": Metric(
        "RA", "rate", "triggered test images that are classified as their true label", "the same images as ASR", "high"
    ),
    "ba_non_target": Metric(
        "BA, other classes",
        "rate",
        "clean test images that are classified as their label",
        "clean test images of other classes than the target",
        "high",
    ),
    "target_recall": Metric(
        "target recall",
        "rate",
        "clean test images of the target class that are classified as it",
        "clean test images of the target class",
        "high",
    ),
    "der": Metric(
        "DER",
        "score",
        "defense effectiveness: (fall of ASR - fall of BA + 1) / 2",
        "against the undefended model (`ba_change` says which)",
        "high",
    ),
    "ba_change": Metric(
        "BA change",
        "change",
        "BA minus that of the undefended model",
        "against the model that was repaired; else the undefended one of the same dataset, network and seed",
        "high",
    ),
    "asr_change": Metric(
        "ASR change", "change", "ASR minus that of the undefended model", "against the same model as BA change", "low"
    ),
    "detection_precision": Metric(
        "set aside: precision",
        "rate",
        "training samples that the defense set aside and that are poisoned",
        "training samples that the defense set aside",
        "high",
    ),
    "detection_recall": Metric(
        "set aside: recall",
        "rate",
        "poisoned training samples that the defense set aside",
        "poisoned training samples",
        "high",
    ),
    "false_alarms": Metric(
        "set aside: false alarms",
        "rate",
        "training samples that the defense set aside and that are not poisoned",
        "training samples that are not poisoned",
        "low",
    ),
    "auroc": Metric(
        "AUROC",
        "score",
        "how well the defense's scores tell poisoned training samples from the others; 0.5 is chance",
        "all training samples",
        "high",
    ),
    "tpr_at_1_fpr": Metric(
        "TPR at 1 % FPR",
        "score",
        "poisoned training samples found where 1 % of the others are suspected",
        "poisoned training samples",
        "high",
    ),
    "tpr_at_5_fpr": Metric(
        "TPR at 5 % FPR",
        "score",
        "poisoned training samples found where 5 % of the others are suspected",
        "poisoned training samples",
        "high",
    ),
    "auroc_in_class": Metric(
        "AUROC in class",
        "score",
        "how well a scan's scores tell poison from clean samples of the same label; 0.5: only the class was found",
        "training samples of the labels that poison has",
        "high",
    ),
    "auroc_covers": Metric(
        "AUROC of covers",
        "score",
        "how well a scan's scores tell covers from clean samples; 0.5: wrong labels are found, not triggers",
        "cover and clean training samples",
    ),
    "auprc": Metric(
        "AUPRC",
        "score",
        "average precision of a scan's scores; chance is the share of poison",
        "all training samples",
        "high",
    ),
    "tpr_at_01_fpr": Metric(
        "TPR at 0.1 % FPR",
        "score",
        "poisoned training samples found where 0.1 % of the others are suspected",
        "poisoned training samples",
        "high",
    ),
    "precision_at_50": Metric(
        "precision at 50", "score", "poisoned samples among the most suspect", "the 50 most suspect samples", "high"
    ),
    "r_precision": Metric(
        "R-precision", "score", "poisoned samples among the most suspect", "as many samples as there is poison", "high"
    ),
    "seconds": Metric("seconds", "cost", "seconds that training took", "all phases of the defense", "low"),
    "peak_memory_bytes": Metric(
        "peak MiB", "cost", "highest memory of the training process", "CPU: of the process; GPU: of the device", "low"
    ),
}  # fmt: skip

MIN_BA = 0.9
"""Share of the undefended model's BA below which a defended model is of little use, whatever its ASR: BackdoorBench
takes no setting of a method that costs more."""

RATES = tuple(name for name, metric in METRICS.items() if metric.kind == "rate")

SET_ASIDE = ("detection_precision", "detection_recall", "false_alarms")
"""Of the samples that a method sets aside."""

RANKINGS = ("auroc_in_class", "auroc_covers", "auprc", "tpr_at_01_fpr", "precision_at_50", "r_precision")
"""Of scans only."""
SCORES = ("auroc", "tpr_at_1_fpr", "tpr_at_5_fpr", *RANKINGS)
"""Of training samples, from the scores of a method that scores them."""


def check_metrics(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Return the names.

    Args:
        names: what a user gave.
        where: what they were given to, such as "--columns".

    Raises:
        OptionError: one is no metric; the nearest is named.
    """
    given = tuple(name.lower() for name in names)
    for name in given:
        if name not in METRICS:
            raise OptionError(
                f"{where}: unknown metric '{name}'.{_nearest(name)} `bdbench list metrics` says what there is"
            )
    return given


OTHER_NAMES = {
    "acc": "ba",
    "accuracy": "ba",
    "clean_accuracy": "ba",
    "ca": "ba",
    "robust_accuracy": "ra",
    "auc": "auroc",
}
"""What other tools call a metric."""


def _nearest(name: str) -> str:
    known = OTHER_NAMES.get(name.lower().replace("-", "_"))
    return f" Did you mean '{known}'?" if known else did_you_mean(name, METRICS)
