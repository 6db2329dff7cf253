"""bdbench inspect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdbench.cli import console
from bdbench.cli.parameters import Json, with_folder
from bdbench.wording import counted

if TYPE_CHECKING:
    from bdbench.artifacts.base import Artifact
    from bdbench.artifacts.dataset import DatasetArtifact
    from bdbench.artifacts.kinds import EvaluationArtifact
    from bdbench.artifacts.model import ModelArtifact


def inspect(
    artifacts: Annotated[
        list[str], typer.Argument(metavar="ARTIFACT...", help="Path or id of an artifact of any kind.")
    ],
    image: Annotated[
        Path | None,
        typer.Option(
            help="Write a picture: clean, triggered, difference of a dataset (taken as found: images of "
            "each class); loss curves of a model; of several datasets one test image under every trigger.",
            callback=with_folder,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Say what is inside an artifact and how it was made.

    Opens the truth of a dataset: which samples are poisoned, per class and role. Of an evaluation it shows the row
    and, where the defense chooses samples epoch by epoch (abl), how many of them were poison after each epoch.
    Checks the files that it reads; `bdbench verify` checks all of them.

    Examples:
      bdbench inspect runs/digits-badnets-s0 --image sheet.png

      bdbench inspect runs/digits-badnets-s0-cbd

      bdbench inspect runs/digits-badnets-s0 runs/digits-sig-s0 --image triggers.png
    """
    from bdbench.artifacts.finding import locate
    from bdbench.artifacts.kinds import open_any

    opened = [open_any(locate(artifact)) for artifact in artifacts]
    if json:
        facts = [_facts(found) for found in opened]
        console.show_json(facts if len(facts) > 1 else facts[0])
    for found in opened if not json else ():
        _say(found)
    if image is not None:
        _draw(opened, image)


def _facts(found: Artifact) -> dict[str, Any]:
    from bdbench.artifacts.kinds import EvaluationArtifact

    manifest = found.manifest
    said = {"path": found.path, "id": found.id, **vars(manifest.ask), "facts": manifest.facts, "made": manifest.made}
    epochs = found.epochs if isinstance(found, EvaluationArtifact) else None
    return said if epochs is None else said | {"epochs": epochs.to_dict("records")}


def _say(found: Artifact) -> None:
    from bdbench.artifacts.dataset import DatasetArtifact
    from bdbench.artifacts.model import ModelArtifact
    from bdbench.artifacts.scan import ScanArtifact

    _say_manifest(found)
    if isinstance(found, DatasetArtifact):
        _say_dataset(found)
    elif isinstance(found, ModelArtifact):
        _say_model(found)
    elif isinstance(found, ScanArtifact):
        from bdbench.cli.scan import show_scans

        show_scans([found])
    else:
        from bdbench.artifacts.kinds import EvaluationArtifact
        from bdbench.reports import results, tables

        evaluation = EvaluationArtifact(found.path, found.manifest)
        row = results.evaluation_row(evaluation)
        if row["judged"] == "scan":
            console.show(tables.render_scans([row], "rich"))
            return
        console.show(tables.render(results.mark_rows([row]), "rich"))
        _say_epochs(evaluation)


def _say_manifest(found: Artifact) -> None:
    from rich.table import Table
    from rich.text import Text

    from bdbench.artifacts.made import arithmetic
    from bdbench.protocol.poisoning import idle_options

    asked, made = found.manifest.ask, found.manifest.made
    table = Table(box=None, show_header=False, pad_edge=False)
    shown = {key: value for key, value in asked.config.items() if key not in idle_options(asked.config)}
    config = ", ".join(f"{key} {_short(value)}" for key, value in shown.items())
    size = sum(file["bytes"] for file in found.manifest.files.values())
    rows = {
        "artifact": f"{asked.kind} {found.id}, {len(found.manifest.files)} files, {size / 2**20:,.1f} MiB",
        "checked": "the files that are read here; `bdbench verify` checks all of them",
        "asked": f"{asked.method} (version {asked.version}), seed {asked.seed}",
        "options": config,
        "from": ", ".join(f"{name} {value}" for name, value in asked.inputs.items()),
        "wrapper": (found.manifest.facts.get("wrapper") or {}).get("name", ""),
        "made": f"{made['at']} in {made['seconds']:.1f} s on {made['device']}, {arithmetic(made)}, "
        f"{counted(made['threads'], 'thread')}, peak {made['peak_memory_bytes'] / 2**20:,.0f} MiB, "
        f"bdbench {made['bdbench']}, torch {made['torch']}",
    }
    for name, text in rows.items():
        if text:
            table.add_row(Text(name, style="bold"), Text(text))
    console.show(table)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _say_dataset(found: DatasetArtifact) -> None:
    import pandas as pd
    from rich.table import Table
    from rich.text import Text

    from bdbench.data import Role
    from bdbench.protocol import judging

    facts = found.manifest.facts
    channels, height, width = facts["image_shape"]
    console.show(f"\n{facts['name']}: {height}x{width}, {'gray' if channels == 1 else 'colour'}; " + ", ".join(
        f"{count:,} {split}" for split, count in facts["counts"].items()
    ))  # fmt: skip
    for remark in facts.get("remarks", ()):
        console.show(Text(f"- {remark}"))
    if found.is_taken:
        _say_labels(found)
        return
    truth = found.truth
    counts = pd.crosstab(truth["clean_label"], truth["role"]).reindex(columns=list(Role), fill_value=0)
    seen = found.train.labels.bincount(minlength=len(facts["class_names"]))
    table = Table("class", title="training split", caption="clean, poison, cover: by true label")
    for heading in ("true label", *(role.name.lower() for role in Role), "as labelled"):
        table.add_column(heading, justify="right")
    for index, name in enumerate(facts["class_names"]):
        per_role = counts.loc[index] if index in counts.index else [0] * len(Role)
        total = str(int(sum(per_role)))
        table.add_row(Text(_class(index, name)), total, *(str(count) for count in per_role), str(int(seen[index])))
    console.show(table)
    if facts["counts"]["triggered"]:
        far = judging.trigger_distances(found)
        console.show(
            f"trigger: PSNR {far['psnr']:.1f} dB, SSIM {far['ssim']:.3f}, {far['changed']:.1%} of pixels changed, "
            f"by at most {far['max_change']:.0f} of 255"
        )


