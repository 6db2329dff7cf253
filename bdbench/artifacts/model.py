"""Model artifacts: weights, history and, where the method scored samples, its scores."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd  # pyarrow would import it in the middle of its own work, where a Ctrl-C is lost
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from bdbench.artifacts.base import Artifact, checked_samples, write_frame
from bdbench.artifacts.manifests import AGAIN
from bdbench.artifacts.store import Draft
from bdbench.data import ImageDataset
from bdbench.defenses.base import Round, are_samples
from bdbench.errors import ArtifactError, DamagedError, MethodError, OptionError
from bdbench.models.classifier import Classifier, build_classifier, check_range
from bdbench.models.wrappers import Wrapper, wrap
from bdbench.plugins import blamed
from bdbench.registry import MODELS, WRAPPERS, plugin_sources
from bdbench.training.checkpoints import save_tensors
from bdbench.training.loop import Unit

HISTORY = pa.schema({
    "phase": pa.string(), "epoch": pa.int64(), "loss": pa.float64(), "lr": pa.float64(),
    "images_per_second": pa.float64(), "seconds": pa.float64(), "step": pa.int64(),
})  # fmt: skip
"""Columns of a model's history; `step` is null in a phase that is counted in epochs."""
ROUNDS = pa.schema({"phase": pa.string(), "epoch": pa.int32(), "row": pa.int64()})
"""Columns of what a method would have set aside after each epoch."""


class ModelArtifact(Artifact):
    """A trained classifier with its history and, where the method scored samples, its scores."""

    kind = "model"

    def classifier(self) -> Classifier:
        """Return `network`, which refuses images that are not float in [0, 1] with a ValueError.

        Raises:
            ArtifactError: see `network`.
        """
        model = self.network()
        model.register_forward_pre_hook(check_range)
        return model

    def network(self) -> Classifier:
        """Rebuild the network and load its weights, in evaluation mode, on the CPU; nothing looks at its input.

        Raises:
            ArtifactError: damaged, or weights that do not belong to the network.
        """
        facts = self.manifest.facts
        shape = tuple(facts["image_shape"])
        blank = torch.zeros(shape[0])
        model = build_classifier(MODELS.load(facts["model"]), shape, len(facts["class_names"]), blank, blank + 1)
        if facts.get("wrapper") is not None:
            self._wrap(model, shape, **facts["wrapper"])
        try:
            model.load_state_dict(self.tensors("model.safetensors"), strict=True)
        except RuntimeError as error:
            said = textwrap.shorten(str(error), 300, placeholder=" ...")
            message = f"{self.path} does not hold weights of {facts['model']} ({said}); {AGAIN}"
            raise DamagedError(self.path, message) from error
        return model.eval()

    def _wrap(
        self,
        model: Classifier,
        shape: tuple[int, int, int],
        name: str,
        options: dict[str, Any],
        plugin: dict[str, str] | None = None,
    ) -> None:
        """Change a fresh network as the one was that was stored."""
        if WRAPPERS.find(name) is None:
            way_out = f"install {plugin['package']} {plugin['version']}" if plugin else "upgrade bdbench"
            raise ArtifactError(f"{self.path} needs the wrapper '{name}', which is not there; {way_out}")
        try:
            with blamed(WRAPPERS.plugin(name)):
                wrap(model, WRAPPERS.load(name).parse(options), shape)
        except OptionError as error:
            said = textwrap.shorten(str(error), 300, placeholder=" ...")
            message = f"{self.path}: options of the wrapper '{name}' cannot be ({said}); {AGAIN}"
            raise DamagedError(self.path, message) from error

    @property
    def history(self) -> pd.DataFrame:
        """phase, epoch, loss, lr, images_per_second, seconds, step (nan where a phase is counted in epochs)."""
        found = self.frame("history.parquet")
        return found if "step" in found else found.assign(step=math.nan)  # 0.1 counted all phases in epochs

    @property
    def samples(self) -> pd.DataFrame | None:
        """row, score (higher is more suspect), set_aside; None where the method scored nothing."""
        return self.frame("samples.parquet") if "samples.parquet" in self.manifest.files else None

    def samples_of(self, count: int) -> pd.DataFrame | None:
        """Return `samples` of a dataset of `count` training images.

        Raises:
            DamagedError: there are scores of other rows, or one is no number.
        """
        return checked_samples(self, count) if "samples.parquet" in self.manifest.files else None

    def rounds_of(self, count: int) -> list[Round]:
        """Return what the method would have set aside after each epoch, of `count` samples; none where it told none.

        Raises:
            DamagedError: an epoch has a sample twice, or one that is not there.
        """
        if "rounds.parquet" not in self.manifest.files:
            return []
        rounds = []
        for place, chosen in self.frame("rounds.parquet").groupby(["phase", "epoch"], sort=False):
            phase, epoch = cast("tuple[str, int]", place)
            rows = torch.from_numpy(chosen["row"].to_numpy(dtype=np.int64, copy=True))
            if not are_samples(rows, count):
                said = f"does not name {len(rows)} different samples of {count} after {phase} {epoch}"
                raise DamagedError(self.path, f"{self.path / 'rounds.parquet'} {said}; {AGAIN}")
            rounds.append(Round(phase, int(epoch), rows))
        return rounds

    @property
    def dataset_id(self) -> str:
        """Id of the dataset it was trained on."""
        return self.made_from("dataset")


