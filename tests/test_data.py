"""Images and labels are checked once, when a dataset is made."""

from __future__ import annotations

import pytest
import torch
from toys import CLASSES, toy_data

from bdbench.data import ImageDataset, SourceData
from bdbench.errors import DataError

IMAGES = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (IMAGES.float(), LABELS, CLASSES, r"must be \(N, C, H, W\) uint8, got \(4, 1, 8, 8\) torch.float32"),
        (IMAGES[:, 0], LABELS, CLASSES, r"must be \(N, C, H, W\) uint8, got \(4, 8, 8\)"),
        (IMAGES.repeat(1, 2, 1, 1), LABELS, CLASSES, "1 or 3 channels, got 2"),
        (IMAGES[..., :7], LABELS, CLASSES, "at least 8x8 pixels, got 8x7"),
        (IMAGES, LABELS.int(), CLASSES, r"labels must be \(4,\) int64, got \(4,\) torch.int32"),
        (IMAGES, LABELS[:3], CLASSES, r"labels must be \(4,\) int64, got \(3,\)"),
        (IMAGES, LABELS * 0, ("one",), "at least 2 classes, got 1"),
        (IMAGES, LABELS + 1, CLASSES, r"label 4 is outside 0\.\.3"),
        (IMAGES, LABELS - 1, CLASSES, r"label -1 is outside 0\.\.3"),
    ],
)
def test_what_does_not_fit_is_refused(
    images: torch.Tensor, labels: torch.Tensor, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ImageDataset(images, labels, names)


def test_shape_and_class_count_are_read_off() -> None:
    data = ImageDataset(torch.zeros(4, 3, 8, 9, dtype=torch.uint8), LABELS, CLASSES)
    assert (len(data), data.num_classes, data.image_shape) == (4, 4, (3, 8, 9))


def test_no_images_at_all_are_a_data_set() -> None:
    assert len(ImageDataset(IMAGES[:0], LABELS[:0], CLASSES)) == 0


def test_taking_rows_copies_them() -> None:
    data = toy_data(4)
    taken = data.take(torch.tensor([2, 0]))
    taken.images.zero_()
    assert taken.labels.tolist() == [2, 0]
    assert data.images[0].any()


def test_a_mask_takes_the_rows_where_it_is_true() -> None:
    assert toy_data(4).take(torch.tensor([False, True, False, True])).labels.tolist() == [1, 3]


def test_equal_content_has_an_equal_fingerprint() -> None:
    assert toy_data(8).fingerprint == toy_data(8).fingerprint


def test_one_pixel_one_label_or_one_name_changes_the_fingerprint() -> None:
    data = toy_data(8)
    pixels, labels = data.images.clone(), data.labels.clone()
    pixels[0, 0, 0, 0] ^= 1
    labels[0] = 1
    others = [
        ImageDataset(pixels, data.labels, CLASSES),
        ImageDataset(data.images, labels, CLASSES),
        ImageDataset(data.images, data.labels, ("ant", "bee", "cat", "eel")),
        ImageDataset(data.images.flatten().view(8, 3, 4, 16).repeat(1, 1, 2, 1)[:, :, :8], data.labels, CLASSES),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 5


def test_both_splits_have_the_same_shape() -> None:
    with pytest.raises(DataError, match="toy: training and test split differ"):
        SourceData("toy", toy_data(8, 1), toy_data(8, 3), "none")


def test_both_splits_have_the_same_classes() -> None:
    with pytest.raises(DataError, match="toy: training and test split differ"):
        SourceData("toy", toy_data(8), toy_data(8, classes=("ant", "bee", "cat", "eel")), "none")


def test_a_training_split_of_one_class_is_refused() -> None:
    one = toy_data(8).take(torch.tensor([0, 4]))
    with pytest.raises(DataError, match="one class only"):
        SourceData("toy", one, toy_data(8), "none")


def test_the_fingerprint_of_a_source_is_that_of_its_splits() -> None:
    one = SourceData("one", toy_data(8), toy_data(4), "none")
    other_name = SourceData("two", toy_data(8), toy_data(4), "crop")
    swapped = SourceData("one", toy_data(4), toy_data(8), "none")
    assert one.fingerprint == other_name.fingerprint != swapped.fingerprint