def _class(index: int, name: str) -> str:
    return name if name == str(index) else f"{index} {name}"


def _say_labels(found: DatasetArtifact) -> None:
    """Print all that is known of a dataset that was taken as found."""
    from rich.table import Table
    from rich.text import Text

    console.show("training split, as it was found:")
    table = Table("class", "as labelled")
    counts = found.train.labels.bincount(minlength=len(found.class_names)).tolist()
    for index, (name, count) in enumerate(zip(found.class_names, counts, strict=True)):
        table.add_row(Text(_class(index, name)), f"{count:,}")
    console.show(table)


def _say_model(found: ModelArtifact) -> None:
    from rich.table import Table

    from bdbench.artifacts.model import counted

    history = found.history
    table = Table("phase", "length", "first loss", "last loss", "images/s", "seconds", title="history")
    for phase, rows in history.groupby("phase", sort=False):
        first, last = rows["loss"].iloc[0], rows["loss"].iloc[-1]
        speed = rows["images_per_second"].median()
        unit, count = counted(rows)
        length = f"{count[-1]:,} {unit}" + ("s" if count[-1] > 1 else "")
        table.add_row(
            str(phase), length, f"{first:.4f}", f"{last:.4f}", f"{speed:,.0f}", f"{rows['seconds'].sum():.1f}"
        )
    if table.row_count:
        console.show(table)
    samples = found.samples
    if samples is not None:
        aside = f", {int(samples['set_aside'].sum()):,} set aside" if found.manifest.facts["sets_aside"] else ""
        console.show(f"{len(samples):,} training samples scored{aside}")
    _say_findings(found)


def _say_findings(found: ModelArtifact) -> None:
    """Print what the method found, and the settings that it chose from."""
    from rich.table import Table
    from rich.text import Text

    from bdbench.reports import findings

    facts = found.manifest.facts
    told = facts.get("findings", {})
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in findings.lines(told, facts["class_names"]).items():
        table.add_row(Text(name, style="bold"), Text(text))
    if table.row_count:
        console.show(table)
    tried = findings.sweep(told)
    if tried is None:
        return
    console.show_wrapped(f"settings tried, from the weakest repair to the strongest, {tried.held_to}")
    table = Table("setting")
    table.add_column("accuracy", justify="right")
    table.add_column("")
    for one in tried.tried:
        table.add_row(*map(Text, one), style="bold" if one.remark == "chosen" else None)
    console.show(table)


def _say_epochs(found: EvaluationArtifact) -> None:
    """Print how right the method would have been after each epoch, where it chooses epoch by epoch."""
    from rich.table import Table

    from bdbench.protocol.metric_list import METRICS, SET_ASIDE

    if (epochs := found.epochs) is None:
        return
    for phase, rows in epochs.groupby("phase", sort=False):
        names = [name for name in SET_ASIDE if (rows["metric"] == name).any()]
        headings = [METRICS[name].heading.removeprefix("set aside: ") for name in names]
        table = Table("epoch", *headings, title=f"What would be set aside after each epoch of {phase}")
        for epoch, told in rows.groupby("epoch", sort=False):
            rates = {rate["metric"]: rate for rate in told.to_dict("records")}
            table.add_row(str(epoch), *(_share(rates.get(name)) for name in names))
        console.show(table)


def _share(rate: Mapping[Any, Any] | None) -> str:
    """Return a rate with its interval; a dash where it counts nothing."""
    if rate is None or not math.isfinite(rate["value"]):
        return "-"
    return f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"


def _draw(opened: list[Artifact], image: Path) -> None:
    from bdbench.artifacts.dataset import DatasetArtifact
    from bdbench.artifacts.model import ModelArtifact
    from bdbench.errors import ArtifactError, OptionError
    from bdbench.reports import pictures

    sources = [found for found in opened if isinstance(found, DatasetArtifact)]
    try:
        if len(opened) > 1:
            if len(sources) < len(opened):
                raise OptionError("--image draws several datasets together, nothing else; give one artifact")
            pictures.gallery(sources, image)
        elif sources:
            pictures.contact_sheet(sources[0], image)
        elif isinstance(opened[0], ModelArtifact):
            pictures.loss_curves(opened[0], image)
        else:
            raise OptionError("--image draws datasets and models, not evaluations")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot write {image}: {error}; give a path that ends in .png") from error
    console.say_wrote(image)
