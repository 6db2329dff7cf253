"""How options become flags: a method's own typed flags, and TOML files read as flags."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from bdbench import reading
from bdbench.errors import OptionError, did_you_mean
from bdbench.wording import respelled

if TYPE_CHECKING:
    from bdbench.options import OptionInfo, Options


def value_of(arguments: Sequence[str], flag: str) -> str | None:
    """Return the last value that is given for a flag, as `--flag value` or `--flag=value`."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif argument.startswith(f"{flag}="):
            found = argument.partition("=")[2]
    return found


def with_options(
    command: Callable[..., None],
    groups: Mapping[str, type[Options]],
    texts: Mapping[str, str] = types.MappingProxyType({}),
) -> Callable[..., None]:
    """Return a command that also takes the options of some classes as typed flags.

    Args:
        command: if it has a parameter `options`, that receives what the user gave: name -> value.
        groups: heading in the help -> class of options.
        texts: parameter -> help, in place of its own.
    """
    hints = get_type_hints(command, include_extras=True)
    hints |= {name: _with_help(hints[name], text) for name, text in texts.items()}
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "options"
    ]
    switches = {item.name: item.default for item in own if _has_two_flags(item)}
    own = [part for item in own for part in (_switch(item) if item.name in switches else [item])]
    takes_options = "options" in hints
    described = [(info, heading) for heading, cls in groups.items() for info in _described(cls)]
    presets = next((cls.presets for cls in groups.values() if hasattr(cls, "presets")), {})
    extra = [parameter for info, heading in described for parameter in _parameters(info, heading, presets)]

    def call(**given: Any) -> None:  # noqa: ANN401 - each flag has its own type
        options = {info.name: given.pop(info.name) for info, _ in described}
        for name, value in options.items():
            options[name] = _turned(name, value, given.pop(f"no_{name}", None))
        for name, default in switches.items():
            turned = _turned(name, given[name], given.pop(f"no_{name}"))
            given[name] = default if turned is None else turned
        if takes_options:
            given["options"] = {name: value for name, value in options.items() if value is not None}
        command(**given)

    functools.update_wrapper(call, command)
    del call.__wrapped__  # type: ignore[attr-defined]
    call.__signature__ = inspect.Signature([*own, *extra])  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *extra)}
    return call


def _with_help(annotation: Any, text: str) -> Any:  # noqa: ANN401 - a type with its flag
    kind, info = get_args(annotation)
    info = copy.copy(info)
    info.help = text
    return Annotated[kind, info]


def _turned(name: str, on: Any, off: bool | None) -> Any:  # noqa: ANN401 - any option's value, if it is no switch
    """Return what was given for an option, False where its `--no-` flag was.

    Raises:
        OptionError: both were.
    """
    if not off:
        return on
    if on:
        flag = name.replace("_", "-")
        raise OptionError(f"--{flag} and --no-{flag} contradict each other; give one")
    return False


def _has_two_flags(parameter: inspect.Parameter) -> bool:
    """Say whether typer would show a parameter as `--name` and `--no-name`, in two columns."""
    kind, *infos = get_args(parameter.annotation) or (None,)
    named = [
        decl for info in infos for decl in (*(getattr(info, "param_decls", None) or ()), getattr(info, "default", None))
    ]
    return kind is bool and not any(isinstance(decl, str) for decl in named)  # typer takes the first name for a default