def counted(rows: pd.DataFrame) -> tuple[Unit, np.ndarray]:
    """Return what a phase of a history is counted in, and the count (M,) int64 at the end of each of its M rows."""
    unit: Unit = "step" if np.isfinite(rows["step"]).all() else "epoch"
    return unit, rows[unit].to_numpy(dtype=np.int64)


def write_model(
    draft: Draft,
    name: str,
    model: Classifier,
    data: ImageDataset,
    history: list[dict[str, Any]],
    scores: Tensor | None = None,
    set_aside: Tensor | None = None,
    rounds: Sequence[Round] = (),
) -> None:
    """Write the files and facts of a model artifact.

    Args:
        draft: from `store.create`.
        name: of the registered architecture.
        model: weights are stored on the CPU, contiguous.
        data: what it classifies: classes and image shape.
        history: rows of the engine.
        scores: (N,) float, higher is more suspect; None takes the decision, if there is one, for a score.
        set_aside: (N,) bool, the samples that the method took for poison, or None if it takes no decision.
        rounds: what it would have set aside after each epoch.
    """
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    save_tensors(weights, draft.folder / "model.safetensors")
    pq.write_table(pa.Table.from_pylist(history, HISTORY), draft.folder / "history.parquet")
    if scores is None and set_aside is not None:
        scores = set_aside.float()
    if scores is not None:
        chosen = torch.zeros(len(scores), dtype=torch.bool) if set_aside is None else set_aside
        write_frame(draft, "samples.parquet", {"score": scores.float(), "set_aside": chosen})
    if rounds:
        phases, epochs, rows = zip(*rounds, strict=True)
        counts = [len(chosen) for chosen in rows]
        columns = [np.repeat(phases, counts), np.repeat(epochs, counts), torch.cat(rows).cpu().numpy()]
        pq.write_table(pa.table(columns, schema=ROUNDS), draft.folder / "rounds.parquet")
    if model.wrapper is not None:
        draft.facts["wrapper"] = _told(model.wrapper)
    draft.facts |= {
        "model": name,
        "class_names": list(data.class_names),
        "image_shape": list(data.image_shape),
        "sets_aside": set_aside is not None,
    }


def _told(wrapper: Wrapper) -> dict[str, Any]:
    """Return what a manifest says of a wrapper.

    Raises:
        MethodError: it is not registered, so that nothing could load what it is stored with.
    """
    if WRAPPERS.find(wrapper.name) is None or WRAPPERS.load(wrapper.name) is not type(wrapper):
        raise MethodError(
            f"the wrapper '{wrapper.name}' ({type(wrapper).__qualname__}) is not registered; name it in the "
            "entry-point group bdbench.wrappers"
        )
    sources = plugin_sources((WRAPPERS, wrapper.name))
    return {
        "name": wrapper.name, "options": wrapper.model_dump(mode="json"), "plugin": next(iter(sources.values()), None)
    }  # fmt: skip
