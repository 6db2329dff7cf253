"""Options of methods and recipes: declared once as typed fields, read as flags, TOML keys, Python and help."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bdbench.errors import OptionError, unknown_name
from bdbench.wording import respelled

LARGEST = 1e30
"""The largest number that an option may be: far more than any means, far less than 32 bits hold."""


class Options(BaseModel):
    """Base of everything that a user can set: frozen, and nothing undeclared gets in."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _fits_a_tensor(self) -> Self:
        """Refuse numbers that a tensor of 32 bits cannot hold."""
        for name, value in self:
            if isinstance(value, float) and abs(value) > LARGEST:
                raise ValueError(f"{name} {value} is too large: at most {LARGEST:g}")
        return self

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named settings that fill in what the user leaves out."""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Build the options from values of any origin; both spellings of a name are understood.

        Raises:
            OptionError: names the option, the limit, the value and, for a wrong name, the nearest one.
        """
        known = cls.model_fields
        values = {respelled(name, known): value for name, value in values.items()}
        for name in values:
            if name not in known:
                raise unknown_name("option", name, known)
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise OptionError(describe_invalid(error)) from None


def plainly(message: str) -> str:
    """Return what pydantic, or the parser of the command line, says of a value in plain words."""
    for theirs, ours in PLAIN.items():
        message = message.replace(theirs, ours)
    return message


PLAIN = {
    "Value error, ": "",
    "Input should be": "must be", "less than or equal to": "at most", "greater than or equal to": "at least",
    "a valid integer": "a whole number", "a valid number": "a number",
    "a valid boolean": "true or false", "a valid string": "text", ", unable to parse string as an integer": "",
    ", unable to parse string as a number": "", ", unable to interpret input": "",
    ", got a number with a fractional part": "", "Extra inputs are not permitted": "is not known",
}  # fmt: skip
"""From pydantic's words to plain ones."""


def describe_invalid(error: ValidationError) -> str:
    """Turn pydantic's report into one line per option: name, value, limit."""
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        message = plainly(item["msg"])
        shown = f"{name} {item['input']!r} " if message.startswith("must ") else f"{name} {item['input']!r}: "
        lines.append((shown if name else "") + message[:1].lower() + message[1:])
    return "; ".join(lines)


@dataclass(frozen=True)
class OptionInfo:
    """One option, as help, `show` and flags need it."""

    name: str
    flag: str
    annotation: Any
    type_name: str
    default: Any
    bounds: str
    description: str


def describe_options(cls: type[Options]) -> list[OptionInfo]:
    """List the options of a class in the order of declaration, inherited ones first."""
    return [
        OptionInfo(
            name=name,
            flag="--" + name.replace("_", "-"),
            annotation=field.annotation,
            type_name=_type_name(field.annotation),
            default=None if field.default is PydanticUndefined else field.default,
            bounds=_bounds(field),
            description=field.description or "",
        )
        for name, field in cls.model_fields.items()
    ]


def _type_name(annotation: object) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " | ".join("none" if part is type(None) else _type_name(part) for part in get_args(annotation))
    if origin is tuple:
        return ", ".join(_type_name(part) for part in get_args(annotation))
    return getattr(annotation, "__name__", str(annotation))


def _bounds(field: FieldInfo) -> str:
    """Say the limits of a field, such as '>= 0, <= 1'."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = (
        f"{sign} {getattr(item, key)}" for item in field.metadata for key, sign in signs.items() if hasattr(item, key)
    )
    return ", ".join(limits)
