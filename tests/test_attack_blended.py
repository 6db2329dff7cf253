"""Blended: the picture and its share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toys import attack_of, flat, toy_lab, triggered

from bdbench.attacks.blended import Blended, draw_cartoon
from bdbench.errors import OptionError


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
