"""Grids: datasets x attacks x models x defenses x seeds, from a TOML file to a list of cells. Imports nothing heavy.

    seeds = [0, 1, 2]
    datasets = ["cifar10"]
    attacks = ["badnets", "faint"]
    defenses = ["none", "abl"]

    [attack.faint]
    use = "blended"
    alpha = 0.1

A name in a list is a registered one, or the label of a table with a key `use`; the other keys of the table are options.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from bdbench.errors import OptionError, did_you_mean
from bdbench.limits import CELLS, SEEDS
from bdbench.reading import read_toml
from bdbench.registry import ATTACKS, DATASETS, DEFENSES, MODELS, Registry
from bdbench.wording import respelled

AXES = {"dataset": "datasets", "attack": "attacks", "model": "models", "defense": "defenses", "seed": "seeds"}
"""From an axis to the key of its list."""

DEFAULTS: Mapping[str, Any] = {
    "datasets": ["digits"], "attacks": ["badnets"], "models": ["auto"],
    "defenses": ["none", "oracle", "cbd", "abl", "dbd", "mcldef"], "seeds": [0], "preset": "auto", "trusted": 0.05,
    "trusted_per_class": 0, "differences": False,
}  # fmt: skip
TABLES: Mapping[str, Registry] = {"dataset": DATASETS, "attack": ATTACKS, "defense": DEFENSES}
KEYS = {*DEFAULTS, *TABLES, "recipe", "include", "exclude"}
"""What a file may hold at its top."""
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
WHOLE = re.compile(r"[0-9]{1,18}")

EXAMPLE = """\
# bdbench sweep grid.toml
# Every dataset x attack x model x defense x seed is a cell; what cells share is made once.

seeds = [0, 1, 2]
datasets = ["digits"]              # bdbench list datasets, or the label of a table below
attacks = ["badnets", "blended"]   # bdbench list attacks; "none" poisons nothing
models = ["auto"]                  # bdbench list models
defenses = ["none", "oracle", "cbd", "abl", "dbd", "mcldef"]
preset = "auto"                    # budget: paper, fast, tiny, or auto by the size of the data
trusted = 0.05                     # share of the training split that is reserved, clean
# trusted_per_class = 50           # in its place: so many images of every class
differences = false                # true: datasets store only what differs from the source

# [recipe]                         # for every defense
# epochs = 20

# [dataset.cifar10]                # options of a name, wherever it occurs
# data_root = "data"
# images = 10000                   # a random part of the training split

# [attack.badnets-rare]            # a name of your own for other options
# use = "badnets"
# rate = 0.01

# [defense.abl-paper]
# use = "abl"
# preset = "paper"

# [[exclude]]                      # cells that match all of its keys
# attack = "blended"
# defense = ["cbd", "dbd"]

