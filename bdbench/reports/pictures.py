"""Pictures of artifacts: what a trigger looks like, how a training went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.model import ModelArtifact, counted
from bdbench.errors import ArtifactError
from bdbench.files import written_file

EXAMPLES = 8
SHOWN = 200
GALLERY_COLUMNS = 9
SHEET_COLUMNS, SHEET_ROWS, LONGEST_NAME = 10, 5, 16


def contact_sheet(data: DatasetArtifact, path: Path) -> None:
    """Draw triggered test images under their clean ones, and the difference, amplified to the full range.

    Of a dataset without triggers draw training images of every class instead.
    """
    triggered, test, rows = data.triggered, data.test, data.triggered_rows
    if not len(triggered):
        class_sheet(data, path)
        return
    places = np.linspace(0, len(triggered) - 1, min(EXAMPLES, len(triggered))).round().astype(int)
    figure = Figure(figsize=(1.3 * len(places) + 1.2, 4.6), layout="constrained")
    axes = figure.subplots(3, len(places), squeeze=False)
    after = triggered.images[places].float()
    before = test.images[rows[places]].float()
    change = after - before
    largest = max(1.0, float(change.abs().max()))
    for column, place in enumerate(places):
        true, wanted = int(test.labels[rows[place]]), int(triggered.labels[place])
        pictures = (before[column], after[column], 127.5 + 127.5 * change[column] / largest)
        titles = (data.class_names[true], f"→ {data.class_names[wanted]}", "")
        for line, (pixels, title) in enumerate(zip(pictures, titles, strict=True)):
            axis = axes[line, column]
            _show(axis, pixels, title)
            axis.set_xticks([])
            axis.set_yticks([])
    for line, label in enumerate(("clean", "triggered", f"change × {127.5 / largest:.1f}\n(gray: none)")):
        axes[line, 0].set_ylabel(label)
    _head(figure, f"{data.manifest.facts['name']}, {data.manifest.ask.method}")
    _save(figure, path)


def class_sheet(data: DatasetArtifact, path: Path) -> None:
    """Draw some training images of each of the first classes, a line each, as they are: nothing is amplified."""
    labels = data.train.labels
    names = [(number, name) for number, name in enumerate(data.class_names) if (labels == number).any()][:SHEET_COLUMNS]
    figure = Figure(figsize=(1.3 * EXAMPLES + 1.2, 1.35 * len(names) + 0.5), layout="constrained")
    axes = figure.subplots(len(names), EXAMPLES, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for line, (number, name) in enumerate(names):
        rows = torch.nonzero(labels == number).flatten()
        chosen = np.linspace(0, len(rows) - 1, min(EXAMPLES, len(rows))).round().astype(int)
        for axis, row in zip(axes[line], rows[chosen].tolist(), strict=False):
            _show(axis, data.train.images[row].float(), "")
        axes[line, 0].set_ylabel(drawable(shortened(name)), fontfamily=font_families(), parse_math=False)
        for axis in axes[line, len(chosen) :]:
            axis.axis("off")
    shown = f", {len(names)} of {len(data.class_names):,} classes" if len(names) < len(data.class_names) else ""
    _head(figure, f"{data.manifest.facts['name']}, {'as it was found' if data.is_taken else 'nothing poisoned'}{shown}")
    _save(figure, path)


def gallery(sources: Sequence[DatasetArtifact], path: Path) -> None:
    """Draw one test image under the trigger of every dataset, with the change, amplified to the full range.

    Args:
        sources: poisoned versions of the same test images.
        path: of the picture.

    Raises:
        ArtifactError: their test images differ, or no test image is triggered in all of them.
    """
    row = shared_row(sources)
    before = sources[0].test.images[row].float()
    columns = min(GALLERY_COLUMNS, len(sources) + 1)
    bands = math.ceil((len(sources) + 1) / columns)
    figure = Figure(figsize=(1.25 * columns, 2.7 * bands), layout="constrained")
    axes = figure.subplots(2 * bands, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    _show(axes[0, 0], before, "clean")
    for place, source in enumerate(sources, 1):
        band, column = divmod(place, columns)
        shown = triggered_example(source, row)
        _show(axes[2 * band, column], shown.triggered, source.manifest.ask.method)
        _show(axes[2 * band + 1, column], shown.change, f"x {shown.gain:.1f}")
    _save(figure, path)


def shared_row(sources: Sequence[DatasetArtifact]) -> int:
    """Return the test row of an image that all datasets trigger, of middle contrast among the first.

    Raises:
        ArtifactError: their test images differ, or no test image is triggered in all of them.
    """
    first = sources[0].test.images
    if any(not torch.equal(it.test.images, first) for it in sources[1:]):
        raise ArtifactError("the datasets do not have the same test images; poison one source with each attack")
    shared = set.intersection(*({int(row) for row in it.triggered_rows} for it in sources))
    if not shared:
        raise ArtifactError("no test image is triggered in all of the datasets; their targets leave none")
    # Of the images that all trigger, one of middle contrast shows faint and strong triggers alike.
    rows = sorted(shared)[:SHOWN]
    contrast = first[rows].float().flatten(1).std(1)
    return rows[int(contrast.argsort()[len(rows) // 2])]


def suspect_sheet(ranked: pd.DataFrame, data: DatasetArtifact, path: Path, title_of: str) -> None:
    """Draw the most suspect training images, with rank, the class that they are labelled as, file and score.

    Args:
        ranked: from `bdbench.protocol.suspects.rank`.
        data: the dataset.
        path: of the picture.
        title_of: what was ranked by what, for the heading.
    """
    shown = ranked.head(SHEET_COLUMNS * SHEET_ROWS)
    pictures = []
    for number, item in enumerate(shown.to_dict("records"), 1):
        name = str(item["place"]).rpartition("/")[2]
        title = f"#{number} {shortened(str(item['class']))}\n{shortened(name)}\nscore {item['score']:.4g}"
        pictures.append((data.train.images[int(item["row"])].float(), title))
    _sheet(pictures, path, f"{title_of}: the most suspect training images (rank and label, file, score)")


def disagreement_sheet(found: pd.DataFrame, data: DatasetArtifact, path: Path, a: str, b: str) -> None:
    """Draw the first test images to which two models give different classes.

    Args:
        found: from `bdbench.protocol.comparing.disagreements`, at least one.
        data: the dataset.
        path: of the picture.
        a, b: what the models are called.
    """
    splits = {"test": data.test.images, "triggered": data.triggered.images}
    pictures = []
    for item in found.head(SHEET_COLUMNS * SHEET_ROWS).to_dict("records"):
        true, said_a, said_b = (shortened(data.class_names[int(item[name])]) for name in ("true", "a", "b"))
        kind = "triggered" if item["split"] == "triggered" else "clean"
        pictures.append(
            (splits[item["split"]][int(item["place"])].float(), f"{kind}: {true}\nA: {said_a}\nB: {said_b}")
        )
    _sheet(pictures, path, f"{data.manifest.facts['name']}, {data.manifest.ask.method}. A: {a}. B: {b}")


def _sheet(pictures: Sequence[tuple[Tensor, str]], path: Path, heading: str) -> None:
    """Draw images (C, H, W) float in [0, 255] with three lines of title each."""
    lines = math.ceil(len(pictures) / SHEET_COLUMNS)
    figure = Figure(figsize=(1.4 * SHEET_COLUMNS, 1.85 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, SHEET_COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (pixels, title) in zip(axes.flat, pictures, strict=False):
        _show(axis, pixels, title)
    _head(figure, heading)
    _save(figure, path)


def shortened(name: str) -> str:
    """Return a name that fits above a picture: its middle left out, which an ellipsis says."""
    if len(name) <= LONGEST_NAME:
        return name
    half = (LONGEST_NAME - 1) // 2
    return f"{name[: LONGEST_NAME - 1 - half]}…{name[-half:]}"


class Example(NamedTuple):
    """One test image (C, H, W) float in [0, 255]: clean, triggered, and the change times `gain` around gray."""

    clean: Tensor
    triggered: Tensor
    change: Tensor
    gain: float


def triggered_example(source: DatasetArtifact, row: int) -> Example:
    """Return a test row of a dataset with and without the trigger, and the change, amplified to the full range."""
    before = source.test.images[row].float()
    after = source.triggered.images[source.triggered_rows.tolist().index(row)].float()
    change = after - before
    gain = 127.5 / max(1.0, float(change.abs().max()))
    return Example(before, after, 127.5 + gain * change, gain)


def _show(axis: Axes, pixels: Tensor, title: str) -> None:
    """Show an image (C, H, W) float in [0, 255]."""
    shown = pixels.permute(1, 2, 0).round().numpy().astype(np.uint8)
    axis.imshow(shown.squeeze(-1) if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=255)
    axis.set_title(drawable(title), fontsize=9, fontfamily=font_families(), parse_math=False)


def _head(figure: Figure, heading: str) -> None:
    figure.suptitle(drawable(heading), fontfamily=font_families(), parse_math=False)


FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Source Han Sans", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "Droid Sans Fallback", "IPAGothic", "IPAexGothic", "TakaoGothic", "NanumGothic",
    "Hiragino Sans", "PingFang SC", "Arial Unicode MS", "Microsoft YaHei", "Yu Gothic", "MS Gothic", "Malgun Gothic",
    "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji", "Symbola",
    "Segoe UI Symbol",
)  # fmt: skip
"""Fonts with letters that matplotlib's own lacks; those that are installed are used."""


