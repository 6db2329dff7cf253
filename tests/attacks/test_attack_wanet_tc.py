"""WaNet with a victim of its own: what a batch holds, and the replay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import toy_attack, toy_batch, toy_data, toy_lab, triggered

from bdbench.attacks.wanet import WaNet, shaken, warped
from bdbench.attacks.wanet_tc import WaNetTC

SHARE = 0.25


class Witness(nn.Module):
    """A victim that keeps what it is shown and is certain of class 3."""

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return F.one_hot(torch.full((len(images),), 3), 4) * 100.0


def shown(augment: tuple[str, ...] = (), step: int = 0, **options: float) -> tuple[Tensor, Tensor, Tensor]:
    """The images of a batch of 16, what the victim saw of them, and the loss; 4 are poisoned."""
    attack, batch, victim = WaNetTC.parse({"target": 3} | options), toy_batch(toy_data(16)), Witness()
    loss = attack._loss(grid(), SHARE, 4, augment, 0, victim, batch._replace(step=step))  # type: ignore[arg-type]
    return batch.images, victim.seen, loss


def grid() -> Tensor:
    return WaNet(strength=0.5).fit(toy_data(16), toy_lab())["grid"]


def test_the_field_is_that_of_wanet_at_the_published_strength() -> None:
    attack = toy_attack("wanet-tc")
    state = attack.fit(toy_data(48), toy_lab())
    assert torch.equal(state["grid"], WaNet(strength=0.5).fit(toy_data(48), toy_lab())["grid"])
    assert list(state) == ["grid"]


def test_the_replay_stamps_as_wanet_does() -> None:
    attack, data = toy_attack("wanet-tc"), toy_data(48)
    for use in ("poison", "cover", "test"):
        expected = triggered(WaNet(strength=0.5), data, use)  # type: ignore[arg-type]
        assert torch.equal(triggered(attack, data, use), expected)  # type: ignore[arg-type]


def test_a_batch_holds_poison_then_covers_then_clean_images() -> None:
    images, seen, _ = shown()
    torch.testing.assert_close(seen[:4], warped(images[:4], grid().expand(4, -1, -1, -1)))
    assert not torch.isclose(seen[4:12], images[4:12]).flatten(1).all(1).any()
    torch.testing.assert_close(seen[12:], images[12:])


def test_covers_are_warped_anew_each_time() -> None:
    (_, one, _), (_, other, _) = shown(), shown()
    assert torch.equal(one[:4], other[:4])
    assert not torch.isclose(one[4:12], other[4:12]).flatten(1).all(1).any()


def test_covers_are_near_the_warp() -> None:
    images, seen, _ = shown()
    plain = warped(images[4:12], grid().expand(8, -1, -1, -1))
    assert (seen[4:12] - plain).abs().mean() < (plain - plain.roll(1, 0)).abs().mean() / 2


@pytest.mark.parametrize(("ratio", "covers"), [(0.0, 0), (1.0, 4), (2.0, 8), (9.0, 12)])
def test_covers_per_poisoned_image(ratio: float, covers: int) -> None:
    images, seen, _ = shown(cover_ratio=ratio)
    changed = ~torch.isclose(seen, images).flatten(1).all(1)
    assert int(changed.sum()) == 4 + covers


def test_only_the_poisoned_are_relabelled() -> None:
    # labels 0, 1, 2, 3 become 3; of the other 12, 3 are of class 3: 9 of 16 are wrong by 100
    assert shown()[2].item() == pytest.approx(900 / 16)


def test_images_are_augmented_after_the_warp() -> None:
    _, plain, _ = shown(cover_ratio=0)
    _, flipped, _ = shown(("flip",), cover_ratio=0)
    mirrored = [torch.allclose(one, other.flip(2)) for one, other in zip(flipped, plain, strict=True)]
    same = [torch.allclose(one, other) for one, other in zip(flipped, plain, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 0 < sum(mirrored) < 16


def test_augmentation_goes_by_the_step() -> None:
    (_, one, _), (_, same, _), (_, other, _) = (shown(("crop", "flip"), step, cover_ratio=0) for step in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_shaking_moves_points_by_up_to_a_step_and_not_out_of_the_image() -> None:
    points = torch.tensor([0.0, 0.95]).view(1, 1, 2, 1).expand(1, 4, 2, 2)
    moved = shaken(points, torch.ones(1, 4, 2, 2))
    # a grid of 4 rows and 2 columns: up to 1/2 in x and 1/4 in y
    torch.testing.assert_close(moved[0, 0], torch.tensor([[0.5, 0.25], [1.0, 1.0]]))
    torch.testing.assert_close(shaken(points, torch.full((1, 4, 2, 2), 0.5)), points)
