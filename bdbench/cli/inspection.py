"""bdbench inspect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bdbench.cli import console
from bdbench.cli.parameters import Json

if TYPE_CHECKING:
    from bdbench.artifacts import Artifact, DatasetArtifact, ModelArtifact


def inspect(
    artifact: Annotated[str, typer.Argument(help="Path or id of an artifact of any kind.")],
    image: Annotated[
        Path | None,
        typer.Option(help="Write a picture: clean, triggered, difference of a data set; loss curves of a model."),
    ] = None,
    json: Json = False,
) -> None:
    """Say what is inside an artifact and how it was made.

    Opens the truth of a data set: which samples are poisoned, per class and role.

    Examples:
      bdbench inspect runs/digits-badnets-s0 --image sheet.png

      bdbench inspect runs/digits-badnets-s0-cbd
    """
    from bdbench.artifacts import DatasetArtifact, ModelArtifact, open_any
    from bdbench.store import locate

    found = open_any(locate(artifact))
    manifest = found.manifest
    if json:
        console.show_json(
            {"path": found.path, "id": found.id, **vars(manifest.ask), "facts": manifest.facts, "made": manifest.made}
        )
    else:
        _say_manifest(found)
        if isinstance(found, DatasetArtifact):
            _say_dataset(found)
        elif isinstance(found, ModelArtifact):
            _say_model(found)
        else:
            from bdbench import tables
            from bdbench.artifacts import EvaluationArtifact

            row = tables.evaluation_row(EvaluationArtifact(found.path, manifest))
            console.show(tables.render(tables.mark_rows([row]), "rich"))
    if image is not None:
        _draw(found, image)


def _say_manifest(found: Artifact) -> None:
    from rich.table import Table

    asked, made = found.manifest.ask, found.manifest.made
    table = Table(box=None, show_header=False, pad_edge=False)
    config = ", ".join(f"{key} {value}" for key, value in asked.config.items() if value is not None)
    size = sum(file["bytes"] for file in found.manifest.files.values())
    rows = {
        "artifact": f"{asked.kind} {found.id}, {len(found.manifest.files)} files, {size / 2**20:,.1f} MiB",
        "asked": f"{asked.method} (version {asked.version}), seed {asked.seed}",
        "options": config,
        "from": ", ".join(f"{name} {value}" for name, value in asked.inputs.items()),
        "made": f"{made['at']} in {made['seconds']:.1f} s on {made['device']}, {made['precision']}, "
        f"{made['threads']} threads, peak {made['peak_memory_bytes'] / 2**20:,.0f} MiB, "
        f"bdbench {made['bdbench']}, torch {made['torch']}",
    }
    for name, text in rows.items():
        if text:
            table.add_row(f"[bold]{name}[/bold]", text)
    console.show(table)


def _say_dataset(found: DatasetArtifact) -> None:
    import pandas as pd
    from rich.table import Table

    from bdbench.data import Role

    facts = found.manifest.facts
    channels, height, width = facts["image_shape"]
    console.show(f"\n{facts['name']}: {height}x{width}, {'gray' if channels == 1 else 'colour'}; " + ", ".join(
        f"{count:,} {split}" for split, count in facts["counts"].items()
    ))  # fmt: skip
    truth = found.truth
    counts = pd.crosstab(truth["clean_label"], truth["role"]).reindex(columns=list(Role), fill_value=0)
    seen = found.train.labels.bincount(minlength=len(facts["class_names"]))
    table = Table("class", "true label", *(role.name.lower() for role in Role), "as labelled", title="training split")
    for index, name in enumerate(facts["class_names"]):
        per_role = counts.loc[index] if index in counts.index else [0] * len(Role)
        total = str(int(sum(per_role)))
        table.add_row(f"{index} {name}", total, *(str(count) for count in per_role), str(int(seen[index])))
    console.show(table)


def _say_model(found: ModelArtifact) -> None:
    from rich.table import Table

    history = found.history
    table = Table("phase", "epochs", "first loss", "last loss", "images/s", "seconds", title="history")
    for phase, rows in history.groupby("phase", sort=False):
        first, last = rows["loss"].iloc[0], rows["loss"].iloc[-1]
        speed = rows["images_per_second"].median()
        table.add_row(
            str(phase), str(len(rows)), f"{first:.4f}", f"{last:.4f}", f"{speed:,.0f}", f"{rows['seconds'].sum():.1f}"
        )
    console.show(table)
    samples = found.samples
    if samples is not None:
        console.show(f"{len(samples):,} training samples scored, {int(samples['set_aside'].sum()):,} set aside")


def _draw(found: Artifact, image: Path) -> None:
    from bdbench import pictures
    from bdbench.artifacts import DatasetArtifact, ModelArtifact
    from bdbench.errors import ArtifactError, OptionError

    try:
        if isinstance(found, DatasetArtifact):
            pictures.contact_sheet(found, image)
        elif isinstance(found, ModelArtifact):
            pictures.loss_curves(found, image)
        else:
            raise OptionError("--image draws data sets and models, not evaluations")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot write {image}: {error}; give a path that ends in .png") from error
    console.say(f"wrote [bold]{image}[/bold]")
