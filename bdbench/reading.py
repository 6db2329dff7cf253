"""How text from outside is read: JSON and TOML within limits, as tables or an error, never by running anything."""

from __future__ import annotations

import datetime as dt
import json
import tomllib
from pathlib import Path
from typing import Any

from bdbench.errors import OptionError
from bdbench.limits import TEXT_BYTES


def read_text(path: Path) -> str:
    """Return a text file's content, UTF-8 with or without a byte-order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is longer than `TEXT_BYTES`, or not UTF-8.
    """
    with path.open("rb") as file:
        content = file.read(TEXT_BYTES + 1)
    if len(content) > TEXT_BYTES:
        raise ValueError(f"it has more than {TEXT_BYTES // 2**20} MB")
    return content.decode("utf-8-sig")


def read_json(path: Path) -> Any:  # noqa: ANN401 - JSON
    """Return what a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, too long, or nested too deeply.
    """
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_toml(path: Path, hint: str = "") -> tuple[str, dict[str, Any]]:
    """Return the text of a TOML file and what it says.

    Args:
        path: of the file.
        hint: what to try where the file cannot be read.

    Raises:
        OptionError: it cannot be read, is not TOML, too long, nested too deeply, or holds a date, which JSON has not;
            names the file and the line, or the key.
    """
    try:
        text = read_text(path)
        found = tomllib.loads(text)
        dated = _dated(found)
    except OSError as error:
        raise OptionError(f"cannot read {path}: {error.strerror or error}{hint}") from error
    except RecursionError:
        raise OptionError(f"{path} is not TOML that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise OptionError(f"{path} is not TOML: {error}") from error
    if dated is not None:
        key, value = dated
        raise OptionError(f"{path}: `{key}` cannot be {value}: no option is a date or a time; put text into quotes")
    return text, found


def _dated(value: object, key: str = "") -> tuple[str, object] | None:
    """Return the key and the value of the first date or time, or None."""
    if isinstance(value, (dt.date, dt.time)):
        return key, value
    inside = (
        value.items() if isinstance(value, dict) else ((key, item) for item in value) if isinstance(value, list) else ()
    )
    return next((found for name, item in inside if (found := _dated(item, name))), None)