# [[include]]                      # cells beside the product; what is left out takes the lists' values
# attack = "sig"
# defense = "none"
"""


class Cell(NamedTuple):
    """One model to make and to judge; names are labels of the grid."""

    dataset: str
    attack: str
    model: str
    defense: str
    seed: int


class Named(NamedTuple):
    """What a label stands for: a registered name (or a path) and options."""

    use: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Grid:
    """A grid as it was read.

    Attributes:
        path: the file.
        cells: in the order in which they should run: of what shares a dataset, undefended models first.
        named: from axis and label to what it stands for.
        recipe: options of every defense.
        preset: budget of the defenses that name none.
        trusted, trusted_per_class, differences: see `bdbench.stages.poison`; one of the first two is None.
    """

    path: Path
    cells: tuple[Cell, ...]
    named: Mapping[tuple[str, str], Named]
    recipe: Mapping[str, Any]
    preset: str
    trusted: float | None
    trusted_per_class: int | None
    differences: bool

    def data_name(self, cell: Cell) -> str:
        """Return the folder name of a cell's dataset."""
        return f"{cell.dataset}-{cell.attack}-s{cell.seed}"

    def name(self, cell: Cell) -> str:
        """Return the folder name of a cell's model, which is the cell's own name."""
        model = "" if cell.model == "auto" else f"-{cell.model.replace(':', '.')}"
        return f"{self.data_name(cell)}{model}-{cell.defense}"

    def undefended(self, cell: Cell) -> Cell:
        """Return the undefended cell of a cell's dataset and model: the grid's own, or `none` as it comes."""
        plain = (label for (axis, label), named in self.named.items() if axis == "defense" and named.use == "none")
        return cell._replace(defense=next(plain, "none"))

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Return all that a cell is made from, as JSON values."""
        dataset, attack, defense = (
            self.named.get((axis, getattr(cell, axis)), Named(getattr(cell, axis), {})) for axis in TABLES
        )
        options = {**self.recipe, **defense.options}
        preset = options.pop("preset", self.preset)
        per_class = {} if self.trusted_per_class is None else {"trusted_per_class": self.trusted_per_class}
        return {
            "dataset": dataset.use, "source_options": dict(dataset.options), "attack": attack.use,
            "attack_options": dict(attack.options), "trusted": self.trusted, "model": cell.model,
            "method": defense.use, "options": options, "preset": preset, "seed": cell.seed, **per_class,
        }  # fmt: skip


def read_grid(path: Path, seeds: list[int] | None = None) -> Grid:
    """Read a grid.

    Args:
        path: of the file.
        seeds: in place of the file's list.

    Raises:
        OptionError: unreadable, not TOML, an unknown name or key, an empty product, or an include or exclude that can't
            mean anything; the message has the file, the line and the nearest name.
    """
    text, raw = read_toml(path, "; `bdbench sweep --init` writes an example")
    return _Reader(path, text, raw, seeds).grid()


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of a list with ranges, such as ``0-4,7``.

    Raises:
        OptionError: not such a list, or a range that runs backwards.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (WHOLE.fullmatch(first) and WHOLE.fullmatch(last) and int(first) <= int(last)):
            raise OptionError(f"seeds '{text[:40]}' must be whole numbers and ranges, such as 0-4 or 0,2,5-7")
        if len(seeds) + int(last) - int(first) >= SEEDS:
            raise OptionError(f"seeds '{text[:40]}' are more than {SEEDS:,}, the most that a sweep takes")
        seeds += range(int(first), int(last) + 1)
    return list(dict.fromkeys(seeds))


class _Reader:
    """Turns a parsed file into a grid, or into an error that names a line of it."""

    def __init__(self, path: Path, text: str, raw: dict[str, Any], seeds: list[int] | None) -> None:
        self.path, self.lines, self.seeds = path, text.splitlines(), seeds
        self.raw = {respelled(key, KEYS): value for key, value in raw.items()}

    def grid(self) -> Grid:
        self._check_keys(self.raw, KEYS, "key")
        written = {axis: self._list(axis) for axis in AXES}
        lists = {**written, "seed": written["seed"] if self.seeds is None else self.seeds}
        includes = [self._rule("include", number) for number in range(len(self._tables("include")))]
        excludes = [self._rule("exclude", number) for number in range(len(self._tables("exclude")))]
        product = self._product(lists)
        for number, rule in enumerate(excludes):
            if not any(_matches(cell, rule) for cell in (*product, *_cells(written))):
                raise self._wrong(
                    f"[[exclude]] number {number + 1} matches no run of the product", "[[exclude]]", number
                )
        kept = [cell for cell in product if not any(_matches(cell, rule) for rule in excludes)]
        for number, rule in enumerate(includes):
            more = list(_cells({axis: rule.get(axis, lists[axis]) for axis in AXES}))
            if any(_matches(cell, other) for cell in more for other in excludes):
                raise self._wrong(
                    f"[[include]] number {number + 1} names a run that an [[exclude]] takes out", "[[include]]", number
                )
            kept += more
        cells = list(dict.fromkeys(kept))
        if not cells:
            raise OptionError(f"{self.path} has no run: a list is empty, or the excludes take out all of them")
        labels = dict.fromkeys((axis, getattr(cell, axis)) for cell in cells for axis in TABLES)
        named = {(axis, label): self._named(axis, label) for axis, label in labels}
        for axis in TABLES:
            for label in self.raw.get(axis, {}):
                if (axis, label) not in named:
                    raise self._wrong(
                        f"[{axis}.{label}] belongs to no run; put '{label}' into `{AXES[axis]}` or take the table out",
                        f"{axis}.{label}",
                    )
        for model in {cell.model for cell in cells} - {"auto"}:
            self._check_name(MODELS, model)
            if not LABEL.fullmatch(model.replace(":", ".")):
                raise self._wrong(f"model '{model}' cannot name a folder (letters, digits, '.', '_', '-')", model)
        order = {cell: place for place, cell in enumerate(cells)}
        cells.sort(
            key=lambda cell: (
                cell.seed,
                cell.dataset,
                cell.attack,
                named["defense", cell.defense].use != "none",
                order[cell],
            )
        )
        grid = Grid(
            self.path, tuple(cells), named, self._table("recipe"), self._value("preset", str),
            *self._trusted(), self._value("differences", bool),
        )  # fmt: skip
        self._check_folders(grid)
        return grid

    def _trusted(self) -> tuple[float | None, int | None]:
        share, per_class = self._share("trusted"), self._value("trusted_per_class", int)
        if "trusted_per_class" not in self.raw:
            return share, None
        if "trusted" in self.raw:
            raise self._wrong("`trusted` is a share, `trusted_per_class` a count; give one of the two", "trusted")
        if per_class < 1:
            raise self._wrong(f"`trusted_per_class` {per_class} must be at least 1", "trusted_per_class")
        return None, per_class

    def _product(self, lists: Mapping[str, list[Any]]) -> list[Cell]:
        count = prod(map(len, lists.values()))
        if count > CELLS:
            raise OptionError(f"{self.path} asks for {count:,} runs; the most that a sweep takes is {CELLS:,}")
        return list(_cells(lists))

    def _list(self, axis: str) -> list[Any]:
        key = AXES[axis]
        return self._values(axis, self.raw.get(key, DEFAULTS[key]), f"`{key}`", key)

    def _values(self, axis: str, values: object, what: str, word: str, number: int = 0) -> list[Any]:
        """Return the labels or seeds of an axis, checked; errors name `what`, and the line of `word`."""
        kind = int if axis == "seed" else str
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise self._wrong(
                f"{what} must be a list of {'whole numbers' if kind is int else 'names'}, not {values!r}", word, number
            )
        if kind is int and any(value < 0 for value in values):
            raise self._wrong("seeds must not be negative", word, number)
        return values

    def _value(self, key: str, kind: Any) -> Any:  # noqa: ANN401 - what TOML holds
        value = self.raw.get(key, DEFAULTS[key])
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self._wrong(f"`{key}` cannot be {value!r}", key)
        return value

    def _share(self, key: str) -> float:
        value = self._value(key, (int, float))
        if not 0 <= value < 1:
            shown = str(value)[:20]
            raise self._wrong(f"`{key}` cannot be {shown}; a share of at least 0 and below 1 is needed", key)
        return value  # type: ignore[no-any-return]

    def _table(self, key: str) -> dict[str, Any]:
        table = self.raw.get(key, {})
        if not isinstance(table, dict):
            raise self._wrong(f"`{key}` must be a table: [{key}]", key)
        return {name.replace("-", "_"): value for name, value in table.items()}

    def _tables(self, key: str) -> list[dict[str, Any]]:
        tables = self.raw.get(key, [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise self._wrong(f"`{key}` must be written [[{key}]]", key)
        return tables

    def _rule(self, key: str, number: int) -> dict[str, list[Any]]:
        """Return the axes that a rule names, each with a list of labels."""
        table = {respelled(name, AXES): value for name, value in self._tables(key)[number].items()}
        self._check_keys(table, set(AXES), f"key of [[{key}]]")
        rule = {
            axis: self._values(
                axis, value if isinstance(value, list) else [value], f"`{axis}` of [[{key}]]", f"[[{key}]]", number
            )
            for axis, value in table.items()
        }
        if not rule:
            raise self._wrong(f"[[{key}]] number {number + 1} is empty", f"[[{key}]]", number)
        return rule

    def _named(self, axis: str, label: str) -> Named:
        tables = self.raw.get(axis, {})
        if not isinstance(tables, dict) or not isinstance(tables.get(label, {}), dict):
            raise self._wrong(f"options of a {axis} are a table: [{axis}.{label}]", axis)
        if not LABEL.fullmatch(label):
            raise self._wrong(
                f"'{label}' cannot name a folder (letters, digits, '.', '_', '-'); use a label: [{axis}.LABEL] with "
                f"use = '{label}'", label,
            )  # fmt: skip
        options = {name.replace("-", "_"): value for name, value in tables.get(label, {}).items()}
        use = options.pop("use", label)
        is_path = axis == "dataset" and re.search(r"[/\\.]", str(use))
        if not is_path:
            self._check_name(TABLES[axis], use, own=tables)
        return Named(str(use), options)

    def _check_folders(self, grid: Grid) -> None:
        """Refuse labels under which two artifacts would lie in one folder."""
        owners: dict[str, tuple[str, str]] = {}
        for cell in grid.cells:
            data, name = grid.data_name(cell), grid.name(cell)
            images, whole = f"{cell.dataset} x {cell.attack} x {cell.seed}", " x ".join(map(str, cell))
            for folder, owner in (
                (data, (f"the dataset of {images}", cell.attack)),
                (f"{data}-victim", (f"the attacker's model of {images}", "")),
                (name, (f"the model of {whole}", cell.defense)),
                (f"{name}-eval", (f"the evaluation of {whole}", cell.defense)),
            ):
                other = owners.setdefault(folder, owner)
                if other != owner:
                    label = max(other[1], owner[1], key=len)  # the longer one spells out what the other name ends with
                    raise self._wrong(
                        f"{other[0]} and {owner[0]} would lie in one folder, {folder}; choose another label in place "
                        f"of '{label}'", label,
                    )  # fmt: skip

    def _check_name(self, registry: Registry, name: object, own: Mapping[str, Any] | None = None) -> None:
        if registry.find(str(name)) is not None:
            return
        raise self._wrong(str(registry.unknown(str(name), own or {})), name)

    def _check_keys(self, table: Mapping[str, Any], known: set[str], what: str) -> None:
        for key in table:
            if key not in known:
                raise self._wrong(
                    f"unknown {what} '{key}'.{did_you_mean(key, known)} Known: {', '.join(sorted(known))}", key
                )

    def _wrong(self, message: str, word: object, number: int = 0) -> OptionError:
        """Return an error with the line on which a word stands for the (number + 1)-th time."""
        return OptionError(f"{self.path}{line_of(self.lines, str(word), number)}: {message}")


def line_of(lines: list[str], word: str, number: int = 0) -> str:
    """Return ', line N' of the (number + 1)-th line that has a word outside comments, or '' if there is none."""
    whole = re.compile(rf"(?<![\w.-]){re.escape(word)}(?![\w.-])")
    found = [place for place, line in enumerate(lines, 1) if whole.search(line.partition("#")[0])]
    return f", line {found[number]}" if number < len(found) else ""


def _cells(lists: Mapping[str, list[Any]]) -> Iterator[Cell]:
    return itertools.starmap(Cell, itertools.product(*(lists[axis] for axis in AXES)))


def _matches(cell: Cell, rule: Mapping[str, list[Any]]) -> bool:
    return all(getattr(cell, axis) in values for axis, values in rule.items())
