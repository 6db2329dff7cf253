"""From scores to a decision: which training samples are set aside, and how often a clean one would be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bdbench.detectors.base import ClassEvidence, Scanned
from bdbench.detectors.parts.evidence import flagged
from bdbench.errors import OptionError
from bdbench.protocol.metrics import Rate
from bdbench.seeds import tie_order

SIGNIFICANCE = 0.05
"""Of the evidence for a class, below which samples of it may be set aside."""
USUAL = "fdr:0.1"
FORMS = "none, budget:SHARE, alarm:RATE, fdr:SHARE or native"


class Rule(NamedTuple):
    """How scores become a decision: what, and its number where it has one."""

    name: str
    number: float = 0.0

    def __str__(self) -> str:
        """Return it as it is given on the command line."""
        return f"{self.name}:{self.number:g}" if self.name in ("budget", "alarm", "fdr") else self.name


class Null(NamedTuple):
    """Trusted images that were scored as training samples are: scores (m,) and labels (m,)."""

    scores: Tensor
    labels: Tensor


class Decision(NamedTuple):
    """Which of the N samples are set aside, None where nothing is decided, and what to tell of it."""

    set_aside: Tensor | None
    facts: dict[str, Any]


def parse_rule(text: str) -> Rule:
    """Return the rule that a text such as ``fdr:0.1`` means.

    Raises:
        OptionError: it means none, or its number is outside (0, 1).
    """
    name, _, given = text.strip().partition(":")
    if name in ("none", "native", "auto") and not given:
        return Rule(name)
    try:
        number = float(given)
    except ValueError:
        number = math.nan
    if name not in ("budget", "alarm", "fdr") or not 0 < number < 1:
        raise OptionError(f"--decide {text}: must be {FORMS}, with a number between 0 and 1, such as {USUAL}")
    return Rule(name, number)


def conformal(scores: Tensor, null: Tensor) -> Tensor:
    """Return how often a clean sample scores at least as high, (N,) float64: (1 + how many of the null do) / (m + 1).

    Args:
        scores: (N,).
        null: (m,), the scores of samples that are known to be clean and were treated as all others.
    """
    ordered = null.double().sort().values
    beyond = len(null) - torch.searchsorted(ordered, scores.double(), side="left")
    return (1 + beyond.double()) / (len(null) + 1)


def usual_rule(has_null: bool, scanned: Scanned) -> Rule:
    """Return the rule where none is asked for: what can be calibrated, else the method's own, else none."""
    if has_null:
        return parse_rule(USUAL)
    return Rule("native" if scanned.native is not None else "none")


def decide(rule: Rule, scanned: Scanned, labels: Tensor, null: Null | None) -> Decision:
    """Decide.

    ``budget:S`` takes a share of all samples, a guess. ``alarm:A`` takes what scores higher than all but a share A of
    clean samples: so many of a clean set by design. ``fdr:Q`` is Benjamini and Hochberg's rule: of what it takes, a
    share Q may be clean, and of a clean set it takes nothing with a chance of 1 - Q. ``native`` is the method's own.
    Where the method judges classes, ``alarm``, ``fdr`` and ``native`` take samples of those classes only that stand
    out.

    Args:
        rule: what was asked.
        scanned: of the N samples of the training set.
        labels: (N,) int64.
        null: of the trusted images; None where there are none.

    Raises:
        OptionError: the rule needs trusted images, or an own rule that the method has not.
    """
    count = len(scanned.scores)
    facts: dict[str, Any] = {"decide": str(rule)}
    if rule.name in ("alarm", "fdr") and null is None:
        raise OptionError(
            f"--decide {rule} compares with trusted images, and there are none; make the dataset with `poison "
            "--trusted` or `take --trusted`, or choose --decide budget:SHARE or none"
        )
    if rule.name == "native" and scanned.native is None:
        raise OptionError(f"this method has no rule of its own; --decide must be {FORMS.removesuffix(' or native')}")
    if rule.name == "none":
        return Decision(None, facts)
    aside = torch.zeros(count, dtype=torch.bool)
    if rule.name == "budget":
        order = tie_order(count)
        ranked = order[torch.argsort(scanned.scores[order], descending=True, stable=True)]
        aside[ranked[: max(1, round(rule.number * count))]] = True
    elif rule.name == "native":
        aside = scanned.native.clone() if scanned.native is not None else aside
    elif null is not None:
        count_null, p = len(null.scores), conformal(scanned.scores, null.scores)
        # over all samples: within the classes that stand out p-values are not uniform, since the scores chose these
        limit = rule.number if rule.name == "alarm" else benjamini_hochberg(p, rule.number)
        aside = p <= limit
        own = (conformal(null.scores, null.scores) * (count_null + 1) - 1) / count_null  # each beside the others
        flagged_null = (own <= limit) & gate(scanned.classes, null.labels)
        facts |= {"null": count_null, "null_flagged": int(flagged_null.sum())}
        if rule.name == "fdr":
            facts["smallest_share"] = round(1 / ((count_null + 1) * rule.number), 6)
    if rule.name != "budget":
        aside &= gate(scanned.classes, labels)
    share = Rate(int(aside.sum()), count)
    facts |= {"flagged": share.numerator, "flagged_low": share.interval[0], "flagged_high": share.interval[1]}
    if null is not None and rule.name in ("alarm", "fdr"):
        high = clopper_pearson_high(facts["null_flagged"], len(null.scores))
        facts["at_least"] = round(max(0.0, (share.interval[0] - high) / (1 - high)), 6) if high < 1 else 0.0
    return Decision(aside, facts)


def benjamini_hochberg(p: Tensor, share: float) -> float:
    """Return the largest p-value that is at most share * rank / N, 0 where there is none.

    Source: Benjamini and Hochberg, Controlling the False Discovery Rate, 1995.
    """
    ordered = p.sort().values
    fits = ordered <= share * torch.arange(1, len(p) + 1, dtype=torch.float64) / len(p)
    return float(ordered[fits][-1]) if bool(fits.any()) else 0.0


def gate(classes: Sequence[ClassEvidence], labels: Tensor) -> Tensor:
    """Return which samples (N,) may be set aside: those of classes that stand out; all where no class is judged."""
    if not any(one.p is not None for one in classes):
        return torch.ones(len(labels), dtype=torch.bool)
    return torch.isin(labels, torch.tensor(flagged(classes, SIGNIFICANCE), dtype=torch.int64))


def clopper_pearson_high(hits: int, count: int) -> float:
    """Return the upper end of the exact one-sided 97.5 % interval of a share."""
    from scipy.stats import beta

    return 1.0 if hits >= count else float(beta.ppf(0.975, hits + 1, count - hits))
