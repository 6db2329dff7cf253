"""One cell of a sweep, in a process of its own: `python -m bdbench.sweeps.worker`, with an order on standard input.

The order is one line of JSON; standard input stays open as long as whoever gave it lives, and the worker ends with it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from filelock import FileLock, Timeout

from bdbench import files
from bdbench.errors import BdbenchError, BusyError, DamagedError, OccupiedError, OptionError, SourceWarning
from bdbench.sweeps import records
from bdbench.sweeps.records import TOLD

DONE, FAILED, FULL, BUSY, INTERRUPTED = 0, 1, 74, 75, 130
"""Exit codes: made, failed with a reason, no room on the disk, another process makes this cell, stopped."""


POLL_SECONDS = 1.0
WRITE_SECONDS = 1.0
Result = TypeVar("Result")


class Record:
    """What is known of a cell: a JSON file in the sweep's folder, written by the worker that makes the cell.

    It is also the worker's `bdbench.progress.Progress`.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path, self.begun, self.written = path, time.time(), 0.0
        self.facts: dict[str, Any] = {
            **facts, "pid": os.getpid(), "host": platform.node(), "started": self.begun, "state": "running",
        }  # fmt: skip

    def write(self, **news: Any) -> None:  # noqa: ANN401 - JSON values
        """Write what is known now."""
        self.facts |= {**news, "seconds": time.time() - self.begun}
        with files.replace_file(self.path) as path:
            path.write_text(json.dumps(self.facts), encoding="utf-8")
        self.written = time.monotonic()

    def start(self, label: str, total: int, unit: str = "images") -> None:
        """Begin a phase."""
        self.write(phase=label, total=total, unit=unit, done=0, status="")

    def advance(self, amount: int, status: str = "") -> None:
        """Count; the file is written once a second."""
        self.facts["done"] += amount
        if status:
            self.facts["status"] = status
        if time.monotonic() - self.written > WRITE_SECONDS:
            self.write()

    def finish(self) -> None:
        """End a phase."""
        self.facts["done"] = self.facts["total"]

    def note(self, message: str) -> None:
        """Put a line into the log."""
        sys.stdout.write(f"{message}\n")
        sys.stdout.flush()


def main() -> int:
    """Read the order, make the cell, and return the exit code."""
    order = json.loads(sys.stdin.readline())
    if order["kind"] in ("check", "plan"):
        answer = check(order) if order["kind"] == "check" else plan(order)
        sys.stdout.write(json.dumps(answer) + "\n")
        return DONE
    threading.Thread(target=_end_with_the_giver, daemon=True).start()
    folder = Path(order["folder"])
    try:
        with FileLock(records.sweep_file(folder, "locks", f"{order['name']}.lock"), timeout=0):
            return _recorded(order, folder)
    except Timeout:
        return BUSY


def _end_with_the_giver() -> None:
    sys.stdin.read()
    os._exit(INTERRUPTED)


def _recorded(order: dict[str, Any], folder: Path) -> int:
    file = records.sweep_file(folder, "cells", f"{order['name']}.json")
    files.remove_unfinished(file)
    record = Record(file, {name: records.without_places(order[name]) for name in TOLD})
    try:
        record.write()
        evaluation = make(order, folder, record)
        record.write(state="done", evaluation=evaluation)
    except KeyboardInterrupt:
        record.write(state="interrupted")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - whatever it is, the other cells go on
        traceback.print_exc()
        if is_full(error):
            with contextlib.suppress(BdbenchError):
                record.write(state="interrupted", reason=str(error), full=str(fullest(folder)))
            return FULL
        kind = "" if isinstance(error, BdbenchError) else f"{type(error).__name__}: "
        record.write(state="failed", reason=f"{kind}{error}")
        return FAILED
    return DONE


def make(order: Mapping[str, Any], folder: Path, record: Record) -> str:
    """Poison, defend and evaluate as ordered, reusing what is there; return the name of the evaluation's folder.

    What is there but was asked otherwise is replaced if the order says so; what is damaged is made again.
    """
    from bdbench import stages

    settings, suspected = order["asked"]["settings"], order["asked"]["suspect"]
    computing = {"device": order["device"], "precision": order["precision"], "progress": record}
    made = partial(when_whole, note=record.note, replace=order["replace"])
    data = made(
        lambda force: stages.poison(
            settings["dataset"], settings["attack"], options=settings["attack_options"],
            source_options=settings["source_options"], trusted=settings["trusted"],
            trusted_per_class=settings.get("trusted_per_class"), seed=settings["seed"],
            out=folder / order["data_name"], differences=order["differences"], force=force, **computing,
        )
    )  # fmt: skip

    def defended(name: str, wanted: Mapping[str, Any], suspect: Path | None = None) -> Path:
        model = made(
            lambda force: stages.defend(
                data.path, wanted["method"], model=wanted["model"], preset=wanted["preset"],
                options=wanted["options"], suspect=suspect, seed=wanted["seed"], out=folder / name, force=force,
                **order["training"], **computing,
            )
        )  # fmt: skip
        return cast("Path", model.path)

    suspect = None
    if suspected is not None:
        suspect = defended(suspected["name"], suspected["settings"])
    model = defended(order["name"], settings, suspect)
    judged = made(lambda force: stages.evaluate(model, data=data.path, force=force, **computing))
    return str(judged.path.name)


