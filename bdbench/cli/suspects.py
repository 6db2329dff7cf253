"""bdbench suspects."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from bdbench.artifacts.finding import ROOT
from bdbench.cli import console
from bdbench.cli.parameters import Config, Device, Json, with_folder
from bdbench.errors import ArtifactError, OptionError
from bdbench.files import written_file
from bdbench.text import printable

if TYPE_CHECKING:
    import pandas as pd

    from bdbench.artifacts.model import ModelArtifact
    from bdbench.artifacts.scan import ScanArtifact
    from bdbench.protocol.planting import SelfTest

CLASSES = 10
"""Classes that are listed."""

CAVEAT = (
    "A defense ranks every dataset, a clean one too. A class that stands out may be poisoned, or only easy to learn. "
    "A trigger that no network learns at this budget is not found."
)


def suspects(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Path or id of a model whose method scores samples, or of a scan; default: the newest.",
        ),
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
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            help="Also plant a known patch in a copy of the dataset, run the same defense on it, and say whether the "
            "patch is found. Costs as much as the defense did; the same command again takes the copy that is there.",
        ),
    ] = False,
    self_test_rate: Annotated[
        float, typer.Option(help="Share of the images that get the patch of the self-test.", min=0, max=1)
    ] = 0.05,
    data: Annotated[
        str | None, typer.Option(help="The dataset artifact, where it is not found by its id.", show_default=False)
    ] = None,
    device: Device = "auto",
    config: Config = None,  # read before the command runs
    json: Json = False,
) -> None:
    """Rank the training images by how suspicious a defense finds them. Uses no ground truth.

    The score of CBD is the confidence of its backdoored model, of ABL the negative loss after isolation, of DBD how
    badly label and features fit.

    What it cannot tell: a defense ranks every dataset, a clean one too. A class that stands out may be poisoned, or
    only easy to learn. `--self-test` says whether this defense, at this budget, finds a trigger that is there. Look at
    the images, and try a second method.

    Examples:
      bdbench suspects

      bdbench suspects runs/photos-abl --csv suspects.csv --image suspects.png

      bdbench suspects runs/photos-abl --self-test
    """
    from bdbench import stages
    from bdbench.artifacts.finding import locate
    from bdbench.protocol import inputs
    from bdbench.protocol.suspects import by_class, counted, rank

    found = _scored(locate(model) if model is not None else newest_scored())
    source, method = inputs.dataset_of(found, data), found.manifest.ask.method
    ranked = rank(found, source)
    count = counted(ranked, share)
    classes = by_class(ranked, count)
    if not json:
        console.show(f"{found.path}: the {count:,} of {len(ranked):,} training images that {method} suspects most")
        show_classes(classes)
        show_top(ranked.head(top))
        console.show_wrapped(CAVEAT)
    tested = None
    if self_test and found.kind == "scan":
        raise OptionError(
            "--self-test runs a defense again, and this is a scan; give a model whose method scores samples"
        )
    if self_test:
        with console.live_progress() as progress:
            progress.note(f"self-test: {method} on a copy with a patch on {self_test_rate:.1%} of the images")
            tested = stages.self_test(
                found.path, data=source.path, rate=self_test_rate, share=share, device=device, progress=progress
            )
    if json:
        facts = {"model": found.path, "dataset": source.path, "method": method, "counted": count, "caveat": CAVEAT}
        listed = {"classes": classes.to_dict("records"), "suspects": ranked.head(top).to_dict("records")}
        told = {} if tested is None else {"self_test": {**tested._asdict(), "verdict": tested.verdict}}
        console.show_json({**facts, **listed, **told})
    elif tested is not None:
        for line in in_words(tested, method):
            console.show_wrapped(line)
    if csv is not None:
        from bdbench.reports.formats import safe_cells

        with written_file(csv) as file:
            safe_cells(ranked).to_csv(file, index=False)
        console.say_wrote(csv)
    if image is not None:
        from bdbench.reports import pictures

        try:
            pictures.suspect_sheet(ranked, source, image, f"{source.manifest.facts['name']}, {method}")
        except (OSError, ValueError) as error:
            raise ArtifactError(f"cannot write {image}: {error}; give a path that ends in .png") from error
        console.say_wrote(image)
    if csv is None and image is None:
        show = f"bdbench suspects {quote(str(found.path))}"
        following = [f"{show} --image suspects.png", f"{show} --csv suspects.csv"]
        console.say_next(*following, *([] if self_test else [f"{show} --self-test"]))


def _scored(place: Path) -> ModelArtifact | ScanArtifact:
    """Open a model or a scan.

    Raises:
        ArtifactError: another kind of artifact is there.
    """
    from bdbench.artifacts.kinds import open_any
    from bdbench.artifacts.model import ModelArtifact
    from bdbench.artifacts.scan import ScanArtifact

    found = open_any(place)
    if not isinstance(found, ModelArtifact | ScanArtifact):
        raise ArtifactError(f"{place} is a {found.kind} artifact; a model or a scan is needed here")
    return found


def newest_scored() -> Path:
    """Return the newest model or scan of the newest dataset under runs/ that scored samples, and say so.

    Raises:
        ArtifactError: there is none: that of another dataset would be another answer.
    """
    from bdbench.artifacts.finding import find_artifacts

    datasets = find_artifacts(ROOT, "dataset")
    if not datasets:
        raise ArtifactError(f"no dataset artifact under {ROOT}/; try: bdbench take DATASET, then bdbench scan")
    newest, about = datasets[-1]
    for path, manifest in reversed(find_artifacts(ROOT)):
        if "samples.parquet" in manifest.files and manifest.ask.inputs.get("dataset") == about.id:
            console.say_plainly(f"{manifest.ask.kind}: {path} (the newest of {newest} that scored samples)")
            return path
    raise ArtifactError(
        f"no model or scan of {newest}, the newest dataset, scored samples; make one with: bdbench scan {newest}"
    )


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
        others = "the other class" if len(rest) == 1 else f"the other {len(rest):,} classes"
        console.show(f"{int(rest['suspects'].sum()):,} in {others}")


def in_words(tested: SelfTest, method: str) -> list[str]:
    """Return what a self-test found, in sentences."""
    chance = tested.planted / tested.images
    target, gathered = printable(tested.target), printable(tested.others_class)
    lines = [
        f"self-test: a patch on {tested.planted:,} of {tested.images:,} images, labelled {target}, was ranked: "
        f"precision in the top {tested.planted:,} = {tested.precision:.2f} (chance {chance:.2f}), "
        f"AUROC {tested.auroc:.2f}."
    ]
    lines.append({
        "found": f"Found: at this budget {method} puts such a trigger among the most suspect images. "
        "A fainter or rarer one may be missed.",
        "ranked high": f"Ranked high, not first: at this budget {method} sees such a trigger, but ranks other samples "
        "before it. Look at more of the most suspect images (--top, --share, --csv): they may be poisoned too.",
        "not found": f"Not found: the budget is too small to tell. What {method} ranks first here says nothing about "
        "this dataset. Train longer (--epochs, --preset paper), or try another defense.",
    }[tested.verdict])  # fmt: skip
    lines.append(
        f"Of the {tested.others:,} most suspect images that were not patched, {tested.others_count:,} are labelled "
        f"{gathered}: so much do the images of this dataset gather in one class without the patch."
    )
    return lines


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
