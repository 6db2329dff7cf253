"""What is written comes back equal, and verify finds what does not fit together."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import FACTS, MADE, toy_data, toy_lab, toy_model, toy_source

from bdbench.artifacts import store
from bdbench.artifacts.dataset import DatasetArtifact, write_dataset
from bdbench.artifacts.kinds import EvaluationArtifact, open_any, verify
from bdbench.artifacts.made import Stopwatch, plain
from bdbench.artifacts.manifests import Ask
from bdbench.artifacts.model import ModelArtifact, write_model
from bdbench.artifacts.store import Draft
from bdbench.attacks.badnets import BadNets
from bdbench.data import PoisonedDataset, SourceData
from bdbench.errors import ArtifactError
from bdbench.models.classifier import build_classifier
from bdbench.protocol.poisoning import poison_source
from bdbench.registry import MODELS

ASK = Ask("dataset", "badnets", 1, {}, 0, {})
MODEL_ASK = Ask("model", "none", 1, {}, 0, {"dataset": ASK.id})


@pytest.fixture
def poisoned(source: SourceData) -> PoisonedDataset:
    return poison_source(source, BadNets(), toy_lab(0), trusted=0.1)


@pytest.fixture
def colour_poisoned() -> PoisonedDataset:
    return poison_source(toy_source(), BadNets(), toy_lab(0), trusted=0.1)


def seal_dataset(path: Path, data: PoisonedDataset, edit: Callable[[Draft], object] | None = None) -> DatasetArtifact:
    """Write a dataset artifact, changed by `edit` before it is sealed, so that its hashes are right."""
    with store.create(path, ASK) as draft:
        write_dataset(draft, data, name="toy", augment="crop,flip")
        draft.made |= MADE
        if edit is not None:
            edit(draft)
    return DatasetArtifact.open(path)


def test_a_data_set_comes_back_bit_equal(tmp_path: Path, poisoned: PoisonedDataset) -> None:
    artifact = seal_dataset(tmp_path / "a", poisoned)
    assert artifact.train.fingerprint == poisoned.visible.fingerprint
    assert artifact.test.fingerprint == poisoned.test.fingerprint
    assert artifact.triggered.fingerprint == poisoned.triggered.fingerprint
    assert artifact.trusted is not None
    assert artifact.trusted.fingerprint == poisoned.trusted.fingerprint
    assert torch.equal(artifact.triggered_rows, poisoned.triggered_rows)
    assert artifact.truth["clean_label"].tolist() == poisoned.clean_labels.tolist()
    assert artifact.truth["role"].tolist() == poisoned.roles.tolist()
    assert artifact.truth["source_row"].tolist() == poisoned.source_rows.tolist()
    assert artifact.truth["row"].tolist() == list(range(108))
    assert {name: value.tolist() for name, value in artifact.trigger_state.items()} == {
        name: value.tolist() for name, value in poisoned.trigger_state.items()
    }


def test_what_a_defender_sees_tells_nothing_of_the_truth(tmp_path: Path, colour_poisoned: PoisonedDataset) -> None:
    artifact = seal_dataset(tmp_path / "a", colour_poisoned)
    assert list(artifact.frame("train.parquet").columns) == ["row", "label"]
    assert list(artifact.tensors("train.safetensors")) == ["images"]


def test_a_data_set_without_trusted_images_has_none(tmp_path: Path) -> None:
    artifact = seal_dataset(tmp_path / "a", poison_source(toy_source(), BadNets(), toy_lab(0), trusted=0))
    assert artifact.trusted is None
    assert "trusted.safetensors" not in artifact.manifest.files


def test_equal_content_gives_equal_files(tmp_path: Path, colour_poisoned: PoisonedDataset) -> None:
    one = seal_dataset(tmp_path / "one", colour_poisoned)
    other = seal_dataset(tmp_path / "other", colour_poisoned)
    assert one.manifest.files == other.manifest.files


def test_no_file_is_a_pickle(tmp_path: Path, colour_poisoned: PoisonedDataset) -> None:
    path = seal_dataset(tmp_path / "a", colour_poisoned).path
    assert {file.suffix for file in path.iterdir()} == {".json", ".parquet", ".safetensors"}


def test_verify_finds_nothing_wrong_with_a_good_data_set(tmp_path: Path, poisoned: PoisonedDataset) -> None:
    path = seal_dataset(tmp_path / "a", poisoned).path
    assert isinstance(verify(path), DatasetArtifact)


def test_verify_finds_a_flipped_byte_in_any_file(tmp_path: Path, colour_poisoned: PoisonedDataset) -> None:
    artifact = seal_dataset(tmp_path / "a", colour_poisoned)
    for name in artifact.manifest.files:
        file = artifact.path / name
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(ArtifactError, match=f"{name} was changed"):
            verify(artifact.path)
        file.write_bytes(good)
    verify(artifact.path)


def test_verify_names_files_that_do_not_belong(tmp_path: Path, colour_poisoned: PoisonedDataset) -> None:
    path = seal_dataset(tmp_path / "a", colour_poisoned).path
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds files that its manifest does not know: notes\.txt"):
        verify(path)


def test_truth_must_have_a_row_for_every_training_image(tmp_path: Path, colour_poisoned: PoisonedDataset) -> None:
    short = replace(
        colour_poisoned,
        clean_labels=colour_poisoned.clean_labels[:-1],
        roles=colour_poisoned.roles[:-1],
        source_rows=colour_poisoned.source_rows[:-1],
    )
    path = seal_dataset(tmp_path / "a", short).path
    with pytest.raises(ArtifactError, match=r"truth\.parquet has 107 rows for 108 images"):
        verify(path)


@pytest.mark.parametrize("row", [-1, 40])
def test_a_triggered_image_must_come_from_a_test_row(
    tmp_path: Path, colour_poisoned: PoisonedDataset, row: int
) -> None:
    rows = colour_poisoned.triggered_rows.clone()
    rows[0] = row
    path = seal_dataset(tmp_path / "a", replace(colour_poisoned, triggered_rows=rows)).path
    with pytest.raises(ArtifactError, match="names a test row that does not exist"):
        verify(path)


def test_counts_must_be_those_of_the_manifest(tmp_path: Path, colour_poisoned: PoisonedDataset) -> None:
    def miscount(draft: Draft) -> None:
        draft.facts["counts"]["test"] = 41

    path = seal_dataset(tmp_path / "a", colour_poisoned, miscount).path
    with pytest.raises(ArtifactError, match="40 images in test, the manifest says 41"):
        verify(path)


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_that_is_no_class_is_said(tmp_path: Path, colour_poisoned: PoisonedDataset, label: int) -> None:
    def relabel(draft: Draft) -> None:
        file = draft.folder / "train.parquet"
        frame = pd.read_parquet(file)
        frame.loc[0, "label"] = label
        frame.to_parquet(file, index=False)

    artifact = seal_dataset(tmp_path / "a", colour_poisoned, relabel)
    with pytest.raises(ArtifactError, match=rf"split train: label {label} is outside 0\.\.3; make the artifact again"):
        _ = artifact.train


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"images": torch.zeros(108, 3, 8, 9, dtype=torch.uint8)}, "does not hold images of"),
        ({"pictures": torch.zeros(108, 3, 8, 8, dtype=torch.uint8)}, "does not hold images of"),
        ({"images": torch.zeros(108, 3, 8, 8)}, "uint8, got"),
        ({"images": torch.zeros(107, 3, 8, 8, dtype=torch.uint8)}, "labels must be"),
    ],
)
def test_images_of_another_shape_or_type_are_refused(
    tmp_path: Path, colour_poisoned: PoisonedDataset, tensors: dict[str, torch.Tensor], message: str
) -> None:
    def replace_images(draft: Draft) -> None:
        save_file(tensors, draft.folder / "train.safetensors")

    artifact = seal_dataset(tmp_path / "a", colour_poisoned, replace_images)
    with pytest.raises(ArtifactError, match=message):
        _ = artifact.train


@pytest.mark.parametrize("name", ["train.safetensors", "train.parquet"])
def test_a_file_of_another_format_is_said(tmp_path: Path, colour_poisoned: PoisonedDataset, name: str) -> None:
    def scribble(draft: Draft) -> None:
        (draft.folder / name).write_bytes(b"not what it says" * 4)

    artifact = seal_dataset(tmp_path / "a", colour_poisoned, scribble)
    with pytest.raises(ArtifactError, match=f"{name} is not a "):
        _ = artifact.train


FULL_DISK = """
import resource, sys
from pathlib import Path
from toys import toy_source, toy_lab
from bdbench.artifacts import manifests, store
from bdbench.artifacts.dataset import write_dataset
from bdbench.attacks.badnets import BadNets
from bdbench.errors import ArtifactError
from bdbench.protocol.poisoning import poison_source
data = poison_source(toy_source(), BadNets(), toy_lab(0), 0.0)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with store.create(Path(sys.argv[1]), manifests.Ask("dataset", "badnets", 1, {}, 0, {})) as draft:
        write_dataset(draft, data, name="toy", augment="none")
