"""The Typer application; modules that import torch are loaded by the command that needs them."""

from __future__ import annotations

import errno
import inspect
import os
import re
import sys
import traceback
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
    doctor,
    evaluate,
    explain,
    inspection,
    quickstart,
    report,
    scan,
    suspects,
    sweep,
    train,
    verify,
)
from bdbench.cli import poison as poison_command
from bdbench.cli.flags import expand_config, read_toml, respelled_flags, unknown_flags, value_of, with_options
from bdbench.errors import BdbenchError, DamageWarning, OptionError, OriginWarning, SourceWarning
from bdbench.wording import listed, respelled

if TYPE_CHECKING:
    from bdbench.options import Options

HELP = """Put any backdoor attack on image classifiers against any defense, and trust the table.

[bold]poison[/bold] writes a poisoned dataset, [bold]train[/bold] and [bold]defend[/bold] train models on it,
[bold]evaluate[/bold] prints BA (benign accuracy) and ASR (attack success rate). Try: [cyan]bdbench quickstart[/cyan].
Read: [cyan]bdbench docs[/cyan].
"""
INTERRUPTED = 130
ADVICE = {
    errno.ENAMETOOLONG: "give a shorter --out",
    errno.ENOSPC: "make room, or choose another place",
    errno.EDQUOT: "make room in your quota, or choose another place",
    errno.EROFS: "the disk is read-only; choose another place",
    errno.EACCES: "you may not read, enter or write it; change its permissions, or choose another place",
    errno.ENOTDIR: "a part of the path is a file; choose another place",
    errno.EMFILE: "too many files are open; raise the limit with ulimit -n",
}
"""What mends an error of the operating system."""
MORE = "More"
PANELS = {
    "The walk": "quickstart poison take train defend scan evaluate",
    "Look at it": "table compare report suspects inspect",
    "Grids": "sweep status",
    "What there is": "list show docs",
    "Housekeeping": "verify gc doctor",
}
"""Groups of commands in the help; a command that is in none is under `MORE`."""


def run(arguments: Sequence[str]) -> None:
    """Run the command line; `bdbench.errors` says what its exit codes mean."""
    with warnings.catch_warnings():
        warnings.showwarning = partial(_show_warning, warnings.showwarning)
        try:
            application, expanded = build(arguments)
        except BdbenchError as error:
            _say_error(error)
            raise SystemExit(error.exit_code) from None
        code = _parsed(application, expanded)
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError as error:
            code = _say_system_error(error)
            sys.stdout = None
        raise SystemExit(code)


def _parsed(application: typer.Typer, arguments: Sequence[str]) -> int:
    """Run the application and return its exit code; what its parser refuses is said in a line, as all other errors."""
    try:
        code = application(list(arguments), prog_name="bdbench", standalone_mode=False)
    except OSError as error:  # of a flag that looks at its value
        return _say_system_error(error)
    except typer.Abort:
        console.say("[yellow]interrupted[/yellow]")
        return INTERRUPTED
    except Exception as error:
        said = getattr(error, "format_message", None)  # of the parser's own errors, which typer does not name
        if said is None:
            raise
        from bdbench.options import plainly

        context = getattr(error, "ctx", None)  # none where a flag has too few values
        named = next((word for word in arguments if not word.startswith("-")), "")
        page = f"{context.command_path} --help" if context else _help_of(named, arguments)
        console.say_error(f"{plainly(said()).rstrip('.')}. See: {page}")
        return OptionError.exit_code
    return code if isinstance(code, int) else 0


def _say_error(error: BdbenchError) -> None:
    """Say an error as a line; with BDBENCH_TRACEBACK=1 its traceback comes first."""
    if os.environ.get("BDBENCH_TRACEBACK", "0") not in ("", "0"):
        console.say_plainly("".join(traceback.format_exception(error)))
    console.say_error(str(error))


def _say_system_error(error: OSError) -> int:
    """Say an error of the operating system with the path, the reason and the way out; return the exit code."""
    if isinstance(error, BrokenPipeError):  # whoever read the output has seen enough
        sys.stdout = None
        return BdbenchError.exit_code
    place = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    advice = ADVICE.get(error.errno or 0, "look at the path, its permissions and its disk")
    console.say_error(f"{place or 'the output'}: {error.strerror or error}; {advice}")
    return BdbenchError.exit_code