def when_whole(make: Callable[[bool], Any], note: Callable[[str], None], *, replace: bool = False) -> Any:  # noqa: ANN401 - an artifact
    """Do as `when_free`, and make an artifact again that is there but damaged, with a note."""
    try:
        artifact = when_free(make, replace=replace)
        artifact.verify()
    except DamagedError as error:
        note(f"{error}; it is made again now")
        return when_free(lambda _: make(True))
    return artifact


def when_free(make: Callable[[bool], Result], *, replace: bool = False) -> Result:
    """Make an artifact as soon as no other process is making it; then it is there, and is opened.

    Args:
        make: makes it, told whether by force.
        replace: use force where another artifact is in its place, or one that other code of a plugin made.
    """
    force = False
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error" if replace and not force else "default", SourceWarning)
                return make(force)
        except BusyError:
            force = False  # by force it would be made a second time
            time.sleep(POLL_SECONDS)
        except (OccupiedError, SourceWarning):
            if force or not replace:
                raise
            force = True


def fullest(folder: Path) -> Path:
    """Return which of the folders that a worker writes to has the least room: its own, the cache, the temporary one."""
    from bdbench.datasets.cache import cache_folder

    places = [place for place in (folder, cache_folder(), Path(tempfile.gettempdir())) if place.is_dir()]
    return min(places, key=lambda place: shutil.disk_usage(place).free)


def is_full(error: BaseException | None) -> bool:
    """Say whether an error comes from a disk without room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # safetensors says it in words
            return True
        error = error.__cause__ or error.__context__
    return False


def check(order: Mapping[str, Any]) -> dict[str, Any]:
    """Check options and look at the machine.

    Args:
        order: `named`: axis, label, registered name (or path) and options of each; `models`: registered names.

    Returns:
        `errors`: (axis, label, message) of options that do not fit; `suspects`, `gpus`, `methods`: see
        `bdbench.sweeps.checking.Checked`.
    """
    import torch

    from bdbench.artifacts import sources
    from bdbench.protocol.budget import check_preset, split_options
    from bdbench.registry import ATTACKS, DEFENSES, MODELS, plugin_sources
    from bdbench.training.augment import parse_augment
    from bdbench.training.recipe import Recipe

    errors, suspects, methods = [], [], {}
    for axis, label, use, options in order["named"]:
        try:
            if axis == "attack":
                cls = ATTACKS.load(use)
                ATTACKS.check_options(use, options)
                parts = [use, cls.version, cls.parse(options).model_dump()]
                methods[f"attack {label}"] = digest(*parts, *plugin_sources((ATTACKS, use)).values())
            elif axis == "dataset":
                sources.open_source(use, options)
            else:
                cls = DEFENSES.load(use)
                preset = options.get("preset", "auto")
                if preset != "auto":
                    check_preset(use, preset, cls)
                wanted = {name: value for name, value in options.items() if name != "preset"}
                DEFENSES.check_options(use, wanted, Recipe.model_fields)
                of_recipe, own = split_options(wanted, cls)
                recipe = Recipe.parse(of_recipe)
                if recipe.augment != "auto":
                    parse_augment(recipe.augment)
                parsed = [recipe.model_dump(), cls.parse(own).model_dump()]
                methods[f"defense {label}"] = digest(
                    use, cls.version, preset, dict(cls.presets), parsed, *plugin_sources((DEFENSES, use)).values()
                )  # fmt: skip
                if cls.needs_scan:
                    raise OptionError(f"'{use}' goes by a scan, which a grid cannot name; see bdbench defend --without")
                if cls.needs_suspect:
                    suspects.append(label)
        except BdbenchError as error:
            errors.append([axis, label, str(error)])
    for model in order["models"]:
        try:
            MODELS.load(model)
        except BdbenchError as error:
            errors.append(["model", model, str(error)])
    return {"errors": errors, "suspects": suspects, "gpus": torch.cuda.device_count(), "methods": methods}


def plan(order: Mapping[str, Any]) -> list[float | None]:
    """Return about how many seconds the trainings of some cells would take, by a few steps of each; None if one cannot
    be tried.

    Args:
        order: `settings`, those of `bdbench.sweeps.grid.Grid.settings`, `device` and `precision`.
    """
    from bdbench import stages

    found: dict[str, float | None] = {}
    answers = []
    with tempfile.TemporaryDirectory() as folder:
        for settings in order["settings"]:
            source = digest(settings["dataset"], settings["source_options"])
            data = Path(folder, source)
            training = {name: settings[name] for name in ("method", "model", "preset", "options")}
            key = digest(source, training)
            if key not in found:
                try:
                    if not data.exists():  # what poisons it plays no part in the time
                        stages.poison(settings["dataset"], source_options=settings["source_options"], out=data)
                    seconds = stages.estimate_seconds(
                        data, **training, device=order["device"], precision=order["precision"]
                    )
                    found[key] = sum(seconds.values())
                except BdbenchError:
                    found[key] = None
            answers.append(found[key])
    return answers


def digest(*parts: object) -> str:
    """Return a short name of what a method does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
