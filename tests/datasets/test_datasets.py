"""Sources: digits, folders, Parquet, archives, benchmarks by name; and what they say about bad input."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from bdbench.data import SourceData
from bdbench.datasets.digits import Digits, read_scans
from bdbench.datasets.paths import PathSource, display_name
from bdbench.datasets.splits import stratified_split
from bdbench.datasets.torchvision_sets import (
    Cifar10,
    Cifar100,
    FashionMnist,
    Gtsrb,
    Mnist,
    Svhn,
    TorchvisionSource,
)
from bdbench.errors import DataError, OptionError
from bdbench.progress import Silent

LABELS = [0, 1, 0, 1, 0, 1]


class Notes(Silent):
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDBENCH_CACHE", str(tmp_path / "cache"))


def load(path: Path, **options: Any) -> SourceData:
    return PathSource(path=path, **options).load(Silent())


def picture(value: int = 0, *, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("L", size, value).convert(mode)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root: Path, names: tuple[str, ...] = ("cat", "dog"), *, each: int = 3, **options: Any) -> Path:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for row in range(each):
            picture(10 * label + row, **options).save(root / name / f"{row}.png")
    return root


def write_parquet(
    path: Path,
    labels: list[Any] = LABELS,
    *,
    images: list[Any] | None = None,
    names: list[str] | None = None,
    label: str = "label",
    image: str = "image",
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = [{"bytes": png(picture(row)), "path": None} for row in range(len(labels))]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kind = pa.binary() if images and isinstance(images[0], bytes) else struct
    table = pa.table({image: pa.array(images, kind), label: pa.array(labels)})
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def gray_images(count: int = 6, side: int = 8) -> np.ndarray:
    return np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((1, side, side), np.uint8)


# splits


def test_a_part_of_the_training_images_is_the_same_for_everyone_and_named() -> None:
    whole, part = Digits().open(Silent()), Digits(images=100).open(Silent())
    assert (part.name, len(part.train), part.test.fingerprint) == ("digits-100", 100, whole.test.fingerprint)
    assert part.fingerprint == Digits(images=100).open(Silent()).fingerprint
    known = {image.numpy().tobytes() for image in whole.train.images}
    assert all(image.numpy().tobytes() in known for image in part.train.images)
    with pytest.raises(OptionError, match=r"images 5000 is more than the \d+ training images of digits"):
        Digits(images=5000).open(Silent())


def test_split_takes_the_fraction_of_every_class() -> None:
    labels = torch.tensor([0] * 10 + [1] * 20)
    train, test = stratified_split(labels, 0.2)
    assert torch.bincount(labels[test]).tolist() == [2, 4]
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(30))


def test_split_leaves_every_class_of_two_in_both_splits_and_a_single_sample_in_training() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2])
    for fraction in (0.01, 0.99):
        train, test = stratified_split(labels, fraction)
        assert labels[train].tolist() == [0, 1, 2]
        assert labels[test].tolist() == [0, 1]


def test_split_is_the_same_every_time_and_leaves_global_randomness_alone() -> None:
    labels = torch.arange(100) % 3
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = stratified_split(labels, 0.3)
    torch.testing.assert_close(torch.random.get_rng_state(), before, rtol=0, atol=0)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, stratified_split(labels, 0.3), strict=True))


# digits


def test_digits_are_1797_gray_scans_stretched_to_0_255() -> None:
    assert Digits().load(Silent()).train.image_shape == (1, 16, 16)
    source = Digits(image_size=8).load(Silent())
    assert (source.name, source.augment, source.train.image_shape) == ("digits", "crop", (1, 8, 8))
    assert len(source.train) + len(source.test) == 1797
    assert source.train.class_names == tuple("0123456789")
    assert set(torch.unique(source.train.images).tolist()) == {round(v * 255 / 16) for v in range(17)}


def test_digits_read_from_the_file_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    images, labels = read_scans()
    published = load_digits()
    torch.testing.assert_close(images[:, 0].double() * 16 / 255, torch.from_numpy(published.images), atol=0.04, rtol=0)
    assert labels.tolist() == published.target.tolist()


def test_digits_test_split_is_a_fifth_of_every_class() -> None:
    source = Digits().load(Silent())
    total = torch.bincount(source.train.labels) + torch.bincount(source.test.labels)
    assert torch.bincount(source.test.labels).tolist() == [round(int(n) * 0.2) for n in total]


def test_digits_can_be_enlarged() -> None:
    assert Digits(image_size=16).load(Silent()).train.image_shape == (1, 16, 16)


# folders


def test_folder_without_splits_is_split_by_class(tmp_path: Path) -> None:
    source = load(write_folder(tmp_path / "My Pets"))
    assert (source.name, source.augment) == ("My-Pets", "crop")
    assert source.train.class_names == ("cat", "dog")
    assert source.train.labels.tolist() == [0, 0, 1, 1]
    assert source.test.labels.tolist() == [0, 1]
    assert source.train.images.is_contiguous()


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_folder_with_splits_keeps_them(tmp_path: Path, test_name: str) -> None:
    write_folder(tmp_path / "set" / "train", each=2)
    write_folder(tmp_path / "set" / test_name, ("dog",), each=1, mode="L")
    source = load(tmp_path / "set")
    assert source.train.images[:, 0, 0, 0].tolist() == [0, 1, 10, 11]
    assert source.test.labels.tolist() == [1]
    assert source.test.image_shape == (3, 8, 8)


def test_folder_names_that_are_numbers_are_ordered_by_value(tmp_path: Path) -> None:
    assert load(write_folder(tmp_path / "set", ("10", "9", "2"))).train.class_names == ("2", "9", "10")


def test_folder_class_called_train_is_a_class(tmp_path: Path) -> None:
    assert load(write_folder(tmp_path / "vehicles", ("car", "train"))).train.class_names == ("car", "train")


def test_folder_of_gray_images_stays_gray_and_one_coloured_image_makes_all_rgb(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", mode="L")
    assert load(root).train.image_shape[0] == 1
    Image.new("RGB", (8, 8), (1, 2, 3)).save(root / "dog" / "colour.png")
    assert load(root).train.image_shape[0] == 3


def test_folder_images_of_different_sizes_need_image_size(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set")
    picture(size=(12, 9)).save(root / "dog" / "wide.png")
    with pytest.raises(DataError, match=r"cat/0.png is 8x8, dog/wide.png is 12x9 pixels; pass --image-size"):
        load(root)
    assert load(root, image_size=10).train.image_shape == (3, 10, 10)


def test_folder_leaves_out_other_files_and_says_so(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set")
    (root / "cat" / "notes.txt").write_text("x")
    (root / "cat" / ".hidden.png").write_text("x")
    (root / ".git").mkdir()
    checkpoints = root / "cat" / ".ipynb_checkpoints"
    checkpoints.mkdir()
    picture().save(checkpoints / "0-checkpoint.png")
    progress = Notes()
    source = PathSource(path=root).open(progress)
    assert len(source.train) + len(source.test) == 6
    assert "1 file is not an image and was left out (1 .txt), such as cat/notes.txt" in progress.notes


def test_folder_bad_input_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set")
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    (root / "dog" / "9.png").write_bytes(png(Image.fromarray(noise))[:120])
    with pytest.raises(DataError, match=r"set: dog/9.png: cannot be read as an image"):
        load(root)
    (root / "dog" / "9.png").write_text("not an image")
    with pytest.raises(DataError, match=r"dog/9.png: cannot be read as an image"):
        load(root)
    (root / "dog" / "9.png").unlink()
    (root / "bird").mkdir()
    with pytest.raises(DataError, match=r"bird: holds no images"):
        load(root)


def test_folder_of_one_class_or_none_or_too_small_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 2 classes"):
        load(write_folder(tmp_path / "one", ("cat",)))
    (tmp_path / "flat").mkdir()
    picture().save(tmp_path / "flat" / "a.png")
    with pytest.raises(DataError, match="no class folders"):
        load(tmp_path / "flat")
    with pytest.raises(DataError, match=r"cat/0.png: 7x7 pixels, at least 8x8"):
        load(write_folder(tmp_path / "small", size=(7, 7)))


def test_folder_test_split_with_a_new_class_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "set" / "train")
    write_folder(tmp_path / "set" / "test", ("bird",))
    with pytest.raises(DataError, match="no class 'bird'"):
        load(tmp_path / "set")


# Parquet


def test_parquet_shards_keep_their_splits_and_class_names(tmp_path: Path) -> None:
    folder = tmp_path / "signs"
    write_parquet(folder / "train-00000-of-00002.parquet", [0, 1], names=["stop", "yield"])
    write_parquet(folder / "train-00001-of-00002.parquet", [1], names=["stop", "yield"])
    write_parquet(folder / "test-00000-of-00001.parquet", [1, 0], names=["stop", "yield"])
    source = load(folder)
    assert (source.name, source.train.class_names) == ("signs", ("stop", "yield"))
    assert source.train.labels.tolist() == [0, 1, 1]
    assert source.train.images[:, 0, 0, 0].tolist() == [0, 1, 0]
    assert source.test.labels.tolist() == [1, 0]


def test_parquet_validation_shards_are_the_test_split_where_there_is_no_other(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    write_parquet(tmp_path / "set" / "validation-00000-of-00001.parquet", [1, 0, 0])
    assert load(tmp_path / "set").test.labels.tolist() == [1, 0, 0]


def test_parquet_single_file_is_split_and_its_classes_numbered(tmp_path: Path) -> None:
    source = load(write_parquet(tmp_path / "set.parquet", [0, 2, 0, 2], label="fine_label", image="img"))
    assert source.train.class_names == ("0", "1", "2")
    assert sorted(source.test.labels.tolist()) == [0, 2]


def test_parquet_accepts_a_plain_binary_column(tmp_path: Path) -> None:
    images = [png(picture(row)) for row in range(4)]
    source = load(write_parquet(tmp_path / "set.parquet", [0, 1, 0, 1], images=images))
    assert len(source.train) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": []}, "set.parquet: has no rows"),
        ({"labels": [0, None, 1]}, "set.parquet, row 1: no label"),
        ({"labels": [0, 1, -1]}, "row 2: label -1 is outside"),
        ({"labels": [0, 1, 2], "names": ["a", "b"]}, r"row 2: label 2 is outside 0..1"),
        ({"labels": [0, 1, 10**12]}, "row 2: label 1000000000000 is outside"),
        ({"labels": [0.5, 1.0]}, "column label holds double; integers 0..K-1, text"),
        ({"labels": [[0, 1], [1, 1]]}, "row 1: a one-hot row has a single 1, this one has 2"),
        ({"label": "kind"}, "no column label or labels or fine_label among image, kind; name it with --label-column"),
        ({"image": "pixels"}, "no column image or img among pixels, label"),
        ({"labels": [0, 0]}, "at least 2 classes"),
        (
            {"labels": [0, 0, 1], "names": ["a", "b"], "images": [{"bytes": None, "path": "x.png"}] * 3},
            "row 0: no image",
        ),
        (
            {"labels": [0, 1], "images": [b"\x89PNG\r\n\x1a\n", b"GIF"]},
            r"2 of 2 images cannot be read.*\n  set.parquet, row 0: ",
        ),
    ],
)
def test_parquet_bad_input_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write_parquet(tmp_path / "set.parquet", **options)
    with pytest.raises(DataError, match=message):
        load(path)


def test_parquet_file_that_is_cut_short_or_overwritten_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "set.parquet")
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"", whole[:4] + b"\xff" * 300 + whole[304:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"set\.parquet"):
            load(path)


def test_parquet_folder_with_a_missing_shard_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "train-00000-of-00002.parquet")
    with pytest.raises(DataError, match="one of 2 shards, but shard 1 is missing"):
        load(tmp_path / "set")


def test_parquet_folder_without_a_training_split_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "data.parquet")
    with pytest.raises(DataError, match=r"no train-\*.parquet"):
        load(tmp_path / "set")


# archives


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
def test_npz_layouts_give_the_same_images(tmp_path: Path, layout: str) -> None:
    images = gray_images()
    shaped = {"NHW": images, "NHWC": images[..., None], "NCHW": images[:, None]}[layout]
    source = load(write_npz(tmp_path / "set.npz", images=shaped, labels=LABELS))
    assert source.train.image_shape == (1, 8, 8)
    shown = torch.cat([source.train.images, source.test.images])[:, 0, 0, 0]
    assert sorted(shown.tolist()) == [0, 1, 2, 3, 4, 5]


def test_classes_without_a_training_image_are_named(tmp_path: Path) -> None:
    labels = np.where(np.arange(len(LABELS)) % 2, 7, 0)
    progress = Notes()
    path = write_npz(tmp_path / "set.npz", x_train=gray_images(), y_train=labels, x_test=gray_images(), y_test=labels)
    PathSource(path=path).open(progress)
    assert "6 of the 8 classes have no training image: 1, 2, 3, 4, 5, ..." in progress.notes


def test_npz_in_the_style_of_keras_keeps_its_splits(tmp_path: Path) -> None:
    labels = np.array(LABELS, np.uint8)[:, None]
    path = write_npz(
        tmp_path / "set.npz", x_train=gray_images(), y_train=labels, x_test=gray_images(2), y_test=labels[:2]
    )
    source = load(path, image_size=16)
    assert source.train.labels.tolist() == LABELS
    assert source.test.images.shape == (2, 1, 16, 16)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": gray_images() / 255, "labels": LABELS}, r"uint8 in 0..255, got float64; save np.round"),
        (
            {"images": gray_images().astype(np.uint16) * 800, "labels": LABELS},
            r"got uint16; they lie in 0..4000: scale",
        ),
        ({"images": gray_images(), "labels": LABELS[:5]}, "images has 6 rows, labels 5"),
        ({"images": gray_images(), "labels": [0.0] * 6}, "one class per image"),
        ({"images": gray_images(), "labels": [0, 1, 0, 1, 0, -1]}, "row 5: label -1"),
        ({"images": gray_images(), "labels": [0] * 6}, "at least 2 classes"),
        ({"images": gray_images(), "labels": [1] * 6}, "one class only"),
        ({"images": gray_images(), "labels": [0, 1, 2, 3, 4, 5]}, "no class has two"),
        ({"images": gray_images(0), "labels": np.array([], int)}, "no images"),
        ({"images": gray_images(side=7), "labels": LABELS}, "at least 8x8"),
        ({"images": np.zeros((6, 8, 8, 4), np.uint8), "labels": LABELS}, "C of 1 or 3"),
        ({"pictures": gray_images()}, "holds pictures; needs images, labels, or x_train"),
    ],
)
def test_npz_bad_input_is_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"set\.npz: .*{message}"):
        load(write_npz(tmp_path / "set.npz", **arrays))


def test_npz_never_opens_pickled_arrays(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "set.npz", images=np.array([{}, []], object), labels=[0, 1])
    with pytest.raises(DataError, match="pickled Python objects, which are never opened"):
        load(path)


def test_npz_that_is_damaged_or_something_else_is_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "set.npz", images=gray_images(), labels=LABELS)
    whole = path.read_bytes()
    single = io.BytesIO()
    np.save(single, gray_images())
    middle = len(whole) // 4
    for damaged in (whole[:-30], b"", whole[:middle] + b"\xff" * 9 + whole[middle + 9 :], single.getvalue()):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"set\.npz: "):
            load(path)


# paths


def test_path_that_is_missing_empty_or_unknown_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").touch()
    (tmp_path / "a.pt").touch()
    for name, message in [
        ("none", "no such file"),
        ("empty", "folder is empty"),
        ("a.csv", "cannot tell what this is"),
        ("a.pt", "pickles can run code and are never opened"),
    ]:
        with pytest.raises(DataError, match=rf"{name}: .*{message}.*image folder"):
            load(tmp_path / name)


def test_path_name_has_safe_characters_only(tmp_path: Path) -> None:
    assert display_name(tmp_path / "My Pets (v2).npz") == "My-Pets-v2"
    assert display_name(Path(tmp_path.anchor)) == "images"
    (tmp_path / "v1.5").mkdir()
    assert display_name(tmp_path / "v1.5") == "v1-5"
    assert display_name(tmp_path / "a\u202eb\tc") == "a-b-c"


def test_path_name_keeps_every_script_in_one_unicode_form(tmp_path: Path) -> None:
    assert display_name(tmp_path / "Verda\u0308chtige Fotos.npz") == "Verd\u00e4chtige-Fotos"
    assert [display_name(tmp_path / f"{name}.npz") for name in ("写真", "動物", "हिन्दी", "🐶 pics")] == [
        "写真", "動物", "हिन्दी", "🐶-pics",
    ]  # fmt: skip


def test_path_names_that_are_long_or_hold_no_letter_stay_apart(tmp_path: Path) -> None:
    names = {display_name(tmp_path / f"{'写' * 60}{end}.npz") for end in "ab"} | {display_name(tmp_path / "!!!.npz")}
    assert len(names | {display_name(tmp_path / "???.npz")}) == 4
    assert max(len(name.encode()) for name in names) == 96


# benchmarks by name


def write_mnist(root: Path, *, train: int = 4, test: int = 2) -> Path:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, count in (("train", train), ("t10k", test)):
        sizes = np.array([count, 28, 28], ">i4").tobytes()
        pixels = gray_images(count, 28).tobytes()
        (folder / f"{split}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + pixels)
        labels = bytes(row % 10 for row in range(count))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes[:4] + labels)
    return root


def test_benchmarks_have_the_names_and_augmentations_of_the_registry() -> None:
    sources: list[type[TorchvisionSource]] = [Mnist, FashionMnist, Cifar10, Cifar100, Gtsrb, Svhn]
    assert {source.name: source.augment for source in sources} == {
        "mnist": "crop",
        "fashion-mnist": "crop,flip",
        "cifar10": "crop,flip",
        "cifar100": "crop,flip",
        "gtsrb": "crop",
        "svhn": "crop",
    }


def test_mnist_is_read_from_a_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mnist, "counts", (4, 2))
    source = Mnist(data_root=write_mnist(tmp_path), download=False).load(Silent())
    assert (source.name, source.train.image_shape) == ("mnist", (1, 28, 28))
    assert source.train.images[:, 0, 5, 5].tolist() == [0, 1, 2, 3]
    assert source.test.labels.tolist() == [0, 1]
    assert Mnist(data_root=tmp_path, image_size=32).load(Silent()).train.image_shape == (1, 32, 32)


def test_mnist_half_a_copy_is_not_trusted(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    with pytest.raises(DataError, match="holds 4 images, not 60000; remove the local copy"):
        Mnist(data_root=tmp_path).load(Silent())
    file = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    for half in (file.read_bytes()[:-1], b"", b"\0\0\x08\x03\0"):
        file.write_bytes(half)
        with pytest.raises(DataError, match="t10k-images-idx3-ubyte: damaged or half a file"):
            Mnist(data_root=tmp_path).load(Silent())


def test_benchmark_is_read_from_parquet_shards_under_its_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "cifar10" / "train-00000-of-00001.parquet")
    write_parquet(tmp_path / "cifar10" / "test-00000-of-00001.parquet")
    source = Cifar10(data_root=tmp_path, download=False).load(Silent())
    assert (source.name, len(source.train), len(source.test)) == ("cifar10", 6, 6)


def test_cifar_copy_with_wrong_checksums_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(DataError, match="damaged or incomplete"):
        Cifar10(data_root=tmp_path).load(Silent())


def test_array_sets_put_channels_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision gives CIFAR as (N, H, W, C) and SVHN as a transposed (N, C, H, W)."""
    import torchvision

    pixels = np.arange(2 * 32 * 32 * 3, dtype=np.int64).reshape(2, 32, 32, 3).astype(np.uint8)

    class Fake:
        data, targets, classes, labels = pixels, [0, 1], ["a", "b"], np.array([1, 0])

        def __init__(self, *_: object, **__: object) -> None: ...

    class FakeTransposed(Fake):
        data = pixels.transpose(0, 3, 1, 2)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    monkeypatch.setattr(torchvision.datasets, "SVHN", FakeTransposed)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    cifar = Cifar10()._read(tmp_path, Silent())[0]
    svhn = Svhn()._read(tmp_path, Silent())[0]
    for found in (cifar.images, svhn.images):
        assert torch.equal(found, expected)
        assert found.is_contiguous()
    assert (cifar.labels.tolist(), svhn.labels.tolist()) == ([0, 1], [1, 0])


