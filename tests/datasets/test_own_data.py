"""Sets of the user's own: what is left out, guessed or changed is said, or refused."""

from __future__ import annotations

import os
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_datasets import Notes, gray_images, load, picture, png, write_folder, write_npz, write_parquet

from bdbench import stages
from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.artifacts.sources import open_source
from bdbench.data import SourceData
from bdbench.datasets.paths import AUGMENT_REMARK, PathSource
from bdbench.datasets.torchvision_sets import Cifar10, Mnist
from bdbench.errors import DataError, OptionError
from bdbench.progress import Silent


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDBENCH_CACHE", str(tmp_path / "cache"))


def opened(path: Path, **options: Any) -> SourceData:
    return PathSource(path=path, **options).open(Silent())


def remarks(path: Path, **options: Any) -> list[str]:
    """What is said of a set, without its dark pixels and its augmentation."""
    said = opened(path, **options).remarks
    return [line for line in said if line != AUGMENT_REMARK and not line.startswith("all pixels")]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder of 2 x 8 images with a test split of 2 x 2, in which 12 and 1 cannot be read."""
    root = tmp_path / "scraped"
    write_folder(root / "train", each=8)
    write_folder(root / "test", each=2)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    for name in ("cat", "dog"):
        for row in range(6):
            (root / "train" / name / f"{row}.png").write_bytes(png(noise)[:120] if row else b"")
    (root / "test" / "dog" / "1.png").write_text("<html>")
    return root


# unreadable images


def test_all_unreadable_files_of_both_splits_are_named_at_once(broken: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(broken)
    head, *lines = str(caught.value).splitlines()
    assert head.endswith(
        "scraped: 13 of 20 images cannot be read; replace or remove them, or leave them out with --skip-unreadable:"
    )
    assert [line.partition(":")[0].strip() for line in lines[:3]] == [f"train/cat/{row}.png" for row in range(3)]
    assert lines[10:] == ["  and 3 more"]


def test_unreadable_files_can_be_left_out_and_are_recorded(broken: Path) -> None:
    source = opened(broken, skip_unreadable=True)
    assert source.train.images[:, 0, 0, 0].tolist() == [6, 7, 16, 17]
    assert source.train.labels.tolist() == [0, 0, 1, 1]
    assert source.test.labels.tolist() == [0, 0, 1]
    assert len(source.unreadable) == 13
    assert source.unreadable[-1] == "test/dog/1.png"
    assert source.remarks[0].startswith("13 images were left out since they cannot be read, such as train/cat/0.png (")
    assert opened(broken, skip_unreadable=True).remarks == source.remarks  # from the cache


def test_places_of_a_set_with_unreadable_files_are_those_of_its_images(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", each=6)
    (root / "cat" / "2.png").write_text("no image")
    taken = stages.take(root, source_options={"skip_unreadable": True}, out=tmp_path / "taken")
    expected = [10 * place.startswith("dog") + int(place[4]) for place in taken.places]
    assert taken.train.images[:, 0, 0, 0].tolist() == expected
    assert taken.manifest.facts["unreadable"] == ["cat/2.png"]
    assert any(line.startswith("1 image was left out") for line in taken.manifest.facts["remarks"])
    assert taken.manifest.facts["source_options"]["skip_unreadable"] is True


def test_parquet_rows_that_cannot_be_read_can_be_left_out(tmp_path: Path) -> None:
    images: list[Any] = [{"bytes": png(picture(row)), "path": None} for row in range(8)]
    images[1]["bytes"], images[4]["bytes"] = None, b"GIF"
    path = write_parquet(tmp_path / "set.parquet", [0, 1] * 4, images=images)
    with pytest.raises(
        DataError, match=r"2 of 8 images.*\n  set.parquet, row 1: no image bytes.*\n  set.parquet, row 4"
    ):
        load(path)
    source = opened(path, skip_unreadable=True)
    assert sorted([*source.train.images[:, 0, 0, 0].tolist(), *source.test.images[:, 0, 0, 0].tolist()]) == [
        0, 2, 3, 5, 6, 7,
    ]  # fmt: skip


def test_a_split_without_a_readable_image_is_refused_even_so(broken: Path) -> None:
    for name in ("cat", "dog"):
        for file in (broken / "test" / name).iterdir():
            file.write_text("no image")
    with pytest.raises(DataError, match="none of the images of a split can be read"):
        load(broken, skip_unreadable=True)


def test_sizes_that_differ_are_said_with_the_unreadable_files(broken: Path) -> None:
    picture(size=(12, 9)).save(broken / "train" / "cat" / "wide.png")
    with pytest.raises(DataError, match=r"8 of 21 images (.|\n)*sizes differ: .* is 8x8, .* is 12x9.*more may be"):
        load(broken)


def test_after_a_second_size_only_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "set", each=100)
    picture(size=(12, 9)).save(root / "cat" / "10.png")
    loaded = []
    load_pixels = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda image: loaded.append(image) or load_pixels(image))
    with pytest.raises(DataError, match="sizes differ"):
        load(root)
    assert len(loaded) < 60


def test_sizes_that_were_brought_to_one_are_said(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set")
    picture(size=(120, 90)).save(root / "cat" / "wide.png")
    assert remarks(root, image_size=10) == [
        "images have 2 sizes, from 8x8 to 120x90 pixels; all were cropped to their centre square and resized to 10x10"
    ]
    assert not remarks(write_folder(tmp_path / "even"), image_size=10)


def test_warnings_of_pillow_name_the_file(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set")
    exif = b"II*\0\x08\0\0\0\xff\xff"  # a directory of 65,535 entries that is not there
    picture().save(root / "dog" / "1.jpg", exif=b"Exif\0\0" + exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = remarks(root)
    assert [line.partition(":")[0] for line in said] == ["Pillow warns of 1 image, such as dog/1.jpg"]


def test_skipping_is_for_files_of_ones_own(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--skip-unreadable is for images of your own.*'digits' is a registered set"):
        open_source("digits", {"skip_unreadable": True})
    path = write_npz(tmp_path / "set.npz", images=gray_images(), labels=[0, 1] * 3)
    with pytest.raises(OptionError, match="--skip-unreadable is for image files and Parquet"):
        load(path, skip_unreadable=True)
    with pytest.raises(OptionError, match="--label-column is for Parquet files"):
        load(path, label_column="y")


# splits and folders


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("Train", "Test"),
        ("seg_train", "seg_test"),
        ("train", "validation"),
        ("x-TRAIN", "x-val"),
        ("train2017", "val2017"),
        ("training_set", "dev_set"),
    ],
)
def test_split_folders_are_known_in_any_case_and_with_prefixes(tmp_path: Path, train: str, test: str) -> None:
    write_folder(tmp_path / "set" / train, each=2)
    write_folder(tmp_path / "set" / test, ("dog",), each=1)
    source = opened(tmp_path / "set")
    assert (source.train.class_names, len(source.train), len(source.test)) == (("cat", "dog"), 4, 1)
    assert f"splits: {train} to train, {test} to test" in source.remarks


def test_archive_that_was_unpacked_into_a_folder_of_its_name_is_entered(tmp_path: Path) -> None:
    write_folder(tmp_path / "set" / "seg_train" / "seg_train")
    write_folder(tmp_path / "set" / "seg_test" / "seg_test")
    (tmp_path / "set" / "seg_pred").mkdir()
    picture().save(tmp_path / "set" / "seg_pred" / "1.png")
    source = opened(tmp_path / "set")
    assert (source.train.class_names, len(source.train), len(source.test)) == (("cat", "dog"), 6, 6)
    assert "beside seg_train and seg_test, 1 folder was left out: seg_pred" in source.remarks
    assert opened(write_folder(tmp_path / "pets" / "pets").parent).train.class_names == ("cat", "dog")


def test_classes_whose_names_sound_like_splits_are_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "places" / "train_station", ("inside", "outside"))
    write_folder(tmp_path / "places" / "test_track", ("wet", "dry"))
    write_folder(tmp_path / "places" / "airport", ("gates",))
    assert load(tmp_path / "places").train.class_names == ("airport", "test_track", "train_station")


def test_test_folder_without_classes_is_left_out_and_said(tmp_path: Path) -> None:
    write_folder(tmp_path / "asl" / "asl_train" / "asl_train")
    flat = tmp_path / "asl" / "asl_test" / "asl_test"
    flat.mkdir(parents=True)
    picture().save(flat / "A_test.png")
    source = opened(tmp_path / "asl")
    assert (source.train.class_names, len(source.train), len(source.test)) == (("cat", "dog"), 4, 2)
    assert "beside asl_train, 1 folder was left out: asl_test" in source.remarks


def test_split_folders_whose_classes_differ_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "set" / "seg_train")
    write_folder(tmp_path / "set" / "seg_test", ("bird", "fish"))
    with pytest.raises(DataError, match="the training split has no class 'bird'"):
        load(tmp_path / "set")


def test_folders_that_hold_the_same_folders_are_refused_with_a_question(tmp_path: Path) -> None:
    for year in ("2019", "2020"):
        write_folder(tmp_path / "years" / year)
    with pytest.raises(DataError, match=r"all its folders \(2019, 2020\) hold the same folders \(cat, dog\); which"):
        load(tmp_path / "years")
    for name in ("cat", "dog"):
        write_folder(tmp_path / "inner" / name, ("images",))
    assert load(tmp_path / "inner").train.class_names == ("cat", "dog")


def test_zip_that_was_unpacked_into_itself_is_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets")
    write_folder(root / "pets")
    with pytest.raises(DataError, match=r"pets: holds folders named as those beside it \(cat, dog\)"):
        load(root)


def test_several_training_folders_are_refused(tmp_path: Path) -> None:
    for name in ("a_train", "b_train", "test"):
        write_folder(tmp_path / "set" / name)
    with pytest.raises(DataError, match=r"several folders may be the training split \(a_train, b_train\)"):
        load(tmp_path / "set")


def test_links_are_followed_and_broken_ones_counted(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set")
    write_folder(tmp_path / "elsewhere", ("bird",))
    (root / "bird").symlink_to(tmp_path / "elsewhere" / "bird")
    (root / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "bird")
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "dog" / "round").symlink_to(root / "dog")
    (root / "fish").symlink_to(tmp_path / "nowhere")
    source = opened(root)
    assert len(source.train) + len(source.test) == 3 + 6 + 3
    assert "2 links were followed, such as bird" in source.remarks
    assert "3 links that lead nowhere were left out, such as fish" in source.remarks


def test_images_outside_class_folders_and_photos_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set")
    picture().save(root / "cover.png")
    (root / "cat" / "IMG_1.HEIC").touch()
    (root / "cat" / "notes.txt").touch()
    assert remarks(root) == [
        "2 files are not images and were left out (1 .heic, 1 .txt), such as cat/IMG_1.HEIC; save .heic as JPEG or PNG",
        "1 image was left out, outside the class folders, such as cover.png",
    ]


@pytest.mark.parametrize(("suffix", "kind"), [(".jfif", "JPEG"), (".avif", "AVIF"), (".jp2", "JPEG2000")])
def test_more_formats_are_read(tmp_path: Path, suffix: str, kind: str) -> None:
    root = write_folder(tmp_path / "set")
    picture(200, size=(16, 16)).resize((8, 8)).save(root / "cat" / f"9{suffix}", kind)
    source = load(root)
    assert len(source.train) + len(source.test) == 7


def test_class_names_in_two_unicode_forms_are_one(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Bär") for form in ("NFC", "NFD"))
    write_folder(tmp_path / "set" / "train", ("Affe", composed))
    write_folder(tmp_path / "set" / "test", (decomposed,))
    source = load(tmp_path / "set")
    assert (source.train.class_names, source.test.labels.tolist()) == (("Affe", composed), [1, 1, 1])
    if not (tmp_path / "set" / "train" / decomposed).exists():
        write_folder(tmp_path / "set" / "train", (decomposed,))
        with pytest.raises(DataError, match="two folders are called"):
            load(tmp_path / "set")


def test_names_that_are_not_text_are_written_out(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", ("cat", os.fsdecode(b"d\xff\x1b[31m")), each=6)
    (root / "cat" / os.fsdecode(b"\xfe.png")).write_text("no image")
    taken = stages.take(root, source_options={"skip_unreadable": True}, out=tmp_path / "taken")
    assert taken.class_names == ("cat", r"d\udcff\x1b[31m")
    assert taken.manifest.facts["unreadable"] == [r"cat/\udcfe.png"]
    assert taken.places[-1].startswith(r"d\udcff\x1b[31m/")


def test_folder_that_may_not_be_entered_is_an_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may enter every folder")
    root = write_folder(tmp_path / "set")
    (root / "cat").chmod(0)
    with pytest.raises(DataError, match="cat: cannot be read"):
        load(root)


# Parquet


def test_missing_shard_is_noticed_where_names_carry_a_hash(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "train-00000-of-00002-1a2b3c4d5e6f.parquet")
    with pytest.raises(DataError, match="one of 2 shards, but shard 1 is missing"):
        load(tmp_path / "set")
    write_parquet(tmp_path / "set" / "train-00001-of-00002-6f5e4d3c2b1a.parquet")
    source = load(tmp_path / "set")
    assert len(source.train) + len(source.test) == 12


def test_clone_of_a_hub_is_read_from_its_data_folder(tmp_path: Path) -> None:
    write_parquet(tmp_path / "signs" / "data" / "train-00000-of-00001.parquet")
    write_parquet(tmp_path / "signs" / "data" / "validation-00000-of-00001.parquet")
    (tmp_path / "signs" / "README.md").touch()
    source = load(tmp_path / "signs")
    assert (source.name, len(source.train), len(source.test)) == ("signs", 6, 6)
    write_parquet(tmp_path / "converted" / "default" / "train" / "0000.parquet")
    write_parquet(tmp_path / "converted" / "default" / "test" / "0000.parquet", [0, 1])
    assert len(load(tmp_path / "converted").test) == 2
    write_parquet(tmp_path / "signs" / "other" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"several folders hold Parquet shards \(data, other\)"):
        load(tmp_path / "signs")


def test_parquet_files_of_no_split_are_said(tmp_path: Path) -> None:
    for name in ("train", "test", "validation"):
        write_parquet(tmp_path / "set" / f"{name}-00000-of-00001.parquet")
    assert remarks(tmp_path / "set") == ["1 Parquet file was left out, such as validation-00000-of-00001.parquet"]


@pytest.fixture
def two_labels(tmp_path: Path) -> Path:
    images = [png(picture(row)) for row in range(8)]
    table = pa.table({"img": images, "thumb": images, "fine_label": [0, 1] * 4, "coarse_label": [0, 0, 1, 1] * 2})
    pq.write_table(table, tmp_path / "set.parquet")
    return tmp_path / "set.parquet"


def test_columns_that_were_taken_among_several_are_said_and_can_be_chosen(two_labels: Path) -> None:
    assert remarks(two_labels) == [
        "label column: fine_label, not coarse_label (--label-column chooses)",
        "image column: img, not thumb (--image-column chooses)",
    ]
    fine, coarse = opened(two_labels), opened(two_labels, label_column="coarse_label", image_column="thumb")
    assert not torch.equal(fine.train.labels, coarse.train.labels)
    with pytest.raises(DataError, match="no column kind among img, thumb, fine_label, coarse_label"):
        load(two_labels, label_column="kind")


def test_text_in_an_image_column_is_never_opened_as_a_path(tmp_path: Path) -> None:
    images = pa.array([{"bytes": "/etc/passwd"}] * 4, pa.struct([("bytes", pa.string())]))
    pq.write_table(pa.table({"image": images, "label": [0, 1, 0, 1]}), tmp_path / "set.parquet")
    with pytest.raises(DataError, match="column image holds struct<bytes: string>"):
        load(tmp_path / "set.parquet")


@pytest.mark.parametrize(
    ("labels", "names", "said"),
    [
        (["cat", "dog"] * 3, ("cat", "dog"), "labels are text"),
        (["9", "10"] * 3, ("9", "10"), "labels are text"),
        ([False, True] * 3, ("false", "true"), "labels are false and true"),
        ([[1, 0], [0, 1]] * 3, ("0", "1"), "labels are one-hot, of 2 classes"),
        ([[1.0, 0.0], [0.0, 1.0]] * 3, ("0", "1"), "labels are one-hot, of 2 classes"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "npz"])
def test_labels_of_other_kinds(tmp_path: Path, kind: str, labels: list[Any], names: tuple[str, ...], said: str) -> None:
    if kind == "parquet":
        path = write_parquet(tmp_path / "set.parquet", labels)
    else:
        path = write_npz(tmp_path / "set.npz", images=gray_images(), labels=np.array(labels))
    source = opened(path)
    assert source.train.class_names == names
    assert (source.train.images[:, 0, 0, 0] % 2).tolist() == source.train.labels.tolist()
    assert any(line.startswith(said) for line in source.remarks)


def test_a_class_that_only_the_test_split_has_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "train.parquet", ["cat", "dog"])
    write_parquet(tmp_path / "set" / "test.parquet", ["cat", "bird"])
    with pytest.raises(DataError, match=r"test.parquet, row 1: the training split has no class 'bird'"):
        load(tmp_path / "set")


# archives


def test_npz_of_medmnist_is_read_without_its_validation_split(tmp_path: Path) -> None:
    labels = np.array([[0], [1], [0], [1], [0], [1]], np.uint8)
    arrays = {f"{split}_{what}": value for split in ("train", "val", "test") for what, value in
              (("images", gray_images()), ("labels", labels))}  # fmt: skip
    path = write_npz(tmp_path / "set.npz", **arrays)
    source = load(path)
    assert (len(source.train), len(source.test), source.train.class_names) == (6, 6, ("0", "1"))
    assert remarks(path) == ["2 arrays were left out: val_images, val_labels"]


# pixels


@pytest.mark.parametrize(("factor", "said"), [(1, True), (50, False)])
def test_pixels_that_are_nearly_black_are_said(tmp_path: Path, factor: int, said: bool) -> None:
    path = write_npz(tmp_path / "set.npz", images=gray_images() * factor, labels=[0, 1] * 3)
    assert any("lie in 0 to" in line and "another range" in line for line in opened(path).remarks) == said


def test_images_of_ones_own_are_not_mirrored_and_that_is_said_and_stored(toy_archive: Path, tmp_path: Path) -> None:
    progress = Notes()
    data = stages.take(toy_archive, out=tmp_path / "taken", progress=progress)
    assert data.manifest.facts["augment"] == "crop"
    assert AUGMENT_REMARK in progress.notes
    assert AUGMENT_REMARK in data.manifest.facts["remarks"]
    progress.notes.clear()
    stages.defend(
        tmp_path / "taken", "none", options={"epochs": 1}, out=tmp_path / "m", device="cpu", progress=progress
    )
    assert "augmentation: crop, nothing mirrored; --augment crop,flip mirrors too" in progress.notes
    progress.notes.clear()
    stages.defend(
        tmp_path / "taken", "none", options={"epochs": 1, "augment": "crop,flip"}, out=tmp_path / "n", device="cpu",
        progress=progress,
    )  # fmt: skip
    assert not [line for line in progress.notes if line.startswith("augmentation")]


# parts, and copies of registered sets


def test_a_part_of_the_test_images_is_the_same_for_everyone_and_named(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "set.npz", images=gray_images(200), labels=np.arange(200) % 2)
    whole, part = opened(path, test_fraction=0.3), opened(path, test_fraction=0.3, test_images=20)
    assert (part.name, len(part.test), part.train.fingerprint) == ("set-test20", 20, whole.train.fingerprint)
    both = opened(path, test_fraction=0.3, images=50, test_images=20)
    assert (both.name, len(both.train), both.test.fingerprint) == ("set-50-test20", 50, part.test.fingerprint)
    known = whole.test.images[:, 0, 0, 0].tolist()
    assert sorted(part.test.images[:, 0, 0, 0].tolist()) == [v for v in known if v in part.test.images[:, 0, 0, 0]]
    with pytest.raises(OptionError, match="test_images 61 is more than the 60 test images of set"):
        opened(path, test_fraction=0.3, test_images=61)


def test_data_root_may_be_the_folder_of_the_shards(tmp_path: Path) -> None:
    write_parquet(tmp_path / "cifar10" / "train-00000-of-00001.parquet")
    write_parquet(tmp_path / "cifar10" / "test-00000-of-00001.parquet")
    for root in (tmp_path, tmp_path / "cifar10"):
        assert len(Cifar10(data_root=root).load(Silent()).train) == 6


def test_data_root_of_another_set_is_refused_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a download began")

    monkeypatch.setattr(Mnist, "_download", forbidden)
    folder = tmp_path / "photos" / "data"
    write_parquet(folder / "train-00000-of-00001.parquet")
    for root in (folder, folder.parent):
        with pytest.raises(DataError, match=rf"holds Parquet shards.*--dataset {root}"):
            Mnist(data_root=root).load(Silent())
    assert [entry.name for entry in folder.iterdir()] == ["train-00000-of-00001.parquet"]


def test_ids_of_registered_sets_are_those_of_0_1(digits: DatasetArtifact) -> None:
    assert digits.manifest.ask.inputs.keys() == {"source"}
    assert digits.manifest.facts["remarks"] == []
