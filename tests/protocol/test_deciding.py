"""Decisions: p-values by hand, what each rule takes, and how often a clean sample is taken."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bdbench.detectors.base import ClassEvidence, Scanned
from bdbench.errors import OptionError
from bdbench.protocol.deciding import (
    Null,
    Rule,
    benjamini_hochberg,
    clopper_pearson_high,
    conformal,
    decide,
    parse_rule,
    usual_rule,
)
from bdbench.seeds import generator


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=generator(seed, "normal"))


def null_of(scores: Tensor, label: int = 0) -> Null:
    return Null(scores, torch.full((len(scores),), label))


def taken(rule: str, scanned: Scanned, labels: Tensor | None = None, null: Null | None = None) -> Tensor:
    labels = torch.zeros(len(scanned.scores), dtype=torch.int64) if labels is None else labels
    aside = decide(parse_rule(rule), scanned, labels, null).set_aside
    assert aside is not None
    return aside


def test_p_values_count_the_null_that_scores_as_high_and_are_never_zero() -> None:
    assert conformal(torch.tensor([0.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0])).tolist() == [1.0, 0.75, 0.25]


def test_p_values_of_clean_samples_are_uniform() -> None:
    found = conformal(normal(4000), normal(999, seed=1))
    for level in (0.01, 0.05, 0.2, 0.5):
        assert float((found <= level).double().mean()) == pytest.approx(level, abs=4 * math.sqrt(level / 999))


def test_benjamini_hochberg_by_hand() -> None:
    p = torch.tensor([0.001, 0.008, 0.039, 0.041, 0.9], dtype=torch.float64)
    assert benjamini_hochberg(p, 0.05) == pytest.approx(0.008)
    assert benjamini_hochberg(torch.tensor([0.5, 0.9], dtype=torch.float64), 0.05) == 0.0


def test_an_alarm_rate_takes_that_share_of_clean_samples() -> None:
    aside = taken("alarm:0.05", Scanned(normal(4000)), null=null_of(normal(1999, seed=1)))
    assert float(aside.double().mean()) == pytest.approx(0.05, abs=0.02)


def test_a_false_discovery_rate_takes_poison_and_of_clean_sets_nearly_always_nothing() -> None:
    scores = normal(2000)
    scores[:200] += 8
    aside = taken("fdr:0.1", Scanned(scores), null=null_of(normal(500, seed=1)))
    assert int(aside[:200].sum()) == 200
    assert int(aside[200:].sum()) <= 40
    clean = [
        int(taken("fdr:0.1", Scanned(normal(500, seed=n)), null=null_of(normal(200, seed=99 + n))).sum())
        for n in range(40)
    ]
    assert sum(count > 0 for count in clean) <= 9


def test_a_budget_takes_the_most_suspect_share_and_needs_nothing() -> None:
    scores = torch.arange(100.0)
    assert torch.nonzero(taken("budget:0.05", Scanned(scores))).flatten().tolist() == [95, 96, 97, 98, 99]


def test_classes_that_do_not_stand_out_are_left_alone_but_by_a_budget() -> None:
    scores, labels = torch.full((10,), 5.0), torch.arange(10) % 2
    evidence = (ClassEvidence(0, 1.0, 0.0, 1.0), ClassEvidence(1, 9.0, 8.0, 0.01))
    scanned, null = Scanned(scores, torch.ones(10, dtype=torch.bool), evidence), null_of(torch.zeros(200))
    for rule in ("alarm:0.05", "fdr:0.1", "native"):
        assert torch.equal(taken(rule, scanned, labels, null), labels == 1)
    assert int(taken("budget:0.5", scanned, labels, null).sum()) == 5


def test_the_share_that_is_poisoned_at_least_is_below_what_was_taken() -> None:
    scores = normal(2000)
    scores[:200] += 8
    facts = decide(
        parse_rule("fdr:0.1"), Scanned(scores), torch.zeros(2000, dtype=torch.int64), null_of(normal(500, seed=1))
    ).facts
    assert 0.03 < facts["at_least"] < facts["flagged"] / 2000
    assert facts["null"] == 500
    assert facts["smallest_share"] == pytest.approx(1 / 50.1, rel=1e-4)


def test_an_exact_upper_limit_by_hand() -> None:
    assert clopper_pearson_high(0, 100) == pytest.approx(1 - 0.025 ** (1 / 100))
    assert clopper_pearson_high(100, 100) == 1.0


def test_the_usual_rule_is_calibrated_where_that_is_possible() -> None:
    own = Scanned(normal(5), torch.zeros(5, dtype=torch.bool))
    assert str(usual_rule(True, own)) == "fdr:0.1"
    assert usual_rule(False, own) == Rule("native")
    assert usual_rule(False, Scanned(normal(5))) == Rule("none")
    assert decide(Rule("none"), own, torch.zeros(5, dtype=torch.int64), None).set_aside is None


@pytest.mark.parametrize("text", ["", "fdr", "fdr:0", "fdr:1", "budget:x", "alarm:nan", "native:0.1", "maybe"])
def test_rules_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--decide"):
        parse_rule(text)


def test_rules_that_need_what_is_not_there_are_refused_with_the_way_out() -> None:
    scanned, labels = Scanned(normal(5)), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(OptionError, match="--trusted"):
        decide(parse_rule("fdr:0.1"), scanned, labels, None)
    with pytest.raises(OptionError, match="no rule of its own"):
        decide(Rule("native"), scanned, labels, None)
