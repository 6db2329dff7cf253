"""Views for contrastive learning: each operation against its definition, each sample with its own draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from bdbench.seeds import generator, scoped
from bdbench.training import views
from bdbench.training.views import contrastive_view

ORANGE = (0.6, 0.4, 0.3)


def random_images(*shape: int) -> Tensor:
    """Images (B, C, H, W) with grey, black and white pixels and tied channels among the others."""
    images = torch.rand(shape, generator=generator(0, "images"))
    images[..., 0, 0], images[..., 0, 1], images[..., 0, 2] = 0, 1, 0.4
    images[:, :2, 1, 0] = 0.7
    images[:, -2:, 1, 1] = 0.7
    images[:, ::2, 1, 2] = 0.7
    images[:, :2, 1, 3] = 0.1
    return images


def plain_images(count: int, side: int = 8) -> Tensor:
    """Images (count, 3, side, side) of one colour, which no crop, flip or blur can change."""
    return torch.tensor(ORANGE)[:, None, None].expand(count, 3, side, side)


def seeded_view(images: Tensor, seed: int = 0) -> Tensor:
    with scoped(seed, "views"):
        return contrastive_view(images)


def by_sample(change: Callable[..., Tensor], images: Tensor, amounts: Tensor) -> Tensor:
    """Run a function of colours-first images and amounts (B, 1, 1) on images (B, C, H, W)."""
    return change(images.transpose(0, 1), amounts[:, None, None]).transpose(0, 1)


def whole(count: int, size: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(count), torch.full((count,), float(size))


@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (5, 1, 32, 32), (4, 3, 8, 12), (4, 1, 12, 8), (1, 3, 8, 8)])
def test_a_view_keeps_shape_range_and_type(shape: tuple[int, ...]) -> None:
    images = random_images(*shape)
    view = seeded_view(images)
    assert view.shape == shape
    assert view.dtype == torch.float32
    assert view.min() >= 0
    assert view.max() <= 1
    assert view.isfinite().all()
    assert not torch.equal(view, images)


def test_no_image_gives_no_view() -> None:
    assert seeded_view(torch.empty(0, 3, 8, 8)).shape == (0, 3, 8, 8)


def test_layout_of_the_images_does_not_matter() -> None:
    images = random_images(4, 3, 8, 12)
    assert torch.equal(seeded_view(images.contiguous(memory_format=torch.channels_last)), seeded_view(images))


def test_equal_seeds_give_equal_views_and_others_do_not() -> None:
    images = random_images(4, 3, 8, 8)
    assert torch.equal(seeded_view(images), seeded_view(images))
    assert not torch.equal(seeded_view(images), seeded_view(images, seed=1))


def test_each_sample_gets_its_own_view() -> None:
    views_of_one = seeded_view(random_images(1, 3, 16, 16).expand(40, -1, -1, -1))
    assert len({view.numpy().tobytes() for view in views_of_one}) == 40


def test_a_view_leaves_the_images_as_they_were_and_has_no_gradient() -> None:
    images = random_images(4, 3, 8, 8)
    before = images.clone()
    view = seeded_view(images.requires_grad_())
    assert not view.requires_grad
    assert torch.equal(images, before)


def test_autocast_costs_no_precision() -> None:
    images = random_images(8, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = seeded_view(images)
    assert torch.equal(under_autocast, seeded_view(images))


def test_a_crop_of_the_whole_is_the_identity() -> None:
    assert torch.equal(views._resize_matrix(*whole(2, 9), 9), torch.eye(9).expand(2, 9, 9))


def test_a_negative_length_mirrors() -> None:
    start, length = torch.tensor([2.0, 0.0]), torch.tensor([5.0, 9.0])
    forth = views._resize_matrix(start, length, 9)
    back = views._resize_matrix(start + length, -length, 9)
    torch.testing.assert_close(back, forth.flip(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("top", "left", "height", "width"), [(0, 0, 8, 12), (3, 2, 5, 9), (4, 0, 4, 6), (0, 11, 3, 1), (7, 5, 1, 7)]
)
def test_a_crop_is_that_of_torchvision_with_antialias(top: int, left: int, height: int, width: int) -> None:
    # antialias=True is Pillow's kernel (a = -1/2, border pixels not repeated), which the code of DBD crops with
    images = random_images(2, 3, 8, 12)
    rows = views._resize_matrix(torch.tensor([float(top)] * 2), torch.tensor([float(height)] * 2), 8)
    columns = views._resize_matrix(torch.tensor([float(left)] * 2), torch.tensor([float(width)] * 2), 12)
    expected = TF.resized_crop(
        images, top, left, height, width, [8, 12], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    found = views._separable(images.transpose(0, 1), rows, columns).transpose(0, 1)
    # float32 sums of 16 products
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_rows_and_columns_of_a_crop_belong_to_their_own_sample() -> None:
    images = random_images(2, 3, 8, 12)
    start, length = torch.tensor([0.0, 3.0]), torch.tensor([8.0, 4.0])
    rows, columns = views._resize_matrix(start, length, 8), views._resize_matrix(start, length, 12)
    both = views._separable(images.transpose(0, 1), rows, columns)
    second = views._separable(images[1:].transpose(0, 1), rows[1:], columns[1:])
    torch.testing.assert_close(both[:, 1:], second, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 8), (8, 12), (40, 12)])
def test_boxes_are_distributed_as_those_of_torchvision(height: int, width: int) -> None:
    image, count = torch.empty(1, height, width), 3000
    with scoped(0, "boxes"):
        (top, left), (box_height, box_width) = views._boxes(count, height, width, image.device)
        drawn = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    expected = torch.tensor(drawn, dtype=torch.float32)
    found = torch.stack([top, left, box_height, box_width], 1)
    # five standard errors of a difference of means
    limit = 5 * expected.std(0) * math.sqrt(2 / count)
    assert ((found.mean(0) - expected.mean(0)).abs() < limit).all()
    torch.testing.assert_close(found[:, 2:].std(0), expected[:, 2:].std(0), rtol=0.1, atol=0)
    assert ((found[:, :2] >= 0) & (found[:, :2] + found[:, 2:] <= torch.tensor([height, width]))).all()
    assert torch.equal(found, found.round())


def test_a_long_image_is_cropped_to_the_largest_allowed_box() -> None:
    # 8 x 64: a share of 0.2 is 102 pixels, the largest allowed box 8 x 11 = 88
    with scoped(0, "boxes"):
        (top, left), sides = views._boxes(500, 8, 64, torch.device("cpu"))
    assert sides.unique(dim=1).tolist() == [[8], [11]]
    assert top.unique().tolist() == [0]
    assert set(left.tolist()) == set(range(64 - 11 + 1))


def test_half_of_the_crops_are_mirrored_left_to_right_and_none_upside_down() -> None:
    ramp = (torch.arange(8.0) / 8)[None, None, None, :].expand(2000, 1, 8, 8)
    with scoped(0, "flip"):
        across = views._crop_and_flip(ramp)[0]
        down = views._crop_and_flip(ramp.mT)[0]
    # 1000 of 2000 with a deviation of 22
    assert 890 < int((across[:, 4, 7] < across[:, 4, 0]).sum()) < 1110
    assert (down[:, 7, 4] > down[:, 0, 4]).all()


def test_crop_comes_first_then_jitter_then_gray_then_blur(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def record(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def recording(*arguments: Tensor) -> Tensor:
            called.append(name)
            return function(*arguments)

        return recording

    monkeypatch.setattr(views, "_contrast", views._brightness)
    monkeypatch.setattr(views, "_saturation", views._brightness)
    for name in ("_crop_and_flip", "_hue", "_gray", "_blur"):
        monkeypatch.setattr(views, name, record(name, getattr(views, name)))
    seeded_view(random_images(20, 3, 8, 8))
    assert called == ["_crop_and_flip", "_hue", "_gray", "_blur"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("change", "reference"), [(views._brightness, TF.adjust_brightness), (views._contrast, TF.adjust_contrast)]
)
def test_brightness_and_contrast_are_those_of_torchvision(
    change: Callable[..., Tensor], reference: Callable[..., Tensor], channels: int
) -> None:
    images, factors = random_images(3, channels, 8, 12), torch.tensor([0.6, 1.0, 1.4])
    expected = torch.stack([reference(one, float(factor)) for one, factor in zip(images, factors, strict=True)])
    torch.testing.assert_close(by_sample(change, images, factors), expected, atol=1e-6, rtol=0)


def test_saturation_is_that_of_torchvision() -> None:
    images, factors = random_images(3, 3, 8, 12), torch.tensor([0.6, 1.0, 1.4])
    expected = torch.stack([TF.adjust_saturation(one, float(f)) for one, f in zip(images, factors, strict=True)])
    torch.testing.assert_close(by_sample(views._saturation, images, factors), expected, atol=1e-6, rtol=0)


def test_hue_is_that_of_torchvision_all_round_the_circle() -> None:
    turns = torch.tensor([-0.5, -0.31, -0.1, 0.0, 0.07, 0.1, 1 / 3, 0.5])
    images = random_images(len(turns), 3, 8, 12)
    expected = torch.stack([TF.adjust_hue(one, float(turn)) for one, turn in zip(images, turns, strict=True)])
    # torchvision goes through value and saturation, each with its own rounding
    torch.testing.assert_close(by_sample(views._hue, images, turns), expected, atol=1e-5, rtol=0)


def test_gray_weighs_the_channels_as_torchvision_does() -> None:
    images = random_images(3, 3, 8, 12)
    found = views._gray(images.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(found, TF.rgb_to_grayscale(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12), (32, 9)])
def test_blur_is_a_gaussian_over_the_mirrored_image(sigma: float, height: int, width: int) -> None:
    image = random_images(1, 1, height, width)
    padded = F.pad(image, (width - 1, width - 1, height - 1, height - 1), mode="reflect")[0, 0].double()
    y, x = torch.meshgrid(torch.arange(len(padded)), torch.arange(padded.shape[1]), indexing="ij")
    expected = torch.empty(height, width)
    for row in range(height):
        for column in range(width):
            squared = (y - row - height + 1) ** 2 + (x - column - width + 1) ** 2
            weight = torch.exp(-squared / (2 * sigma**2)).double()
            expected[row, column] = (weight * padded).sum() / weight.sum()
    found = views._blur(image.transpose(0, 1), torch.tensor([sigma]))[0, 0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_blur_is_that_of_torchvision_inside_its_kernel() -> None:
    image = random_images(1, 3, 32, 32)
    found = views._blur(image.transpose(0, 1), torch.tensor([0.8])).transpose(0, 1)
    torch.testing.assert_close(found, TF.gaussian_blur(image, [13, 13], [0.8, 0.8]), atol=1e-5, rtol=0)


def test_each_sample_is_blurred_by_its_own_sigma() -> None:
    images = random_images(1, 3, 8, 8).expand(2, -1, -1, -1).transpose(0, 1)
    both = views._blur(images, torch.tensor([0.02, 2.0]))
    assert torch.equal(both[:, 0], images[:, 0])
    assert both[:, 1].var() < 0.1 * images[:, 1].var()


def test_jitter_draws_every_order_and_every_factor_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, Tensor]] = []
    names = ("_brightness", "_contrast", "_saturation", "_hue")
    for name in names:

        def record(view: Tensor, amount: Tensor, name: str = name) -> Tensor:
            seen.append((name, amount))
            return view

        monkeypatch.setattr(views, name, record)
    with scoped(0, "jitter"):
        for _ in range(200):
            views._jitter(plain_images(20).transpose(0, 1))
    orders = {tuple(name for name, _ in seen[start : start + 4]) for start in range(0, len(seen), 4)}
    assert len(orders) == 24
    for name in names:
        amounts = torch.cat([amount for found, amount in seen if found == name])
        assert amounts.shape == (4000, 1, 1)
        middle, reach = (0.0, 0.1) if name == "_hue" else (1.0, 0.4)
        assert (amounts - middle).abs().max() <= reach + 1e-6
        # uniform: mean 0 with a standard error of 0.01 of the reach, mean square a third of the reach's
        assert abs(float((amounts - middle).mean())) < 0.05 * reach
        assert float(((amounts - middle) / reach).square().mean()) == pytest.approx(1 / 3, abs=0.03)


def test_eight_in_ten_are_jittered_and_two_in_ten_are_gray() -> None:
    images = plain_images(3000)
    view = seeded_view(images)
    gray = (view.amax(1) - view.amin(1)).flatten(1).amax(1) < 1e-5
    same = (view - images).abs().flatten(1).amax(1) < 1e-5
    # deviations 0.007; what is neither jittered nor grey stays: 0.2 * 0.8
    assert float(gray.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert float(same.float().mean()) == pytest.approx(0.16, abs=0.03)


def test_a_gray_image_keeps_all_but_brightness_and_contrast() -> None:
    # of one value, so that contrast cannot change it either: two in ten are not jittered
    view = seeded_view(torch.full((3000, 1, 8, 8), 0.5))
    factor = view[:, 0, 4, 4] / 0.5
    assert (view - view[:, :, :1, :1]).abs().max() < 1e-5
    assert float(((factor - 1).abs() < 1e-5).float().mean()) == pytest.approx(0.2, abs=0.03)
    assert 0.6 <= factor.min() < 0.62
    assert 1.38 < factor.max() <= 1.4 + 1e-5


def test_half_are_blurred_by_a_tenth_to_two_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    sigmas: list[Tensor] = []

    def whiten(view: Tensor, sigma: Tensor) -> Tensor:
        sigmas.append(sigma)
        return torch.ones_like(view)

    monkeypatch.setattr(views, "_blur", whiten)
    view = seeded_view(plain_images(3000))
    (sigma,) = sigmas
    assert int((view == 1).flatten(1).all(1).sum()) == len(sigma)
    assert 1350 < len(sigma) < 1650
    assert 0.1 <= sigma.min() < 0.11
    assert 1.99 < sigma.max() <= 2
    assert float(sigma.mean()) == pytest.approx(1.05, abs=0.07)
