"""Evaluations -> one row each, and rows merged over seeds."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from bdbench.artifacts.dataset import UNPOISONED
from bdbench.artifacts.finding import find_artifacts
from bdbench.artifacts.kinds import EvaluationArtifact
from bdbench.artifacts.manifests import AGAIN
from bdbench.errors import ArtifactError, DamagedError, DamageWarning
from bdbench.protocol.metric_list import METRICS, MIN_BA, RATES, SCORES
from bdbench.protocol.metrics import defense_effectiveness, mean_interval

KEYS = ("dataset", "model", "attack", "attack_options", "defense", "defense_options", "preset")


SOURCE = ("source", "source_options")
"""What tells datasets of one name apart; rows from before it was kept have None."""


UNDEFENDED = ("none", "victim")
"""What no defense has touched: plain training, and an attacker's own model."""


PUBLISHED = ("paper", "code")
"""Presets whose budget is the paper's own, or that of its published code."""


WEAK_ATTACK = 0.5


FLOOR_MARGIN = 0.1


def read_rows(
    places: Sequence[Path], *, strict: bool = False, judged: Literal["model", "scan"] = "model"
) -> list[dict[str, Any]]:
    """Return a row per evaluation of a model, or of a scan, found at or under the given folders, oldest first.

    A row has dataset, model, attack, defense, preset, seed, and for every rate its value, n, low and high.

    Raises:
        ArtifactError: a place is no folder, or no evaluation is there; `strict`, and an artifact there is damaged.
    """
    for place in places:
        if not place.is_dir():
            raise ArtifactError(f"{place} is not a folder; give the folder that holds your runs")
    seen: dict[str, dict[str, Any]] = {}
    for place in places:
        for path, manifest in find_artifacts(place, "evaluation", strict=strict):
            if manifest.facts.get("judged", "model") != judged:
                continue
            try:
                seen[manifest.id] = evaluation_row(EvaluationArtifact(path, manifest))
            except DamagedError as error:
                if strict:
                    raise
                warnings.warn(f"left out: {error}", DamageWarning, stacklevel=2)
    if not seen:
        what = "evaluation" if judged == "model" else "judged scan"
        raise ArtifactError(f"no {what} under {', '.join(map(str, places))}; make one with: bdbench evaluate")
    return mark_rows(list(seen.values())) if judged == "model" else list(seen.values())


def evaluation_row(evaluation: EvaluationArtifact) -> dict[str, Any]:
    """Return one evaluation as a flat row of JSON values; what does not apply is None.

    Raises:
        DamagedError: its numbers cannot be read, or one that every evaluation has is missing.
    """
    facts = evaluation.manifest.facts
    row: dict[str, Any] = {**facts, **{name: facts.get(name) for name in (*SOURCE, "suspect_id", "suspect")}}
    row["judged"] = facts.get("judged", "model")
    row |= {"evaluation_id": evaluation.id, "path": str(evaluation.path)}
    entries = {entry["metric"]: entry for entry in evaluation.records("metrics.parquet")}
    for name in (*RATES, *SCORES):
        entry = entries.get(name, {"value": None, "denominator": None, "low": None, "high": None})
        row[name] = finite(entry["value"])
        if name in RATES:
            row |= {f"{name}_n": entry["denominator"], f"{name}_low": finite(entry["low"])}
            row |= {f"{name}_high": finite(entry["high"])}
    if facts.get("judged") == "scan":
        return row
    if row["ba"] is None or (row["asr"] is None) != (row["floor"] is None):
        raise DamagedError(evaluation.path, f"{evaluation.path} lacks BA, or one of ASR and floor; {AGAIN}")
    return row


def mark_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add what follows from the undefended row of each: `der`, `ba_change`, `asr_change`, `attack_failed` and `marks`.

    That of a repaired model is the row of its suspect, if it is there (of a suspect that was repaired itself, the row
    of the first one), else the undefended row of the same dataset, model, seed and, if there is one, preset. An
    undefended row tells by its own ASR whether the attack failed: a dataset may have several, of other budgets.
    """
    undefended = {_pairing(row): row for row in rows if row["defense"] == "none"}
    undefended |= {(*_pairing(row), row["preset"]): row for row in rows if row["defense"] == "none"}
    by_model = {row["model_id"]: row for row in rows if "model_id" in row}
    marked = []
    for row in rows:
        base = row if row["defense"] in UNDEFENDED else _first_suspect(row, by_model)
        if base is None:
            base = undefended.get((*_pairing(row), row["preset"]), undefended.get(_pairing(row)))
        attacked = row["asr"] is not None and not has_no_poison(row)
        failed = der = ba_change = asr_change = None
        if base is not None and base["asr"] is not None and attacked:
            failed = bool(base["asr"] < WEAK_ATTACK or base["asr"] - base["floor"] < FLOOR_MARGIN)
        if base is not None and base is not row:
            ba_change = row["ba"] - base["ba"]
            if failed is not None:
                asr_change = row["asr"] - base["asr"]
                if not row.get("reads_truth"):
                    der = defense_effectiveness(base["ba"], base["asr"], row["ba"], row["asr"])
        told = {"der": der, "ba_change": ba_change, "asr_change": asr_change}
        marked.append({**row, **told, "attack_failed": failed, "marks": _marks(row, base, failed=failed)})
    return marked


def _marks(row: Mapping[str, Any], base: Mapping[str, Any] | None, *, failed: bool | None) -> str:
    """Return the letters of `tables.MARKS` that are true of a row, beside its undefended row."""
    attacked = row["asr"] is not None and not has_no_poison(row)
    marks = "0" if has_no_poison(row) else "n" if not attacked else "?" if base is None else "w" if failed else ""
    marks += "" if row["preset"] in PUBLISHED else "b"
    marks += "c" if row.get("changed") else ""
    marks += "o" if row["defense_options"].get("oracle_target") is not None else ""
    marks += "r" if row.get("reads_truth") else ""
    marks += "p" if row.get("replay") else ""
    marks += "u" if row.get("findings", {}).get("unchanged") else ""
    marks += "a" if row.get("findings", {}).get("took") is False else ""
    return marks + ("l" if attacked and base is not None and row["ba"] < MIN_BA * base["ba"] else "")


def _first_suspect(row: Mapping[str, Any], by_model: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Return the row of the model that was repaired, that which no repair made, or None if it is not there."""
    found: dict[str, Any] | None = None
    suspect = row.get("suspect_id")
    while suspect is not None:
        found = by_model.get(suspect)
        suspect = None if found is None else found.get("suspect_id")
    return found


