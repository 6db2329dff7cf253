"""Pictures of artifacts: what a trigger looks like, how a training went."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from bdbench.artifacts import DatasetArtifact, ModelArtifact

EXAMPLES = 8


def contact_sheet(data: DatasetArtifact, path: Path) -> None:
    """Draw triggered test images under their clean ones, and the difference, amplified to the full range."""
    triggered, test, rows = data.triggered, data.test, data.triggered_rows
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
        titles = (data.class_names[true], f"-> {data.class_names[wanted]}", "")
        for line, (pixels, title) in enumerate(zip(pictures, titles, strict=True)):
            axis = axes[line, column]
            shown = pixels.permute(1, 2, 0).round().numpy().astype(np.uint8)
            axis.imshow(shown.squeeze(-1) if shown.shape[2] == 1 else shown, cmap="gray", vmin=0, vmax=255)
            axis.set_title(title, fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
    for line, label in enumerate(("clean", "triggered", f"change x {127.5 / largest:.1f}")):
        axes[line, 0].set_ylabel(label)
    figure.suptitle(f"{data.manifest.facts['name']}, {data.manifest.ask.method}")
    _save(figure, path)


def loss_curves(model: ModelArtifact, path: Path) -> None:
    """Draw the mean loss of every epoch, one panel a phase."""
    phases = list(model.history.groupby("phase", sort=False))
    figure = Figure(figsize=(4 * len(phases), 3.2), layout="constrained")
    for axis, (phase, rows) in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        axis.plot(rows["epoch"], rows["loss"], marker=".")
        axis.set_title(str(phase))
        axis.set_xlabel("epoch")
        axis.set_ylabel("loss")
        axis.grid(alpha=0.3)
    asked = model.manifest.ask
    figure.suptitle(f"{asked.method}, {asked.config['model']}, preset {asked.config['preset']}, seed {asked.seed}")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with mpl.rc_context({"savefig.dpi": 150}):
        figure.savefig(path)
