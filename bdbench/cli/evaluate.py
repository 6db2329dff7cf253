"""bdbench evaluate and bdbench table."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal, cast, get_args

import typer

from bdbench.artifacts.finding import ROOT
from bdbench.artifacts.manifests import Kind
from bdbench.cli import console
from bdbench.cli.parameters import Config, Device, Force, Json, PrecisionName, one_of, with_folder
from bdbench.cli.train import newest_dataset
from bdbench.errors import ArtifactError, BdbenchError, OptionError
from bdbench.files import written_file
from bdbench.protocol.metric_list import METRICS, MIN_BA, check_metrics
from bdbench.text import printable

COMPARISONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
Assertions = Annotated[
    list[str] | None,
    typer.Option(
        "--assert",
        metavar="CONDITION",
        help='A metric, one of <= >= < >, and a number, such as "asr<=0.05", for every row; exit code 3 where it does '
        "not hold. Repeatable.",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        metavar="METRICS",
        help=f"Metrics to show, such as ba,asr,floor. There are: {', '.join(METRICS)} (`bdbench list metrics`).",
        show_default=False,
    ),
]
Wide = Annotated[bool, typer.Option("--wide", help="Show every metric, whatever the width of the terminal.")]
Junit = Annotated[
    Path | None,
    typer.Option(
        help="Also write the conditions of --assert as JUnit XML, for dashboards.",
        callback=with_folder,
        show_default=False,
    ),
]
FormatName = Annotated[
    str,
    typer.Option(
        "--format",
        help="rich, markdown, csv, latex or json.",
        autocompletion=one_of("rich", "markdown", "csv", "latex", "json"),
    ),
]


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Paths or ids of model artifacts; default: every model of the newest dataset under runs/."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="The dataset artifact, where it is not found by its id.")] = None,
    assertions: Assertions = None,
    junit: Junit = None,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    force: Force = False,
    columns: Columns = None,
    wide: Wide = False,
    config: Config = None,  # read before the command runs
    json: Json = False,
) -> None:
    """Judge models on clean and triggered test images: the table of BA and ASR.

    BA counts all clean test images. ASR counts the triggered test images of other classes. The floor is the share of
    the same images that are classified as the target without any trigger: an ASR near its floor is no attack.
    `bdbench list metrics` has all of them. A repaired model is shown beside the model that it repaired.

    Examples:
      bdbench evaluate

      bdbench evaluate runs/digits-badnets-s0-cbd --assert "asr<=0.05" --assert "ba>=0.9"
    """
    from bdbench import stages
    from bdbench.artifacts.manifests import read_manifest
    from bdbench.reports import results, tables
    from bdbench.training.devices import Precision

    checks, shown = read_checks(assertions, junit), chosen_columns(columns, wide=wide)
    rows: dict[str, dict[str, Any]] = {}
    scans: dict[str, dict[str, Any]] = {}
    with console.live_progress() as progress:

        def judge(model: Path, *, again: bool) -> None:
            if read_manifest(model).ask.kind == "scan":
                judged = stages.evaluate_scan(model, data=data, force=again)
                scans[judged.id] = results.evaluation_row(judged)
                return
            made = stages.evaluate(
                model, data=data, device=device, precision=cast("Precision", precision), force=again, progress=progress
            )
            rows[made.id] = results.evaluation_row(made)

        for model in (places := _models(models)):
            judge(model, again=force)
        asked = set(rows)
        _judge_suspects(rows, places[0].parent, judge)
    marked = results.mark_rows(list(rows.values()))
    own, found = [row for row in marked if row["evaluation_id"] in asked], list(scans.values())
    if json:
        suspects = [row for row in marked if row["evaluation_id"] not in asked]
        console.show_json({"rows": own, "suspects": suspects, "scans": found})
    elif marked:
        console.show(tables.render(marked, "rich", shown))
    if found and not json:
        console.show(tables.render_scans(found, "rich"))
    place = quote(str(Path([*own, *found][0]["path"]).parent))
    console.say_next(f"bdbench table {place} --format markdown", *_comparison(marked))
    _check([*own, *found], checks, junit)


def _judge_suspects(rows: Mapping[str, dict[str, Any]], near: Path, judge: Callable[..., None]) -> None:
    """Judge the models that were repaired, those that were repaired before them too; say which is not here.

    Args:
        rows: by the id of the evaluation; `judge` adds to them.
        near: a folder to look in, beside ``runs/``.
        judge: judges the model of a folder.
    """
    from bdbench.protocol.inputs import find_suspect

    known: set[str] = set()
    while waiting := {row["suspect_id"]: row for row in rows.values() if row["suspect_id"]}.keys() - known:
        known |= {row["model_id"] for row in rows.values()}
        for wanted in waiting - known:
            place = find_suspect(wanted, near)
            said = f"it is neither under {near} nor under {ROOT}/"
            try:
                if place is not None:
                    judge(place, again=False)
                    continue
            except BdbenchError as error:
                said = str(error)
            console.say_plainly(f"the row of the suspect, model {wanted}, is missing: {said}")
        known |= waiting


def _comparison(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the command that compares a model with its suspect image by image, where one model is repaired."""
    places = {row["model_id"]: row["path"] for row in rows}
    repaired = [row for row in rows if row["suspect_id"] in places]
    if len(repaired) != 1:
        return []
    return [f"bdbench compare {quote(places[repaired[0]['suspect_id']])} {quote(repaired[0]['path'])}"]


