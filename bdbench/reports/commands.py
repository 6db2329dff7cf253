"""From manifests to the commands that make the artifacts again, with the options that differ from the defaults."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any, cast

from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.kinds import EvaluationArtifact
from bdbench.artifacts.made import plain
from bdbench.artifacts.manifests import Manifest
from bdbench.artifacts.model import ModelArtifact
from bdbench.attacks.base import Attack
from bdbench.datasets.base import Source
from bdbench.errors import OptionError
from bdbench.protocol import budget, networks
from bdbench.registry import ATTACKS, DATASETS

FOLDER = "again"
"""Where the commands write, so that they make things again instead of finding them."""


def poison_command(data: DatasetArtifact) -> str:
    """Return the command that makes a dataset."""
    asked = data.manifest.ask
    if data.is_taken:
        _, dataset, *options = _source(data)
        if "--test-fraction" not in options:  # `take` has another default
            options += ["--test-fraction", str(Source.model_fields["test_fraction"].default)]
        return _line(["bdbench", "take", dataset, *options, "--out", _place(data.path.name)])
    config = dict(asked.config)
    trusted: dict[str, Any] = {name: config.pop(name) for name in ("trusted", "trusted_per_class") if name in config}
    config.pop("dataset", None)
    words = ["bdbench", "poison", *_source(data), "--attack", asked.method]
    words += [*_flags(trusted), *(["--seed", str(asked.seed)] if asked.seed else [])]

    def complete(options: Mapping[str, Any]) -> dict[str, Any]:
        attack = cast("type[Attack]", ATTACKS.load(asked.method)).parse(options)
        return cast("dict[str, Any]", plain(attack.model_dump()))

    return _line([*words, *_flags(_differing(config, complete)), "--out", _place(data.path.name)])


def _source(data: DatasetArtifact) -> list[str]:
    """Return the flags of a source, by the name or the path that was given.

    0.1 did not store which of the two it was: its datasets get words that no command takes for either.
    """
    facts = data.manifest.facts
    if "origin" in facts:
        return ["--dataset", facts["origin"]["dataset"], *_flags(facts["origin"]["options"])]
    options = facts.get("source_options", {})
    if facts.get("given"):
        (dataset,) = facts["given"].values()
        return ["--dataset", dataset, *_flags(options)]
    # The name of a part of a source ends with how many images were kept.
    name = facts["name"].removesuffix(f"-{options.get('images')}")
    dataset = f"{name} or path/to/{name}" if name in DATASETS.rows else f"path/to/{name}"
    return ["--dataset", dataset, *_flags(options)]


def model_command(model: ModelArtifact, data: DatasetArtifact, suspect: str | None = None) -> str | None:
    """Return the command that trains a model, or None where making the dataset makes it too.

    Args:
        model: what to make.
        data: the dataset it was trained on.
        suspect: folder name of the undefended model that it mends, if it mends one.
    """
    asked = model.manifest.ask
    if asked.method == "victim":
        return None
    config = dict(asked.config)
    name, preset = config.pop("model"), config.pop("preset")
    words = ["bdbench", *(["train"] if asked.method == "none" else ["defend"]), _place(data.path.name)]
    words += [] if asked.method == "none" else ["--method", asked.method]
    words += ["--model", name] if name != networks.model_name("auto", data.image_shape) and suspect is None else []
    words += ["--preset", preset] if preset != _usual_preset(asked.method, data) else []
    words += ["--suspect", _place(suspect)] if suspect is not None else []
    words += ["--seed", str(asked.seed)] if asked.seed != data.manifest.ask.seed else []

    def complete(options: Mapping[str, Any]) -> dict[str, Any]:
        _, defense, recipe = budget.resolve_budget(asked.method, preset, options, data)
        return {**plain(recipe.model_dump()), **plain(defense.model_dump())}

    options = _flags(_differing(config, complete))
    return _line([*words, *options, *_arithmetic(model.manifest), "--out", _place(model.path.name)])


def evaluate_command(model: ModelArtifact, evaluation: EvaluationArtifact | None) -> str:
    """Return the command that judges a model."""
    words = ["bdbench", "evaluate", _place(model.path.name)]
    return _line([*words, *(_arithmetic(evaluation.manifest) if evaluation else [])])


def _arithmetic(manifest: Manifest) -> list[str]:
    """Return the precision that was used, whose default depends on the machine, and whether networks were compiled."""
    return ["--precision", str(manifest.made["precision"]), *(["--compile"] if manifest.made.get("compiled") else [])]


def _usual_preset(method: str, data: DatasetArtifact) -> str | None:
    try:
        return budget.resolve_budget(method, "auto", {}, data)[0]
    except OptionError:
        return None


def _differing(config: Mapping[str, Any], complete: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Return the settings that have to be given to get `config`; all of them where the method is not installed.

    Args:
        config: every setting with its value.
        complete: from given settings to all of them.
    """
    everything = {name: value for name, value in config.items() if value is not None}
    try:
        usual = complete({})
        given = {name: value for name, value in everything.items() if value != usual.get(name)}
        return given if complete(given) == dict(config) else everything
    except OptionError:
        return everything


def _flags(options: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(str(part) for part in (value if isinstance(value, list) else [value]))]
    return words


def _place(name: str) -> str:
    return f"{FOLDER}/{name}"


def _line(words: list[str]) -> str:
    return shlex.join(words)
