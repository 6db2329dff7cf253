"""FTrojan: the pattern of two frequencies, and the rounding of the published code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from torch import Tensor
from toys import flat, toy_data, toy_lab, triggered

from bdbench.attacks.ftrojan import FTrojan, add_to_chroma_bytes
from bdbench.attacks.parts.frequency import window_pattern
from bdbench.errors import OptionError


def from_coefficients(height: int, width: int, *places: tuple[int, int]) -> Tensor:
    """The pixels of a window whose transform is 1 at these places."""
    coefficients = np.zeros((height, width))
    for place in places:
        coefficients[place] = 1
    return torch.from_numpy(idctn(coefficients, norm="ortho")).float()


def flat_colour(*values: int) -> Tensor:
    """One 8x8 image (1, C, 8, 8) of one colour."""
    return torch.tensor(values, dtype=torch.uint8).view(1, -1, 1, 1).expand(1, -1, 8, 8).contiguous()


def test_the_pattern_is_the_published_formula() -> None:
    def wave(row: int, column: int, k: int) -> float:
        return math.cos(math.pi * (2 * row + 1) * k / 64) * math.cos(math.pi * (2 * column + 1) * k / 64)

    expected = [[2 / 32 * (wave(i, j, 15) + wave(i, j, 31)) for j in range(32)] for i in range(32)]
    torch.testing.assert_close(window_pattern(32, 32, 32), torch.tensor(expected), rtol=0, atol=1e-6)


def test_the_pattern_is_as_large_as_published() -> None:
    pattern = 30 * window_pattern(32, 32, 32)
    assert pattern.abs().max().item() == pytest.approx(3.19, abs=0.01)
    assert pattern.square().mean().sqrt().item() == pytest.approx(1.33, abs=0.01)


@pytest.mark.parametrize(
    ("height", "width", "places"),
    [(32, 32, [(15, 15), (31, 31)]), (28, 28, [(13, 13), (27, 27)]), (12, 20, [(5, 9), (11, 19)])],
)
def test_it_raises_the_middle_and_the_highest_frequency(height: int, width: int, places: list[tuple[int, int]]) -> None:
    expected = from_coefficients(height, width, *places)
    torch.testing.assert_close(window_pattern(height, width, 32), expected, rtol=0, atol=1e-6)


def test_larger_images_have_several_windows_and_the_last_are_cut() -> None:
    one = window_pattern(32, 32, 32)
    assert torch.equal(window_pattern(64, 64, 32), one.repeat(2, 2))
    assert torch.equal(window_pattern(40, 32, 32), torch.cat([one, one[:8]]))


def test_red_and_blue_rise_where_green_falls() -> None:
    changed = triggered(FTrojan(), flat(100))[0].float() - 100
    p = 30 * window_pattern(32, 32, 32)
    for channel, share in enumerate((1.403, -1.058, 1.773)):
        assert torch.equal(changed[channel], (100 + share * p).round() - 100)
    # 4.5, 3.4 and 5.7 before rounding
    assert changed.abs().amax((1, 2)).tolist() == [4, 3, 6]


def test_gray_images_take_the_pattern_on_their_channel() -> None:
    changed = triggered(FTrojan(), flat(100, channels=1))[0, 0]
    assert torch.equal(changed, (100 + 30 * window_pattern(32, 32, 32)).round().to(torch.uint8))


def test_magnitude_and_window_are_options() -> None:
    state = FTrojan(magnitude=20, window=8).fit(flat(0, side=16), toy_lab())
    assert torch.equal(state["pattern"][0], 20 * window_pattern(8, 8, 8).repeat(2, 2))


# the rounding of the published code


def test_exact_cuts_chroma_to_bytes() -> None:
    # Y 100, Cr and Cb 128 + 2.7, cut to 130
    red, green, blue = add_to_chroma_bytes(flat_colour(100, 100, 100), torch.tensor([2.7]).view(1, 1, 1))[0, :, 0, 0]
    assert red == round(100 + 1.403 * 2)
    assert green == round(100 - 0.714 * 2 - 0.344 * 2)
    assert blue == round(100 + 1.773 * 2)


def test_exact_cuts_towards_zero() -> None:
    # 127.5 to 127: the cut takes one more from Cr
    changed = add_to_chroma_bytes(flat_colour(100, 100, 100), torch.tensor([-0.5]).view(1, 1, 1))
    assert changed[0, 0, 0, 0] == round(100 - 1.403)


def test_exact_wraps_round_on_saturated_colours() -> None:
    # pure blue: Y 29, Cr 107, Cb 255; plus 1.2 are 108 and 256, which is 0
    changed = add_to_chroma_bytes(flat_colour(0, 0, 255), torch.tensor([1.2]).view(1, 1, 1))[0, :, 0, 0]
    assert changed.tolist() == [round(29 - 1.403 * 20), round(29 + 0.714 * 20 + 0.344 * 128), 0]


def test_exact_starts_from_bytes() -> None:
    # pure red: Y 76, Cb 85, Cr 255.6, which no byte holds: 255
    red = add_to_chroma_bytes(flat_colour(255, 0, 0), torch.zeros(1, 1, 1))[0, 0, 0, 0]
    assert red == round(76 + 1.403 * 127)


@pytest.mark.parametrize(
    ("colour", "expected"),
    [
        ((232, 240, 11), (235, 237, 14)),
        ((167, 46, 233), (170, 45, 237)),
        ((177, 10, 208), (180, 9, 212)),
        ((82, 230, 39), (85, 228, 42)),
    ],
)
def test_exact_is_what_opencv_gives_where_shares_in_float_give_another_byte(
    colour: tuple[int, int, int], expected: tuple[int, int, int]
) -> None:
    """By cv2.cvtColor to YCrCb, 2 more in Cr and Cb, and back; of such colours floats round Y, Cr or Cb otherwise."""
    changed = add_to_chroma_bytes(flat_colour(*colour), torch.tensor([2.0]).view(1, 1, 1))
    assert tuple(changed[0, :, 0, 0].tolist()) == expected


@pytest.mark.parametrize(("value", "shift", "expected"), [(255, 1.5, 0), (0, -1.5, 255), (0, -0.5, 0), (9, 0.9, 9)])
def test_exact_cuts_and_wraps_gray_too(value: int, shift: float, expected: int) -> None:
    assert (add_to_chroma_bytes(flat_colour(value), torch.tensor([shift]).view(1, 1, 1)) == expected).all()


def test_exact_is_what_the_transform_of_the_image_gives() -> None:
    data = toy_data(1, 1, 32)
    transformed = dctn(data.images[0, 0].numpy().astype(float), norm="ortho")
    transformed[[15, 31], [15, 31]] += 30
    expected = idctn(transformed, norm="ortho")
    sure = torch.from_numpy(np.abs(expected - np.rint(expected)) > 1e-4)
    wrapped = torch.from_numpy(np.trunc(expected) % 256).to(torch.uint8)
    changed = triggered(FTrojan(exact=True), data)[0, 0]
    assert sure.float().mean() > 0.95
    assert torch.equal(changed[sure], wrapped[sure])


def test_exact_differs_by_few_levels_where_nothing_wraps() -> None:
    data = toy_data(4, 3, 32)
    data.images.clamp_(60, 180)
    linear, exact = (triggered(FTrojan(exact=exact), data).float() for exact in (False, True))
    assert 0 < (linear - exact).abs().mean() < 2
    assert (linear - exact).abs().max() <= 5


@pytest.mark.parametrize(("option", "value"), [("magnitude", 0), ("window", 3)])
def test_an_empty_pattern_is_refused(option: str, value: int) -> None:
    with pytest.raises(OptionError, match=f"{option} {value}"):
        FTrojan.parse({option: value})
