"""bdbench suspects."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from bdbench.artifacts.finding import ROOT
from bdbench.cli import console
from bdbench.cli.parameters import Config, Json, with_folder
from bdbench.errors import ArtifactError

if TYPE_CHECKING:
    import pandas as pd

CLASSES = 10
"""Classes that are listed."""


def suspects(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Path or id of a model whose method scores samples; default: the newest."),
    ] = None,
    top: Annotated[int, typer.Option(help="How many of the most suspect samples are listed.", min=0)] = 10,
    share: Annotated[
        float, typer.Option(help="Share of the training images whose classes are counted.", min=0, max=1)
    ] = 0.01,
    csv: Annotated[
        Path | None,
        typer.Option(
            help="Write all training samples, the most suspect first.", callback=with_folder, show_default=False
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Write a picture of the 50 most suspect images.", callback=with_folder, show_default=False),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The dataset artifact, where it is not found by its id.", show_default=False)
    ] = None,
    config: Config = None,  # read before the command runs
    json: Json = False,
) -> None:
    """Say which training samples a defense suspects, the most suspect first; the truth plays no part.

    Of CBD the score is how sure its backdoored twin is, of ABL how early a sample was learned, of DBD how little its
    label fits its features. A defense ranks every set, a clean one too: a class that stands out may be easy, or
    poisoned. Look at the images, and ask another method.

    Examples:
      bdbench suspects

      bdbench suspects runs/photos-abl --csv suspects.csv --image suspects.png
    """
    from bdbench.artifacts.finding import locate
    from bdbench.artifacts.model import ModelArtifact
    from bdbench.protocol import inputs
    from bdbench.protocol.suspects import by_class, rank

    found = ModelArtifact.open(locate(model, "model") if model is not None else newest_scored())
    source = inputs.dataset_of(found, data)
    ranked = rank(found, source)
    count = max(1, round(share * len(ranked)))
    classes = by_class(ranked, count)
    if json:
        facts = {"model": found.path, "dataset": source.path, "method": found.manifest.ask.method, "counted": count}
        listed = {"classes": classes.to_dict("records"), "suspects": ranked.head(top).to_dict("records")}
        console.show_json({**facts, **listed})
    else:
        method = found.manifest.ask.method
        console.show(f"{found.path}: the {count:,} of {len(ranked):,} training images that {method} suspects most")
        show_classes(classes)
        show_top(ranked.head(top))
    if csv is not None:
        try:
            ranked.to_csv(csv, index=False)
        except OSError as error:
            raise ArtifactError(f"cannot write {csv}: {error.strerror or error}") from error
        console.say_wrote(csv)
    if image is not None:
        from bdbench.reports import pictures

        try:
            pictures.suspect_sheet(ranked, source, image)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"cannot write {image}: {error}; give a path that ends in .png") from error
        console.say_wrote(image)
    if csv is None and image is None:
        show = f"bdbench suspects {quote(str(found.path))}"
        console.say_next(f"{show} --image suspects.png", f"{show} --csv suspects.csv")


def newest_scored() -> Path:
    """Return the newest model under runs/ that scored samples, and say so.

    Raises:
        ArtifactError: there is none.
    """
    from bdbench.artifacts.finding import find_artifacts

    for path, manifest in reversed(find_artifacts(ROOT, "model")):
        if "samples.parquet" in manifest.files:
            console.say_plainly(f"model: {path} (the newest that scored samples)")
            return path
    raise ArtifactError(f"no model under {ROOT}/ scored samples; make one with: bdbench defend --method abl")


def show_classes(classes: pd.DataFrame) -> None:
    """Print how the suspects spread over the classes."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    table.add_column("labelled as", overflow="fold")
    for heading in ("images", "suspects", "of the class"):
        table.add_column(heading, justify="right")
    listed = min(CLASSES, int((classes["suspects"] > 0).sum()))
    for row in classes.head(listed).itertuples():
        table.add_row(Text(str(row[2])), f"{row.images:,}", f"{row.suspects:,}", f"{row.share:.1%}")
    console.show(table)
    if len(classes) > listed:
        rest = classes.iloc[listed:]
        console.show(f"and {int(rest['suspects'].sum()):,} in the other {len(rest):,} classes")


def show_top(ranked: pd.DataFrame) -> None:
    """Print the most suspect samples."""
    from rich.table import Table
    from rich.text import Text

    if not len(ranked):
        return
    table = Table("", header_style="bold")
    for heading in ("place", "labelled as"):
        table.add_column(heading, overflow="fold")
    table.add_column("score", justify="right")
    for number, row in enumerate(ranked.itertuples(), 1):
        table.add_row(str(number), Text(str(row.place)), Text(str(row[4])), f"{row.score:.4g}")
    console.show(table)
