"""bdbench quickstart: the walk on bundled images."""

from __future__ import annotations

import time
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from bdbench.cli import console
from bdbench.cli.parameters import Device, Force, Json, Seed
from bdbench.progress import duration

METHODS = ("none", "oracle", "cbd", "abl", "dbd", "mcldef")
"""`none` comes first: mcldef mends it."""

ATTACK_OPTIONS = {"margin": 1}
"""One pixel from the border, the crops of training never cut the patch, so that it is learned before the digits are."""


def quickstart(
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for the artifacts.")] = Path("runs/quickstart"),
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
) -> None:
    """Poison, train, defend and evaluate bundled digits in one to three minutes: the table of BA and ASR.

    The same stages as the commands, with their defaults but one: 1,797 real scans of digits, BadNets with
    `--margin 1`, the undefended model, the one that an oracle would train, CBD, ABL, DBD and MCLDef.
    """
    begun = time.perf_counter()
    console.say("loading torch ...")
    from bdbench import stages
    from bdbench.reports import results, tables

    with console.live_progress() as progress:
        data = stages.poison(
            "digits",
            "badnets",
            options=ATTACK_OPTIONS,
            seed=seed,
            out=out / f"digits-badnets-s{seed}",
            force=force,
            progress=progress,
        )
        waiting = [method for method in METHODS if force or not (out / f"{data.path.name}-{method}").exists()]
        seconds = [sum(stages.estimate_seconds(data.path, method, device=device).values()) for method in waiting]
        if waiting:
            progress.note(f"{len(waiting)} trainings: about {duration(sum(seconds))} on this machine")
        rows = []
        for method in METHODS:
            progress.task = method
            progress.note(f"{method} ...")
            model = stages.defend(data.path, method, device=device, force=force, progress=progress)
            rows.append(
                results.evaluation_row(stages.evaluate(model.path, device=device, force=force, progress=progress))
            )
    marked = results.mark_rows(rows)
    console.show_json({"rows": marked}) if json else console.show(tables.render(marked, "rich"))
    console.say_plainly(f"{time.perf_counter() - begun:.1f} s. In {out}: dataset, models, evaluations")
    console.say_next(
        f"bdbench inspect {quote(str(data.path))} --image digits.png",
        "bdbench defend --method abl --help",
        "bdbench poison --dataset cifar10 --attack blended --rate 0.1",
    )