def _show_warning(
    usual: Callable[..., None], message: Warning | str, category: type[Warning], *where: object, **more: object
) -> None:
    """Say a warning of bdbench's as a line; other packages' appear as usual."""
    if issubclass(category, DamageWarning | OriginWarning | SourceWarning):
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
        "scan": scan.scan,
        "suspects": suspects.suspects,
        "evaluate": evaluate.evaluate,
        "table": evaluate.table,
        "compare": compare.compare,
        "report": report.report,
        "sweep": sweep.sweep,
        "status": sweep.status,
        "list": explain.list_names,
        "show": explain.show,
        "gc": sweep.gc,
        "inspect": inspection.inspect,
        "verify": verify.verify,
        "docs": docs.docs,
        "doctor": doctor.doctor,
    }
    if named == "list":
        arguments = [respelled(word, set(explain.Plural)) for word in arguments]
    panels = {name: panel for panel, names in PANELS.items() for name in names.split()}
    expanded = list(arguments)
    # Only the command that is called is built, where no help lists the others: all 19 take 20 ms.
    wanted = [named] if words[:1] == [named] and named in commands and not completed else list(commands)
    for name in wanted:
        function = commands[name]
        groups: dict[str, type[Options]] = {}
        try:
            groups = _option_groups(name, rest if name == named else None)
        except BdbenchError:
            if not completed:  # a name that is still being typed
                raise
        command = with_options(function, groups, _names_told(name) if name == named else {})
        application.command(name, rich_help_panel=panels.get(name, MORE))(_mending(command))
        if name == named and named in arguments:
            start = arguments.index(named) + 1
            arguments = [*arguments[:start], *respelled_flags(arguments[start:], command)]
            owner = partial(_owner, name, rest)
            for flag, near in unknown_flags(arguments[start:], command).items():
                owned = owner(flag.removeprefix("--").removeprefix("no-").replace("-", "_"), flag)
                raise OptionError(owned or f"bdbench {name} has no option {flag}.{near} See: {_help_of(name, rest)}")
            expanded = [*arguments[:start], *expand_config(arguments[start:], command, owner)]
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
    if command == "scan":
        from bdbench.registry import DETECTORS

        detector = _named(arguments, "method")
        return {} if detector is None else {f"Options of {detector}": DETECTORS.load(detector)}
    if command in ("train", "defend"):
        from bdbench.registry import DEFENSES
        from bdbench.training.recipe import Recipe

        name = (_named(arguments, "method") if command == "defend" else None) or "none"
        cls = DEFENSES.load(name)
        own = {f"Options of {name}": cls} if cls.model_fields else {}
        return {**own, "Recipe (the preset's values where left out)": Recipe}
    return {}


def _names_told(command: str) -> dict[str, str]:
    """Return the help of the flag that names a method; looking for plugins takes time that other commands spare."""
    from bdbench.registry import ATTACKS, DEFENSES, repairs

    if command == "poison":
        return {"attack": f"One of: {', '.join(ATTACKS.names())}."}
    if command != "defend":
        return {}
    mend = repairs()
    training = [name for name in DEFENSES.names() if name not in mend]
    return {"method": f"Training: {', '.join(training)}, or repair of a model: {', '.join(mend)}."}


def _help_of(command: str, arguments: Sequence[str]) -> str:
    """Return the command whose help shows the options of the method that is named."""
    what = {"poison": "attack", "defend": "method", "scan": "method"}.get(command, "")
    named = _named(arguments, what) if what else None
    return " ".join(["bdbench", *([command] if command else []), *([f"--{what} {named}"] if named else []), "--help"])


def _owner(command: str, arguments: Sequence[str], option: str, shown: str = "") -> str:
    """Say which methods an option belongs to that the chosen one has not, or "".

    Args:
        command: poison, train, defend or scan; others have no such options.
        arguments: its words.
        option: with underscores.
        shown: as it was typed, if not as `option`.
    """
    from bdbench.registry import ATTACKS, DEFENSES, DETECTORS

    known = {
        "poison": (ATTACKS, "attack", "badnets"), "train": (DEFENSES, "method", "none"),
        "defend": (DEFENSES, "method", "none"), "scan": (DETECTORS, "method", "no detector"),
    }  # fmt: skip
    if command not in known:
        return ""
    registry, what, usual = known[command]
    owners = registry.owners(option)
    if not owners:
        return ""
    chosen = "train has no defense" if command == "train" else f"you chose {_named(arguments, what) or usual}"
    return f"{shown or option} belongs to {listed(owners)} ({chosen})"


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
    """Return the command with errors as messages and their exit codes, 130 for Ctrl-C."""

    def call(*given: Any, **named: Any) -> None:  # noqa: ANN401 - whatever the command takes
        try:
            command(*given, **named)
        except BdbenchError as error:
            _say_error(error)
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            raise typer.Exit(_say_system_error(error)) from error
        except KeyboardInterrupt:
            console.say(
                "[yellow]interrupted[/yellow]; nothing half-written is left; the same command continues from the "
                "last checkpoint"
            )
            raise typer.Exit(INTERRUPTED) from None

    call.__name__, call.__doc__ = command.__name__, _help(command)
    call.__signature__ = inspect.signature(command)  # type: ignore[attr-defined]
    call.__annotations__ = {name: item.annotation for name, item in inspect.signature(command).parameters.items()}
    return call


def _help(command: Callable[..., None]) -> str:
    """Return a command's docstring as typer shows it: paragraphs flow, examples are indented lines in a colour.

    The markup around them keeps typer from taking their indentation away where nothing stands before them.
    """
    from rich.markup import escape

    text = console.flowing(inspect.cleandoc(command.__doc__ or ""))
    return re.sub(r"(?m)^  (.+)$", lambda found: f"[cyan]  {escape(found[1])}[/cyan]", text)
