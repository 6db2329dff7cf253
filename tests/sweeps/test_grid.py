"""Grids: what a file means, and what is said of one that means nothing."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from bdbench.errors import OptionError
from bdbench.sweeps.grid import EXAMPLE, Cell, Grid, parse_seeds, read_grid


def grid_of(tmp_path: Path, text: str) -> Grid:
    path = tmp_path / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return read_grid(path)


def test_an_empty_file_is_all_defenses_on_digits_and_badnets(tmp_path: Path) -> None:
    cells = grid_of(tmp_path, "").cells
    assert [cell.defense for cell in cells] == ["none", "oracle", "cbd", "abl", "dbd", "mcldef"]
    assert {cell[:3] + cell[4:] for cell in cells} == {("digits", "badnets", "auto", 0)}


def test_the_example_is_a_grid_with_all_its_comments_taken_away_too(tmp_path: Path) -> None:
    assert len(grid_of(tmp_path, EXAMPLE).cells) == 36
    bare = "\n".join(line.removeprefix("# ") for line in EXAMPLE.splitlines()[2:])
    keys = tomllib.loads(bare)
    assert {"recipe", "dataset", "attack", "defense", "exclude", "include"} <= keys.keys()


def test_cells_are_the_product_in_an_order_that_shares_data_sets_and_trains_undefended_models_first(
    tmp_path: Path,
) -> None:
    grid = grid_of(
        tmp_path, 'seeds = [1, 0]\nattacks = ["sig", "badnets"]\ndefenses = ["abl", "none"]\nmodels = ["wrn-16-1"]\n'
    )
    names = [grid.name(cell) for cell in grid.cells]
    assert names == [
        f"digits-{attack}-s{seed}-wrn-16-1-{defense}"
        for seed in (0, 1)
        for attack in ("badnets", "sig")
        for defense in ("none", "abl")
    ]


LABELS = """
attacks = ["badnets", "rare"]
defenses = ["none", "long"]
preset = "tiny"

[recipe]
batch-size = 16

[dataset.digits]
image_size = 16

[attack.rare]
use = "badnets"
rate = 0.01

[defense.long]
use = "abl"
preset = "paper"
isolation-rate = 0.02
"""


def test_a_label_stands_for_a_name_with_options(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, LABELS)
    cell = Cell("digits", "rare", "auto", "long", 0)
    assert cell in grid.cells
    assert grid.settings(cell) == {
        "dataset": "digits", "source_options": {"image_size": 16}, "attack": "badnets",
        "attack_options": {"rate": 0.01}, "trusted": 0.05, "model": "auto", "method": "abl",
        "options": {"batch_size": 16, "isolation_rate": 0.02}, "preset": "paper", "seed": 0,
    }  # fmt: skip
    plain = grid.settings(cell._replace(attack="badnets", defense="none"))
    assert (plain["attack_options"], plain["options"], plain["preset"]) == ({}, {"batch_size": 16}, "tiny")


def test_the_undefended_cell_is_the_grids_own_or_none(tmp_path: Path) -> None:
    own = grid_of(tmp_path, 'defenses = ["plain", "mcldef"]\n[defense.plain]\nuse = "none"\nepochs = 3\n')
    assert own.undefended(own.cells[1]).defense == "plain"
    without = grid_of(tmp_path, 'defenses = ["mcldef"]\n')
    base = without.undefended(without.cells[0])
    assert without.name(base) == "digits-badnets-s0-none"
    assert without.settings(base)["method"] == "none"


def test_a_path_needs_a_label_and_takes_one(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"line 1: 'photos/x' cannot name a folder.*\[dataset\.LABEL\]"):
        grid_of(tmp_path, 'datasets = ["photos/x"]\n')
    grid = grid_of(tmp_path, 'datasets = ["mine"]\ndefenses = ["none"]\n[dataset.mine]\nuse = "photos/x"\n')
    assert grid.settings(grid.cells[0])["dataset"] == "photos/x"


RULES = """
attacks = ["badnets", "sig"]
defenses = ["none", "abl", "cbd"]

[[exclude]]
attack = "sig"
defense = ["abl", "cbd"]