def test_gtsrb_squashes_whole_signs_to_32_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gtsrb, "counts", ((43,), 2))
    root = tmp_path / "gtsrb"
    for label in range(43):
        folder = root / "GTSRB" / "Training" / f"{label:05}"
        folder.mkdir(parents=True)
        picture(label, size=(15 + label, 20)).save(folder / "00000_00000.ppm")
    (root / "GTSRB" / "Final_Test" / "Images").mkdir(parents=True)
    wide = np.full((20, 80), 200, np.uint8)
    wide[:, :20] = 0  # a centre crop would lose it
    for row in range(2):
        Image.fromarray(wide).convert("RGB").save(root / "GTSRB" / "Final_Test" / "Images" / f"0000{row}.ppm")
    (root / "GT-final_test.csv").write_text("Filename;Width;ClassId\n00001.ppm;80;14\n00000.ppm;80;3\n")
    source = Gtsrb(data_root=tmp_path, download=False).load(Silent())
    assert source.train.labels.tolist() == list(range(43))
    assert source.train.images[:, 1, 16, 16].tolist() == list(range(43))
    assert source.test.labels.tolist() == [14, 3]
    assert source.train.class_names[14] == "Stop"
    assert source.test.images[0, 0, 5, [0, 31]].tolist() == [0, 200]
    with pytest.raises(DataError, match="Training has 1 of 43 classes"):
        one_sign(tmp_path / "partial", root)


