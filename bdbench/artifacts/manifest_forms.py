"""The form of a manifest: what must stand in it, and of which type, before anything uses it."""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from bdbench.limits import CLASSES, IMAGE_SIDE, IMAGE_VALUES


def _plain_name(name: str) -> str:
    if name != name.strip() or "/" in name or "\\" in name or "\0" in name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} names no file of this folder")
    return name


def _image_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if max(shape) > IMAGE_SIDE or prod(shape) > IMAGE_VALUES:
        raise ValueError(f"images of {shape} are larger than {IMAGE_VALUES} values")
    return shape


Count = Annotated[StrictInt, Field(ge=0)]
Side = Annotated[StrictInt, Field(ge=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
FileName = Annotated[StrictStr, AfterValidator(_plain_name)]
ImageShape = Annotated[tuple[Side, Side, Side], AfterValidator(_image_shape)]
ClassNames = Annotated[list[StrictStr], Field(min_length=1, max_length=CLASSES)]
Table = dict[StrictStr, Any]


class _Form(BaseModel):
    model_config = ConfigDict(extra="allow", hide_input_in_errors=True)


class FileForm(_Form):
    """What is said of a file."""

    sha256: Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Count


class AskForm(_Form):
    """What was asked."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    kind: Literal["dataset", "model", "scan", "evaluation"]
    method: StrictStr
    version: StrictInt
    config: Table
    seed: StrictInt
    inputs: dict[StrictStr, StrictStr]


class MadeForm(_Form):
    """How it was made."""

    bdbench: StrictStr
    python: StrictStr
    torch: StrictStr
    device: StrictStr
    threads: Count
    precision: StrictStr
    seconds: Number
    peak_memory_bytes: Count
    at: StrictStr
    training_seconds: Number = 0.0
    compiled: StrictBool = False


class OriginForm(_Form):
    """Where the images lie that a dataset does not store."""

    dataset: StrictStr
    options: Table
    fingerprint: StrictStr


class Counts(_Form):
    """Images of each split."""

    train: Count
    test: Count
    triggered: Count
    trusted: Count


class PluginForm(_Form):
    """Whose code took part, and which."""

    package: StrictStr
    version: StrictStr
    source: StrictStr


Plugins = dict[StrictStr, PluginForm]


class DatasetFacts(_Form):
    """Facts of a dataset."""

    name: StrictStr
    augment: StrictStr
    class_names: ClassNames
    image_shape: ImageShape
    counts: Counts
    replay: StrictBool = False
    source_options: Table = {}
    origin: OriginForm | None = None
    remarks: list[StrictStr] = []
    unreadable: list[StrictStr] = []
    guessed: dict[StrictStr, StrictStr] = {}
    given: Annotated[dict[Literal["name", "path"], StrictStr], Field(min_length=1, max_length=1)] | None = None
    plugins: Plugins = {}


class TrainedForm(MadeForm):
    """How a model was made."""

    training_seconds: Number


class WrapperForm(_Form):
    """What changed the structure of a network, and with which options; a wrapper checks its own."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")]
    options: Annotated[Table, Field(max_length=100)]
    plugin: PluginForm | None = None


class ModelFacts(_Form):
    """Facts of a model."""

    model: StrictStr
    class_names: ClassNames
    image_shape: ImageShape
    sets_aside: StrictBool
    trained_on: StrictStr = ""
    findings: Table = {}
    reads_truth: StrictBool = False
    changed: list[StrictStr] = []
    suspect: Table = {}
    plugins: Plugins = {}
    wrapper: WrapperForm | None = None


class ScanFacts(_Form):
    """Facts of a scan."""

    sets_aside: StrictBool
    decide: StrictStr
    class_names: ClassNames
    scanned: StrictStr
    suspect: StrictStr = ""
    null_learned: StrictBool = False
    null: Count = 0
    null_flagged: Count = 0
    flagged: Count = 0
    at_least: Number = 0.0
    smallest_share: Number = 0.0
    findings: Table = {}
    plugins: Plugins = {}


class EvaluationFacts(_Form):
    """Facts of an evaluation: all that a table needs beside the metrics."""

    judged: Literal["model", "scan"] = "model"
    dataset: StrictStr
    dataset_id: StrictStr
    source: StrictStr | None = None
    source_options: Table | None = None
    model: StrictStr
    model_id: StrictStr
    suspect_id: StrictStr | None = None
    suspect: Table | None = None
    attack: StrictStr
    replay: StrictBool = False
    attack_options: Table
    defense: StrictStr
    defense_options: Table
    preset: StrictStr
    findings: Table = {}
    changed: list[StrictStr] = []
    plugins: Plugins = {}
    reads_truth: StrictBool = False
    seed: StrictInt
    attack_seed: StrictInt
    seconds: Number
    peak_memory_bytes: Count
    device: StrictStr
    precision: StrictStr


class ManifestForm(_Form):
    """All of a manifest but what depends on its kind."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    id: StrictStr
    ask: AskForm
    files: dict[FileName, FileForm]
    facts: Table
    made: Table
    schema_: Annotated[StrictInt, Field(alias="schema")]
    seal: StrictStr = ""


PARTS: dict[str, tuple[type[_Form], type[_Form]]] = {
    "dataset": (DatasetFacts, MadeForm),
    "model": (ModelFacts, TrainedForm),
    "scan": (ScanFacts, MadeForm),
    "evaluation": (EvaluationFacts, MadeForm),
}
"""Forms of `facts` and `made` of each kind."""


def misfit(raw: object) -> str:
    """Return what is wrong with the form of a manifest, or '' where nothing is."""
    wrong = _first_error(ManifestForm, raw)
    if wrong or not isinstance(raw, dict):
        return wrong
    facts, made = PARTS[raw["ask"]["kind"]]
    return _first_error(facts, raw["facts"], "facts.") or _first_error(made, raw["made"], "made.")


def _first_error(form: type[_Form], raw: object, place: str = "") -> str:
    try:
        form.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        return f"{place}{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"
    return ""
