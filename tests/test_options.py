"""Options are declared once; what is wrong is said by name, limit and value."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError

from bdbench.errors import NEVER_SUGGESTED, OptionError, did_you_mean, unknown_name
from bdbench.options import Options, describe_options
from bdbench.registry import ATTACKS, DEFENSES, DETECTOR_NAMES, DETECTORS, OTHER_NAMES, REGISTRIES
from bdbench.training.recipe import Recipe
from bdbench.wording import counted, listed


class Soup(Options):
    """Options of an example."""

    spoons: int = Field(2, ge=1, le=9, description="How many.")
    heat: float = Field(0.5, gt=0, description="How hot.")
    kind: Literal["clear", "thick"] = Field("clear", description="Which.")
    colour: tuple[int, int, int] | None = Field(None, description="RGB.")
    salted: bool = Field(True, description="With salt.")


def message_of(**values: object) -> str:
    with pytest.raises(OptionError) as caught:
        Soup.parse(values)
    return str(caught.value)


def test_what_is_left_out_has_its_default() -> None:
    assert Soup.parse({"heat": 0.7}).model_dump() == {
        "spoons": 2, "heat": 0.7, "kind": "clear", "colour": None, "salted": True,
    }  # fmt: skip


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_a_number_is_finite(value: str) -> None:
    assert "heat" in message_of(heat=value)
    assert "finite" in message_of(heat=value)


def test_text_from_a_command_line_becomes_the_declared_type() -> None:
    soup = Soup.parse({"spoons": "3", "heat": "1e-2", "salted": "false", "colour": ["1", "2", "3"]})
    assert (soup.spoons, soup.heat, soup.salted, soup.colour) == (3, 0.01, False, (1, 2, 3))


def test_an_unknown_option_is_answered_with_the_nearest_and_all_names() -> None:
    message = message_of(spoon=3)
    assert "unknown option 'spoon'. Did you mean 'spoons'?" in message
    assert "colour, heat, kind, salted, spoons" in message


def test_a_name_far_from_all_gets_no_guess() -> None:
    assert "Did you mean" not in message_of(zzzzzz=3)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"spoons": 0}, ("spoons", "0", "must be at least 1")),
        ({"spoons": 10}, ("spoons", "10", "must be at most 9")),
        ({"heat": 0.0}, ("heat", "0.0", "greater than 0")),
        ({"kind": "solid"}, ("kind", "'solid'", "'clear' or 'thick'")),
        ({"spoons": "many"}, ("spoons", "'many'", "a whole number")),
        ({"spoons": 1.5}, ("spoons", "1.5", "a whole number")),
    ],
)
def test_a_wrong_value_is_answered_with_option_value_and_limit(
    values: dict[str, object], parts: tuple[str, ...]
) -> None:
    message = message_of(**values)
    assert all(part in message for part in parts), message


def test_two_wrong_values_are_both_named() -> None:
    message = message_of(spoons=0, heat=-1)
    assert "spoons 0" in message
    assert "heat -1" in message


def test_options_cannot_be_changed_once_made() -> None:
    with pytest.raises(ValidationError):
        Soup().spoons = 3  # type: ignore[misc]


def test_a_description_has_what_help_needs() -> None:
    spoons, heat, kind, colour, salted = describe_options(Soup)
    assert (spoons.flag, spoons.type_name, spoons.default, spoons.bounds) == (
        "--spoons",
        "int",
        2,
        ">= 1, <= 9",
    )
    assert (heat.bounds, heat.description) == ("> 0", "How hot.")
    assert kind.type_name == "clear | thick"
    assert colour.type_name == "int, int, int | none"
    assert salted.type_name == "bool"


def test_underscores_become_hyphens_in_flags() -> None:
    class Stew(Options):
        cooking_time: int = Field(1, description="Hours.")

    assert describe_options(Stew)[0].flag == "--cooking-time"


def test_the_nearest_name_ignores_case() -> None:
    assert did_you_mean("BadNet", ["badnets", "sig"]) == " Did you mean 'badnets'?"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("wrn", "wrn-16-1"), ("cifra10", "cifar10"), ("abll", "abl"), ("clea", ""),
     ("oracel", ""), ("floor", ""), ("paper", ""), ("z", "")],
)  # fmt: skip
def test_what_is_suggested_is_near_and_never_a_reference_row(typed: str, meant: str) -> None:
    names = [name for registry in REGISTRIES.values() for name in registry.names()]
    assert did_you_mean(typed, names) == (f" Did you mean '{meant}'?" if meant else "")


def test_reference_rows_are_those_that_read_the_truth() -> None:
    assert {name for name in DEFENSES.names() if DEFENSES.load(name).needs_truth} == NEVER_SUGGESTED


def test_a_detector_that_is_asked_for_as_a_defense_is_called_so() -> None:
    for typed, meant in (("spectral", "spectral"), ("AC", "ac"), ("activation-clustering", "ac")):
        with pytest.raises(OptionError, match=f"'{typed}' is a detector, not a defense; .* scan --method {meant}$"):
            DEFENSES.load(typed)
    assert not {*DETECTORS.names(), *DETECTOR_NAMES} & set(DEFENSES.names())


def test_a_name_that_others_use_leads_to_ours() -> None:
    with pytest.raises(OptionError, match="defense 'FP' is called fine-pruning here"):
        DEFENSES.load("FP")
    assert not set(OTHER_NAMES) & set(DEFENSES.names())


def test_an_option_of_another_method_names_its_owners() -> None:
    with pytest.raises(OptionError, match=r"^alpha belongs to blended, .* and lc \(you chose badnets\)$"):
        ATTACKS.check_options("badnets", {"rate": 0.1, "alpha": 3})
    with pytest.raises(OptionError, match=r"^twin_epochs belongs to cbd \(you chose abl\)$"):
        DEFENSES.check_options("abl", {"epochs": 1, "twin_epochs": 3}, {"epochs"})
    ATTACKS.check_options("badnets", {"nobody_has_it": 3})  # left to the method's own check


def test_counts_and_lists_are_words() -> None:
    assert [counted(number, noun) for number, noun in ((1, "class"), (2, "class"), (1234, "image"), (0, "file"))] == [
        "1 class", "2 classes", "1,234 images", "0 files"
    ]  # fmt: skip
    assert [listed(list(names)) for names in ("", "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]


def test_an_unknown_name_lists_all_in_order() -> None:
    assert str(unknown_name("attack", "qqq", ["wanet", "abc"])) == "unknown attack 'qqq'. Known: abc, wanet"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lr": 1e300}, "too large"),
        ({"weight_decay": 1e39}, "too large"),
        ({"milestones": (0.9, 0.1)}, "must not fall"),
        ({"warmup": 12.0}, "less than the 12 epochs"),
        ({"epochs": 10**11}, "at most 1000000"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Recipe.parse(values)


@pytest.mark.parametrize("name", ["torchvision:../../x", "torchvision:a/b", "torchvision:a b"])
def test_a_name_of_a_family_that_is_a_path_is_refused(name: str) -> None:
    from bdbench.registry import MODELS

    with pytest.raises(OptionError, match="names no model of torchvision"):
        MODELS.load(name)
