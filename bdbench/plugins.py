"""Methods that other packages add by entry points: which there are, whether they can be used, and whose fault it is."""

from __future__ import annotations

import errno
import hashlib
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from bdbench.errors import BdbenchError, MethodError

BASES = {
    "attack": "bdbench.attacks.base:Attack",
    "defense": "bdbench.defenses.base:Defense",
    "detector": "bdbench.detectors.base:Detector",
    "dataset": "bdbench.datasets.base:Source",
    "wrapper": "bdbench.models.wrappers:Wrapper",
}
"""What a plugin of a kind has to subclass; imported when one is loaded."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Plugin(NamedTuple):
    """A name that an installed package adds.

    Attributes:
        kind: attack, defense, dataset, model or wrapper.
        name: as users type it.
        target: ``module:object``.
        package, version: the distribution that declares it.
    """

    kind: str
    name: str
    target: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"plugin {self.name} of {self.package}"

    @property
    def file(self) -> Path | None:
        """Where its module is written, found without running it; None if there is no such file."""
        try:
            with redirect_stdout(sys.stderr):
                found = find_spec(self.target.partition(":")[0])
        except (Exception, SystemExit):  # noqa: BLE001 - the package above it is run, and may fail in any way
            return None
        return Path(found.origin) if found is not None and found.origin is not None and found.has_location else None

    @property
    def source(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of its module's file, "" if there is none."""
        file = self.file
        try:
            return "" if file is None else hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        except OSError:
            return ""


def installed(kind: str, plural: str) -> dict[str, Plugin]:
    """Return the plugins of a kind by name, from the entry points ``bdbench.PLURAL`` of all installed packages."""
    from importlib.metadata import entry_points

    return {
        point.name: Plugin(
            kind,
            point.name,
            point.value,
            point.dist.name if point.dist else "an unnamed package",
            point.dist.version if point.dist else "",
        )
        for point in entry_points(group=f"bdbench.{plural}")
    }


def load(plugin: Plugin) -> Any:  # noqa: ANN401 - each kind has a class of its own
    """Import and return the object of a plugin; what its module prints goes to standard error.

    Raises:
        MethodError: it cannot be imported, or is not what its kind has to be; names plugin and package.
    """
    module, _, attribute = plugin.target.partition(":")
    try:
        with redirect_stdout(sys.stderr):
            found = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise MethodError(f"{plugin} cannot be imported: {type(error).__name__}: {error}") from error
    if fault := _fault(plugin, found):
        raise MethodError(f"{plugin} cannot be used: {plugin.target} {fault}")
    return found


def _fault(plugin: Plugin, found: object) -> str:
    """Say why an object cannot be what a plugin has to be, or ""."""
    if plugin.kind not in BASES:
        return "" if callable(found) else "cannot be called"
    module, _, name = BASES[plugin.kind].partition(":")
    base = getattr(import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, base)):
        return f"is no subclass of {module}.{name}"
    if inspect.isabstract(found):
        return f"does not define {', '.join(sorted(getattr(found, '__abstractmethods__', ())))}"
    presets = getattr(found, "presets", None)
    if plugin.kind == "defense" and not (
        isinstance(presets, Mapping) and presets and all(isinstance(values, Mapping) for values in presets.values())
    ):
        return "has no `presets`: a defense needs fast and tiny, each a table of options, which may be empty"
    return ""


class Tried(NamedTuple):
    """What came of loading a plugin.

    Attributes:
        summary: first line of its docstring; "" if it has none.
        broken: why it cannot be used, or None.
    """

    summary: str
    broken: str | None


def try_out(plugin: Plugin) -> Tried:
    """Load a plugin and say whether it can be used."""
    try:
        found = load(plugin)
    except MethodError as error:
        return Tried("", str(error).removeprefix(f"{plugin} "))
    own = found.__doc__ if isinstance(found, type) else inspect.getdoc(found)  # a docstring of a base is no summary
    return Tried(inspect.cleandoc(own or "").partition("\n")[0], None)


@contextmanager
def blamed(plugin: Plugin | None) -> Iterator[None]:
    """Turn what goes wrong in a plugin's code inside the block into an error that names plugin and package.

    Errors that a user can mend, and a full disk, stay as they are; with None, all do.

    Raises:
        MethodError: in place of any other exception.
    """
    try:
        yield
    except MethodError as error:
        raise error if plugin is None else MethodError(f"{plugin}: {error}") from error
    except BdbenchError:
        raise
    except (Exception, SystemExit) as error:
        if plugin is None or (isinstance(error, OSError) and error.errno in DISK_FULL):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if plugin.file is not None and Path(frame.filename) == plugin.file]
        last = (own or frames)[-1]
        said = str(error).partition("\n")[0]
        raise MethodError(
            f"{plugin} failed in {last.filename}, line {last.lineno}: {type(error).__name__}: {said}; with "
            "BDBENCH_TRACEBACK=1 the whole traceback is shown"
        ) from error