def has_no_poison(row: Mapping[str, Any]) -> bool:
    """Say whether a row's dataset was left without poison on purpose: no attack, or one at a rate of 0."""
    options = row["attack_options"]
    if row["attack"] == UNPOISONED:
        return not options.keys() <= {"dataset"}
    return bool(options.get("rate") == 0)


def _pairing(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["dataset_id"], row["model"], row["seed"]


def finite(value: float | None) -> float | None:
    """Return a number as JSON knows it: None for nan."""
    return None if value is None or math.isnan(value) else float(value)


def over_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge rows that differ in seeds only: mean, and under `<metric>_sd` and `<metric>_half` the spread.

    `<metric>_sd` is the sample standard deviation, `<metric>_half` half of the 95 % t interval; both None for one seed.
    """
    merged = []
    for group in by_setting(rows):
        seeds = sorted({row["seed"] for row in group})
        out: dict[str, Any] = {key: group[0].get(key) for key in (*KEYS, *SOURCE, "suspect")}
        out |= {"seeds": seeds, "marks": "".join(sorted({mark for row in group for mark in row["marks"]}))}
        for name in METRICS:
            out |= mean_and_spread(name, [row.get(name) for row in group])
        merged.append(out)
    return merged


def mean_and_spread(name: str, values: Iterable[float | None]) -> dict[str, float | None]:
    """Return mean, standard deviation and half interval of a metric under the names that `over_seeds` gives them."""
    parts = mean_interval([math.nan if value is None else value for value in values])
    return dict(zip((name, f"{name}_sd", f"{name}_half"), map(finite, parts), strict=True))


def merge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `over_seeds` with attacks and defenses named so that rows of different options are told apart."""
    merged = over_seeds(rows)
    for row, dataset in zip(merged, _sources_apart(merged), strict=True):
        row["dataset"] = dataset
        if row["attack"] == UNPOISONED and has_no_poison(row):
            row["attack"] = "no poison"
    attacks = _tell_apart(merged, "attack", ("dataset",))
    attacks = _suspects_apart([row | {"attack": attack} for row, attack in zip(merged, attacks, strict=True)])
    defenses = _tell_apart(merged, "defense", ("dataset", "model", "preset"))
    return [
        row | {"attack": attack, "defense": defense}
        for row, attack, defense in zip(merged, attacks, defenses, strict=True)
    ]


def by_setting(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return rows in groups that differ in seeds only, both in the order of the rows."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        setting = [*(row.get(key) for key in (*KEYS, *SOURCE)), row.get("suspect") or {}]
        groups.setdefault(json.dumps(setting, sort_keys=True), []).append(row)
    return list(groups.values())


def _sources_apart(rows: list[dict[str, Any]]) -> list[str]:
    """Return the name of each row's dataset; of equal names with their source's options, or else its id."""
    told = []
    for row in rows:
        own = row["source_options"] or {}
        others = [
            other["source_options"] or {}
            for other in rows
            if other["dataset"] == row["dataset"]
            and None not in (row["source"], other["source"])
            and other["source"] != row["source"]
        ]
        differing = sorted({name for other in others for name in own | other if own.get(name) != other.get(name)})
        said = [f"{name}={own[name]}" for name in differing if name in own]
        if others and not differing:
            said = [row["source"][:6]]
        told.append(" ".join([row["dataset"], *said]))
    return told


def _tell_apart(rows: list[dict[str, Any]], name: str, among: Sequence[str]) -> list[str]:
    """Return the name of each row's attack or defense, with the options that differ among rows of equal `among`."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault(tuple(row[key] for key in (*among, name)), []).append(row)
    told = []
    for row in rows:
        own = row[f"{name}_options"]
        others = [it[f"{name}_options"] for it in alike[tuple(row[key] for key in (*among, name))]]
        differing = [key for key, value in own.items() if any(other.get(key) != value for other in others)]
        differing = [key for key in differing if own[key] is not None]
        told.append(" ".join([row[name], *(f"{key}={own[key]}" for key in differing)]))
    return told


def _suspects_apart(rows: list[dict[str, Any]]) -> list[str]:
    """Return the name of each row's attack, with what tells apart the models that its repairs started from.

    An attacker's own model is another model to repair than one that was trained on the attacker's dataset.
    """
    repaired: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["suspect"] is not None:
            repaired.setdefault((row["dataset"], row["model"], row["attack"]), []).append(row["suspect"])
    told = []
    for row in rows:
        own = {"method": "victim"} if row["defense"] == "victim" else row["suspect"] or {}
        others = repaired.get((row["dataset"], row["model"], row["attack"]), [])
        differing = [key for key in own if any(other.get(key) != own[key] for other in others)]
        names = {key: "suspect" if key == "method" else f"suspect_{key}" for key in differing}
        told.append(" ".join([row["attack"], *(f"{names[key]}={own[key]}" for key in differing)]))
    return told
