"""bdbench list and bdbench show."""

from __future__ import annotations

import inspect as reflection
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdbench import plugins
from bdbench.cli import console
from bdbench.cli.flags import shown
from bdbench.cli.parameters import Json
from bdbench.errors import unknown_name
from bdbench.protocol.metric_list import METRICS
from bdbench.registry import DEFENSES, REGISTRIES, Registry, Row, repairs

if TYPE_CHECKING:
    from rich.table import Table


class Plural(StrEnum):
    """What can be listed; both spellings are understood."""

    ATTACKS = "attacks"
    DEFENSES = "defenses"
    DETECTORS = "detectors"
    DATASETS = "datasets"
    MODELS = "models"
    METRICS = "metrics"


GROUPS = {"repairs": "defenses that start from a trained model"}
"""What is said beside the headings of a list."""

NEEDS = {
    "trusted": "trusted clean images (bdbench poison --trusted)",
    "suspect": "the undefended model (bdbench train)",
    "truth": "which samples are poisoned (a reference, not a defense)",
}


def list_names(
    kind: Annotated[Plural | None, typer.Argument(help="What to list; default: everything.")] = None,
    json: Json = False,
) -> None:
    """List attacks, defenses, datasets and models, plugins included, and metrics.

    Examples:
      bdbench list

      bdbench list attacks --json

      bdbench list metrics
    """
    chosen = [registry for registry in REGISTRIES.values() if kind in (None, registry.plural)]
    rows = {
        registry.plural: [_listed(registry, name, row) for name, row in registry.rows.items()] for registry in chosen
    }
    if json:
        if kind in (None, Plural.METRICS):
            rows["metrics"] = [_metric(name) for name in METRICS]
        console.show_json(rows[kind.value] if kind else rows)
        return
    if kind is Plural.METRICS:
        _show_metrics()
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for heading, listed in _in_groups(rows).items():
        table.add_row(Text(heading, style="bold"), Text(GROUPS.get(heading, ""), style="dim"))
        for item in listed:
            summary = Text(f"broken: {item['broken']}", style="red") if item["broken"] else Text(item["summary"])
            origin = f"plugin of {item['plugin']}" if item["plugin"] else item["threat"]
            table.add_row(Text(f"  {item['name']}"), summary, Text(origin, style="dim"))
    console.show(table)
    console.say("more: [cyan]bdbench show NAME[/cyan], [cyan]bdbench list metrics[/cyan]")


def _in_groups(rows: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return what is listed under its headings: of the defenses those that repair a model have their own."""
    groups, mend = {}, repairs()
    for plural, listed in rows.items():
        if plural == DEFENSES.plural:
            groups[plural] = [item for item in listed if item["name"] not in mend]
            groups["repairs"] = [item for item in listed if item["name"] in mend]
        else:
            groups[plural] = listed
    return groups


def _metric(name: str) -> dict[str, Any]:
    metric = METRICS[name]
    return {"name": name, "summary": f"{metric.counts}; over: {metric.over}", **metric._asdict()}


def _show_metrics() -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, metric in METRICS.items():
        good = f"; {metric.better} is good" if metric.better else ""
        table.add_row(Text(name, style="bold"), Text.assemble(metric.counts, (f"\nover: {metric.over}{good}", "dim")))
    console.show(table)
    console.say("Rates have their count and 95 % interval (Wilson) in CSV, JSON and the report.")


def _listed(registry: Registry, name: str, row: Row) -> dict[str, Any]:
    """Return a row for people and for JSON; a plugin is loaded, so that a broken one says why."""
    facts: dict[str, Any] = {"name": name, **row._asdict(), "plugin": None, "broken": None}
    plugin = registry.plugins.get(name)
    if plugin is not None:
        tried = plugins.try_out(plugin)
        facts |= {"plugin": f"{plugin.package} {plugin.version}".strip(), "broken": tried.broken}
        facts["summary"] = tried.summary or "no docstring"
    return facts


def _complete_any(incomplete: str) -> list[str]:
    known = [name for registry in REGISTRIES.values() for name in registry.names()]
    return [name for name in (*known, *METRICS) if name.startswith(incomplete)]


def show(
    name: Annotated[
        str, typer.Argument(help="An attack, defense, dataset, model or metric.", autocompletion=_complete_any)
    ],
    json: Json = False,
) -> None:
    """Explain one name: what it is, its paper, the threat model, its options with types, bounds and defaults.

    Examples:
      bdbench show cbd

      bdbench show badnets --json
    """
    from rich.console import Group
    from rich.text import Text

    if name in METRICS:
        metric = _metric(name)
        if json:
            console.show_json({**metric, "kind": "metric", "description": metric["summary"], "options": []})
        else:
            console.show(f"{name}: {metric['counts']}\nover: {metric['over']}")
        return
    registry, row = _row_of(name)
    facts = _describe(registry, row, name)
    if json:
        console.show_json(facts)
        return
    parts: list[Any] = [Text(f"{name}: {facts['summary']}", style="bold"), Text(facts["description"])]
    headings = (heading for heading in ("plugin", "paper", "threat", "needs", "presets") if facts[heading])
    parts += [Text(f"\n{heading}: {_in_words(facts[heading])}") for heading in headings]
    if facts["options"]:
        parts += [Text(), _option_table(facts["options"])]
    console.show(Group(*parts))


def _row_of(name: str) -> tuple[Registry, Row]:
    for registry in REGISTRIES.values():
        row = registry.find(name)
        if row is not None:
            return registry, row
    names = [known for registry in REGISTRIES.values() for known in registry.names()]
    raise unknown_name("name", name, [*names, *METRICS])


def _describe(registry: Registry, row: Row, name: str) -> dict[str, Any]:
    from bdbench.options import Options, describe_options

    found = registry.load(name)
    cls = found if isinstance(found, type) else found.func
    options = describe_options(cls) if issubclass(cls, Options) else []
    needs = [text for what, text in NEEDS.items() if getattr(cls, f"needs_{what}", False)]
    plugin = registry.plugin(name)
    return {
        "name": name,
        "kind": registry.kind,
        "summary": (plugins.try_out(plugin).summary or "no docstring") if plugin else row.summary,
        "plugin": f"{plugin.package} {plugin.version}".strip() if plugin else "",
        "description": console.flowing(reflection.getdoc(cls) or ""),
        "paper": getattr(cls, "paper", ""),
        "threat": row.threat or getattr(cls, "threat", ""),
        "needs": needs,
        "presets": {key: dict(values) for key, values in getattr(cls, "presets", {}).items()},
        "options": [
            {
                "name": item.name, "flag": item.flag, "type": item.type_name, "bounds": item.bounds,
                "default": item.default, "description": item.description,
            }
            for item in options
        ],
    }  # fmt: skip


def _in_words(value: object) -> str:
    if isinstance(value, dict):
        return "".join(
            f"\n  {name}: " + ", ".join(f"{key} {shown(setting)}" for key, setting in settings.items())
            for name, settings in value.items()
        )
    return ", ".join(value) if isinstance(value, list) else str(value)


def _option_table(options: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    table.add_column("flag", no_wrap=True)
    table.add_column("default")
    table.add_column("what")
    for item in options:
        default = "" if item["default"] is None else shown(item["default"])
        values = f"{item['type']} {item['bounds']}".strip()
        table.add_row(*map(Text, (item["flag"], default, f"{item['description']} ({values})")))
    return table
