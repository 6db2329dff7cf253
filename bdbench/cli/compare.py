"""bdbench compare."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdbench.cli import console
from bdbench.cli.parameters import Config, Device, Json, with_folder
from bdbench.errors import ArtifactError, OptionError
from bdbench.files import written_file
from bdbench.text import printable

if TYPE_CHECKING:
    import pandas as pd

    from bdbench.artifacts.kinds import EvaluationArtifact
    from bdbench.protocol.comparing import Paired

WHAT = "Path or id of a model or an evaluation."


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=WHAT)],
    b: Annotated[str, typer.Argument(metavar="B", help=f"{WHAT} Of the same dataset as A.")],
    top: Annotated[int, typer.Option(help="How many of the images on which they differ are listed.", min=0)] = 10,
    csv: Annotated[
        Path | None,
        typer.Option(help="Write all images on which they differ.", callback=with_folder, show_default=False),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            help="Write a picture of the first 50 images on which they differ.",
            callback=with_folder,
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The dataset artifact, where it is not found by its id.", show_default=False)
    ] = None,
    device: Device = "auto",
    config: Config = None,  # read before the command runs
    json: Json = False,
) -> None:
    """Compare two models on the same test images: the differences of BA and ASR, and the images behind them.

    The difference is B - A, paired image by image, with a 95 % interval (Newcombe 1998). The interval is over test
    images: another seed of the same method can differ by more. A model without an evaluation is evaluated first.

    Examples:
      bdbench compare runs/digits-badnets-s0-none runs/digits-badnets-s0-cbd

      bdbench compare runs/digits-badnets-s0-abl runs/digits-badnets-s0-cbd --csv differ.csv --image differ.png
    """  # fmt: skip
    from bdbench.protocol import comparing, inputs

    first, second = (_evaluation(item, data, device) for item in (a, b))
    if first.id == second.id:
        console.say_warning(f"A and B are the same evaluation, {first.path}: they cannot differ")
    _check_same_dataset(first, second)
    source = inputs.find_dataset(first.made_from("dataset"), first.path.parent, data)
    rates = comparing.paired_rates(first.predictions, second.predictions, first.manifest.facts["attack_options"])
    found = comparing.disagreements(first.predictions, second.predictions)
    if source is not None:
        comparing.check_fits(first.predictions, source)
        comparing.check_fits(second.predictions, source)
    names = None if source is None else source.class_names
    named = found if names is None else _with_names(found, names)
    if json:
        sides = {side: {"path": it.path, **_side(it)} for side, it in (("a", first), ("b", second))}
        told = {name: _facts(paired) for name, paired in rates.items()}
        console.show_json({**sides, "metrics": told, "images": named.head(top).to_dict("records")} | _counts(found))
    else:
        _show_sides(first, second)
        _show_rates(rates)
        _show_images(named, top)
    if csv is not None:
        from bdbench.reports.formats import safe_cells

        with written_file(csv) as file:
            safe_cells(named).to_csv(file, index=False)
        console.say_wrote(csv)
    if image is not None:
        from bdbench.reports import pictures

        if source is None:
            raise ArtifactError("the dataset of the evaluations is not found here; give --data PATH for --image")
        if not len(found):
            raise OptionError("--image has nothing to draw: both give every image the same class")
        try:
            pictures.disagreement_sheet(found, source, image, _label(first), _label(second))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"cannot write {image}: {error}; give a path that ends in .png") from error
        console.say_wrote(image)
    if csv is None and image is None and len(found):
        console.say_next(f"bdbench compare {quote(a)} {quote(b)} --image differ.png")


def _evaluation(reference: str, data: str | None, device: str) -> EvaluationArtifact:
    """Return the evaluation that is named, or that of the model that is named, made if it is not there."""
    from bdbench import stages
    from bdbench.artifacts.finding import locate
    from bdbench.artifacts.kinds import EvaluationArtifact, open_any

    found = open_any(locate(reference))
    if isinstance(found, EvaluationArtifact):
        return found
    if found.manifest.ask.kind != "model":
        raise ArtifactError(f"{found.path} is a {found.manifest.ask.kind}; compare takes models or evaluations")
    with console.live_progress() as progress:
        return stages.evaluate(found.path, data=data, device=device, progress=progress)


def _check_same_dataset(first: EvaluationArtifact, second: EvaluationArtifact) -> None:
    one, other = (it.made_from("dataset") for it in (first, second))
    if one != other:
        said = [f"{it.path} is of {_dataset(it)}" for it in (first, second)]
        raise OptionError(
            f"{said[0]}, {said[1]}; compare takes two models of one dataset (`bdbench table` shows others side by side)"
        )


def _dataset(found: EvaluationArtifact) -> str:
    facts = found.manifest.facts
    return f"{facts['dataset']} with {facts['attack']} ({facts['dataset_id']})"


def _side(found: EvaluationArtifact) -> dict[str, Any]:
    facts = found.manifest.facts
    return {name: facts[name] for name in ("defense", "model", "preset", "seed")}


def _label(found: EvaluationArtifact) -> str:
    side = _side(found)
    return f"{side['defense']}, {side['model']}, {side['preset']}, seed {side['seed']}"


def _facts(paired: Paired) -> dict[str, Any]:
    low, high = paired.interval
    return {
        "a": paired.a.value, "b": paired.b.value, "difference": paired.difference, "low": low, "high": high,
        "images": paired.images, "only_a": paired.only_a, "only_b": paired.only_b,
    }  # fmt: skip


def _counts(found: pd.DataFrame) -> dict[str, dict[str, int]]:
    return {"differ": {split: int((found["split"] == split).sum()) for split in ("test", "triggered")}}


def _with_names(found: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    return found.assign(**{
        column: [names[label] for label in found[column]] for column in ("true", "wanted", "a", "b")
    })  # fmt: skip


def _show_sides(first: EvaluationArtifact, second: EvaluationArtifact) -> None:
    console.show_wrapped(f"dataset: {_dataset(first)}")
    for side, found in (("A", first), ("B", second)):
        console.show_wrapped(f"{side}: {_label(found)}  ({found.path})")


def _show_rates(rates: dict[str, Paired]) -> None:
    from rich.table import Table

    table = Table("", header_style="bold")
    for heading in ("A", "B", "B - A", "95 % interval", "images", "A alone", "B alone"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, paired in rates.items():
        low, high = paired.interval
        table.add_row(
            name.upper(), f"{paired.a.value:.3f}", f"{paired.b.value:.3f}", f"{paired.difference:+.3f}",
            f"[{low:+.3f}, {high:+.3f}]", f"{paired.images:,}", f"{paired.only_a:,}", f"{paired.only_b:,}",
        )  # fmt: skip
    console.show(table)
    said = {"ba": "BA: A alone, B alone: images that only one classifies correctly."}
    said["asr"] = "ASR: images whose trigger works on one only."
    console.show_wrapped(" ".join(said[name] for name in rates))


def _show_images(named: pd.DataFrame, top: int) -> None:
    from rich.table import Table
    from rich.text import Text

    counts = _counts(named)["differ"]
    console.show_wrapped(
        f"They give different classes to {counts['test']:,} clean and {counts['triggered']:,} triggered test images"
        + (f"; the first {min(top, len(named)):,}:" if top and len(named) else ".")
    )
    if not top or not len(named):
        return
    table = Table("split", header_style="bold")
    table.add_column("test row", justify="right")
    for heading in ("true", "A predicts", "B predicts"):
        table.add_column(heading, overflow="fold")
    for item in named.head(top).itertuples():
        table.add_row(str(item.split), str(item.row), *(Text(printable(str(it))) for it in (item.true, item.a, item.b)))
    console.show(table)
