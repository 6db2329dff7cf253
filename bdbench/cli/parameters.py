"""Flags that several commands share, and names for shell completion."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from bdbench.limits import MEMORY_GB
from bdbench.registry import ATTACKS, DATASETS, DEFENSES, DETECTORS, MODELS, Registry


def names_of(registry: Registry):  # type: ignore[no-untyped-def]  # noqa: ANN201 - typer looks at the parameter
    """Return a completion function for the names of a registry."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        return [(name, row.summary) for name, row in registry.rows.items() if name.startswith(incomplete)]

    return complete


def one_of(*names: str):  # type: ignore[no-untyped-def]  # noqa: ANN201 - typer looks at the parameter
    """Return a completion function for a few words."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


SOURCE = "Registered name, or a path: image folder, Parquet (file or folder of shards), .npz."
DatasetName = Annotated[str, typer.Option(help=SOURCE, autocompletion=names_of(DATASETS))]
DatasetPlace = Annotated[str, typer.Argument(metavar="DATASET", help=SOURCE, autocompletion=names_of(DATASETS))]
DataRoot = Annotated[Path | None, typer.Option(help="Folder of a local copy of a named dataset.")]
Download = Annotated[bool, typer.Option(help="Download a named dataset that is missing.")]
ImageSize = Annotated[int | None, typer.Option(help="Resize the shorter side to this many pixels and crop the centre.")]
Images = Annotated[
    int | None, typer.Option(help="Keep this many training images, chosen at random, the same for every seed.", min=20)
]
TestImages = Annotated[
    int | None, typer.Option(help="Keep so many test images, chosen at random, the same for every seed.", min=20)
]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be read, and name them.")
]
ImageColumn = Annotated[
    str | None, typer.Option(help="Image column of Parquet files; default: image or img.", show_default=False)
]
LabelColumn = Annotated[
    str | None,
    typer.Option(help="Label column of Parquet files; default: label, labels or fine_label.", show_default=False),
]
TestFraction = Annotated[float, typer.Option(help="Test share, where the source has no test split.")]
AttackName = Annotated[str, typer.Option(help="A registered attack.", autocompletion=names_of(ATTACKS))]
MethodName = Annotated[str, typer.Option(help="A registered defense.", autocompletion=names_of(DEFENSES))]
DetectorName = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="A registered detector; default: a few of them.",
        autocompletion=names_of(DETECTORS),
        show_default=False,
    ),
]
ModelName = Annotated[
    str,
    typer.Option(
        help="Network, torchvision:NAME, or auto: convnet below 16 pixels, convnet-16 at 16, wrn-16-1 above.",
        autocompletion=names_of(MODELS),
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.", min=0, max=2**63 - 1)]


def with_folder(context: typer.Context, path: Path | None) -> Path | None:
    """Make the folder that a file goes to, before the work for the file begins.

    Raises:
        typer.BadParameter: the path is a folder, or its own cannot be made or written to.
    """
    if path is None or context.resilient_parsing:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_folder = path.is_dir()
    except OSError as error:
        raise typer.BadParameter(f"cannot make {path}: {error.strerror or error}") from error
    if is_folder:
        raise typer.BadParameter(f"{path} is a folder; give a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise typer.BadParameter(f"no permission to write {path}")
    return path


def number(value: float | None) -> float | None:
    """Refuse nan, which is neither below nor above a limit."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is not a number")
    return value


Out = Annotated[Path | None, typer.Option(help="Folder of the artifact; default: a telling name under runs/.")]
Force = Annotated[bool, typer.Option("--force", help="Make it again, replacing what is there.")]
Config = Annotated[Path | None, typer.Option(help="TOML file of settings, named as the flags; flags win.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on standard output.")]
ImageMemory = Annotated[
    float | None,
    typer.Option(
        help="GB of training images that a run (in a sweep: each job) may keep on the device; more are streamed from "
        "the artifact, with the same result. Default: half of what a GPU has free, half of all RAM.",
        min=0,
        max=MEMORY_GB,
        callback=number,
        show_default=False,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Let torch compile the networks that defenses train: 25 to 70 s at the first start, 5 once torch has them "
        "in its cache; a tenth to a third less time on a CPU with AMX, little on other CPUs, "
        "not measured on GPUs.",
    ),
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.", autocompletion=one_of("auto", "cpu", "cuda", "mps"))
]
PrecisionName = Annotated[
    str,
    typer.Option(
        help="auto (bf16 where the hardware accelerates it), fp32 or bf16.",
        autocompletion=one_of("auto", "fp32", "bf16"),
    ),
]
