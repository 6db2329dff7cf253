"""The Typer application; modules that import torch are loaded by the command that needs them."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bdbench import __version__
from bdbench.cli import (
    compare,
    console,
    docs,
    evaluate,
    explain,
    inspection,
    quickstart,
    report,
    suspects,
    sweep,
    train,
    verify,
)
from bdbench.cli import poison as poison_command
from bdbench.cli.flags import expand_config, read_toml, value_of, with_options
from bdbench.errors import BdbenchError, DamageWarning, OptionError

if TYPE_CHECKING:
    from bdbench.options import Options

HELP = """Put any backdoor attack on image classifiers against any defense, and trust the table.

[bold]poison[/bold] writes a poisoned dataset, [bold]train[/bold] and [bold]defend[/bold] train models on it,
[bold]evaluate[/bold] prints BA (benign accuracy) and ASR (attack success rate). Try: [cyan]bdbench quickstart[/cyan].
Read: [cyan]bdbench docs[/cyan].
"""
INTERRUPTED = 130


def run(arguments: Sequence[str]) -> None:
    """Run the command line.

    Exit codes: 0 done, 1 an error that the user can mend, 2 usage, 3 an assertion does not hold, 130 interrupted.
    """
    with warnings.catch_warnings():
        warnings.showwarning = partial(_show_warning, warnings.showwarning)
        try:
            application, expanded = build(arguments)
        except BdbenchError as error:
            console.say_error(str(error))
            raise SystemExit(1) from None
        application(expanded)


def _show_warning(
    usual: Callable[..., None], message: Warning | str, category: type[Warning], *where: object, **more: object
) -> None:
    """Say a warning of bdbench's as a line; other packages' appear as usual."""
    if issubclass(category, DamageWarning):
        console.say_warning(str(message))
    else:
        usual(message, category, *where, **more)


def build(arguments: Sequence[str]) -> tuple[typer.Typer, list[str]]:
    """Return the application for these arguments, with the flags of the methods that they name, and the arguments
    with settings from `--config` put in.
    """
    application = typer.Typer(help=HELP, rich_markup_mode="rich", pretty_exceptions_enable=False)
    application.callback(invoke_without_command=True)(_root)
    completed = _completed_words()
    words = completed or list(arguments)
    named = next((word for word in words if not word.startswith("-")), "")
    rest = words[words.index(named) + 1 :] if named else []
    commands: dict[str, Callable[..., None]] = {
        "quickstart": quickstart.quickstart,
        "poison": poison_command.poison,
        "take": poison_command.take,
        "train": train.train,
        "defend": train.defend,
        "suspects": suspects.suspects,
        "evaluate": evaluate.evaluate,
        "table": evaluate.table,
        "compare": compare.compare,
        "report": report.report,
        "sweep": sweep.sweep,
        "status": sweep.status,
        "gc": sweep.gc,
        "list": explain.list_names,
        "show": explain.show,
        "inspect": inspection.inspect,
        "verify": verify.verify,
        "docs": docs.docs,
    }
    expanded = list(arguments)
    for name, function in commands.items():
        groups: dict[str, type[Options]] = {}
        try:
            groups = _option_groups(name, rest if name == named else None)
        except OptionError:
            if not completed:  # a name that is still being typed
                raise
        command = with_options(function, groups)
        application.command(name)(_mending(command))
        if name == named and named in arguments:
            start = arguments.index(named) + 1
            expanded = [*arguments[:start], *expand_config(arguments[start:], command)]
    return application, expanded


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.", is_eager=True)] = False,
) -> None:
    if version:
        console.show(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        console.show(context.get_help())
        raise typer.Exit


def _option_groups(command: str, arguments: Sequence[str] | None) -> dict[str, type[Options]]:
    """Return the options that belong to a command; the classes are loaded for the command that is called only."""
    if arguments is None:
        return {}
    if command == "poison":
        from bdbench.registry import ATTACKS

        name = _named(arguments, "attack") or "badnets"
        return {f"Options of {name}": ATTACKS.load(name)}
    if command in ("train", "defend"):
        from bdbench.registry import DEFENSES
        from bdbench.training.recipe import Recipe

        name = (_named(arguments, "method") if command == "defend" else None) or "none"
        cls = DEFENSES.load(name)
        own = {f"Options of {name}": cls} if cls.model_fields else {}
        return {**own, "Recipe (the preset's values where left out)": Recipe}
    return {}


def _named(arguments: Sequence[str], what: str) -> str | None:
    """Return the method that the flags or the TOML file name.

    Raises:
        OptionError: the file has something else than a name there.
    """
    config = value_of(arguments, "--config")
    given = value_of(arguments, f"--{what}")
    if given or config is None:
        return given
    found = read_toml(Path(config)).get(what)
    if not isinstance(found, str | None):
        raise OptionError(f"{config}: {what} must be a name in quotes, not {found!r}; `bdbench list` has the names")
    return found


def _completed_words() -> list[str]:
    """Return the words of the line that a shell asks to complete, without the program's name."""
    line = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")
    return line.split()[1:]


def _mending(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with errors as messages: exit code 1 for what a user can mend, 130 for Ctrl-C."""

    def call(*given: Any, **named: Any) -> None:  # noqa: ANN401 - whatever the command takes
        try:
            command(*given, **named)
        except BdbenchError as error:
            console.say_error(str(error))
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            console.say(
                "[yellow]interrupted[/yellow]; nothing half-written is left, and the same command goes on from the "
                "last checkpoint"
            )
            raise typer.Exit(INTERRUPTED) from None

    call.__name__, call.__doc__ = command.__name__, console.flowing(inspect.cleandoc(command.__doc__ or ""))
    call.__signature__ = inspect.signature(command)  # type: ignore[attr-defined]
    call.__annotations__ = {name: item.annotation for name, item in inspect.signature(command).parameters.items()}
    return call
