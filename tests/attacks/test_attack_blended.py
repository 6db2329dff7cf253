"""Blended: the picture and its share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import attack_of, flat, toy_engine, toy_lab, triggered

from bdbench.attacks.blended import Blended, draw_cartoon
from bdbench.errors import OptionError
from bdbench.progress import Silent


def test_blending_is_a_weighted_mean() -> None:
    attack = Blended(alpha=0.2)
    state = {"pattern": torch.full((3, 8, 8), 200.0)}
    # 0.8 * 100 + 0.2 * 200 = 120
    assert (attack.trigger(flat(100, side=8), torch.tensor([0]), state, "poison", 0) == 120).all()


def test_blending_has_its_own_share_at_test_time() -> None:
    attack, images = Blended(alpha=0.2, alpha_test=0.5), flat(100, side=8)
    state = {"pattern": torch.full((3, 8, 8), 200.0)}
    assert (attack.trigger(images, torch.tensor([0]), state, "test", 0) == 150).all()
    assert (attack.trigger(images, torch.tensor([0]), state, "poison", 0) == 120).all()


def test_blending_rounds_to_nearest() -> None:
    state = {"pattern": torch.full((3, 8, 8), 103.0)}
    # 0.8 * 100 + 0.2 * 103 = 100.6
    assert (Blended(alpha=0.2).trigger(flat(100, side=8), torch.tensor([0]), state, "test", 0) == 101).all()


@pytest.mark.parametrize("picture", ["cartoon", "noise"])
def test_one_pattern_is_blended_into_all_images(picture: str) -> None:
    changed = triggered(attack_of("blended", picture=picture, alpha=0.5), flat(100, side=16, count=3), "poison")
    assert torch.equal(changed[0], changed[1])
    assert torch.equal(changed[0], changed[2])
    assert len(changed[0].unique()) > 5


def test_noise_depends_on_the_seed_and_covers_all_bytes() -> None:
    attack = Blended(picture="noise")
    one, same, other = (attack.fit(flat(0), toy_lab(seed))["pattern"] for seed in (0, 0, 1))
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
        attack_of("blended", picture=str(tmp_path / "cat.png")).fit(flat(0), toy_lab(0))


def test_a_file_that_is_no_picture_is_said(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_text("meow")
    with pytest.raises(OptionError, match=r"cat\.png' cannot be read as an image"):
        attack_of("blended", picture=str(tmp_path / "cat.png")).fit(flat(0), toy_lab(0))


def test_the_cartoon_is_bright_and_colourful() -> None:
    pixels = np.asarray(draw_cartoon(64))
    assert pixels.shape == (64, 64, 3)
    assert pixels.mean() > 150
    assert pixels.std() > 40


# a user's picture of another size


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def said_of(picture: str) -> list[str]:
    notes = Notes()
    attack_of("blended", picture=picture).fit(flat(0), replace(toy_lab(), engine=toy_engine(progress=notes)))
    return notes.said


def test_a_picture_of_another_size_is_resized_and_that_is_said(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    Image.new("RGB", (64, 40), (9, 200, 30)).save(file)
    (said,) = said_of(str(file))
    assert said == f"picture '{file}' of 40x64 pixels is resized to the images' 32x32"
    pattern = attack_of("blended", picture=str(file)).fit(flat(0), toy_lab())["pattern"]
    assert pattern.shape == (3, 32, 32)
    assert pattern[:, 5, 5].tolist() == [9, 200, 30]


def test_nothing_is_said_of_a_picture_that_fits(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    Image.new("RGB", (32, 32)).save(file)
    assert said_of(str(file)) == said_of("cartoon") == said_of("noise") == []


# new noise for every image, as ABL and CBD do


def test_noise_per_image_differs_between_images_and_is_the_images_own() -> None:
    attack, data = Blended(picture="noise", per_image=True), flat(100, count=3)
    assert attack.fit(data, toy_lab()) == {}
    at_once = triggered(attack, data)
    assert not torch.equal(at_once[0], at_once[1])
    assert torch.equal(attack.trigger(data, torch.tensor([2, 0]), {}, "test", 0), at_once[[2, 0]])
    assert not torch.equal(triggered(attack, data, seed=1), at_once)


def test_noise_per_image_is_gray_and_covers_all_bytes() -> None:
    shown = triggered(Blended(picture="noise", per_image=True, alpha=1), flat(100))[0]
    assert torch.equal(shown[0], shown[1])
    assert torch.equal(shown[0], shown[2])
    assert shown.min() < 3
    assert shown.max() > 252
    assert 110 < shown.float().mean() < 145


def test_noise_per_image_is_blended_by_the_share() -> None:
    shown = triggered(Blended(picture="noise", per_image=True), flat(100))
    # 80 to 80 + 0.2 * 255
    assert 80 <= shown.min() < 83
    assert 128 < shown.max() <= 131


@pytest.mark.parametrize("picture", ["cartoon", "cat.png"])
def test_a_picture_is_not_drawn_anew_per_image(picture: str) -> None:
    with pytest.raises(OptionError, match=f"picture is {picture}; give --picture noise too"):
        attack_of("blended", picture=picture, per_image=True)
