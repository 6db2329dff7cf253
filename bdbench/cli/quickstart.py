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

ATTACK_OPTIONS = {"margin": 2, "patch_size": 4, "exclude_target": True}
"""Crops shift images by up to 2 pixels in training: the patch is never cut, and is learned before the digits are."""

COLUMNS = ("ba", "asr", "floor", "target_recall", "seconds")

READING = """BA: accuracy on clean test images (high is good). ASR: share of the triggered
test images that the model takes for the attacker's class (low is good). Floor:
the same images without the trigger; an ASR near its floor is no attack. Target
recall: accuracy on the attacker's class, which some defenses give up."""


def quickstart(
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for the artifacts.")] = Path("runs/quickstart"),
    wide: Annotated[bool, typer.Option("--wide", help="Show all columns of the table.")] = False,
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
) -> None:
    """Poison, train, defend and evaluate bundled digits in about a minute: the table of BA and ASR.

    The same stages as the commands: 1,797 real scans of digits at 16 pixels, BadNets, the undefended model, the one
    that an oracle would train, CBD, ABL, DBD and MCLDef. It also draws the trigger and writes the report page.
    """
    begun = time.perf_counter()
    console.say("loading torch ...")
    from bdbench import stages
    from bdbench.reports import pictures, results, tables
    from bdbench.reports.page import write_report

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
    if json:
        console.show_json({"rows": marked})
    else:
        console.show(tables.render(marked, "rich", tables.USUAL if wide else COLUMNS))
        console.show(f"\n{READING}")
    sheet, page = out / "trigger.png", out / "report.html"
    pictures.contact_sheet(data, sheet)
    write_report([out], page)
    console.say_plainly(f"\n{time.perf_counter() - begun:.1f} s. Dataset, models and evaluations are in {out}/")
    console.say_wrote(sheet, "test images without and with the trigger")
    console.say_wrote(page, "open it in a browser")
    console.say_next(
        f"bdbench inspect {quote(str(data.path))}",
        "bdbench defend --method abl --help",
        "bdbench poison --dataset cifar10 --attack blended --rate 0.1",
    )
