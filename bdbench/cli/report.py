"""bdbench report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bdbench.artifacts.finding import ROOT
from bdbench.cli import console
from bdbench.cli.parameters import Config, Json, with_folder
from bdbench.wording import counted


def report(
    places: Annotated[
        list[Path] | None, typer.Argument(help="Folders that hold evaluations, at any depth; default: runs/.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.", callback=with_folder)] = Path("report.html"),
    config: Config = None,  # read before the command runs
    json: Json = False,
) -> None:
    """Write one page to look at: a heat map of attacks against defenses, and what is behind each cell.

    A cell is the mean over the seeds of one attack and defense; its runs are listed with curves and the commands that
    reproduce them. The page also has cost, detection curves, triggers and CSV. It is one file and needs no network. The
    numbers are those of `bdbench table`.

    Examples:
      bdbench report

      bdbench report runs/grid --out grid.html
    """
    from bdbench.reports.page import write_report

    written = write_report(places or [ROOT], out)
    size = f"{written.bytes / 1e6:.2f} MB"
    found = f"{counted(written.evaluations, 'run')} in {counted(written.cells, 'cell')} (means over seeds)"
    console.say_wrote(out, f"{found}, {size}")
    console.say("next: open it in a browser")
    if json:
        console.show_json({"path": out, **written._asdict()})
