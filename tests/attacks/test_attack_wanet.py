"""WaNet: the warp and its covers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import flat, toy_data, toy_lab, toy_source, triggered

from bdbench.attacks.wanet import WaNet
from bdbench.data import ImageDataset, Role
from bdbench.errors import OptionError
from bdbench.protocol.poisoning import poison_source


def identity(side: int) -> Tensor:
    line = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], 2)


def test_wanet_control_points_shift_by_half_a_strength_on_average() -> None:
    # With as many control points as pixels nothing is interpolated, and mean |P| is 1 by construction:
    # s / H in [-1, 1] is s / H * (H - 1) / 2 pixels, 1 / 16 * 15 / 2 = 0.469. The clamp takes a little.
    grid = WaNet(control_points=16, strength=1.0).fit(flat(0, side=16), toy_lab(0))["grid"]
    shift = (grid - identity(16)).abs() * 15 / 2
    assert shift[1:-1, 1:-1].mean().item() == pytest.approx(0.469, rel=0.1)


def test_wanet_shifts_by_about_a_quarter_pixel_at_the_published_strength() -> None:
    grids = [WaNet(strength=0.5).fit(flat(0), toy_lab(seed))["grid"] for seed in range(20)]
    shift = torch.stack([(grid - identity(32)).abs().mean() for grid in grids]).mean().item() * 31 / 2
    # 0.5 / 32 * 31 / 2 = 0.242 at the control points; between them, averages: about 0.7 of it
    assert 0.6 * 0.242 < shift < 0.9 * 0.242


def test_wanet_shifts_larger_images_by_the_same_share() -> None:
    small, large = (
        WaNet(control_points=2).fit(flat(0, side=side), toy_lab(0))["grid"] - identity(side) for side in (32, 64)
    )
    torch.testing.assert_close(large[0, 0], small[0, 0])  # corners are control points
    torch.testing.assert_close(large[-1, 0], small[-1, 0])
    assert large.abs().mean().item() == pytest.approx(small.abs().mean().item(), rel=0.05)


def test_wanet_doubles_its_shift_with_its_strength() -> None:
    one, two = (WaNet(strength=strength).fit(flat(0), toy_lab(0))["grid"] - identity(32) for strength in (0.5, 1.0))
    torch.testing.assert_close(two[4:-4, 4:-4], 2 * one[4:-4, 4:-4], rtol=1e-3, atol=1e-6)


def test_wanet_grid_stays_inside_the_image() -> None:
    grid = WaNet(strength=8).fit(flat(0), toy_lab(0))["grid"]
    assert (grid.min().item(), grid.max().item()) == (-1, 1)


def test_wanet_fields_are_smooth() -> None:
    shift = WaNet().fit(flat(0), toy_lab(0))["grid"] - identity(32)
    assert shift.diff(dim=0)[2:-2].abs().mean() < shift.abs().mean() / 3


def test_wanet_without_a_shift_changes_nothing() -> None:
    data = toy_data(2)
    changed = WaNet().trigger(data, torch.arange(2), {"grid": identity(8)}, "test", 0)
    assert torch.equal(changed, data.images)


def test_wanet_grid_of_one_pixel_to_the_right_fetches_the_right_neighbour() -> None:
    data = toy_data(2)
    grid = identity(8) + torch.tensor([2 / 7, 0.0])
    changed = WaNet().trigger(data, torch.arange(2), {"grid": grid}, "test", 0)
    assert torch.equal(changed[..., :-1], data.images[..., 1:])


def test_wanet_poison_and_test_images_share_one_warp() -> None:
    data = toy_data(1)
    twice = ImageDataset(data.images.repeat(2, 1, 1, 1), data.labels.repeat(2), data.class_names)
    poison, test = triggered(WaNet(), twice, "poison"), triggered(WaNet(), twice, "test")
    assert torch.equal(poison[0], poison[1])
    assert torch.equal(poison, test)


def test_wanet_covers_are_warped_each_in_its_own_way() -> None:
    data = toy_data(1)
    twice = ImageDataset(data.images.repeat(2, 1, 1, 1), data.labels.repeat(2), data.class_names)
    covers = triggered(WaNet(), twice, "cover")
    assert not torch.equal(covers[0], covers[1])
    assert not torch.equal(covers[0], triggered(WaNet(), twice, "poison")[0])


@pytest.mark.parametrize(("ratio", "expected"), [(0.0, 0), (0.5, 6), (2.0, 24)])
def test_wanet_covers_go_by_the_poison(ratio: float, expected: int) -> None:
    poisoned = poison_source(toy_source(), WaNet(cover_ratio=ratio), toy_lab(0), trusted=0)
    covers = poisoned.roles == Role.COVER
    assert int(covers.sum()) == expected
    assert torch.equal(poisoned.visible.labels[covers], poisoned.clean_labels[covers])


def test_more_covers_than_images_are_refused() -> None:
    with pytest.raises(OptionError, match="asks for 120 cover samples, only 60 can be; lower --cover-ratio"):
        poison_source(toy_source(), WaNet(rate=0.5, cover_ratio=2), toy_lab(0), trusted=0)