def one_sign(partial: Path, whole: Path) -> Tensor:
    """Load a copy whose training archive was unpacked only in part."""
    (partial / "gtsrb" / "GTSRB" / "Training").mkdir(parents=True)
    for name in ("GT-final_test.csv", "GTSRB/Final_Test", "GTSRB/Training/00000"):
        (partial / "gtsrb" / name).symlink_to(whole / name)
    return Gtsrb(data_root=partial).load(Silent()).train.images


def test_benchmark_that_is_absent_names_folder_and_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"cifar10 is not in {tmp_path}; drop --no-download, or point --data-root"):
        Cifar10(data_root=tmp_path, download=False).load(Silent())
    assert not any(tmp_path.iterdir())


def test_failed_download_leaves_nothing_behind_that_could_be_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    def half(root: Path, **_: object) -> None:
        write_mnist(root, train=1)
        raise RuntimeError("Error downloading\nno route")

    monkeypatch.setattr(torchvision.datasets, "MNIST", half)
    root = tmp_path / "data"
    with pytest.raises(DataError, match="data is not a folder; make it to download mnist there"):
        Mnist(data_root=root).load(Silent())
    root.mkdir()
    with pytest.raises(DataError, match=r"cannot be downloaded to .*Error downloading no route.*--data-root"):
        Mnist(data_root=root).load(Silent())
    assert [entry.name for entry in root.iterdir() if entry.suffix != ".lock"] == []


def test_download_is_moved_to_its_place_when_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def fetch(root: Path, *, train: bool, **_: object) -> None:
        if train:
            write_mnist(root)

    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
    monkeypatch.setattr(Mnist, "counts", (4, 2))
    progress = Notes()
    assert len(Mnist().load(progress).train) == 4
    assert (tmp_path / "cache" / "data" / "MNIST" / "raw").is_dir()
    assert len(Mnist(download=False).load(progress).train) == 4
    assert ["downloading mnist" in note for note in progress.notes] == [True]


# real data


def real_data() -> Path:
    """The folder of real images that BDBENCH_TEST_DATA names."""
    found = Path(os.environ.get("BDBENCH_TEST_DATA", "nowhere"))
    if not (found / "gtsrb").is_dir():
        pytest.skip("needs the real images (BDBENCH_TEST_DATA)")
    return found


def test_real_gtsrb_shards_are_read_and_read_again_from_the_cache() -> None:
    root = real_data()
    first = Gtsrb(data_root=root, download=False).load(Silent())
    assert (len(first.train), len(first.test), first.train.num_classes) == (9149, 4210, 43)
    assert Gtsrb(data_root=root).load(Silent()).fingerprint == first.fingerprint
