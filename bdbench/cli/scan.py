"""bdbench scan."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bdbench.cli import console
from bdbench.cli.parameters import Config, DetectorName, Device, Force, Json, ModelName, Out, PrecisionName
from bdbench.cli.train import DataArgument, OptionalSeed, Preset, newest_dataset
from bdbench.errors import OptionError
from bdbench.wording import listed

if TYPE_CHECKING:
    from bdbench.artifacts.scan import ScanArtifact

QUICK = ("scan-lda", "spectral", "ac")
"""What is run where no method is named; the first one where there are trusted images only."""
LARGE_SHARE = 0.02
"""Of poison: a rule that sets nothing aside below it is told so."""
CAVEAT = "Nothing that stands out does not mean clean: a trigger that the suspect has not learned is not seen."


def scan(
    options: dict[str, Any],
    dataset: DataArgument = None,
    method: DetectorName = None,
    decide: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            help="Which samples are set aside: none, budget:SHARE, alarm:RATE, fdr:SHARE, native, or auto: fdr:0.1 "
            "where there are trusted images, else the method's own rule.",
        ),
    ] = "auto",
    suspect: Annotated[
        str | None, typer.Option(help="Path or id of the undefended model to look at; default: made if missing.")
    ] = None,
    fail_above: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="End with exit code 3 if at least so large a share is poisoned, by the lower bound.",
            min=0,
            max=1,
            show_default=False,
        ),
    ] = None,
    model: ModelName = "auto",
    preset: Preset = "auto",
    seed: OptionalSeed = None,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    out: Out = None,
    force: Force = False,
    config: Config = None,  # read before the command runs
    json: Json = False,
) -> None:
    """Score the training images of a dataset by how poisoned they look. Uses no ground truth.

    A model is trained on the dataset as it is, with the trusted images among the others, and detectors look at it.
    Because they cannot tell trusted images from training images, how often a trusted one would be flagged says how
    often a clean one would be. `evaluate` judges a scan by the truth, where it is known.

    Without --method a few detectors run on the same model.

    Examples:
      bdbench scan

      bdbench scan runs/photos --method spectral --decide budget:0.02

      bdbench scan runs/photos --fail-above 0.005
    """
    from bdbench import stages
    from bdbench.artifacts.finding import locate
    from bdbench.artifacts.manifests import read_manifest
    from bdbench.training.devices import Precision

    place = locate(dataset, "dataset") if dataset is not None else newest_dataset()
    has_trusted = bool(read_manifest(place, "dataset").facts["counts"]["trusted"])
    if fail_above is not None and not has_trusted:
        raise OptionError(
            f"--fail-above compares with trusted images, and {place} has none: without them it is not known how often "
            "a clean image is flagged; make the dataset with `poison --trusted` or `take --trusted`"
        )
    methods = [method] if method is not None else [name for name in QUICK if has_trusted or name != "scan-lda"]
    if method is None and out is not None:
        raise OptionError("--out is the place of one scan; name its --method")
    with console.live_progress("scan") as progress:
        made = [
            stages.scan(
                place, name, decide=decide, options=options, suspect=suspect, model=model, preset=preset, seed=seed,
                out=out, device=device, precision=cast("Precision", precision), force=force, progress=progress,
            )
            for name in methods
        ]  # fmt: skip
    if json:
        console.show_json({"scans": [_facts(one) for one in made]})
    else:
        show_scans(made)
    for one in made:
        console.say_made(one, [])
    first = quote(str(made[0].path))
    console.say_next(f"bdbench suspects {first} --image suspects.png", f"bdbench evaluate {first}")
    if fail_above is not None:
        failed = [one for one in made if one.manifest.facts.get("at_least", 0.0) > fail_above]
        for one in failed:
            console.say_error(
                f"{one.path}: at least {one.manifest.facts['at_least']:.2%} of the images look poisoned, more than "
                f"{fail_above:.2%}"
            )
        if failed:
            raise typer.Exit(3)


def _facts(one: ScanArtifact) -> dict[str, Any]:
    asked, facts = one.manifest.ask, one.manifest.facts
    classes = one.classes.to_dict("records")
    return {"path": one.path, "id": one.id, "method": asked.method, **facts, "classes": classes}


def show_scans(made: list[ScanArtifact]) -> None:
    """Print what each detector set aside, of which classes, and how often it would flag a clean image."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    table.add_column("detector")
    table.add_column("rule")
    for heading in ("set aside", "of trusted", "poisoned, at least"):
        table.add_column(heading, justify="right")
    table.add_column("of class", overflow="fold")
    table.add_column("stands out", overflow="fold")
    for one in made:
        facts = one.manifest.facts
        null = facts.get("null")
        table.add_row(
            one.manifest.ask.method,
            facts["decide"],
            f"{facts['flagged']:,}" if "flagged" in facts else "",
            f"{facts['null_flagged']:,} of {null:,}" if null else "",
            f"{facts['at_least']:.2%}" if "at_least" in facts else "",
            Text(_classes(one)),
            Text(_standing_out(one)),
        )
    console.show(table)
    for one in made:
        facts = one.manifest.facts
        if facts.get("smallest_share", 0) > LARGE_SHARE:
            console.show_wrapped(
                f"{one.manifest.ask.method}: {facts['null']:,} trusted images calibrate, so {facts['decide']} sets "
                f"nothing aside below {facts['smallest_share']:.0%} of poison; more trusted images lower this limit"
            )
    if not any(one.manifest.facts.get("flagged") or _standing_out(one) for one in made):
        console.show_wrapped(f"Nothing stands out. {CAVEAT}")


def _standing_out(one: ScanArtifact) -> str:
    """Name the classes that stand out among all, with the p-value of the one that stands out most."""
    from bdbench.artifacts.scan import class_evidence
    from bdbench.detectors.parts.evidence import flagged
    from bdbench.protocol.deciding import SIGNIFICANCE

    classes, names = class_evidence(one), one.manifest.facts["class_names"]
    labels = sorted(flagged(classes, SIGNIFICANCE), key=lambda label: -classes[label].deviations)
    p = [f" (p {classes[label].p:.2g})" for label in labels[:1]]
    return "".join([listed([names[label] for label in labels[:3]]), *p])


def _classes(one: ScanArtifact) -> str:
    """Name the classes of what was set aside, the most first."""
    from bdbench.protocol.inputs import find_dataset

    samples = one.samples
    source = find_dataset(one.dataset_id, one.path.parent)
    if source is None or not bool(samples["set_aside"].any()):
        return ""
    labels = source.train_labels[samples["set_aside"].to_numpy(copy=True)]
    counts = labels.bincount(minlength=len(source.class_names))
    order = counts.argsort(descending=True).tolist()
    named = [f"{source.class_names[label]} {int(counts[label]):,}" for label in order if int(counts[label])]
    return listed(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