def table(
    places: Annotated[
        list[Path] | None, typer.Argument(help="Folders that hold evaluations, at any depth; default: runs/.")
    ] = None,
    style: FormatName = "rich",
    ranks: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="Rank the defenses over attacks by der, ba or asr, with Friedman's test, instead.",
            show_default=False,
        ),
    ] = None,
    min_ba: Annotated[
        float | None,
        typer.Option(
            help="With --ranks der or asr: the share of the undefended model's BA that a defense must keep; one that "
            f"keeps less shares the last rank. Default: {MIN_BA:g}; 0 for no bound.",
            min=0,
            max=1,
            show_default=False,
        ),
    ] = None,
    scans: Annotated[bool, typer.Option("--scans", help="Show judged scans in place of models.")] = False,
    columns: Columns = None,
    wide: Wide = False,
    assertions: Assertions = None,
    junit: Junit = None,
    out: Annotated[
        Path | None, typer.Option(help="Write to this file instead of standard output.", callback=with_folder)
    ] = None,
    config: Config = None,  # read before the command runs
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Print the table of any number of evaluations: mean and spread over seeds, DER against the undefended row.

    CSV and JSON hold every single run; rich, Markdown and LaTeX one row for all seeds of a setting.

    Examples:
      bdbench table

      bdbench table --columns ba,asr,floor,ba_non_target

      bdbench table runs/ --format latex --out table.tex

      bdbench table runs/grid --ranks der
    """
    from bdbench.errors import unknown_name
    from bdbench.reports import results, tables
    from bdbench.reports.ranking import METRICS

    style = "json" if json else style
    if style not in get_args(tables.Format):
        raise unknown_name("format", style, get_args(tables.Format))
    if ranks is not None and ranks not in METRICS:
        raise unknown_name("metric to rank by", ranks, METRICS)
    checks, shown = read_checks(assertions, junit), chosen_columns(columns, wide=wide)
    if ranks is not None and shown is not None:
        raise OptionError("--ranks has its own columns; drop --columns and --wide")
    if min_ba is not None and ranks not in ("der", "asr"):
        raise OptionError("--min-ba bounds the ranks by DER and ASR; add --ranks der or --ranks asr, or drop it")
    if scans and (ranks is not None or shown is not None):
        raise OptionError("--scans has its own columns; drop --ranks, --columns and --wide")
    bound = MIN_BA if min_ba is None else min_ba
    kind: Literal["model", "scan"] = "scan" if scans else "model"
    rows = results.read_rows(places or [ROOT], strict=bool(checks), judged=kind)  # what is left out might not hold
    written = cast("tables.Format", style)
    if scans:
        rendered = tables.render_scans(rows, written)
    else:
        rendered = tables.render_ranking(rows, ranks, written, bound) if ranks else tables.render(rows, written, shown)
    if out is None:
        console.show(rendered)
    elif isinstance(rendered, str):
        with written_file(out) as file:
            file.write_text(rendered.rstrip("\n") + "\n", encoding="utf-8")
        console.say_wrote(out)
    else:
        raise OptionError("--out needs a format for files: markdown, csv, latex or json")
    _check(rows, checks, junit)


def chosen_columns(columns: str | None, *, wide: bool) -> tuple[str, ...] | None:
    """Return the metrics that are asked for, or None for the usual ones.

    Raises:
        OptionError: a name is no metric, or both flags are given.
    """
    if columns is None:
        return tuple(METRICS) if wide else None
    if wide:
        raise OptionError("--wide shows every metric, --columns some; give one of the two")
    return check_metrics([name.strip() for name in columns.split(",") if name.strip()], "--columns")


def read_checks(assertions: list[str] | None, junit: Path | None) -> list[tuple[str, str, float]]:
    """Return the conditions.

    Raises:
        OptionError: one has another form, or a JUnit file is asked for without any.
    """
    if junit is not None and not assertions:
        raise OptionError('--junit writes conditions, and there is none; add one, such as --assert "asr<=0.05"')
    return [parse_assertion(text) for text in assertions or []]


def parse_assertion(text: str) -> tuple[str, str, float]:
    """Return metric, comparison and limit of a condition such as ``asr<=0.05``.

    Raises:
        OptionError: it has another form, or names no metric.
    """
    found = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*([0-9.eE+-]+)\s*", text)
    if found is None:
        raise OptionError(f"assertion '{text}' is not of the form METRIC<=NUMBER (or >=, <, >), such as asr<=0.05")
    (metric,) = check_metrics([found[1]], f"assertion '{text}'")
    try:
        return metric, found[2], float(found[3])
    except ValueError as error:
        raise OptionError(f"assertion '{text}': '{found[3]}' is not a number") from error


def _check(rows: list[dict[str, Any]], checks: list[tuple[str, str, float]], junit: Path | None) -> None:
    """Exit with code 3 if a row fails a condition; a metric that a row lacks fails."""
    outcomes: list[tuple[str, str, str]] = []
    for row in rows:
        for metric, sign, limit in checks:
            holds = row[metric] is not None and COMPARISONS[sign](row[metric], limit)
            value, total = row[metric], row.get(f"{metric}_n")
            said = "" if value is None else f"{value:.4g}{f' of {total:,}' if total else ''}"
            found = f"{said} is not {sign} {limit:g}" if said else "is not measured in this row"
            reason = "" if holds else f"{metric} {found}"
            outcomes.append((row["path"], f"{metric}{sign}{limit:g}", reason))
    if junit is not None:
        _write_junit(outcomes, junit)
    failed = [f"{path}: {reason}" for path, _, reason in outcomes if reason]
    for line in failed:
        console.say_error(line)
    if failed:
        raise typer.Exit(3)


def _write_junit(outcomes: list[tuple[str, str, str]], path: Path) -> None:
    """Write conditions, with the reasons of those that fail, as one suite of JUnit's XML."""
    import xml.etree.ElementTree as ET

    failures = sum(bool(reason) for _, _, reason in outcomes)
    suite = ET.Element("testsuite", name="bdbench", tests=str(len(outcomes)), failures=str(failures))
    for place, name, reason in outcomes:
        case = ET.SubElement(suite, "testcase", classname=printable(place), name=printable(name))
        if reason:
            ET.SubElement(case, "failure", message=printable(reason))
    with written_file(path) as file:
        ET.ElementTree(suite).write(file, encoding="utf-8", xml_declaration=True)
    console.say_wrote(path)


def _models(given: list[str] | None) -> list[Path]:
    """Return the models that are named, all of a dataset that is named, and without a name all of the newest one."""
    from bdbench.artifacts.finding import locate
    from bdbench.artifacts.manifests import read_manifest

    found: list[Path] = []
    for place in [locate(name) for name in given] if given else [newest_dataset()]:
        found += _models_of(place) if read_manifest(place).ask.kind == "dataset" else [place]
    return found


def _models_of(dataset: Path) -> list[Path]:
    from bdbench.artifacts.finding import find_artifacts
    from bdbench.artifacts.manifests import read_manifest

    wanted, places = read_manifest(dataset).id, dict.fromkeys((dataset.parent, ROOT))
    kinds: tuple[Kind, ...] = ("model", "scan")
    models = [item for place in places if place.is_dir() for kind in kinds for item in find_artifacts(place, kind)]
    found = [path for path, manifest in models if manifest.ask.inputs.get("dataset") == wanted]
    if not found:
        raise ArtifactError(
            f"no model of {dataset} beside it or under {ROOT}/; train one with: bdbench train {dataset}"
        )
    return list({path.resolve(): path for path in found}.values())
