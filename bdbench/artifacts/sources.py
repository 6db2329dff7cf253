"""From a registered name or a path to a source of images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from bdbench.artifacts.manifests import is_artifact
from bdbench.datasets.base import Source
from bdbench.datasets.paths import PathSource
from bdbench.errors import OptionError, did_you_mean
from bdbench.files import expanded
from bdbench.registry import DATASETS


def open_source(dataset: str | Path, options: Mapping[str, Any]) -> Source:
    """Return the source of a registered name, or of a path.

    Raises:
        OptionError: neither is known, the path is an artifact, or an option does not fit.
    """
    if not str(dataset).strip():
        raise OptionError("the name of the dataset is empty; `bdbench list datasets` has names, or give a path")
    if str(dataset) in DATASETS.rows:
        registered = cast("type[Source]", DATASETS.load(str(dataset)))
        for name in options:
            if name in PathSource.model_fields and name not in registered.model_fields:
                flag = name.replace("_", "-")
                raise OptionError(
                    f"--{flag} is for images of your own, named by a path; '{dataset}' is a registered set"
                )
        return registered.parse(options)
    path = expanded(Path(dataset))
    if is_artifact(path):
        raise OptionError(f"{path} is an artifact already; go on with: bdbench defend {path} --method abl")
    if not path.exists() and not re.search(r"[/\\.]", str(dataset)):
        raise OptionError(
            f"unknown dataset '{dataset}'.{did_you_mean(str(dataset), DATASETS.rows)} Known: "
            f"{', '.join(DATASETS.names())}; or give the path of an image folder, a Parquet or an .npz file"
        )
    return PathSource.parse({"path": path, **options})


def as_given(dataset: str | Path, source: Source) -> dict[str, str]:
    """Return `name` of a registered source, or `path` as it was given; the user's own folder is written ``~``."""
    if not isinstance(source, PathSource):
        return {"name": str(dataset)}
    place = expanded(Path(dataset))
    home = Path.home()
    return {"path": f"~/{place.relative_to(home)}" if place.is_relative_to(home) else str(dataset)}


def address_of(dataset: str | Path, source: Source) -> dict[str, Any]:
    """Return `dataset` and `options` that open a source again from any folder: places are absolute."""
    options = source.model_dump(exclude_defaults=True)
    places = {name: str(expanded(value).resolve()) for name, value in options.items() if isinstance(value, Path)}
    options |= places
    return {"dataset": options.pop("path", str(dataset)), "options": options}