[[include]]
attack = "wanet"
defense = "none"
seed = [3, 4]
"""


def test_an_exclude_of_a_seed_of_the_file_holds_where_other_seeds_are_given(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text('seeds = [0, 1]\ndefenses = ["none", "abl"]\n[[exclude]]\ndefense = "abl"\nseed = 1\n')
    assert [(cell.seed, cell.defense) for cell in read_grid(path, [0, 2]).cells] == [
        (0, "none"), (0, "abl"), (2, "none"), (2, "abl"),
    ]  # fmt: skip
    assert [cell.defense for cell in read_grid(path, [1]).cells] == ["none"]
    path.write_text("seeds = [0, 1]\n[[exclude]]\nseed = 3\n")
    with pytest.raises(OptionError, match="matches no run"):
        read_grid(path, [0])
    assert all(cell.seed == 4 for cell in read_grid(path, [3, 4]).cells)


def test_a_grid_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text('defenses = ["none"]\n', encoding="utf-8-sig")
    assert [cell.defense for cell in read_grid(path, [1]).cells] == ["none"]


def test_excludes_take_out_and_includes_add(tmp_path: Path) -> None:
    found = {(cell.attack, cell.defense, cell.seed) for cell in grid_of(tmp_path, RULES).cells}
    product = {("badnets", defense, 0) for defense in ("none", "abl", "cbd")} | {("sig", "none", 0)}
    assert found == product | {("wanet", "none", 3), ("wanet", "none", 4)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('seeds = [0]\nattacks = ["badnet"]\n', r"line 2: unknown attack 'badnet'\. Did you mean 'badnets'\?"),
        ('defenses = ["none", "ablx"]\n', r"line 1: unknown defense 'ablx'\. Did you mean 'abl'\?"),
        ('models = ["wrn"]\n', r"line 1: unknown model 'wrn'"),
        ('models = ["resnet50"]\n', r"named as in 'torchvision:resnet50'"),
        ('models = ["torchvision"]\n', r"line 1: unknown model 'torchvision'\. Did you mean 'torchvision:NAME'\?"),
        ('datasets = ["cifar"]\n', r"line 1: unknown dataset 'cifar'\. Did you mean 'cifar1"),
        ('\nsead = [0]\n', r"line 2: unknown key 'sead'\. Did you mean 'seeds'\?"),
        ("seeds = [-1]\n", "line 1: seeds must not be negative"),
        ("seeds = [true]\n", "line 1: `seeds` must be a list of whole numbers"),
        ('seeds = "0"\n', "line 1: `seeds` must be a list"),
        ("attacks = []\n", "has no run"),
        ("preset = 3\n", "line 1: `preset` cannot be 3"),
        ("[attack.sig]\nrate = 0.1\n", r"line 1: \[attack\.sig\] belongs to no run"),
        ('[[exclude]]\nattack = "sig"\n', r"line 1: \[\[exclude\]\] number 1 matches no run"),
        ("[[exclude]]\n", "number 1 is empty"),
        ('[[exclude]]\nattack = "badnets"\n', "has no run"),
        ('[[exclude]]\ndefens = "abl"\n', r"line 2: unknown key of .*'defens'\. Did you mean 'defense'"),
        (
            '[[exclude]]\ndefense = "abl"\n[[include]]\ndefense = "abl"\nseed = 4\n',
            r"line 3: \[\[include\]\] number 1 names a run that an \[\[exclude\]\] takes out",
        ),
        ("[[include]]\nattack = 5\n", r"line 1: `attack` of \[\[include\]\] must be a list of names"),
        ('[[include]]\nseed = ["x"]\n', r"line 1: `seed` of \[\[include\]\] must be a list of whole numbers"),
        ("[[include]]\nseed = 3\n[[include]]\nseed = -1\n", "line 3: seeds must not be negative"),
        ("[[exclude]]\nattack = [true]\n", r"line 1: `attack` of \[\[exclude\]\] must be a list of names"),
        ("seeds = [0\n", "is not TOML"),
        ("[recipe]\nepochs = 1979-05-27\n", "`epochs` cannot be 1979-05-27: no option is a date or a time"),
        ("seeds = [[{a = 07:32:00}]]\n", "`a` cannot be 07:32:00"),
        ('attacks = ["low"]\n[attack.low]\nuse = "badnetz"\n', r"line 3: unknown attack 'badnetz'"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused_with_file_line_and_way_out(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        grid_of(tmp_path, text)
    assert str(tmp_path / "grid.toml") in str(caught.value)


ALIKE = """
defenses = ["none", "{label}"]
models = ["auto", "convnet"]
[defense."{label}"]
use = "none"
"""


@pytest.mark.parametrize(
    ("text", "folder", "label"),
    [
        (ALIKE.format(label="convnet-none"), "digits-badnets-s0-convnet-none", "convnet-none"),
        (ALIKE.format(label="none-eval"), "digits-badnets-s0-none-eval", "none-eval"),
        (ALIKE.format(label="victim"), "digits-badnets-s0-victim", "victim"),
        (
            'datasets = ["a", "a-b"]\nattacks = ["sig", "b-sig"]\ndataset.a.use = "digits"\n'
            'dataset.a-b.use = "digits"\nattack.b-sig.use = "sig"\n', "a-b-sig-s0", "b-sig",
        ),
    ],
)  # fmt: skip
def test_two_things_that_would_lie_in_one_folder_are_refused(
    tmp_path: Path, text: str, folder: str, label: str
) -> None:
    message = rf"one folder, {folder}; choose another label in place of '{label}'"
    with pytest.raises(OptionError, match=message):
        grid_of(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [3]), ("0-4", [0, 1, 2, 3, 4]), ("0, 2,5-7", [0, 2, 5, 6, 7]), ("4-4,4", [4])]
)
def test_seeds_are_a_list_with_ranges_in_place_of_the_files(tmp_path: Path, text: str, seeds: list[int]) -> None:
    grid = grid_of(tmp_path, 'seeds = [9]\ndefenses = ["none"]\n')
    grid = read_grid(grid.path, parse_seeds(text))
    assert [cell.seed for cell in grid.cells] == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "0-", "1,,2", "1.5", "0-2-4"])
def test_seeds_that_are_no_list_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"must be whole numbers and ranges, such as 0-4"):
        parse_seeds(text)


def test_a_missing_file_names_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot read .*bdbench sweep --init"):
        read_grid(tmp_path / "grid.toml")


def test_ten_thousand_cells_have_ten_thousand_names(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, f'seeds = {list(range(1000))}\ndefenses = ["none", "abl"]\n'
                   'attacks = ["badnets", "blended", "sig", "wanet", "trojan"]\n')  # fmt: skip
    assert len({grid.name(cell) for cell in grid.cells}) == 10_000


# no poison, and trusted images per class


def test_a_grid_may_have_cells_without_poison_and_trusted_images_of_every_class(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text('attacks = ["badnets", "none"]\ndefenses = ["none"]\ntrusted_per_class = 5\n')
    grid = read_grid(path)
    assert [grid.name(cell) for cell in grid.cells] == ["digits-badnets-s0-none", "digits-none-s0-none"]
    settings = grid.settings(grid.cells[1])
    assert (settings["attack"], settings["trusted"], settings["trusted_per_class"]) == ("none", None, 5)


def test_settings_of_a_share_say_nothing_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text("trusted = 0.1\n")
    settings = read_grid(path).settings(read_grid(path).cells[0])
    assert settings["trusted"] == 0.1
    assert "trusted_per_class" not in settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trusted = 0.1\ntrusted_per_class = 5", "line 1: `trusted` is a share, `trusted_per_class` a count"),
        ("trusted_per_class = 0", "line 1: `trusted_per_class` 0 must be at least 1"),
        ("trusted_per_class = 0.1", "line 1: `trusted_per_class` cannot be 0.1"),
    ],
)
def test_trusted_images_that_cannot_be_name_their_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    with pytest.raises(OptionError, match=said):
        read_grid(path)


@pytest.mark.parametrize("value", ["nan", "inf", "-0.1", "1", "1" + "0" * 400])
def test_the_trusted_share_of_a_grid_is_a_share(tmp_path: Path, value: str) -> None:
    (tmp_path / "grid.toml").write_text(f"trusted = {value}\n")
    with pytest.raises(OptionError, match=r"grid\.toml.*`trusted` cannot be"):
        read_grid(tmp_path / "grid.toml")
