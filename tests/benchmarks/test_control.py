"""The no-poison control: what each defense costs where there is nothing to defend against."""

from __future__ import annotations

from typing import Any

import pytest
from toys import TRAINS_NOTHING, toy_data, toy_engine, toy_model, toy_recipe

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task
from bdbench.models.classifier import Classifier
from bdbench.registry import DEFENSES
from bdbench.training.engine import Engine

CLASSES = tuple("abcdefgh")
TRAIN = toy_data(640, 1, 16, classes=CLASSES)
TRUSTED = toy_data(160, 1, 16, seed=2, classes=CLASSES)
TEST = toy_data(400, 1, 16, seed=1, classes=CLASSES)

COST = {"cbd": 0.05, "abl": 0.02, "dbd": 0.1, "mcldef": 0.02, "ft": 0.02, "ft-sam": 0.02}
COST |= {"fst": 0.02, "seam": 0.02, "sft": 0.02, "nft": 0.02}
COST |= {"anp": 0.0, "rnp": 0.03, "ban": 0.01, "awm": 0.02}
COST |= {"i-bau": 0.02, "sau": 0.02, "npd": 0.15}  # the map of npd is one number in this network
COST |= {"clp": 0.0, "ep": 0.0, "bnp": 0.0, "nad": 0.02, "fine-pruning": 0.05}
COST |= {"neural-cleanse": 0.02, "mcr": 0.05, "tsbd": 0.02, "mm-bm": 0.05, "unit": 0.05}
"""The most BA that each may cost on these images."""

OPTIONS: dict[str, dict[str, Any]] = {
    "cbd": {"twin_epochs": 1},
    "abl": {"isolation_epochs": 2, "isolation_rate": 0.02, "unlearn_steps": 30, "unlearn_batch_size": 8},
    "dbd": {"ssl_epochs": 4, "ssl_batch_size": 128, "head_epochs": 20, "steps_per_epoch": 40, "split_by": "class"},
    "mcldef": {"inversion_epochs": 30},
    "ft-sam": {"rho": 0.2},
    "seam": {"forget_share": 1.0},
    "nft": {"steps_per_epoch": 40},
    "awm": {"radius": 10.0},
    "nad": {"teacher_epochs": 3},
    "neural-cleanse": {"inversion_epochs": 30},
    "mcr": {"curve_epochs": 5},
    "tsbd": {"unlearn_lr": 0.01, "unlearn_epochs": 10},
}
FINDS_NOTHING = {"mcldef", "anp", "neural-cleanse"} | TRAINS_NOTHING
"""Methods that cost nothing here because they find nothing."""

RECIPE: dict[str, dict[str, Any]] = {
    "dbd": {"epochs": 4, "lr": 0.01, "augment": "flip"},
    "mcldef": {"epochs": 10, "lr": 0.01, "schedule": "constant"},
    "ft": {"epochs": 5, "lr": 0.01},
    "ft-sam": {"epochs": 5, "lr": 0.01},
    "fst": {"epochs": 30, "lr": 0.05},
    "seam": {"epochs": 40, "lr": 0.01},
    "sft": {"epochs": 20, "lr": 0.5, "momentum": 0.0, "schedule": "constant"},
    "nft": {"epochs": 5, "lr": 0.05, "momentum": 0.95},
    "anp": {"epochs": 2, "lr": 0.2, "weight_decay": 0.0},
    "rnp": {"epochs": 10, "lr": 0.04, "weight_decay": 0.0},
    "ban": {"epochs": 5, "lr": 0.01},
    "awm": {"epochs": 3, "lr": 0.01, "weight_decay": 0.0},
    "i-bau": {"epochs": 2, "lr": 1e-4},
    "sau": {"epochs": 5, "lr": 1e-3},
    "npd": {"epochs": 5, "lr": 0.01},
    "nad": {"epochs": 5, "lr": 0.01},
    "fine-pruning": {"epochs": 5, "lr": 0.01},
    "neural-cleanse": {"epochs": 5, "lr": 0.01},
    "mcr": {"epochs": 5, "lr": 0.01},
    "tsbd": {"epochs": 5, "lr": 0.05},
    "mm-bm": {"epochs": 20, "lr": 0.1},
    "unit": {"epochs": 10, "lr": 0.01},
}


def accuracy(model: Classifier) -> float:
    return float((toy_engine().logits(model, TEST.images).argmax(1) == TEST.labels).float().mean())


def run(method: str, train: ImageDataset, suspect: Classifier | None, engine: Engine) -> Defended:
    recipe = toy_recipe(**({"epochs": 10, "batch_size": 32} | RECIPE.get(method, {})))
    task = Task(train, lambda purpose: toy_model(train, purpose), recipe, engine, trusted=TRUSTED, suspect=suspect)
    defended: Defended = DEFENSES.load(method).parse(OPTIONS.get(method, {})).run(task)
    return defended


@pytest.fixture(scope="module")
def undefended() -> Classifier:
    return run("none", TRAIN, None, toy_engine()).model


def test_every_defense_has_a_stated_cost() -> None:
    plain = {"none", "oracle", "clean", "none-trusted", "retrain"}
    assert COST.keys() == set(DEFENSES.names()) - plain


@pytest.mark.parametrize("method", COST)
def test_on_clean_data_a_defense_costs_no_more_than_stated(method: str, undefended: Classifier) -> None:
    before = accuracy(undefended)
    assert before > 0.95
    defended = run(method, TRAIN, undefended, toy_engine())
    assert accuracy(defended.model) >= before - COST[method]
    assert bool(defended.findings.get("unchanged")) == (method in FINDS_NOTHING)
