"""bdbench poison and bdbench take: from images to a dataset artifact."""

from __future__ import annotations

from collections import Counter
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bdbench.cli import console
from bdbench.cli.parameters import (
    AttackName,
    Config,
    DataRoot,
    DatasetName,
    DatasetPlace,
    Device,
    Download,
    Force,
    ImageColumn,
    Images,
    ImageSize,
    Json,
    LabelColumn,
    Out,
    PrecisionName,
    Seed,
    SkipUnreadable,
    TestFraction,
    TestImages,
)

if TYPE_CHECKING:
    from bdbench.artifacts.dataset import DatasetArtifact
    from bdbench.training.devices import Precision


TRUSTED = "Trusted images"
"""Heading in the help."""


def poison(
    options: dict[str, Any],
    dataset: DatasetName = "digits",
    attack: AttackName = "badnets",
    seed: Seed = 0,
    trusted: Annotated[
        float | None,
        typer.Option(
            help="Share of the training split reserved, clean, for defenses that need it (default: 0.05).",
            min=0,
            max=1,
            show_default=False,
            rich_help_panel=TRUSTED,
        ),
    ] = None,
    trusted_per_class: Annotated[
        int | None,
        typer.Option(
            help="Reserve so many images of every class, in place of a share.",
            min=1,
            show_default=False,
            rich_help_panel=TRUSTED,
        ),
    ] = None,
    data_root: DataRoot = None,
    download: Download = True,
    image_size: ImageSize = None,
    images: Images = None,
    test_images: TestImages = None,
    test_fraction: TestFraction = 0.2,
    skip_unreadable: SkipUnreadable = False,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    differences: Annotated[
        bool,
        typer.Option("--differences", help="Store only changed images (smaller; needs the source to open)."),
    ] = False,
    out: Out = None,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    force: Force = False,
    config: Config = None,  # read before the command runs
    json: Json = False,
) -> None:
    """Poison a dataset, once, on disk, before any augmentation.

    Writes a dataset artifact: the training images as a defender sees them, the truth in a file of its own, the clean
    and the triggered test images, and a small trusted set. `--attack none` poisons and triggers nothing: it shows what
    a defense costs where there is nothing to find.

    Examples:
      bdbench poison

      bdbench poison --dataset cifar10 --attack badnets --target 0 --rate 0.1

      bdbench poison --dataset photos/ --image-size 64 --attack blended --alpha 0.1
    """
    from bdbench import stages

    given = source_options(
        download=download, test_fraction=test_fraction, data_root=data_root, image_size=image_size, images=images,
        test_images=test_images, skip_unreadable=skip_unreadable or None, image_column=image_column,
        label_column=label_column,
    )  # fmt: skip
    with console.live_progress(attack) as progress:
        made = stages.poison(
            dataset, attack, options=options, source_options=given, trusted=trusted,
            trusted_per_class=trusted_per_class, seed=seed, out=out, device=device,
            precision=cast("Precision", precision), differences=differences, force=force, progress=progress,
        )  # fmt: skip
    facts = made.manifest.facts
    counts, roles = facts["counts"], Counter(made.roles.tolist())
    poison, cover = roles.get(1, 0), roles.get(2, 0)
    done = f"{poison:,} poisoned by {attack}, {cover:,} cover" if made.is_attacked else "none of them poisoned"
    console.say_plainly(
        f"{facts['name']}: {counts['train']:,} training images, {done}; {counts['trusted']:,} trusted; "
        f"{counts['test']:,} test images, {counts['triggered']:,} of them triggered"
    )
    console.say_made(
        made,
        [f"bdbench train {quote(str(made.path))}", f"bdbench defend {quote(str(made.path))} --method cbd"],
    )
    say_newer(made)
    if json:
        console.show_json({"path": made.path, "id": made.id, "roles": roles, **facts})


def take(
    dataset: DatasetPlace,
    trusted: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            help="Images that somebody vouches for, of the same classes: a folder, Parquet or .npz. They calibrate "
            "`scan`, and repairs learn from them.",
            show_default=False,
        ),
    ] = None,
    data_root: DataRoot = None,
    download: Download = True,
    image_size: ImageSize = None,
    images: Images = None,
    test_images: TestImages = None,
    test_fraction: TestFraction = 0.05,
    skip_unreadable: SkipUnreadable = False,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    out: Out = None,
    force: Force = False,
    config: Config = None,  # read before the command runs
    json: Json = False,
) -> None:
    """Store a dataset as it is, to train on it and to find out which images may be poisoned.

    Nothing is poisoned, triggered or reserved. You can measure BA on it, but not ASR: the trigger, if any, is unknown.
    Only training images are scored. Without a test split, 5 % of the images are held out (`--test-fraction`).

    Examples:
      bdbench take photos/ --image-size 64

      bdbench take photos/ --image-size 64 --trusted vouched/

      bdbench scan

      bdbench defend --method abl

      bdbench suspects --image suspects.png
    """
    from bdbench import stages

    given = source_options(
        download=download, test_fraction=test_fraction, data_root=data_root, image_size=image_size, images=images,
        test_images=test_images, skip_unreadable=skip_unreadable or None, image_column=image_column,
        label_column=label_column,
    )  # fmt: skip
    with console.live_progress() as progress:
        made = stages.take(dataset, trusted=trusted, source_options=given, out=out, force=force, progress=progress)
    facts = made.manifest.facts
    counts = facts["counts"]
    console.say_plainly(
        f"{facts['name']}: {counts['train']:,} training and {counts['test']:,} test images of "
        f"{len(facts['class_names']):,} classes, as they were found"
        + (f", and {counts['trusted']:,} trusted images" if counts["trusted"] else "")
    )
    console.say_made(
        made,
        [f"bdbench defend {quote(str(made.path))} --method abl", f"bdbench scan {quote(str(made.path))}"],
    )
    say_newer(made)
    if json:
        console.show_json({"path": made.path, "id": made.id, **facts})


def say_newer(made: DatasetArtifact) -> None:
    """Say so where `bdbench train` alone would take another dataset than this one: the newest under runs/."""
    from bdbench import stages
    from bdbench.artifacts.finding import ROOT

    if made.is_new and ROOT in made.path.parents:
        return
    newest = stages.latest("dataset")
    if newest is None or not newest.path.samefile(made.path):
        other = f"take {newest.path}, the newest under {ROOT}/" if newest else f"look under {ROOT}/ only"
        console.say_plainly(f"`bdbench train` and `defend` without a path {other}")


def source_options(**given: object) -> dict[str, Any]:
    """Return the options of a source that were given."""
    return {name: value for name, value in given.items() if value is not None}
