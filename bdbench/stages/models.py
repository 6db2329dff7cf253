"""From a dataset artifact to a model artifact: undefended, or with a defense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdbench.artifacts import finding, store
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.made import Stopwatch, plain, plugins_of
from bdbench.artifacts.manifests import Ask
from bdbench.artifacts.model import ModelArtifact, write_model
from bdbench.defenses.base import Round, check_defended
from bdbench.errors import OptionError
from bdbench.limits import MEMORY_GB, ROWS
from bdbench.plugins import blamed
from bdbench.progress import Progress, Silent
from bdbench.protocol import naming
from bdbench.protocol.budget import resolve_budget, settings_of, usual_preset, usual_settings
from bdbench.protocol.inputs import (
    check_known,
    check_place,
    open_scan,
    open_suspect,
    suspect_line,
    suspect_network,
    task_for,
    unusual_suspect,
)
from bdbench.protocol.networks import fresh_model, model_name, work_of
from bdbench.protocol.planning import plan_text, planned_seconds
from bdbench.registry import DEFENSES, MODELS
from bdbench.training.devices import Precision, resolve_device, suited_threads, use_bf16
from bdbench.training.engine import Engine


def defend(
    dataset: str | Path,
    method: str = "none",
    *,
    model: str = "auto",
    preset: str = "auto",
    options: Mapping[str, Any] | None = None,
    suspect: str | Path | None = None,
    without: str | Path | None = None,
    seed: int | None = None,
    out: Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    image_memory: float | None = None,
    compile: bool = False,  # noqa: A002
    force: bool = False,
    estimate: bool = False,
    progress: Progress | None = None,
) -> ModelArtifact:
    """Train a model on a dataset artifact with a defense; ``none`` is plain training.

    Interrupted, the same call goes on from the last finished epoch that was saved.

    Args:
        dataset: path or id of a dataset artifact.
        method: a registered defense.
        model: a registered model, ``torchvision:NAME``, or ``auto``: convnet below 16 pixels, convnet-16 at
            16, wrn-16-1 above.
        preset: budget: paper, fast, tiny, ``code`` where a method has it, or ``auto``: tiny for small sets of tiny
            images, else fast.
        options: of the method and of the recipe (epochs, lr, batch_size, ...); they win over the preset.
        suspect: path or id of the undefended model, for methods that mend one.
        without: path or id of a scan, for methods that go by one.
        seed: of weights, order and augmentation; default: the dataset's.
        out: folder; default: the dataset's folder name, the method's, and what differs from the defaults, such as
            ``-s5-epochs20``.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto, fp32 or bf16.
        image_memory: gigabytes (10^9 bytes) of training images that may lie on the device; more are streamed from the
            artifact, with the same result. Default: half of what a GPU has free, half of all RAM.
        compile: let torch compile the networks that are trained; where it cannot, say why and go on without. Results
            differ from those of a run without it by rounding.
        force: see `poison`.
        estimate: take a few steps of every phase first, and say how long all of them will take.
        progress: who is told how far it is.

    Raises:
        BdbenchError: see `poison`.
    """
    watch, progress = Stopwatch(), progress or Silent()
    place = resolve_device(device)
    bf16 = use_bf16(precision, place)
    data = DatasetArtifact.open(finding.locate(dataset, "dataset"))
    method = DEFENSES.spelled(method)
    plugin = DEFENSES.plugin(method)
    with blamed(plugin):
        preset, defense, recipe = resolve_budget(method, preset, options or {}, data)
    limit = _image_bytes(image_memory)
    seed = data.manifest.ask.seed if seed is None else seed
    inputs = {"dataset": data.id}
    check_known(defense, method, data)
    suspect_model = open_suspect(defense, method, suspect, data, model, preset, seed)
    if suspect_model is not None:
        inputs["suspect"] = suspect_model.id
        model = suspect_model.manifest.facts["model"]
        progress.note(f"suspect: {suspect_line(suspect_model)}")
    scanned, set_aside = open_scan(defense, method, without, data)
    if scanned is not None:
        inputs["scan"] = scanned.id
    model = model_name(model, data.image_shape)
    if data.manifest.facts.get("guessed", {}).get("augment") == recipe.augment:
        progress.note(f"augmentation: {recipe.augment}, nothing mirrored; --augment crop,flip mirrors too")
    settings = settings_of(recipe, defense)
    config = {"model": model, "preset": preset, **settings}
    ask = Ask("model", method, defense.version, config, seed, inputs)
    usual = usual_settings(method, preset, data)
    if out is None:
        parts = naming.model_parts(
            data.path, preset=(preset, usual_preset(data)), seed=(seed, data.manifest.ask.seed),
            model=(model, model_name("auto", data.image_shape)), suspect=suspect_model,
            changed=naming.differing(settings, usual),
        )  # fmt: skip
        parts += naming.scan_parts(data.path, scanned) if scanned else []
        out = naming.place(
            data.path.with_name(f"{data.path.name}-{method}"), ask, parts, force=force, progress=progress
        )
    check_place(out, suspect_model)
    facts = plugins_of(
        (DEFENSES, method),
        (MODELS, model),
        made_from=[item.manifest for item in (data, suspect_model, scanned) if item],
    )
    if store.existing(out, ask, force=force, facts=facts):
        progress.note(f"{out} is there already ({ask.id}); --force makes it again")
        return ModelArtifact.open(out)
    threads = suited_threads(place, work_of(model, data.image_shape), progress.note)
    read = [data.path, *([suspect_model.path] if suspect_model else [])]
    with threads, store.held(*read), store.create(out, ask) as draft:
        engine = Engine(place, bf16, seed, draft.work, progress, image_memory=limit, compile=compile)
        task = task_for(data, defense, recipe, engine, model, suspect_network(suspect_model, data), set_aside)
        with blamed(plugin):
            if estimate:
                progress.note(plan_text(method, planned_seconds(defense, task)))
            result = defense.run(task)
            check_defended(result, len(data.train), method)
        write_model(
            draft, model, result.model, data.train, engine.history, result.scores, result.set_aside,
            _kept(result.rounds, progress),
        )  # fmt: skip
        draft.facts |= {
            **facts,
            "findings": plain(dict(result.findings)),
            "reads_truth": defense.needs_truth,
            "trained_on": data.content,
            "changed": [name for name, value in settings.items() if value != usual[name]],
            "suspect": unusual_suspect(suspect_model, preset),
        }
        draft.made |= watch.made(place, bf16=bf16)
        draft.made |= {"training_seconds": engine.trained_seconds, "compiled": engine.compiled}
    return ModelArtifact.open(out, is_new=True)


def estimate_seconds(
    dataset: str | Path,
    method: str = "none",
    *,
    model: str = "auto",
    preset: str = "auto",
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> dict[str, float]:
    """Return about how many seconds each phase of a training would take, by a few steps of each; see `defend`.

    A phase that depends on what an earlier one finds may be missing.
    """
    place = resolve_device(device)
    data = DatasetArtifact.open(finding.locate(dataset, "dataset"))
    _, defense, recipe = resolve_budget(method, preset, options or {}, data)
    check_known(defense, method, data)
    name = model_name(model, data.image_shape)
    engine = Engine(place, use_bf16(precision, place), data.manifest.ask.seed)
    suspect = fresh_model(name, data.train, engine.seed, "suspect").eval() if defense.needs_suspect else None
    with suited_threads(place, work_of(name, data.image_shape), lambda _: None):
        return planned_seconds(defense, task_for(data, defense, recipe, engine, name, suspect))


def _kept(rounds: Sequence[Round], progress: Progress) -> Sequence[Round]:
    """Return the rounds of a method, none if they are more than an artifact may hold."""
    rows = sum(len(each.rows) for each in rounds)
    if rows <= ROWS:
        return rounds
    progress.note(f"what was set aside after each epoch is not kept: {rows:,} rows, an artifact holds {ROWS:,}")
    return ()


def _image_bytes(gigabytes: float | None) -> int | None:
    if gigabytes is not None and not 0 <= gigabytes <= MEMORY_GB:
        raise OptionError(f"image_memory {gigabytes} must lie in 0..{MEMORY_GB:,} GB")
    return None if gigabytes is None else int(gigabytes * 1e9)
