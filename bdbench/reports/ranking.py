"""Do defenses differ over attacks? Average ranks, Friedman's test and Nemenyi's critical difference.

Source: Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 2006.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bdbench.protocol.metric_list import MIN_BA
from bdbench.reports.results import UNDEFENDED

METRICS = {"der": True, "ba": True, "asr": False}
"""What defenses can be ranked by, and whether more is better."""


class Ranked(NamedTuple):
    """A defense with one of its presets.

    Attributes:
        defense, preset: which.
        rank: average rank, where 1 is the best of all in every block.
        mean: of the metric, as it was measured.
        lost: in how many blocks it came last because of its BA.
    """

    defense: str
    preset: str
    rank: float
    mean: float
    lost: int


class Ranking(NamedTuple):
    """Defenses in the order of their average ranks.

    Attributes:
        metric: what was ranked.
        defenses: best first.
        blocks: how many settings (dataset, model, attack) had a value of every defense.
        statistic, p: Friedman's; nan below 3 defenses or 2 blocks.
        critical_difference: ranks further apart than this differ at the 5 % level; nan likewise.
        failed: settings whose attack failed undefended; incomplete: settings that lack a defense. Both are left out.
        min_ba: share of the undefended model's BA that a defense has to keep.
        lost: defenses and settings where it keeps less: (defense, setting).
    """

    metric: str
    defenses: tuple[Ranked, ...]
    blocks: int
    statistic: float
    p: float
    critical_difference: float
    failed: tuple[str, ...]
    incomplete: tuple[str, ...]
    min_ba: float
    lost: tuple[tuple[str, str], ...]


def rank(rows: Sequence[dict[str, Any]], metric: str = "der", min_ba: float = MIN_BA) -> Ranking:
    """Rank the defenses of rows over seeds.

    A block is a dataset, a model and an attack with its options. Equal values share a rank. Undefended and reference
    rows are not ranked, and rows without poison only by BA. By DER and ASR, defenses that keep too little BA share the
    last rank of a block: a model that answers nothing right has no ASR, and a DER above that of one left as it was.

    Args:
        rows: from `bdbench.reports.results.merge`.
        metric: der, ba or asr.
        min_ba: share of the undefended model's BA that a defense has to keep, both means over seeds; 0 for no bound.
    """
    blocks: dict[str, dict[tuple[str, str], float]] = {}
    names: dict[str, str] = {}
    failed: set[str] = set()
    ruined: set[tuple[str, tuple[str, str]]] = set()
    for row in rows:
        if row["defense"].split()[0] in UNDEFENDED or "r" in row["marks"] or ("0" in row["marks"] and metric != "ba"):
            continue
        block = json.dumps([row[key] for key in ("dataset", "model", "attack", "attack_options")], sort_keys=True)
        names[block] = f"{row['dataset']}, {row['model']}, {row['attack']}"
        if {"w", "?"} & set(row["marks"]):
            failed.add(block)
        elif row[metric] is not None:
            blocks.setdefault(block, {})[row["defense"], row["preset"]] = row[metric]
            if metric != "ba" and _has_lost(row, min_ba):
                ruined.add((block, (row["defense"], row["preset"])))
    defenses = sorted({name for values in blocks.values() for name in values})
    whole = {block: values for block, values in blocks.items() if len(values) == len(defenses)}
    table_BK = np.array([[values[name] for name in defenses] for values in whole.values()], dtype=float)
    lost_BK = np.array([[(block, name) in ruined for name in defenses] for block in whole], dtype=bool)
    worst_BK = np.where(lost_BK, math.inf, -table_BK if METRICS[metric] else table_BK) if whole else table_BK
    ranks_BK = _ranks(worst_BK) if whole else np.zeros((0, len(defenses)))
    lost = lost_BK.sum(0) if whole else np.zeros(len(defenses), dtype=int)
    means = table_BK.mean(0) if whole else np.full(len(defenses), math.nan)
    average = ranks_BK.mean(0) if whole else np.full(len(defenses), math.nan)
    order = np.argsort(average, kind="stable")
    statistic, p, difference = _test(ranks_BK)
    return Ranking(
        metric,
        tuple(
            Ranked(defense, preset, float(average[place]), float(means[place]), int(lost[place]))
            for place, (defense, preset) in ((place, defenses[place]) for place in order)
        ),
        len(whole),
        statistic,
        p,
        difference,
        tuple(sorted(names[block] for block in failed)),
        tuple(sorted(names[block] for block in blocks.keys() - whole.keys())),
        min_ba if metric != "ba" else 0.0,
        tuple(sorted((name[0], names[block]) for block, name in ruined if block in whole)),
    )


def _has_lost(row: dict[str, Any], min_ba: float) -> bool:
    """Say whether a row over seeds keeps less than this share of the undefended model's BA."""
    return row["ba_change"] is not None and bool(row["ba"] < min_ba * (row["ba"] - row["ba_change"]))


def _ranks(values_BK: np.ndarray) -> np.ndarray:
    """Return ranks from 1 within each row; equal values share the mean of theirs."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(values_BK, axis=1), dtype=float)


def _test(ranks_BK: np.ndarray) -> tuple[float, float, float]:
    """Return Friedman's statistic and p, and Nemenyi's critical difference at 5 %."""
    from scipy.stats import friedmanchisquare, studentized_range

    blocks, count = ranks_BK.shape
    if blocks < 2 or count < 3:
        return math.nan, math.nan, math.nan
    statistic, p = friedmanchisquare(*ranks_BK.T)
    quantile = studentized_range.ppf(0.95, count, math.inf) / math.sqrt(2)
    return float(statistic), float(p), float(quantile * math.sqrt(count * (count + 1) / (6 * blocks)))