except ArtifactError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on file sizes")
def test_a_disk_that_is_full_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "a")],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"cannot write {tmp_path / 'a'}" in found.stdout, found.stderr
    assert not (tmp_path / "a").exists()
    assert not list(tmp_path.glob("**/*.safetensors"))


# models


def seal_model(path: Path, edit: Callable[[Draft], object] | None = None) -> ModelArtifact:
    blank = torch.zeros(1)
    model = build_classifier(MODELS.load("convnet"), (1, 8, 8), 4, blank, blank + 1)
    with store.create(path, MODEL_ASK) as draft:
        history = [{"phase": "train", "epoch": 1, "loss": 0.5, "lr": 0.1, "images_per_second": 10.0, "seconds": 1.0}]
        scores, set_aside = torch.tensor([0.5, -1.0]), torch.tensor([True, False])
        write_model(draft, "convnet", model, toy_data(4, 1), history, scores, set_aside)
        draft.made |= MADE
        if edit is not None:
            edit(draft)
    return ModelArtifact.open(path)


def test_a_model_comes_back_with_equal_logits(tmp_path: Path) -> None:
    source = toy_source(channels=1)
    model = build_classifier(MODELS.load("convnet"), (1, 8, 8), 4, torch.tensor([0.4]), torch.tensor([0.2])).eval()

    def put(draft: Draft) -> None:
        write_model(draft, "convnet", model, source.train, [])

    images = source.test.images.float() / 255
    with torch.no_grad():
        assert torch.equal(seal_model(tmp_path / "m", put).classifier()(images), model(images))