def _switch(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """Return the two parameters of a command's own switch, the second one hidden; see `_parameters`."""
    info = copy.copy(get_args(parameter.annotation)[1])
    flag = f"--{parameter.name.replace('_', '-')}"
    off = f"--no-{flag[2:]}"
    info.param_decls, info.show_default = (flag,), False
    info.help = f"{info.help} ({f'default; off: {off}' if parameter.default else f'off: {off}'})"
    hidden = Annotated[bool | None, typer.Option(off, hidden=True)]
    return [
        parameter.replace(annotation=Annotated[bool | None, info], default=None),
        inspect.Parameter(f"no_{parameter.name}", parameter.kind, default=None, annotation=hidden),
    ]


def _described(cls: type[Options]) -> list[OptionInfo]:
    from bdbench.options import describe_options

    return describe_options(cls)


def _parameters(info: OptionInfo, heading: str, presets: Mapping[str, Mapping[str, Any]]) -> list[inspect.Parameter]:
    """Return the keyword parameters of an option, whose default None means: not given.

    Its help says the default, and which presets have another value.

    A switch has two, `--name` and `--no-name`. The second is in the help of the first alone, where it changes
    something: a column for it would leave too little room for the others, and typer cuts flags that find no room.
    """
    flag_type, choices = _flag_type(info)
    switch = flag_type is bool
    off = f"--no-{info.flag[2:]}"
    default = "" if info.default is None else f"default: {shown(info.default)}"
    others = [f"{name} {shown(values[info.name])}" for name, values in presets.items() if info.name in values]
    default += f"{default and ', '}presets: {', '.join(others)}" if others else ""
    turned = f"off: {off}" if switch and info.default else ""
    notes = "; ".join(filter(None, (info.bounds, ", ".join(choices), turned, default)))
    described = f"{info.description}{f' ({notes})' if notes else ''}"
    option = typer.Option(info.flag, help=described, rich_help_panel=heading, show_default=False)
    parameters = [_keyword(info.name, Annotated[flag_type | None, option])]
    if switch:
        parameters.append(_keyword(f"no_{info.name}", Annotated[bool | None, typer.Option(off, hidden=True)]))
    return parameters


def _keyword(name: str, annotation: Any) -> inspect.Parameter:  # noqa: ANN401 - a type with its flag
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def shown(value: object) -> str:
    """Return a value as a flag takes it: several words for a tuple."""
    return " ".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def _flag_type(info: OptionInfo) -> tuple[Any, tuple[str, ...]]:
    """Return the type that the command line parses, and the values to choose from; the options check all of it."""
    annotation = info.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        annotation = parts[0] if len(parts) == 1 else str
    if get_origin(annotation) is Literal:
        return str, tuple(str(value) for value in get_args(annotation))
    if annotation in (int, float, bool, Path) or get_origin(annotation) is tuple:
        return annotation, ()
    return str, ()


def unknown_flags(arguments: Sequence[str], command: Callable[..., None]) -> dict[str, str]:
    """Return the long flags among one command's arguments that it has not, each with a question for the nearest one."""
    parameters = _parameters_of(command)
    known = {word for parameter in parameters for word in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    shown = [parameter.opts[0] for parameter in parameters if not getattr(parameter, "hidden", False)]
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    flags = [word.partition("=")[0] for word in before if re.match(r"--[a-z]", word)]
    return {flag: did_you_mean(flag, shown) for flag in flags if flag not in known}


def respelled_flags(arguments: Sequence[str], command: Callable[..., None]) -> list[str]:
    """Return one command's arguments with long flags as the command spells them."""
    known = {word for parameter in _parameters_of(command) for word in (*parameter.opts, *parameter.secondary_opts)}
    split = [word.partition("=") if word.startswith("--") else (word, "", "") for word in arguments]
    return [f"{respelled(flag, known)}{sign}{value}" for flag, sign, value in split]


def _parameters_of(command: Callable[..., None]) -> list[Any]:
    """Return a command's parameters as the parser inside typer has them."""
    application = typer.Typer(add_completion=False)
    application.command()(command)
    return list(typer.main.get_command(application).params)


def expand_config(
    arguments: Sequence[str], command: Callable[..., None], owner: Callable[[str], str] = lambda _: ""
) -> list[str]:
    """Put the settings of `--config FILE.toml` as flags before the given ones, so that given flags win.

    Args:
        arguments: of one command, without its name.
        command: from `with_options`.
        owner: says which methods an option belongs to that this command has not, or "".

    Raises:
        OptionError: unreadable file, a key that is no flag of the command, or a value that its flag cannot take.
    """
    name = value_of(arguments, "--config")
    if name is None:
        return list(arguments)
    parameters = _parameters_of(command)
    keys = {_key(parameter.opts[0]): parameter for parameter in parameters if not getattr(parameter, "hidden", False)}
    known = {word for parameter in parameters for word in (*parameter.opts, *parameter.secondary_opts)}
    given = {argument.partition("=")[0] for argument in arguments}
    flags: list[str] = []
    for key, value in read_toml(Path(name)).items():
        parameter = keys.get(respelled(_key(key), keys))
        if parameter is None:
            if owned := owner(_key(key)):
                raise OptionError(f"{name}: {owned}")
            raise OptionError(f"{name}: unknown key '{key}'.{did_you_mean(_key(key), keys)}")
        words = _as_words(parameter, value, f"{name}: {key}")
        flag, off = parameter.opts[0], f"--no-{parameter.opts[0][2:]}"
        if not {flag, off} & given and (value is not False or off in known):
            flags += words
    return [*flags, *arguments]


def _key(flag: str) -> str:
    """Return what a TOML file calls a flag."""
    return flag.removeprefix("--").replace("-", "_")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file of settings.

    Raises:
        OptionError: missing or malformed; names the file and the line.
    """
    return reading.read_toml(path)[1]


def _as_words(parameter: Any, value: object, place: str) -> list[str]:  # noqa: ANN401 - of the parser inside typer
    """Return a setting as words of the command line.

    Raises:
        OptionError: the parameter has no flag, or the flag cannot take such a value.
    """
    flag = parameter.opts[0]
    if parameter.param_type_name == "argument":
        raise OptionError(f"{place} is not a flag; give it on the command line")
    if isinstance(value, dict):
        raise OptionError(f"{place} is a table; settings are plain keys")
    if isinstance(value, bool) != parameter.is_flag:
        takes = "is a switch: true or false" if parameter.is_flag else "takes a value"
        raise OptionError(f"{place} cannot be {str(value).lower()}; {flag} {takes}")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, list) and parameter.nargs == 1 and not parameter.multiple:
        raise OptionError(f"{place} cannot be {value}; {flag} takes one value")
    parts = [str(part) for part in value] if isinstance(value, list) else [str(value)]
    if parameter.multiple:
        return [word for part in parts for word in (flag, part)]
    if len(parts) != parameter.nargs:
        count = "one value" if parameter.nargs == 1 else f"{parameter.nargs} values"
        raise OptionError(f"{place} cannot be {value}; {flag} takes {count}")
    return [flag, *parts]
