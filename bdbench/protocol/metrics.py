"""How metrics are computed: rates with their counts and intervals, of (N,) tensors. `metric_list` says what each is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bdbench.data import Role
from bdbench.seeds import tie_order

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """A share with its counts; `value` is nan where the denominator is 0."""

    numerator: int
    denominator: int

    @property
    def value(self) -> float:
        """Numerator / denominator, in [0, 1]."""
        return self.numerator / self.denominator if self.denominator else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval; (nan, nan) where the denominator is 0."""
        n = self.denominator
        if not n:
            return math.nan, math.nan
        centre = (self.value + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(self.value * (1 - self.value) / n + Z95**2 / (4 * n**2))
        return max(0.0, centre - half), min(1.0, centre + half)


def rate(hits: Tensor) -> Rate:
    """Count a (N,) bool tensor."""
    return Rate(int(hits.sum()), hits.numel())


def classification_rates(
    predicted: Tensor,
    labels: Tensor,
    triggered_predicted: Tensor,
    wanted: Tensor,
    triggered_rows: Tensor,
    target: int | None,
) -> dict[str, Rate]:
    """Return the metrics of one model on one attack.

    Args:
        predicted, labels: (N,) int64 over all clean test images: what the model says, what is true.
        triggered_predicted, wanted: (M,) int64 over the triggered images of eligible classes: what the model says, what
            the attacker wants.
        triggered_rows: (M,) int64, the test row of each triggered image.
        target: the attacker's one class, or None if there is no single one.

    Returns:
        ba: correct on all clean images. asr: called what the attacker wants. floor: the same images without trigger
        that are called so anyway. ra: triggered images given their true label. With a target also
        ba_non_target (over the other classes) and target_recall.
    """
    correct = predicted == labels
    rates = {
        "ba": rate(correct),
        "asr": rate(triggered_predicted == wanted),
        "floor": rate(predicted[triggered_rows] == wanted),
        "ra": rate(triggered_predicted == labels[triggered_rows]),
    }
    if target is not None:
        of_target = labels == target
        rates["ba_non_target"] = rate(correct[~of_target])
        rates["target_recall"] = rate(correct[of_target])
    return rates


def set_aside_rates(set_aside: Tensor, is_poison: Tensor) -> dict[str, Rate]:
    """Return precision, recall and false alarms of a decision (N,) bool about what is poison (N,) bool.

    Covers are not poison: they are truthfully labelled. Nothing set aside leaves precision undefined, never 0 or 1.
    """
    hits = set_aside & is_poison
    return {
        "detection_precision": Rate(int(hits.sum()), int(set_aside.sum())),
        "detection_recall": Rate(int(hits.sum()), int(is_poison.sum())),
        "false_alarms": false_alarms(set_aside, is_poison),
    }


def false_alarms(set_aside: Tensor, is_poison: Tensor) -> Rate:
    """Return how many of the samples that are not poison are set aside, both (N,) bool."""
    return rate(set_aside[~is_poison])


def detection_curve(scores: Tensor, is_poison: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
    """Return false- and true-positive rates, rising, of scores (N,), higher is more suspect, at every threshold.

    None where there is only poison or only clean.
    """
    from sklearn.metrics import roc_curve

    if is_poison.all() or not is_poison.any():
        return None
    false_positive, true_positive, _ = roc_curve(is_poison.numpy(), scores.double().numpy(), drop_intermediate=False)
    return false_positive, true_positive


def score_metrics(scores: Tensor, is_poison: Tensor) -> dict[str, float]:
    """Return AUROC and the true-positive rate at 1 % and 5 % false positives of scores (N,), higher is more suspect.

    nan where there is only poison or only clean.
    """
    from sklearn.metrics import auc

    curve = detection_curve(scores, is_poison)
    if curve is None:
        return dict.fromkeys(("auroc", "tpr_at_1_fpr", "tpr_at_5_fpr"), math.nan)
    false_positive, true_positive = curve
    at = {f"tpr_at_{percent}_fpr": float(true_positive[false_positive <= percent / 100].max()) for percent in (1, 5)}
    return {"auroc": float(auc(false_positive, true_positive)), **at}


def ranking_metrics(scores: Tensor, labels: Tensor, roles: Tensor) -> dict[str, float]:
    """Return what `score_metrics` leaves out of how scores (N,) rank training samples, higher is more suspect.

    Args:
        scores: (N,).
        labels: (N,) int64, as the defender sees them.
        roles: (N,) of `Role`.

    Returns:
        auroc_in_class: poison against clean samples of the labels that poison has: 0.5 where only the class was found.
        auroc_covers: covers against clean samples: above 0.5 where triggers are found, not wrong labels.
        auprc: average precision; chance is the share of poison. tpr_at_01_fpr: at 0.1 % of false positives.
        precision_at_50: poison among the 50 most suspect; r_precision: among as many as there is poison. nan where
        there is nothing to tell apart.
    """
    from sklearn.metrics import average_precision_score

    is_poison, is_clean = roles == Role.POISON, roles == Role.CLEAN
    count = int(is_poison.sum())
    beside = is_poison | (is_clean & torch.isin(labels, labels[is_poison].unique()))
    covers = roles == Role.COVER
    told = covers | is_clean
    order = tie_order(len(scores))
    ranked = is_poison[order[torch.argsort(scores[order], descending=True, stable=True)]].double()
    curve = detection_curve(scores, is_poison)
    at = math.nan if curve is None else float(curve[1][curve[0] <= 0.001].max())
    return {
        "auroc_in_class": score_metrics(scores[beside], is_poison[beside])["auroc"],
        "auroc_covers": score_metrics(scores[told], covers[told])["auroc"],
        "auprc": float(average_precision_score(is_poison.numpy(), scores.numpy())) if count else math.nan,
        "tpr_at_01_fpr": at,
        "precision_at_50": float(ranked[:50].mean()) if count else math.nan,
        "r_precision": float(ranked[:count].mean()) if count else math.nan,
    }


def image_distances(before: Tensor, after: Tensor) -> dict[str, float]:
    """Return how far a trigger moves images (N, C, H, W) uint8, N of at least 1.

    Returns:
        psnr: in dB, 10 log10(255^2 / mean squared change), over the images that change; inf where none does. ssim: the
        structural similarity (7x7 windows, mean over channels). max_change: the largest change of a value, of 255.
        changed: share of pixels of which any channel changes. The first two are means over images.
    """
    from skimage.metrics import structural_similarity

    change = after.float() - before.float()
    squared = change.square().flatten(1).mean(1)
    squared = squared[squared > 0]
    similarities = [
        structural_similarity(one, other, channel_axis=0)  # type: ignore[no-untyped-call]
        for one, other in zip(before.numpy(), after.numpy(), strict=True)
    ]
    return {
        "psnr": float((10 * torch.log10(255**2 / squared)).mean()) if len(squared) else math.inf,
        "ssim": float(np.mean(similarities)),
        "max_change": float(change.abs().max()),
        "changed": float((change != 0).any(1).float().mean()),
    }


def defense_effectiveness(ba_before: float, asr_before: float, ba_after: float, asr_after: float) -> float:
    """Return the defense effectiveness rating in [0, 1]: (fall of ASR - fall of BA + 1) / 2, falls not below 0.

    Source: Zhu et al., Enhancing Fine-Tuning based Backdoor Defense, ICCV 2023.
    """
    return (max(0.0, asr_before - asr_after) - max(0.0, ba_before - ba_after) + 1) / 2


def mean_interval(values: list[float]) -> tuple[float, float, float]:
    """Return mean, sample standard deviation and half the 95 % t interval of values over seeds; nan below 2 values."""
    from scipy.stats import t

    finite = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64)
    if not len(finite):
        return math.nan, math.nan, math.nan
    mean = float(finite.mean())
    if len(finite) < 2:
        return mean, math.nan, math.nan
    spread = float(finite.std(correction=1))
    return mean, spread, float(t.ppf(0.975, len(finite) - 1)) * spread / float(np.sqrt(len(finite)))
