"""bdbench poison."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bdbench.cli import console
from bdbench.cli.parameters import AttackName, Config, DatasetName, Device, Force, Json, Out, PrecisionName, Seed

if TYPE_CHECKING:
    from bdbench.devices import Precision


def poison(
    options: dict[str, Any],
    dataset: DatasetName = "digits",
    attack: AttackName = "badnets",
    seed: Seed = 0,
    trusted: Annotated[
        float,
        typer.Option(help="Share of the training split reserved, clean, for defences that need it.", min=0, max=1),
    ] = 0.05,
    data_root: Annotated[Path | None, typer.Option(help="Folder of a local copy of a named data set.")] = None,
    download: Annotated[bool, typer.Option(help="Download a named data set that is missing.")] = True,
    image_size: Annotated[
        int | None, typer.Option(help="Resize the shorter side to this many pixels and crop the centre.")
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(help="Keep so many training images, chosen at random, the same for every seed.", min=20),
    ] = None,
    test_fraction: Annotated[float, typer.Option(help="Test share, where the source has no test split.")] = 0.2,
    differences: Annotated[
        bool,
        typer.Option(
            "--differences", help="Store what differs from the source only; it opens only where the source is."
        ),
    ] = False,
    out: Out = None,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    force: Force = False,
    config: Config = None,  # read before the command runs
    json: Json = False,
) -> None:
    """Poison a data set, once, on disk, before any augmentation.

    Writes a data set artifact: the training images as a defender sees them, the truth in a file of its own, the clean
    and the triggered test images, and a small trusted set.

    Examples:
      bdbench poison

      bdbench poison --dataset cifar10 --attack badnets --target 0 --rate 0.1

      bdbench poison --dataset photos/ --image-size 64 --attack blended --alpha 0.1
    """
    from bdbench import stages

    source = {
        "download": download, "test_fraction": test_fraction, "data_root": data_root, "image_size": image_size,
        "images": images,
    }  # fmt: skip
    given = {name: value for name, value in source.items() if value is not None}
    with console.live_progress() as progress:
        made = stages.poison(
            dataset, attack, options=options, source_options=given, trusted=trusted, seed=seed, out=out, device=device,
            precision=cast("Precision", precision), differences=differences, force=force, progress=progress,
        )  # fmt: skip
    facts = made.manifest.facts
    counts, roles = facts["counts"], Counter(made.roles.tolist())
    console.say(
        f"{facts['name']}: {counts['train']:,} training images, {roles.get(1, 0):,} poisoned by {attack}, "
        f"{roles.get(2, 0):,} cover; {counts['trusted']:,} trusted; {counts['test']:,} test images, "
        f"{counts['triggered']:,} of them triggered"
    )
    console.say_made(
        made.path,
        made.id,
        made.manifest.made,
        [f"bdbench train {made.path}", f"bdbench defend {made.path} --method cbd"],
    )
    if json:
        console.show_json({"path": made.path, "id": made.id, "roles": roles, **facts})
