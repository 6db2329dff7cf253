"""bdbench train and bdbench defend: one stage."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated, Any, cast

import typer

from bdbench.cli import console
from bdbench.cli.parameters import (
    Compile,
    Config,
    Device,
    Force,
    ImageMemory,
    Json,
    MethodName,
    ModelName,
    Out,
    PrecisionName,
    one_of,
)

DataArgument = Annotated[
    str | None,
    typer.Argument(metavar="DATASET", help="Path or id of a dataset artifact; default: the newest under runs/."),
]
Preset = Annotated[
    str,
    typer.Option(
        help="Budget: paper, fast, tiny, code where the method has it (abl), or auto by the size of the data.",
        autocompletion=one_of("auto", "paper", "fast", "tiny"),
    ),
]
OptionalSeed = Annotated[int | None, typer.Option(help="Seed of weights and order; default: the dataset's.", min=0)]


def train(
    options: dict[str, Any],
    dataset: DataArgument = None,
    model: ModelName = "auto",
    preset: Preset = "auto",
    seed: OptionalSeed = None,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    image_memory: ImageMemory = None,
    compile: Compile = False,  # noqa: A002
    out: Out = None,
    force: Force = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Train a model on a dataset artifact without any defense (the same as `defend --method none`).

    Examples:
      bdbench train

      bdbench train runs/cifar10-badnets-s0 --model wrn-16-1 --epochs 20
    """
    defend(
        options, dataset, model=model, preset=preset, seed=seed, device=device, precision=precision,
        image_memory=image_memory, compile=compile, out=out, force=force, json=json,
    )  # fmt: skip


def defend(
    options: dict[str, Any],
    dataset: DataArgument = None,
    method: MethodName = "none",
    model: ModelName = "auto",
    preset: Preset = "auto",
    suspect: Annotated[
        str | None, typer.Option(help="Path or id of the model to repair, for methods that repair one.")
    ] = None,
    without: Annotated[
        str | None,
        typer.Option(metavar="SCAN", help="Path or id of a scan, for `retrain`: what it set aside is left out."),
    ] = None,
    seed: OptionalSeed = None,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    image_memory: ImageMemory = None,
    compile: Compile = False,  # noqa: A002
    out: Out = None,
    force: Force = False,
    config: Config = None,  # read before the command runs
    json: Json = False,
) -> None:
    """Train a model on a dataset artifact with a defense.

    The defense sees the training images and labels as they are, never which are poisoned. Interrupted, the same command
    continues from the last checkpoint. `--method NAME --help` shows the method's own flags.

    Examples:
      bdbench defend --method cbd

      bdbench defend runs/cifar10-badnets-s0 --method abl --preset paper --isolation-rate 0.01
    """
    from bdbench import stages
    from bdbench.artifacts.made import arithmetic
    from bdbench.protocol.inputs import dataset_of
    from bdbench.training.devices import Precision

    place = Path(dataset) if dataset is not None else newest_dataset()
    with console.live_progress(method) as progress:
        made = stages.defend(
            place, method, model=model, preset=preset, options=options, suspect=suspect, without=without, seed=seed,
            out=out, device=device, precision=cast("Precision", precision), image_memory=image_memory,
            compile=compile, force=force, estimate=True, progress=progress,
        )  # fmt: skip
    asked = made.manifest.ask.config
    console.say_plainly(f"{asked['model']} by {method}, preset {asked['preset']}, {arithmetic(made.manifest.made)}")
    is_found = made.samples is not None and not dataset_of(made, place).is_attacked
    console.say_made(made, [f"bdbench {'suspects' if is_found else 'evaluate'} {quote(str(made.path))}"])
    if json:
        console.show_json({"path": made.path, "id": made.id, "config": asked, "made": made.manifest.made})


def newest_dataset() -> Path:
    """Return the newest dataset artifact under runs/, and say so.

    Raises:
        ArtifactError: there is none.
    """
    from bdbench import stages
    from bdbench.errors import ArtifactError

    found = stages.latest("dataset")
    if found is None:
        raise ArtifactError("no dataset artifact under runs/; make one with: bdbench poison")
    console.say_plainly(f"dataset: {found.path} (the newest)")
    return found.path
