"""STRIP: entropies by hand, and independence of what lies beside an image."""

from __future__ import annotations

import math

import torch
from linear import linear_model
from toys import toy_data, toy_engine, toy_model

from bdbench.data import ImageDataset
from bdbench.detectors.data.strip import entropies


def test_a_model_that_always_says_the_same_leaves_the_entropy_of_its_answer() -> None:
    data = toy_data(6)
    found = entropies(toy_engine(), linear_model(torch.zeros(4, 3 * 64), channels=3), data, data.images[:2], add=False)
    assert torch.allclose(found, torch.full((6,), math.log(4)))


def test_the_mean_of_two_images_and_their_clipped_sum_by_hand() -> None:
    images = torch.tensor([100, 250], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 8, 8).contiguous()
    data = ImageDataset(images, torch.zeros(2, dtype=torch.int64), ("a", "b"))
    overlay = torch.full((1, 1, 8, 8), 50, dtype=torch.uint8)
    weight = torch.zeros(2, 64)
    weight[1, 0] = 1
    model = linear_model(weight)
    for add, pixels in ((False, (75, 150)), (True, (150, 255))):
        p = torch.tensor([[0.0, pixel / 255] for pixel in pixels]).softmax(1)
        expected = -(p * p.log()).sum(1)
        assert torch.allclose(entropies(toy_engine(), model, data, overlay, add=add), expected, atol=1e-5)


def test_an_image_has_the_same_entropy_alone_and_among_others() -> None:
    data = toy_data(40)
    model = toy_model(data).eval()
    whole = entropies(toy_engine(), model, data, data.images[:3], add=False)
    part = entropies(toy_engine(), model, data.take(torch.arange(7, 12)), data.images[:3], add=False)
    assert torch.allclose(whole[7:12], part, atol=1e-5)
