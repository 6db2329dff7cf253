"""Augmentation moves pixels where it says, per sample, and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bdbench.errors import OptionError
from bdbench.seeds import generator
from bdbench.training import augment
from bdbench.training.augment import OPERATIONS, augmented, parse_augment

TOGETHER = tuple(name for name in OPERATIONS if name != "crop-reflect")
"""All operations that one setting can name."""


def one_image(side: int = 8, channels: int = 1) -> Tensor:
    """An image whose pixels are all different from zero and, up to 15x15, from each other."""
    count = channels * side * side
    return (torch.arange(count) % 255 + 1).to(torch.uint8).view(1, channels, side, side)


def batch_of(images: Tensor, *operations: str, count: int = 200, seed: int = 0) -> Tensor:
    """Batches of the first image, as bytes again."""
    batch = augmented(images[:1].repeat(count, 1, 1, 1), operations, generator(seed, "augment"))
    return (batch * 255).round().to(torch.uint8)


def windows(image: Tensor, pad: int, mode: str = "constant") -> dict[bytes, tuple[int, int]]:
    """All windows of the padded image (C, H, W) by content: their shift down and to the right."""
    side = image.shape[-1]
    padded = F.pad(image.float(), (pad, pad, pad, pad), mode=mode).to(torch.uint8)
    return {
        padded[:, top : top + side, left : left + side].numpy().tobytes(): (top - pad, left - pad)
        for top in range(2 * pad + 1)
        for left in range(2 * pad + 1)
    }


@pytest.mark.parametrize(("side", "pad"), [(8, 1), (15, 2), (32, 4)])
def test_a_crop_is_a_window_of_the_zero_padded_image_and_every_shift_occurs(side: int, pad: int) -> None:
    image = one_image(side)
    known = windows(image[0], pad)
    found = [known[crop.numpy().tobytes()] for crop in batch_of(image, "crop", count=1500)]
    assert set(found) == set(known.values())


@pytest.mark.parametrize(("side", "pad"), [(8, 1), (15, 2), (32, 4)])
def test_a_reflecting_crop_is_a_window_of_the_mirrored_image_and_every_shift_occurs(side: int, pad: int) -> None:
    image = one_image(side)
    known = windows(image[0], pad, "reflect")
    found = [known[crop.numpy().tobytes()] for crop in batch_of(image, "crop-reflect", count=1500)]
    assert set(found) == set(known.values())


def test_a_reflecting_crop_of_a_long_image_mirrors_each_side_by_its_own_eighth() -> None:
    image = torch.arange(1, 8 * 24 + 1, dtype=torch.uint8).view(1, 1, 8, 24)
    padded = F.pad(image.float(), (3, 3, 1, 1), mode="reflect").to(torch.uint8)[0, 0]
    known = {padded[y : y + 8, x : x + 24].numpy().tobytes() for y in range(3) for x in range(7)}
    assert {crop.numpy().tobytes() for crop in batch_of(image, "crop-reflect", count=600)} == known


def test_a_reflecting_crop_and_flip_together_are_windows_of_the_image_or_its_mirror() -> None:
    image = one_image()
    known = set(windows(image[0], 1, "reflect")) | set(windows(image[0].flip(2), 1, "reflect"))
    found = {crop.numpy().tobytes() for crop in batch_of(image, "crop-reflect", "flip", count=600)}
    assert found == known


def test_both_crops_shift_alike() -> None:
    image = one_image(32)
    zeroed, reflected = batch_of(image, "crop", "flip"), batch_of(image, "crop-reflect", "flip")
    assert (zeroed == 0).any()
    assert (reflected > 0).all()
    assert torch.equal(reflected[zeroed > 0], zeroed[zeroed > 0])


def test_cropped_in_pixels_are_zero() -> None:
    ones = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    zeros = (batch_of(ones, "crop") == 0).flatten(1).sum(1)
    # no shift loses nothing; one side loses 8 pixels of 3 channels, two sides 15
    assert set(zeros.tolist()) == {0, 24, 45}


def test_a_flip_mirrors_about_half_of_the_images_left_to_right() -> None:
    image = one_image()
    batch = batch_of(image, "flip")
    mirrored = (batch == image.flip(3)).flatten(1).all(1)
    as_it_was = (batch == image).flatten(1).all(1)
    assert (mirrored ^ as_it_was).all()
    # 100 of 200 with a deviation of 7
    assert 70 < int(mirrored.sum()) < 130


def test_crop_and_flip_together_are_windows_of_the_image_or_its_mirror() -> None:
    image = one_image()
    known = set(windows(image[0], 1)) | set(windows(image[0].flip(2), 1))
    found = {crop.numpy().tobytes() for crop in batch_of(image, "crop", "flip", count=600)}
    assert found == known


@pytest.mark.parametrize(
    "operations", [("crop",), ("crop-reflect",), ("flip",), ("crop", "flip"), ("crop-reflect", "flip")]
)
@pytest.mark.parametrize("shape", [(9, 3, 8, 8), (7, 1, 17, 24)])
def test_crop_and_flip_image_by_image(operations: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """The same numbers are drawn, in the same order: results of before stay as they were."""
    images = torch.randint(256, shape, generator=generator(1, "images"), dtype=torch.uint8)
    count, _, height, width = shape
    rng, one = generator(2, "draw"), (count, 1)
    mirrored = torch.rand(one, generator=rng) < 0.5 if "flip" in operations else torch.zeros(one, dtype=torch.bool)
    y, x = (round(side / 8) if operations[0] != "flip" else 0 for side in (height, width))
    down, right = (torch.randint(-pad, pad + 1, one, generator=rng) if y else torch.zeros(one).long() for pad in (y, x))
    expected = []
    for image, turned, shift_y, shift_x in zip(images, mirrored, down, right, strict=True):
        mode = "reflect" if "crop-reflect" in operations else "constant"
        padded = F.pad(image[None].float(), (x, x, y, y), mode)[0]
        top, left = y + int(shift_y), x + int(shift_x)
        seen = padded[:, top : top + height, left : left + width]
        expected.append(seen.flip(2) if turned else seen)
    assert torch.equal(augmented(images, operations, generator(2, "draw")), torch.stack(expected) / 255)


def test_a_gpu_takes_the_windows_that_a_cpu_takes() -> None:
    images = torch.randint(256, (9, 3, 10, 12), generator=generator(1, "images"), dtype=torch.uint8)
    rng = generator(2, "draw")
    places = torch.stack(
        [torch.arange(9), *(torch.randint(length, (9,), generator=rng) for length in (3, 5)), torch.arange(9) % 2]
    )
    seen = images.unfold(2, 8, 1).unfold(3, 8, 1)
    assert torch.equal(augment._windows(seen, places), augment._windows_by_numpy(seen, places))


def test_channels_move_together() -> None:
    gray = one_image().repeat(1, 3, 1, 1)
    batch = batch_of(gray, "crop", "flip", "cutout", "affine")
    assert torch.equal(batch[:, 0], batch[:, 1])
    assert torch.equal(batch[:, 0], batch[:, 2])


@pytest.mark.parametrize(("side", "hole"), [(8, 2), (32, 2), (64, 4)])
def test_cutout_is_one_square_hole_cut_off_at_the_border(side: int, hole: int) -> None:
    ones = torch.full((1, 3, side, side), 255, dtype=torch.uint8)
    batch = batch_of(ones, "cutout", count=300)
    assert torch.equal(batch[:, 0], batch[:, 2])
    sizes = set()
    for image in batch[:, 0]:
        rows = (image == 0).any(1).nonzero().flatten()
        columns = (image == 0).any(0).nonzero().flatten()
        assert int((image == 0).sum()) == len(rows) * len(columns)
        assert int(rows.max() - rows.min()) + 1 == len(rows)
        assert int(columns.max() - columns.min()) + 1 == len(columns)
        sizes.add((len(rows), len(columns)))
    assert max(sizes) == (hole, hole)
    assert min(sizes) >= (hole // 2, hole // 2)


def test_affine_moves_a_point_by_no_more_than_a_few_pixels() -> None:
    image = torch.zeros(1, 1, 33, 33, dtype=torch.uint8)
    image[0, 0, 15:18, 15:18] = 255
    centres = []
    for moved in batch_of(image, "affine")[:, 0].float():
        y, x = torch.meshgrid(torch.arange(33.0), torch.arange(33.0), indexing="ij")
        centres.append([float((moved * y).sum() / moved.sum()), float((moved * x).sum() / moved.sum())])
    shift = torch.tensor(centres) - 16
    # a tenth of the side is 3.3 pixels, up to 3.3 * (1 + 0.2 + 0.3) / 0.85 after scale, turn and shear
    assert shift.abs().max() < 6
    assert shift.abs().mean() > 1
    assert shift.mean(0).abs().max() < 0.6


def test_affine_gives_each_sample_its_own_move() -> None:
    batch = batch_of(one_image(32), "affine", count=20)
    assert len({image.numpy().tobytes() for image in batch}) == 20


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", [(), *((name,) for name in OPERATIONS), TOGETHER])
def test_any_operation_keeps_shape_and_range(operation: tuple[str, ...], channels: int) -> None:
    images = torch.randint(0, 256, (9, channels, 12, 20), generator=generator(0, "x")).to(torch.uint8)
    batch = augmented(images[:4], operation, generator(0, "augment"))
    assert batch.shape == (4, channels, 12, 20)
    assert batch.dtype == torch.float32
    assert batch.min() >= 0
    assert batch.max() <= 1


def test_no_operation_divides_by_255() -> None:
    images = torch.randint(0, 256, (9, 3, 8, 8), generator=generator(0, "x")).to(torch.uint8)
    assert torch.equal(augmented(images, (), generator(0, "augment")), images.float() / 255)


def test_no_operation_draws_no_numbers() -> None:
    rng = generator(0, "augment")
    before = rng.get_state()
    augmented(one_image(), (), rng)
    assert torch.equal(rng.get_state(), before)


def test_equal_states_give_equal_batches_and_others_do_not() -> None:
    image = one_image(16)
    assert torch.equal(batch_of(image, *TOGETHER), batch_of(image, *TOGETHER))
    assert not torch.equal(batch_of(image, *TOGETHER), batch_of(image, *TOGETHER, seed=1))


def test_augmenting_leaves_the_data_set_as_it_was() -> None:
    image = one_image()
    before = image.clone()
    batch_of(image, *TOGETHER)
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", ()),
        ("crop", ("crop",)),
        ("crop,flip", ("crop", "flip")),
        (" crop , cutout ", ("crop", "cutout")),
        ("crop-reflect,flip", ("crop-reflect", "flip")),
    ],
)
def test_a_setting_names_operations(text: str, expected: tuple[str, ...]) -> None:
    assert parse_augment(text) == expected


@pytest.mark.parametrize("text", ["", "crops", "crop,", "crop,none", "crop flip", "auto"])
def test_a_setting_that_names_anything_else_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="unknown augmentation"):
        parse_augment(text)


def test_the_nearest_operation_is_offered() -> None:
    with pytest.raises(OptionError, match=r"unknown augmentation 'flp'\. Did you mean 'flip'\?"):
        parse_augment("crop,flp")


def test_an_operation_named_twice_is_refused() -> None:
    with pytest.raises(OptionError, match="augment 'flip,flip' names an operation twice"):
        parse_augment("flip,flip")


@pytest.mark.parametrize("text", ["crop,crop-reflect", "crop-reflect,flip,crop"])
def test_two_crops_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match=f"augment '{text}' names both crop and crop-reflect; choose one border"):
        parse_augment(text)
