"""The strength of a repair is chosen on trusted images that were held out, and on nothing else."""

from __future__ import annotations

import pytest
import torch
from toys import toy_data, toy_engine, toy_model

from bdbench.data import ImageDataset
from bdbench.defenses.parts.holding import accuracy, halves, head_accuracy, strongest, unmet
from bdbench.errors import OptionError


def labelled(*counts: int) -> ImageDataset:
    """So many images of each class; the first pixel tells one image from another."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(labels))
    return ImageDataset(images, labels, tuple("abcdefgh"[: len(counts)]))


def marks(data: ImageDataset) -> list[int]:
    """Which images they are."""
    pixels: list[int] = data.images[:, 0, 0, 0].tolist()
    return pixels


def counts(data: ImageDataset) -> list[int]:
    found: list[int] = torch.bincount(data.labels, minlength=data.num_classes).tolist()
    return found


# halves


def test_every_image_is_on_one_side() -> None:
    data = labelled(10, 20, 30)
    tune, held = halves(data, 0.5, seed=0)
    assert sorted(marks(tune) + marks(held)) == list(range(60))


@pytest.mark.parametrize(("share", "held"), [(0.5, [5, 10, 20]), (0.2, [2, 4, 8]), (0.9, [9, 18, 36])])
def test_the_share_is_held_out_of_every_class(share: float, held: list[int]) -> None:
    split = halves(labelled(10, 20, 40), share, seed=0)
    assert counts(split.held) == held
    assert counts(split.tune) == [10 - held[0], 20 - held[1], 40 - held[2]]


def test_images_keep_their_labels() -> None:
    data = labelled(10, 20)
    for part in halves(data, 0.5, seed=0):
        assert [data.labels[mark].item() for mark in marks(part)] == part.labels.tolist()


def test_the_seed_draws_which() -> None:
    data = labelled(20, 20)
    one, same, other = (halves(data, 0.5, seed) for seed in (0, 0, 1))
    assert marks(one.held) == marks(same.held)
    assert marks(one.held) != marks(other.held)


def test_which_are_held_out_is_no_matter_of_place() -> None:
    held = marks(halves(labelled(100, 100), 0.5, seed=0).held)
    assert 15 < sum(mark < 50 for mark in held) < 35  # 25 of the first 50 are expected, 3.5 is their deviation


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_the_last_image_of_a_class_is_never_held_out(share: float) -> None:
    split = halves(labelled(1, 2, 20), share, seed=0)
    assert counts(split.held)[:2] == [0, 1]
    assert min(counts(split.tune)) == 1


def test_a_class_without_images_is_no_matter() -> None:
    assert counts(halves(labelled(20, 0, 20), 0.5, seed=0).held) == [10, 0, 10]


def test_too_few_to_hold_out_are_refused_and_the_number_that_it_takes_is_told() -> None:
    message = (
        r"of 14 trusted images, --holdout 0\.5 holds out 7 .* takes at least 8, and 2 others; .* \(about 16\): .*"
        r"--trusted-per-class; or choose a method that has nothing to choose, such as ft"
    )
    with pytest.raises(OptionError, match=message):
        halves(labelled(14, 0), 0.5, seed=0)
    assert len(halves(labelled(16, 0), 0.5, seed=0).held) == 8


def test_too_few_left_are_refused() -> None:
    with pytest.raises(OptionError, match=r"of 10 trusted images, --holdout 0\.95 holds out 9"):
        halves(labelled(10, 0), 0.95, seed=0)
    assert len(halves(labelled(10, 0), 0.8, seed=0).tune) == 2


def test_one_image_a_class_cannot_be_split() -> None:
    with pytest.raises(OptionError, match=r"of 8 trusted images, .* holds out 0"):
        halves(labelled(*[1] * 8), 0.5, seed=0)


# strongest

ACCURACY = {1.0: 0.9, 2.0: 0.86, 3.0: 0.85, 4.0: 0.84, 5.0: 0.2}
"""From the weakest repair to the strongest."""


def choose(tolerance: float | None = 0.05, before: float = 0.9, held: int = 1000) -> float | None:
    return strongest(list(ACCURACY), ACCURACY.__getitem__, before, held, tolerance).setting


def test_the_strongest_that_keeps_the_accuracy_is_taken() -> None:
    assert choose(0.1) == 4.0


def test_what_lies_on_the_floor_keeps_the_accuracy() -> None:
    assert choose(0.05) == 3.0  # 0.9 - 0.05 is 0.85000000000000009 in binary


def test_a_tolerance_of_nothing_and_of_all() -> None:
    assert choose(0.0) == 1.0
    assert choose(1.0) == 5.0


def test_none_is_taken_where_none_keeps_the_accuracy() -> None:
    assert choose(0.05, before=1.0) is None


def test_a_stronger_one_that_keeps_it_wins_over_weaker_ones_that_do_not() -> None:
    values = {1.0: 0.9, 2.0: 0.5, 3.0: 0.88}
    assert strongest(list(values), values.__getitem__, 0.9, 1000, 0.05).setting == 3.0


def test_the_order_says_what_is_strong_not_the_number() -> None:
    assert strongest([5.0, 1.0], lambda _: 1.0, 1.0, 1000, 0.0).setting == 1.0


@pytest.mark.parametrize(("held", "chosen"), [(99, 4.0), (100, 3.0)])
def test_the_usual_tolerance_is_larger_below_100_images(held: int, chosen: float) -> None:
    assert choose(None, held=held) == chosen


def test_a_tolerance_that_is_given_counts_for_few_images_too() -> None:
    assert choose(0.05, held=10) == 3.0


def test_every_candidate_is_measured_once_and_told() -> None:
    asked: list[float] = []

    def measure(setting: float) -> float:
        asked.append(setting)
        return ACCURACY[setting]

    findings = strongest(list(ACCURACY), measure, 0.912345, 500, None).findings
    assert asked == list(ACCURACY)
    assert findings == {
        "chosen": 1.0, "held_out": 500, "accuracy_before": 0.9123, "accuracy_floor": 0.8623, "sweep": [
            {"setting": 1.0, "accuracy": 0.9}, {"setting": 2.0, "accuracy": 0.86}, {"setting": 3.0, "accuracy": 0.85},
            {"setting": 4.0, "accuracy": 0.84}, {"setting": 5.0, "accuracy": 0.2},
        ],
    }  # fmt: skip


def test_where_none_keeps_it_the_best_and_the_floor_are_told() -> None:
    findings = strongest([2.0, 5.0], ACCURACY.__getitem__, 1.0, 40, None).findings
    assert findings["chosen"] is None
    assert unmet(findings) == (
        "no setting keeps the accuracy on 40 held-out images: the best has 0.860, the floor is 0.900; model unchanged; "
        "a larger --tolerance allows more"
    )


# accuracy


def test_accuracy_is_the_share_of_right_answers() -> None:
    data, engine = toy_data(40), toy_engine()
    model = toy_model(data)
    answers = engine.logits(model, data.images).argmax(1)
    right = (answers == data.labels).sum().item()
    assert accuracy(engine, model, data) == right / 40
    told = ImageDataset(data.images, answers, data.class_names)
    assert accuracy(engine, model, told) == 1.0


def test_accuracy_from_embeddings_is_that_of_the_images() -> None:
    data, engine = toy_data(40), toy_engine()
    model = toy_model(data)
    assert head_accuracy(model, engine.embeddings(model, data.images), data.labels) == accuracy(engine, model, data)