@cache
def font_families() -> list[str]:
    """Return matplotlib's own font and what is installed of `FONTS`."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in FONTS if name in installed)]


@cache
def _has_glyph(character: str) -> bool:
    paths = (font_manager.findfont(font_manager.FontProperties(family=[name])) for name in font_families())
    return any(font_manager.get_font(path).get_char_index(ord(character)) for path in paths)


def drawable(text: str) -> str:
    """Return a text in which each character that no font here has is a ``?``."""
    return "".join(it if it == "\n" or _has_glyph(it) else "?" for it in text)


def loss_curves(model: ModelArtifact, path: Path) -> None:
    """Draw the mean loss over epochs, or steps where a phase is counted in them, one panel a phase."""
    phases = list(model.history.groupby("phase", sort=False))
    figure = Figure(figsize=(4 * len(phases), 3.2), layout="constrained")
    for axis, (phase, rows) in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        unit, count = counted(rows)
        axis.plot(count, rows["loss"], marker=".")
        axis.set_title(str(phase))
        axis.set_xlabel(unit)
        axis.set_ylabel("loss")
        axis.grid(alpha=0.3)
    asked, network, preset = model.manifest.ask, model.option("model"), model.option("preset")
    _head(figure, f"{asked.method}, {network}, preset {preset}, seed {asked.seed}")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with mpl.rc_context({"savefig.dpi": 150}), written_file(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower() or "png")
