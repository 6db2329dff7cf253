"""The budget of a run: the preset first, then what the user gave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.made import plain
from bdbench.defenses.base import Defense
from bdbench.errors import OptionError, did_you_mean, unknown_name
from bdbench.options import Options
from bdbench.protocol.networks import TINY_SIDE
from bdbench.registry import DEFENSES
from bdbench.training.augment import parse_augment
from bdbench.training.recipe import Recipe
from bdbench.wording import respelled

TINY_IMAGES = 10_000


def resolve_budget(
    method: str, preset: str, options: Mapping[str, Any], data: DatasetArtifact
) -> tuple[str, Defense, Recipe]:
    """Return the preset's name, the defense and the recipe: preset first, then what the user gave.

    Raises:
        OptionError: unknown method, preset or option, or a value out of bounds.
    """
    cls = cast("type[Defense]", DEFENSES.load(method))
    if preset == "auto":
        preset = usual_preset(data)
    check_preset(method, preset, cls)
    DEFENSES.check_options(method, options, Recipe.model_fields)
    recipe_values, method_values = split_options({**cls.presets[preset], **options}, cls)
    recipe = Recipe.parse(recipe_values)
    if recipe.augment == "auto":
        recipe = recipe.model_copy(update={"augment": data.manifest.facts["augment"]})
    parse_augment(recipe.augment)
    return preset, cls.parse(method_values), recipe


def usual_preset(data: DatasetArtifact) -> str:
    """Return the budget that suits a dataset: tiny for small sets of tiny images, else fast."""
    small = data.manifest.facts["counts"]["train"] < TINY_IMAGES and max(data.image_shape[1:]) <= TINY_SIDE
    return "tiny" if small else "fast"


def usual_settings(method: str, preset: str, data: DatasetArtifact) -> dict[str, Any]:
    """Return all options of a preset as they are where the user gives none, as JSON values."""
    _, defense, recipe = resolve_budget(method, preset, {}, data)
    return settings_of(recipe, defense)


def check_preset(method: str, preset: str, cls: type[Defense]) -> None:
    """Refuse a preset that a method has not.

    Raises:
        OptionError: names those that it has.
    """
    if preset not in cls.presets:
        has, near = ", ".join(cls.presets), did_you_mean(preset, cls.presets)
        raise OptionError(f"--preset {preset}: '{method}' has the presets {has}{near and '.' + near}")


def settings_of(recipe: Recipe, defense: Defense) -> dict[str, Any]:
    """Return all options of a run as JSON values."""
    return {**plain(recipe.model_dump()), **plain(defense.model_dump())}


def split_options(values: Mapping[str, Any], cls: type[Options]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split values into those of `Recipe` and those of the method.

    Raises:
        OptionError: a name that neither has.
    """
    known = {*Recipe.model_fields, *cls.model_fields}
    values = {respelled(name, known): value for name, value in values.items()}
    for name in values:
        if name not in known:
            raise unknown_name("option", name, known)
    recipe = {name: value for name, value in values.items() if name in Recipe.model_fields}
    return recipe, {name: value for name, value in values.items() if name not in recipe}
