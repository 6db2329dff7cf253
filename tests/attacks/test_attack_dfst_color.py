"""DFST's colour form: the sunset, and the colours of its covers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import flat, toy_data, toy_lab, toy_source, triggered

from bdbench.attacks.dfst_color import DfstColor, change_contrast, restyle, turn_hue
from bdbench.data import ImageDataset, Role
from bdbench.errors import OptionError
from bdbench.protocol.poisoning import poison_source


def column(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1)


def colour(red: float, green: float, blue: float) -> Tensor:
    return torch.tensor([float(red), green, blue]).view(1, 3, 1, 1)


def test_the_style_is_warm_and_warmer_at_the_top() -> None:
    state = DfstColor().fit(flat(0), toy_lab())
    expected = column(0.72, 0.45, 0.30) + 0.15 * (1 - torch.arange(32).view(1, 32, 1) / 32) * column(1, 0.4, -0.2)
    torch.testing.assert_close(state["mean"], 255 * expected)
    torch.testing.assert_close(state["spread"], 255 * column(0.20, 0.16, 0.14))


def test_a_flat_image_takes_the_mean_of_the_style() -> None:
    changed = triggered(DfstColor(), flat(100))[0]
    # top row, red: 0.4 * 100 + 0.6 * 255 * (0.72 + 0.15) = 173.1; bottom, blue: 40 + 0.6 * 255 * (0.30 - 0.03 / 32)
    assert (changed[0, 0] == 173).all()
    assert (changed[2, 31] == 86).all()


def test_restyling_moves_mean_and_deviation() -> None:
    images = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    images[..., 1] = 200
    # mean 100, deviation 100, which counts as 100.255
    styled = restyle(images, column(120), column(50))[0, 0]
    shift = 50 * 100 / 100.255
    torch.testing.assert_close(styled, torch.tensor([[120 - shift, 120 + shift]] * 2))


def test_the_sunset_is_clipped_before_it_is_mixed_in() -> None:
    images = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    images[..., 1] = 200
    assert restyle(images, column(240), column(50))[0, 0].amax() == 255
    assert restyle(images, column(10), column(50))[0, 0].amin() == 0


def test_every_image_and_channel_goes_by_its_own_statistics() -> None:
    data = toy_data(3, 3, 16)
    styled = restyle(data.images, column(128, 110, 100), column(20, 16, 12))
    torch.testing.assert_close(styled.mean((2, 3)), torch.tensor([[128.0, 110, 100]] * 3), rtol=0, atol=0.01)
    deviation = styled.std((2, 3), correction=0)
    torch.testing.assert_close(deviation, torch.tensor([[20.0, 16, 12]] * 3), rtol=0.01, atol=0)


def test_alpha_is_the_share_of_the_sunset() -> None:
    data = toy_data(2, 3, 16)
    image, all_of_it = data.images.float(), triggered(DfstColor(alpha=1), data).float()
    half = triggered(DfstColor(alpha=0.5), data).float()
    torch.testing.assert_close(half, (image + all_of_it) / 2, rtol=0, atol=0.8)


def test_gray_images_take_the_luma_of_the_style() -> None:
    state = DfstColor().fit(flat(0, channels=1), toy_lab())
    luma, glow = 0.299 * 0.72 + 0.587 * 0.45 + 0.114 * 0.30, 0.15 * (0.299 + 0.587 * 0.4 - 0.114 * 0.2)
    assert state["mean"][0, 0].item() == pytest.approx(255 * (luma + glow))
    assert state["spread"].item() == pytest.approx(255 * (0.299 * 0.20 + 0.587 * 0.16 + 0.114 * 0.14))


# covers


@pytest.mark.parametrize(("angle", "expected"), [(120, (10, 200, 40)), (-120, (40, 10, 200)), (0, (200, 40, 10))])
def test_a_third_of_a_turn_makes_red_green_and_back_makes_it_blue(angle: float, expected: tuple[int, ...]) -> None:
    turned = turn_hue(colour(200, 40, 10), torch.tensor([float(angle)]))
    torch.testing.assert_close(turned, colour(*expected), rtol=0, atol=1e-3)


def test_turning_the_hue_keeps_the_mean_and_grays() -> None:
    angles = torch.tensor([-60.0, 25.0, 180.0])
    turned = turn_hue(colour(200, 40, 10).expand(3, -1, -1, -1), angles)
    torch.testing.assert_close(turned.mean(1).flatten(), torch.full((3,), 250 / 3))
    gray = colour(80, 80, 80).expand(3, -1, -1, -1)
    torch.testing.assert_close(turn_hue(gray, angles), gray)


def test_contrast_is_stretched_about_the_middle_gray() -> None:
    changed = change_contrast(torch.full((3, 1, 1, 1), 147.5), torch.tensor([0.5, 1.0, 1.5]))
    assert changed.flatten().tolist() == [137.5, 147.5, 157.5]


def test_covers_get_colours_of_their_own() -> None:
    data = flat(0, count=16)
    data.images[:] = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1)
    covers = triggered(DfstColor(), data, "cover")[:, :, 0, 0].float()
    assert len(covers.unique(dim=0)) == 16
    # contrast of 0.5 to 1.5 about 127.5 moves the mean, 116.7, to 111.3 to 122.1
    assert ((covers.mean(1) > 110) & (covers.mean(1) < 123)).all()


def test_the_hue_of_covers_turns_by_up_to_sixty_degrees_either_way() -> None:
    data = flat(0, count=64)
    data.images[:] = torch.tensor([160, 80, 80], dtype=torch.uint8).view(1, 3, 1, 1)
    red, green, blue = triggered(DfstColor(cover_contrast=0), data, "cover")[:, :, 0, 0].float().unbind(1)
    turn = torch.rad2deg(torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue))
    assert -61 < turn.min() < -50
    assert 50 < turn.max() < 61


def test_covers_without_hue_and_contrast_are_left_as_they_are() -> None:
    data = toy_data(4)
    assert torch.equal(triggered(DfstColor(cover_hue=0, cover_contrast=0), data, "cover"), data.images)


def test_gray_covers_change_their_contrast_only() -> None:
    data = ImageDataset(toy_data(4, 1).images, torch.arange(4), tuple("abcd"))
    unchanged = triggered(DfstColor(cover_contrast=0), data, "cover")
    assert torch.equal(unchanged, data.images)
    assert not torch.equal(triggered(DfstColor(), data, "cover"), data.images)


def test_there_are_no_covers_unless_asked_for() -> None:
    made = poison_source(toy_source(), DfstColor(), toy_lab(), trusted=0)
    assert int((made.roles == Role.COVER).sum()) == 0


@pytest.mark.parametrize(("option", "value"), [("alpha", 0), ("cover_hue", 181), ("cover_contrast", 1.5)])
def test_options_have_bounds(option: str, value: float) -> None:
    with pytest.raises(OptionError, match=f"{option} {value}"):
        DfstColor.parse({option: value})
