"""BPP: levels, dithering, and covers that borrow another image's residual."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import flat, toy_data, toy_lab, toy_source, triggered

from bdbench.attacks.bpp import Bpp, dither, quantise
from bdbench.data import ImageDataset, Role
from bdbench.errors import OptionError
from bdbench.protocol.poisoning import poison_source


def flats(*values: int) -> ImageDataset:
    """Images of one gray value each."""
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return ImageDataset(images, torch.zeros(len(values), dtype=torch.int64), ("a", "b"))


def test_every_byte_goes_to_the_nearest_of_eight_levels() -> None:
    levels = torch.tensor([0, 36, 73, 109, 146, 182, 219, 255])
    shown = triggered(Bpp(), flats(*range(256)))[:, 0, 0, 0].long()
    assert torch.equal(shown.unique(), levels)
    # between 0 and 36.43 the border is at 18.2, between 109.29 and 145.71 at 127.5
    assert shown[[18, 19, 127, 128, 254]].tolist() == [0, 36, 109, 146, 255]


def test_one_bit_is_black_and_white() -> None:
    assert triggered(Bpp(bits=1), flats(0, 127, 128, 255))[:, 0, 0, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("bits", [0, 8])
def test_bits_have_bounds(bits: int) -> None:
    with pytest.raises(OptionError, match=f"bits {bits}"):
        Bpp.parse({"bits": bits})


# dithering


def in_reading_order(image: Tensor, levels: int) -> Tensor:
    """Floyd and Steinberg for one channel (H, W), pixel by pixel."""
    values, (height, width) = image.double() * (levels - 1) / 255, image.shape
    for i in range(height):
        for j in range(width):
            error = values[i, j] - values[i, j].round()
            values[i, j] -= error
            for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if i + down < height and 0 <= j + right < width:
                    values[i + down, j + right] += error * share / 16
    return values * 255 / (levels - 1)


@pytest.mark.parametrize(("height", "width", "levels"), [(8, 8, 8), (8, 13, 2), (11, 8, 4)])
def test_dithering_is_that_of_reading_order(height: int, width: int, levels: int) -> None:
    images = toy_data(2, 3, height, width).images
    expected = torch.stack([in_reading_order(image, levels) for image in images.flatten(0, 1)])
    torch.testing.assert_close(dither(images, levels), expected.view_as(images).float(), rtol=0, atol=0.01)


def test_dithering_of_two_pixels() -> None:
    # 100 is 0.392 of white, shown black; 7/16 of it make the next 0.564, shown white
    assert dither(torch.full((1, 1, 1, 2), 100.0), 2).tolist() == [[[[0, 255]]]]


def test_dithering_keeps_the_mean_and_shows_levels_only() -> None:
    shown = triggered(Bpp(dithering=True), flat(100))
    assert set(shown.unique().tolist()) == {73, 109}
    assert shown.float().mean().item() == pytest.approx(100, abs=0.5)
    assert quantise(flat(100).images, 8).mean().item() == pytest.approx(109.3, abs=0.1)


# covers


@pytest.mark.parametrize("dithering", [False, True])
def test_a_cover_gets_what_the_levels_change_in_another_image(dithering: bool) -> None:
    data, attack = toy_data(2), Bpp(dithering=dithering)
    reduced = (dither if dithering else quantise)(data.images, 8)
    residual = (reduced - data.images).flip(0)
    expected = (data.images + residual).clamp(0, 255).round().to(torch.uint8)
    assert torch.equal(triggered(attack, data, "cover"), expected)


def test_residuals_by_hand() -> None:
    # 100 is shown as 109.29 and 20 as 36.43: residuals 9.29 and 16.43, exchanged
    assert triggered(Bpp(), flats(100, 20), "cover")[:, 0, 0, 0].tolist() == [116, 29]


def test_no_cover_gets_its_own_residual_and_partners_vary() -> None:
    values = list(range(0, 256, 3))
    own = triggered(Bpp(), flats(*values)).int()[:, 0, 0, 0]
    covers = triggered(Bpp(), flats(*values), "cover").int()[:, 0, 0, 0]
    shift = covers - torch.tensor(values)
    unclipped = (covers > 0) & (covers < 255)
    residual = own - torch.tensor(values)
    of_next_row = (shift - residual.roll(-1))[unclipped].abs() <= 1
    assert 0 < of_next_row.sum() < len(of_next_row) / 2
    same = torch.tensor([(residual == value).sum() for value in residual]) == 1
    assert (shift != residual)[unclipped & same].all()


def test_there_is_a_cover_for_every_poisoned_sample() -> None:
    made = poison_source(toy_source(), Bpp(), toy_lab(), trusted=0)
    covers = made.roles == Role.COVER
    assert int(covers.sum()) == int((made.roles == Role.POISON).sum()) == 12
    assert torch.equal(made.visible.labels[covers], made.clean_labels[covers])
