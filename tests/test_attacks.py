"""Rules that every registered attack keeps, then each trigger against its formula."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import toy_data, toy_source

from bdbench.attacks import base
from bdbench.attacks.badnets import BadNets
from bdbench.attacks.base import Attack, Use, pattern_for
from bdbench.attacks.blended import Blended, draw_cartoon
from bdbench.attacks.sig import Sig
from bdbench.attacks.wanet import WaNet
from bdbench.data import ImageDataset, Role
from bdbench.errors import OptionError
from bdbench.options import describe_options
from bdbench.poisoning import poison_source
from bdbench.registry import ATTACKS
from bdbench.seeds import generator

USES: tuple[Use, ...] = ("poison", "cover", "test")
every_attack = pytest.mark.parametrize("name", ATTACKS.names())


def attack_of(name: str, **options: Any) -> Attack:
    attack: Attack = ATTACKS.load(name).parse(options)
    return attack


def flat(value: int, channels: int = 3, side: int = 32, count: int = 1) -> ImageDataset:
    """Images of one gray value."""
    images = torch.full((count, channels, side, side), value, dtype=torch.uint8)
    return ImageDataset(images, torch.zeros(count, dtype=torch.int64), ("a", "b"))


def triggered(attack: Attack, data: ImageDataset, use: Use = "test", seed: int = 0) -> Tensor:
    return attack.trigger(data.images, torch.arange(len(data)), attack.fit(data, seed), use, seed)


# every attack


@every_attack
def test_images_do_not_depend_on_the_batch_they_are_triggered_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attack, data = attack_of(name), toy_data(12)
    state, rows = attack.fit(data, 0), torch.arange(12) + 100
    for use in USES:
        at_once = attack.trigger(data.images, rows, state, use, 0)
        for start, stop in ((0, 1), (1, 8), (8, 12)):
            part = attack.trigger(data.images[start:stop], rows[start:stop], state, use, 0)
            assert torch.equal(part, at_once[start:stop])
        assert torch.equal(attack.trigger(data.images.flip(0), rows.flip(0), state, use, 0).flip(0), at_once)
        monkeypatch.setattr(base, "CHUNK", 5)
        assert torch.equal(attack.trigger(data.images, rows, state, use, 0), at_once)
        monkeypatch.undo()


@every_attack
def test_triggering_changes_copies_only(name: str) -> None:
    attack, data = attack_of(name), toy_data(12)
    before = data.images.clone()
    assert not torch.equal(triggered(attack, data), before)
    assert torch.equal(data.images, before)


@every_attack
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 12, 20)])
def test_any_image_shape_goes_in_and_comes_out_as_bytes(name: str, shape: tuple[int, int, int]) -> None:
    attack = attack_of(name)
    images = torch.randint(0, 256, (3, *shape), generator=generator(0, "x")).to(torch.uint8)
    data = ImageDataset(images, torch.zeros(3, dtype=torch.int64), ("a", "b"))
    for use in USES:
        changed = triggered(attack, data, use)
        assert changed.shape == images.shape
        assert changed.dtype == torch.uint8
        assert not torch.equal(changed, images)


@every_attack
def test_no_images_are_triggered_to_no_images(name: str) -> None:
    attack, data = attack_of(name), toy_data(4)
    nothing = torch.arange(0)
    assert attack.trigger(data.images[:0], nothing, attack.fit(data, 0), "cover", 0).shape == (0, 3, 8, 8)


@every_attack
def test_only_chosen_rows_change(name: str) -> None:
    source = toy_source()
    poisoned = poison_source(source, attack_of(name), seed=0, trusted=0.1)
    clean = source.train.take(poisoned.source_rows)
    untouched = poisoned.roles == Role.CLEAN
    assert torch.equal(poisoned.visible.images[untouched], clean.images[untouched])
    assert torch.equal(poisoned.visible.labels[untouched], clean.labels[untouched])
    changed = (poisoned.visible.images != clean.images).flatten(1).any(1)
    assert changed[~untouched].all()


@every_attack
def test_counts_are_exact(name: str) -> None:
    attack = attack_of(name, rate=0.1)
    roles = poison_source(toy_source(), attack_of(name, rate=0.1), seed=0, trusted=0).roles
    assert int((roles == Role.POISON).sum()) == 12
    assert int((roles == Role.COVER).sum()) == attack.cover_count(12)


@every_attack
def test_clean_labels_stay_and_only_the_target_class_is_drawn(name: str) -> None:
    source = toy_source()
    poisoned = poison_source(source, attack_of(name, labels="clean", class_rate=0.5, target=2), seed=0, trusted=0)
    assert torch.equal(poisoned.visible.labels, source.train.labels)
    assert (source.train.labels[poisoned.roles == Role.POISON] == 2).all()
    assert int((poisoned.roles == Role.POISON).sum()) == 15


@every_attack
def test_a_stored_state_triggers_the_same_test_set_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = toy_source()
    poisoned = poison_source(source, attack_of(name), seed=3, trusted=0)
    save_file(
        {key: value.contiguous() for key, value in poisoned.trigger_state.items()},
        tmp_path / "attack.safetensors",
    )
    rows = poisoned.triggered_rows
    again = attack_of(name).trigger(
        source.test.images[rows], rows, load_file(tmp_path / "attack.safetensors"), "test", 3
    )
    assert torch.equal(again, poisoned.triggered.images)


@every_attack
def test_equal_seeds_poison_alike_and_another_seed_otherwise(name: str) -> None:
    one, same, other = (poison_source(toy_source(), attack_of(name), seed=seed, trusted=0) for seed in (0, 0, 1))
    assert one.visible.fingerprint == same.visible.fingerprint
    assert one.triggered.fingerprint == same.triggered.fingerprint
    assert one.visible.fingerprint != other.visible.fingerprint


@every_attack
def test_the_source_is_left_as_it_was(name: str) -> None:
    source = toy_source()
    before = source.train.images.clone(), source.train.labels.clone(), source.test.images.clone()
    poison_source(source, attack_of(name), seed=0, trusted=0.1)
    assert torch.equal(source.train.images, before[0])
    assert torch.equal(source.train.labels, before[1])
    assert torch.equal(source.test.images, before[2])


@every_attack
def test_all_to_all_can_be_asked_of_any_attack(name: str) -> None:
    poisoned = poison_source(toy_source(), attack_of(name, labels="all-to-all", rate=0.1), seed=0, trusted=0)
    chosen = poisoned.roles == Role.POISON
    assert torch.equal(poisoned.visible.labels[chosen], (poisoned.clean_labels[chosen] + 1) % 4)
    assert len(poisoned.triggered) == 40


@every_attack
def test_an_attack_says_what_it_is(name: str) -> None:
    cls = ATTACKS.load(name)
    assert cls.paper.startswith("https://")
    assert cls.paper in (inspect.getdoc(cls) or "")
    assert cls.threat
    assert cls.version >= 1
    assert all(option.description for option in describe_options(cls))


# rates


def test_rate_and_class_rate_exclude_each_other() -> None:
    with pytest.raises(OptionError, match="give either rate or class_rate"):
        BadNets.parse({"rate": 0.1, "class_rate": 0.1})


def test_class_rate_alone_takes_the_place_of_the_default_rate() -> None:
    assert BadNets.parse({"class_rate": 0.5}).class_rate == 0.5


def test_neither_rate_is_refused() -> None:
    with pytest.raises(OptionError, match="give either rate or class_rate"):
        BadNets.parse({"rate": None})


def test_class_rate_has_no_meaning_for_all_to_all() -> None:
    with pytest.raises(OptionError, match="no meaning with all-to-all"):
        BadNets.parse({"class_rate": 0.5, "labels": "all-to-all"})


@pytest.mark.parametrize("rate", [0, -0.1, 1.1])
def test_a_rate_is_a_share(rate: float) -> None:
    with pytest.raises(OptionError, match=f"rate {rate}"):
        BadNets.parse({"rate": rate})


def test_a_target_is_not_negative() -> None:
    with pytest.raises(OptionError, match="target -1"):
        BadNets.parse({"target": -1})


# BadNets

GRID = [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
CHECKER = [[255, 1, 255], [1, 255, 1], [255, 1, 255]]
WHITE = [[255] * 3] * 3


@pytest.mark.parametrize(
    ("patch", "top", "values"),
    [("grid", 29, GRID), ("white", 29, WHITE), ("checker", 29, CHECKER), ("square", 28, WHITE)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_published_patches_lie_where_published(patch: str, top: int, values: list[list[int]], channels: int) -> None:
    expected = flat(100, channels).images
    expected[..., top : top + 3, top : top + 3] = torch.tensor(values, dtype=torch.uint8)
    assert torch.equal(triggered(attack_of("badnets", patch=patch), flat(100, channels)), expected)


def test_black_pixels_of_a_patch_are_written() -> None:
    assert triggered(BadNets(), flat(100))[0, :, 29, 29].tolist() == [0, 0, 0]
    assert triggered(BadNets(colour=(0, 0, 0)), flat(100))[0, :, 29:, 29:].sum() == 0


def test_four_corners_carry_the_grid_one_pixel_in_at_top_and_left() -> None:
    expected = flat(100).images
    for top in (1, 29):
        for left in (1, 29):
            # ABL: the corners on the top and left sides are one pixel from both of their borders
            inset_top = top if (top, left) != (29, 1) else 28
            inset_left = left if (top, left) != (1, 29) else 28
            expected[..., inset_top : inset_top + 3, inset_left : inset_left + 3] = torch.tensor(
                GRID, dtype=torch.uint8
            )
    assert torch.equal(triggered(BadNets(patch="4corner"), flat(100)), expected)


def test_dbd_patch_is_two_by_two_in_colour() -> None:
    expected = flat(100).images
    expected[0, :, 4, 4] = torch.tensor([180, 249, 112])
    expected[0, :, 4, 5] = torch.tensor([155, 50, 126])
    expected[0, :, 5, 4] = torch.tensor([234, 82, 68])
    expected[0, :, 5, 5] = torch.tensor([187, 201, 219])
    assert torch.equal(triggered(BadNets(patch="dbd"), flat(100)), expected)


def test_a_colour_on_gray_images_is_its_luma() -> None:
    # 0.299 * 100 + 0.587 * 200 + 0.114 * 50 = 153
    assert triggered(BadNets(colour=(100, 200, 50)), flat(0, channels=1))[0, 0, 31, 31] == 153


@pytest.mark.parametrize(("side", "expected"), [(8, 3), (28, 3), (32, 3), (64, 6), (96, 9)])
def test_a_patch_keeps_its_share_of_larger_images(side: int, expected: int) -> None:
    changed = triggered(BadNets(patch="white"), flat(0, side=side))
    assert int(changed[0, 0].count_nonzero()) == expected**2


@pytest.mark.parametrize(
    ("corner", "row", "column"),
    [("top-left", 2, 2), ("top-right", 2, 5), ("bottom-left", 5, 2), ("bottom-right", 5, 5)],
)
def test_size_corner_and_margin_place_a_patch(corner: str, row: int, column: int) -> None:
    attack = attack_of("badnets", patch="white", patch_size=1, corner=corner, margin=2)
    changed = triggered(attack, flat(0, side=8))[0, 0]
    assert changed.nonzero().tolist() == [[row, column]]


def test_a_patch_may_cover_the_whole_image() -> None:
    assert (triggered(BadNets(patch="white", patch_size=8), flat(0, side=8)) == 255).all()


@pytest.mark.parametrize("options", [{"patch_size": 9}, {"margin": 6}, {"patch": "4corner", "patch_size": 8}])
def test_a_patch_larger_than_the_image_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"a patch of \d pixels .*does not fit images of 8x8; lower --patch-size"):
        attack_of("badnets", **options).fit(flat(0, side=8), 0)


@pytest.mark.parametrize("colour", [(256, 0, 0), (0, -1, 0)])
def test_a_colour_out_of_range_is_refused(colour: tuple[int, int, int]) -> None:
    with pytest.raises(OptionError, match=r"colour .* outside 0\.\.255"):
        BadNets(colour=colour).fit(flat(0), 0)


def test_luma_of_a_pattern() -> None:
    pattern = torch.tensor([100.0, 200.0, 50.0]).view(3, 1, 1)
    assert pattern_for(pattern, 1).item() == pytest.approx(153)
    assert pattern_for(pattern, 3) is pattern


# Blended


def test_blending_is_a_weighted_mean() -> None:
    attack = Blended(alpha=0.2)
    state = {"pattern": torch.full((3, 8, 8), 200.0)}
    # 0.8 * 100 + 0.2 * 200 = 120
    assert (attack.trigger(flat(100, side=8).images, torch.tensor([0]), state, "poison", 0) == 120).all()


def test_blending_has_its_own_share_at_test_time() -> None:
    attack, images = Blended(alpha=0.2, alpha_test=0.5), flat(100, side=8).images
    state = {"pattern": torch.full((3, 8, 8), 200.0)}
    assert (attack.trigger(images, torch.tensor([0]), state, "test", 0) == 150).all()
    assert (attack.trigger(images, torch.tensor([0]), state, "poison", 0) == 120).all()


def test_blending_rounds_to_nearest() -> None:
    state = {"pattern": torch.full((3, 8, 8), 103.0)}
    # 0.8 * 100 + 0.2 * 103 = 100.6
    assert (Blended(alpha=0.2).trigger(flat(100, side=8).images, torch.tensor([0]), state, "test", 0) == 101).all()


@pytest.mark.parametrize("picture", ["cartoon", "noise"])
def test_one_pattern_is_blended_into_all_images(picture: str) -> None:
    changed = triggered(attack_of("blended", picture=picture, alpha=0.5), flat(100, side=16, count=3), "poison")
    assert torch.equal(changed[0], changed[1])
    assert torch.equal(changed[0], changed[2])
    assert len(changed[0].unique()) > 5


def test_noise_depends_on_the_seed_and_covers_all_bytes() -> None:
    attack = Blended(picture="noise")
    one, same, other = (attack.fit(flat(0), seed)["pattern"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert (one.min().item(), one.max().item()) == (0, 255)


def test_a_share_of_one_shows_the_picture_alone(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    changed = triggered(attack_of("blended", picture=str(file), alpha=1.0), flat(0, side=8))
    assert torch.equal(changed[0], torch.from_numpy(pixels).permute(2, 0, 1))


def test_a_missing_picture_is_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"picture '.*cat\.png' does not exist; give cartoon, noise, or the path"):
        attack_of("blended", picture=str(tmp_path / "cat.png")).fit(flat(0), 0)


def test_a_file_that_is_no_picture_is_said(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_text("meow")
    with pytest.raises(OptionError, match=r"cat\.png' cannot be read as an image"):
        attack_of("blended", picture=str(tmp_path / "cat.png")).fit(flat(0), 0)


def test_the_cartoon_is_bright_and_colourful() -> None:
    pixels = np.asarray(draw_cartoon(64))
    assert pixels.shape == (64, 64, 3)
    assert pixels.mean() > 150
    assert pixels.std() > 40


# SIG


def test_sig_adds_a_sinusoid_over_the_columns() -> None:
    changed = triggered(Sig(delta=40, frequency=6), flat(100))
    expected = [round(100 + 40 * math.sin(2 * math.pi * 6 * column / 32)) for column in range(32)]
    assert torch.equal(changed, torch.tensor(expected, dtype=torch.uint8).expand(1, 3, 32, 32))


def test_sig_of_one_period_in_eight_columns() -> None:
    # sin 0, 45, 90, ... 315 degrees
    expected = [100, 128, 140, 128, 100, 72, 60, 72]
    assert triggered(Sig(delta=40, frequency=1), flat(100, side=8))[0, 0, 0].tolist() == expected


@pytest.mark.parametrize(("value", "column", "expected"), [(250, 2, 255), (5, 6, 0)])
def test_sig_is_clipped_and_never_wraps_round(value: int, column: int, expected: int) -> None:
    assert triggered(Sig(delta=40, frequency=1), flat(value, side=8))[0, 0, 0, column] == expected


def test_sig_has_its_own_amplitude_at_test_time() -> None:
    attack = Sig(delta=20, delta_test=60, frequency=1)
    assert triggered(attack, flat(100, side=8), "poison")[0, 0, 0, 2] == 120
    assert triggered(attack, flat(100, side=8), "test")[0, 0, 0, 2] == 160


def test_sig_changes_no_label_by_default() -> None:
    assert Sig().labels == "clean"
    source = toy_source()
    assert torch.equal(poison_source(source, Sig(), 0, 0).visible.labels, source.train.labels)


# WaNet


def identity(side: int) -> Tensor:
    line = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], 2)


def test_wanet_control_points_shift_by_half_a_strength_on_average() -> None:
    # With as many control points as pixels nothing is interpolated, and mean |P| is 1 by construction:
    # s / H in [-1, 1] is s / H * (H - 1) / 2 pixels, 1 / 16 * 15 / 2 = 0.469. The clamp takes a little.
    grid = WaNet(control_points=16, strength=1.0).fit(flat(0, side=16), 0)["grid"]
    shift = (grid - identity(16)).abs() * 15 / 2
    assert shift[1:-1, 1:-1].mean().item() == pytest.approx(0.469, rel=0.1)


def test_wanet_shifts_by_about_a_quarter_pixel_at_the_published_strength() -> None:
    grids = [WaNet(strength=0.5).fit(flat(0), seed)["grid"] for seed in range(20)]
    shift = torch.stack([(grid - identity(32)).abs().mean() for grid in grids]).mean().item() * 31 / 2
    # 0.5 / 32 * 31 / 2 = 0.242 at the control points; between them, averages: about 0.7 of it
    assert 0.6 * 0.242 < shift < 0.9 * 0.242


def test_wanet_doubles_its_shift_with_its_strength() -> None:
    one, two = (WaNet(strength=strength).fit(flat(0), 0)["grid"] - identity(32) for strength in (0.5, 1.0))
    torch.testing.assert_close(two[4:-4, 4:-4], 2 * one[4:-4, 4:-4], rtol=1e-3, atol=1e-6)


def test_wanet_grid_stays_inside_the_image() -> None:
    grid = WaNet(strength=8).fit(flat(0), 0)["grid"]
    assert (grid.min().item(), grid.max().item()) == (-1, 1)


def test_wanet_fields_are_smooth() -> None:
    shift = WaNet().fit(flat(0), 0)["grid"] - identity(32)
    assert shift.diff(dim=0)[2:-2].abs().mean() < shift.abs().mean() / 3


def test_wanet_without_a_shift_changes_nothing() -> None:
    data = toy_data(2)
    changed = WaNet().trigger(data.images, torch.arange(2), {"grid": identity(8)}, "test", 0)
    assert torch.equal(changed, data.images)


def test_wanet_grid_of_one_pixel_to_the_right_fetches_the_right_neighbour() -> None:
    data = toy_data(2)
    grid = identity(8) + torch.tensor([2 / 7, 0.0])
    changed = WaNet().trigger(data.images, torch.arange(2), {"grid": grid}, "test", 0)
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
    poisoned = poison_source(toy_source(), WaNet(cover_ratio=ratio), seed=0, trusted=0)
    covers = poisoned.roles == Role.COVER
    assert int(covers.sum()) == expected
    assert torch.equal(poisoned.visible.labels[covers], poisoned.clean_labels[covers])


def test_more_covers_than_images_are_refused() -> None:
    with pytest.raises(OptionError, match="asks for 120 cover samples, only 60 are not poisoned; lower its rate"):
        poison_source(toy_source(), WaNet(rate=0.5, cover_ratio=2), seed=0, trusted=0)
