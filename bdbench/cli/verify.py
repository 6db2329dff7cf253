"""bdbench verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bdbench.cli import console
from bdbench.cli.parameters import Json
from bdbench.wording import counted


def verify(
    artifacts: Annotated[
        list[str] | None,
        typer.Argument(help="Paths or ids of artifacts of any kind, or folders that hold some; default: runs/."),
    ] = None,
    json: Json = False,
) -> None:
    """Check that artifacts are complete and unchanged; exit code 1 if one is not.

    Checks file hashes; sample counts and triggered images of datasets; that a model's weights load.

    Examples:
      bdbench verify

      bdbench verify runs/digits-badnets-s0 --json
    """
    from rich.markup import escape

    from bdbench.artifacts.finding import ROOT, artifacts_under, locate
    from bdbench.artifacts.kinds import verify as check
    from bdbench.artifacts.manifests import is_artifact
    from bdbench.errors import BdbenchError

    references: list[str] = []
    for reference in artifacts or [str(ROOT)]:
        place = Path(reference)
        inside = artifacts_under(place) if place.is_dir() and not is_artifact(place) else []
        references += [str(path) for path in inside] or [reference]
    results: list[dict[str, Any]] = []
    for reference in references:
        try:
            found = check(locate(reference))
            results.append({"artifact": reference, "ok": True, "kind": found.kind, "id": found.id, "error": None})
            facts = f"{found.kind} {found.id}, {counted(len(found.manifest.files), 'file')}"
            console.say(f"[green]ok[/green]       {escape(reference)}  {facts}")
        except BdbenchError as error:
            results.append({"artifact": reference, "ok": False, "kind": None, "id": None, "error": str(error)})
            console.say(f"[red]not ok[/red]   {escape(reference)}")
            console.say_error(str(error))
    if json:
        console.show_json(results)
    if not all(result["ok"] for result in results):
        raise typer.Exit(1)