def test_a_model_is_opened_in_evaluation_mode(tmp_path: Path) -> None:
    assert not any(module.training for module in seal_model(tmp_path / "m").classifier().modules())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), r"float in \[0, 1\], got torch.uint8; bytes become"),
        (torch.full((2, 1, 8, 8), 255.0), r"in \[0, 1\], got 255 to 255; divide by 255"),
        (torch.full((2, 1, 8, 8), -1.5), r"in \[0, 1\], got -1.5 to -1.5"),
        (torch.full((2, 1, 8, 8), torch.nan), r"in \[0, 1\], got nan"),
    ],
)
def test_a_model_that_is_handed_out_refuses_other_images_than_in_0_to_1(
    tmp_path: Path, images: torch.Tensor, message: str
) -> None:
    artifact = seal_model(tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        artifact.classifier()(images)
    artifact.classifier()(torch.linspace(-0.005, 1.005, 64).view(1, 1, 8, 8))


def test_the_engine_gets_a_network_whose_input_nothing_looks_at(tmp_path: Path) -> None:
    artifact = seal_model(tmp_path / "m")
    assert not artifact.network()._forward_pre_hooks
    assert artifact.network()(torch.full((2, 1, 8, 8), 255.0)).shape == (2, 4)


def test_scores_and_history_come_back(tmp_path: Path) -> None:
    artifact = seal_model(tmp_path / "m")
    assert artifact.samples is not None
    assert artifact.samples.to_dict("list") == {
        "row": [0, 1],
        "score": [0.5, -1.0],
        "set_aside": [True, False],
    }
    assert artifact.history["loss"].tolist() == [0.5]
    assert artifact.dataset_id == ASK.id


def test_a_method_without_scores_has_no_samples(tmp_path: Path) -> None:
    def drop(draft: Draft) -> None:
        (draft.folder / "samples.parquet").unlink()

    assert seal_model(tmp_path / "m", drop).samples is None


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    def swap(draft: Draft) -> None:
        save_file(toy_model(toy_source(channels=1).train).state_dict(), draft.folder / "model.safetensors")

    path = seal_model(tmp_path / "m", swap).path
    with pytest.raises(ArtifactError, match="does not hold weights of convnet"):
        verify(path)


def test_a_missing_weight_is_refused(tmp_path: Path) -> None:
    def drop(draft: Draft) -> None:
        file = draft.folder / "model.safetensors"
        tensors = load_file(file)
        save_file({name: value.clone() for name, value in tensors.items() if name != "head.bias"}, file)

    artifact = seal_model(tmp_path / "m", drop)
    with pytest.raises(ArtifactError, match=r"head\.bias"):
        artifact.classifier()


def test_each_kind_is_opened_as_what_it_is(tmp_path: Path, colour_poisoned: PoisonedDataset) -> None:
    seal_dataset(tmp_path / "data", colour_poisoned)
    seal_model(tmp_path / "model")
    with store.create(tmp_path / "eval", replace(ASK, kind="evaluation")) as draft:
        draft.facts, draft.made = dict(FACTS["evaluation"]), dict(MADE)
    assert isinstance(open_any(tmp_path / "data"), DatasetArtifact)
    assert isinstance(open_any(tmp_path / "model"), ModelArtifact)
    assert isinstance(open_any(tmp_path / "eval"), EvaluationArtifact)


def test_a_model_is_not_opened_as_a_data_set(tmp_path: Path) -> None:
    path = seal_model(tmp_path / "m").path
    with pytest.raises(ArtifactError, match="is a model artifact; a dataset artifact is needed here"):
        DatasetArtifact.open(path)


def test_how_it_was_made_names_versions_and_hardware() -> None:
    made = Stopwatch().made(bf16=True)
    assert made["torch"] == torch.__version__
    assert (made["device"], made["precision"]) == ("cpu", "bf16")
    assert made["seconds"] >= 0
    assert made["peak_memory_bytes"] > 0


def test_plain_values_are_those_that_json_gives_back() -> None:
    assert plain({"a": (1, 2), "b": Path("x") / "y", "c": None}) == {"a": [1, 2], "b": "x/y", "c": None}


def test_an_artifact_says_in_python_what_it_is(toys: DatasetArtifact) -> None:
    assert repr(toys) == f"DatasetArtifact('{toys.path}', badnets, seed 0, id {toys.id})"
    assert toys.is_new
    assert not DatasetArtifact.open(toys.path).is_new
