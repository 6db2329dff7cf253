"""DBD: contrast, symmetric cross entropy, the credible half and MixMatch against what their formulas say."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from toys import (
    CLASSES,
    Fuse,
    are_equal,
    toy_batch,
    toy_compiler,
    toy_data,
    toy_engine,
    toy_model,
    toy_recipe,
    weights_of,
)

from bdbench.data import ImageDataset
from bdbench.defenses.base import Defended, Task, lowest
from bdbench.defenses.training import dbd
from bdbench.defenses.training.dbd import (
    DBD,
    Contrastive,
    contrastive_loss,
    interleave,
    mixing_share,
    ramp,
    sharpen,
    symmetric_losses,
)
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier
from bdbench.progress import Silent
from bdbench.seeds import generator, scoped
from bdbench.training.augment import augmented
from bdbench.training.engine import Engine
from bdbench.training.feeding import Feed
from bdbench.training.loop import Batch
from bdbench.training.recipe import Recipe

QUICK: dict[str, Any] = {
    "ssl_epochs": 2, "ssl_batch_size": 32, "head_epochs": 2, "head_batch_size": 32, "steps_per_epoch": 3,
}  # fmt: skip
"""On 80 images: 3 steps an epoch in each stage, 2 epochs each."""

EARLY: dict[str, Any] = {
    "ssl_epochs": 3, "ssl_horizon": 9, "ssl_batch_size": 16, "ssl_lr": 0.1, "ssl_weight_decay": 0.1, "ssl_warmup": 1.0,
    "temperature": 0.1, "symmetric": False, "ssl_crop": 0.6,
}  # fmt: skip
"""Another value for every option of the features."""

LATER: dict[str, Any] = {
    "head_epochs": 1, "head_batch_size": 16, "sce_alpha": 1.0, "sce_beta": 0.1, "credible_rate": 0.3,
    "split_augmented": True, "steps_per_epoch": 2, "sharpening": 0.9, "mixup": 0.3, "unlabelled_weight": 1.0,
    "crop_padding": "zero", "split_by": "class",
}  # fmt: skip
"""Another value for every other option."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "noise"), dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(noise(*shape, seed=seed), dim=-1)


# the contrastive loss


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_of_equal_views_each_is_found_by_chance_only(count: int, symmetric: bool) -> None:
    same = unit(1, 5).expand(count, 5)
    loss = contrastive_loss(same, same, 0.5, symmetric=symmetric)
    assert loss.item() == pytest.approx(math.log(2 * count - 1))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_aligned_pairs_orthogonal_to_all_others_have_a_closed_form(temperature: float, symmetric: bool) -> None:
    views = torch.eye(4, dtype=torch.float64)
    loss = contrastive_loss(views, views, temperature, symmetric=symmetric)
    assert loss.item() == pytest.approx(math.log(1 + 6 * math.exp(-1 / temperature)))


def counted_by_hand(one: Tensor, other: Tensor, temperature: float, anchors: int) -> float:
    """The mean loss of the first anchors, one by one."""
    views, size = torch.cat([one, other]), len(one)
    losses = []
    for anchor in range(anchors):
        said = [math.exp(float(views[anchor] @ view) / temperature) for view in views]
        losses.append(-math.log(said[(anchor + size) % (2 * size)] / (sum(said) - said[anchor])))
    return sum(losses) / anchors


def test_the_contrastive_loss_is_what_a_double_loop_finds() -> None:
    one, other = unit(6, 4), unit(6, 4, seed=1)
    assert contrastive_loss(one, other, 0.5).item() == pytest.approx(counted_by_hand(one, other, 0.5, 12))


def test_the_one_sided_loss_is_the_mean_over_anchors_of_the_first_view() -> None:
    one, other = unit(6, 4), unit(6, 4, seed=1)
    loss = contrastive_loss(one, other, 0.5, symmetric=False)
    assert loss.item() == pytest.approx(counted_by_hand(one, other, 0.5, 6))


def test_the_symmetric_loss_is_the_mean_of_both_directions() -> None:
    one, other = unit(6, 4), unit(6, 4, seed=1)
    there, back = (contrastive_loss(*pair, 0.5, symmetric=False).item() for pair in ((one, other), (other, one)))
    assert there != pytest.approx(back)
    assert contrastive_loss(one, other, 0.5).item() == pytest.approx((there + back) / 2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_order_of_a_batch_does_not_matter_but_its_pairs_do(symmetric: bool) -> None:
    one, other, order = unit(6, 4), unit(6, 4, seed=1), torch.tensor([3, 0, 5, 1, 4, 2])
    loss = contrastive_loss(one, other, 0.5, symmetric=symmetric).item()
    assert contrastive_loss(one[order], other[order], 0.5, symmetric=symmetric).item() == pytest.approx(loss)
    assert contrastive_loss(one, other[order], 0.5, symmetric=symmetric).item() != pytest.approx(loss)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_contrastive_loss_has_the_gradient_of_its_formula(symmetric: bool) -> None:
    one, other = unit(3, 4).requires_grad_(), unit(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: contrastive_loss(a, b, 0.5, symmetric=symmetric), (one, other))


def test_projections_are_unit_vectors() -> None:
    data = toy_data(16)
    projected = Contrastive(toy_model(data))(toy_batch(data).images)
    assert projected.shape == (16, 128)
    torch.testing.assert_close(projected.norm(dim=1), torch.ones(16))


# symmetric cross entropy


def test_alpha_alone_is_cross_entropy() -> None:
    logits, labels = noise(9, 5), torch.arange(9) % 5
    plain = F.cross_entropy(logits, labels, reduction="none")
    assert torch.equal(symmetric_losses(logits, labels, 1.0, 0.0), plain)


@pytest.mark.parametrize("classes", [2, 4, 10])
def test_the_reverse_of_a_blind_guess_is_the_share_of_wrong_classes(classes: int) -> None:
    losses = symmetric_losses(torch.zeros(3, classes), torch.zeros(3, dtype=torch.int64), 0.0, 1.0)
    assert losses.tolist() == pytest.approx([9.2103 * (1 - 1 / classes)] * 3, rel=1e-4)


def test_symmetric_cross_entropy_by_hand() -> None:
    # p = 1/2, 1/4, 1/4 and the label is the first: CE = ln 2, RCE = ln 10^4 * (1/4 + 1/4)
    logits = torch.tensor([[2.0, 1.0, 1.0]]).log()
    loss = symmetric_losses(logits, torch.tensor([0]), 0.1, 2.0)
    assert loss.tolist() == pytest.approx([0.1 * math.log(2) + 2.0 * math.log(1e4) / 2])


def test_ranking_by_symmetric_cross_entropy_is_ranking_by_cross_entropy_and_by_the_label_s_probability() -> None:
    logits, labels = noise(200, 10), torch.arange(200) % 10
    plain = F.cross_entropy(logits, labels, reduction="none")
    own = logits.softmax(1)[torch.arange(200), labels]
    order = symmetric_losses(logits, labels, 0.1, 1.0).argsort()
    assert torch.equal(order, plain.argsort())
    assert torch.equal(order, own.argsort(descending=True))


# the parts of MixMatch


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0])
def test_sharpened_rows_sum_to_one(temperature: float) -> None:
    sharp = sharpen(noise(9, 5).softmax(1), temperature)
    torch.testing.assert_close(sharp.sum(1), torch.ones(9, dtype=torch.float64))


def test_a_temperature_of_one_sharpens_nothing() -> None:
    rows = noise(9, 5).softmax(1)
    torch.testing.assert_close(sharpen(rows, 1.0), rows)


def test_sharpening_by_hand() -> None:
    # squares 1/4, 1/16, 1/16 of 1/2, 1/4, 1/4
    assert sharpen(torch.tensor([[0.5, 0.25, 0.25]]), 0.5)[0].tolist() == pytest.approx([4 / 6, 1 / 6, 1 / 6])


def test_a_very_low_temperature_leaves_the_surest_class_only() -> None:
    rows = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(sharpen(rows, 0.01), torch.tensor([[1.0, 0, 0], [0, 0, 1.0]], dtype=torch.float64))


def test_the_mixing_weight_is_the_larger_side() -> None:
    with scoped(0, "shares"):
        shares = [mixing_share(0.75) for _ in range(300)]
    assert 0.5 <= min(shares) < 0.55
    assert 0.95 < max(shares) <= 1.0


def labelled_parts(count: int, size: int) -> list[Tensor]:
    """Batches of their own number."""
    return [torch.full((size, 2), float(number)) for number in range(count)]


@pytest.mark.parametrize("size", [2, 3, 6, 7, 8, 64])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_interleaving_twice_gives_the_batches_back(count: int, size: int) -> None:
    batches = [noise(size, 2, seed=number) for number in range(count)]
    mixed = interleave(batches)
    assert [batch.shape for batch in mixed] == [batch.shape for batch in batches]
    for found, expected in zip(interleave(mixed), batches, strict=True):
        assert torch.equal(found, expected)


def test_interleaving_swaps_a_third_by_hand() -> None:
    mixed = [batch[:, 0].tolist() for batch in interleave(labelled_parts(3, 3))]
    assert mixed == [[0, 1, 2], [1, 0, 1], [2, 2, 0]]


@pytest.mark.parametrize("size", [3, 7, 64])
def test_the_first_interleaved_batch_holds_all_and_every_other_some_of_the_first(size: int) -> None:
    first, *others = (set(batch[:, 0].tolist()) for batch in interleave(labelled_parts(3, size)))
    assert first == {0, 1, 2}
    assert others == [{0, 1}, {0, 2}]


def test_the_ramp_rises_from_nothing_to_one_and_stays() -> None:
    shares = [ramp(epoch, 4) for epoch in (0, 1, 2.5, 4, 5, 400)]
    assert shares == [0, 0.25, 0.625, 1, 1, 1]


@pytest.mark.parametrize("length", [1, 4, 5, 11])
def test_a_cycle_uses_every_row_equally_often_up_to_one(length: int) -> None:
    rows = torch.tensor([3, 5, 7, 9])
    used = dbd._cycle(rows, length, generator(0, "cycle"))
    counts = [int((used == row).sum()) for row in rows]
    assert len(used) == sum(counts) == length
    assert max(counts) - min(counts) <= 1


def test_a_cycle_is_shuffled_anew_each_round() -> None:
    used = dbd._cycle(torch.arange(50), 100, generator(0, "cycle"))
    assert not torch.equal(used[:50], torch.arange(50))
    assert not torch.equal(used[:50], used[50:])


# tasks


class Watched(Engine):
    """An engine that keeps, for every phase, its recipe, its optimiser and the weights before and after."""

    def __init__(self, **changes: Any) -> None:
        base = replace(toy_engine(), **changes)
        super().__init__(**{field.name: getattr(base, field.name) for field in fields(base) if field.init})
        self.recipes: dict[str, Recipe] = {}
        self.optimizers: dict[str, torch.optim.Optimizer | None] = {}
        self.moments: dict[str, list[tuple[int, ...]]] = {}
        self.before: dict[str, dict[str, Tensor]] = {}
        self.after: dict[str, dict[str, Tensor]] = {}

    def fit(self, model: Any, data: ImageDataset, loss: Any, recipe: Recipe, *, phase: str, **settings: Any) -> Any:
        self.recipes[phase], self.optimizers[phase] = recipe, settings.get("optimizer")
        if phase != "simclr":
            state = settings["optimizer"].state
            self.moments[phase] = [(*weight.shape, int(entry["step"])) for weight, entry in state.items()]
        self.before[phase] = weights_of(model)
        trained = super().fit(model, data, loss, recipe, phase=phase, **settings)
        self.after[phase] = weights_of(trained)
        return trained


@dataclass(frozen=True)
class Setting:
    """What a run is made from."""

    data: ImageDataset
    recipe: Recipe
    cache: Path | None = None
    seed: int = 0

    def task(self, engine: Engine) -> Task:
        return Task(
            train=self.data, new_model=lambda purpose: toy_model(self.data, purpose, seed=self.seed),
            recipe=self.recipe, engine=engine, cache=self.cache,
        )  # fmt: skip


SETTING = Setting(toy_data(80), toy_recipe(lr=0.01, augment="crop,flip"))


def defend(setting: Setting = SETTING, **options: Any) -> tuple[Defended, Watched]:
    engine = Watched()
    return DBD.parse(QUICK | options).run(setting.task(engine)), engine


@pytest.fixture(scope="module")
def plain() -> tuple[Defended, Watched]:
    """The run with all defaults; tests only read it."""
    return defend()


def relabelled(data: ImageDataset, labels: Tensor) -> ImageDataset:
    return ImageDataset(data.images, labels, data.class_names)


class Asked(Watched):
    """An engine that trains nothing and keeps what `fit` was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, dict[str, Any]] = {}

    def fit(self, model: Any, *args: Any, phase: str, **settings: Any) -> Any:
        *_, recipe = args
        self.recipes[phase], self.settings[phase] = recipe, settings
        return model


def ask(setting: Setting = SETTING, **options: Any) -> Asked:
    engine = Asked()
    DBD.parse(QUICK | options).run(setting.task(engine))
    return engine


def losses_of(engine: Engine) -> list[tuple[Any, ...]]:
    return [(row["phase"], row["epoch"], row["loss"], row["lr"]) for row in engine.history]


def is_same(one: tuple[Defended, Engine], other: tuple[Defended, Engine]) -> bool:
    """Say whether two runs gave the same model, scores and history bit for bit."""
    assert one[0].scores is not None
    assert other[0].scores is not None
    return (
        are_equal(weights_of(one[0].model), weights_of(other[0].model))
        and torch.equal(one[0].scores, other[0].scores)
        and losses_of(one[1]) == losses_of(other[1])
    )


# stage 1: features


def learned(setting: Setting = SETTING, **options: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The features, and the history, after the first stage alone on a fresh model."""
    task = setting.task(toy_engine())
    model = task.new_model("model")
    DBD.parse(QUICK | options)._learn_features(task, model)
    return weights_of(model.features), task.engine.history


@pytest.fixture(scope="module")
def features(plain: tuple[Defended, Watched]) -> dict[str, Tensor]:
    """Those of the run with all defaults."""
    trained = plain[1].after["simclr"]
    return {
        name.removeprefix("classifier.features."): value
        for name, value in trained.items()
        if name.startswith("classifier.features.")
    }


def test_features_read_no_labels(features: dict[str, Tensor]) -> None:
    shuffled = SETTING.data.labels[torch.randperm(80, generator=generator(0, "shuffle"))]
    other = replace(SETTING, data=relabelled(SETTING.data, shuffled))
    assert not torch.equal(shuffled, SETTING.data.labels)
    assert are_equal(learned(other)[0], features)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.3}, {"epochs": 7}, {"batch_size": 8}, {"momentum": 0.0}, {"nesterov": False}, {"weight_decay": 0.1},
        {"schedule": "step"}, {"milestones": (0.1, 0.2)}, {"warmup": 2.0}, {"augment": "flip"},
    ],
)  # fmt: skip
def test_features_do_not_depend_on_the_recipe_of_the_third_stage(
    changes: dict[str, Any], features: dict[str, Tensor]
) -> None:
    """Their key in the cache does not hold it."""
    other = replace(SETTING, recipe=SETTING.recipe.model_copy(update=changes))
    assert are_equal(learned(other)[0], features)


def test_learning_features_lowers_the_loss_and_moves_them(plain: tuple[Defended, Watched]) -> None:
    losses = [row["loss"] for row in learned(ssl_epochs=8)[1]]
    assert losses[-1] < losses[0]
    assert not are_equal(plain[1].before["simclr"], plain[1].after["simclr"])


def test_learning_features_leaves_the_head_as_it_was(plain: tuple[Defended, Watched]) -> None:
    _, engine = plain
    for name in ("weight", "bias"):
        assert torch.equal(engine.before["simclr"][f"classifier.head.{name}"], engine.before["head"][name])


@pytest.mark.parametrize("count", [80, 65, 33])
def test_a_last_batch_of_any_size_is_contrasted_too(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """65 leaves one image over, whose two views are each other's only choice."""
    seen: list[int] = []

    def watched(one: Tensor, other: Tensor, temperature: float, *, symmetric: bool) -> Tensor:
        seen.append(len(one))
        return contrastive_loss(one, other, temperature, symmetric=symmetric)

    monkeypatch.setattr(dbd, "contrastive_loss", watched)
    _, history = learned(replace(SETTING, data=toy_data(count)))
    assert sum(seen) == 2 * count
    assert all(math.isfinite(row["loss"]) for row in history)


def test_the_learning_rate_of_the_features_follows_a_cosine_over_the_horizon() -> None:
    # the last of 2 epochs of 3 steps begins its last step at epoch 1 2/3
    for horizon, length in ((0, 2), (2, 2), (50, 50)):
        _, rows = learned(ssl_horizon=horizon, ssl_lr=0.2)
        assert [row["epoch"] for row in rows] == [1, 2]
        assert rows[-1]["lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi * (5 / 3) / length)))


def test_a_horizon_shorter_than_the_training_is_refused() -> None:
    with pytest.raises(OptionError, match=r"ssl_horizon 1 is less than ssl_epochs 2; 0 fits it"):
        ask(ssl_horizon=1)
    ask(ssl_horizon=2)


def test_features_are_trained_with_views_of_their_own(plain: tuple[Defended, Watched]) -> None:
    recipe = plain[1].recipes["simclr"]
    assert (recipe.augment, recipe.nesterov, recipe.momentum) == ("none", False, 0.9)


# the cache


def key_of(setting: Setting = SETTING, engine: Engine | None = None, **options: Any) -> str:
    engine = engine or toy_engine()
    with scoped(0, "weights", "projection"):
        net = Contrastive(setting.task(engine).new_model("model"))
    return DBD.parse(QUICK | options)._encoder_key(setting.data, net, engine)


def test_labels_and_later_stages_are_no_part_of_the_key() -> None:
    assert key_of(replace(SETTING, data=relabelled(SETTING.data, SETTING.data.labels.flip(0)))) == key_of()
    assert key_of(**LATER) == key_of()


@pytest.mark.parametrize("option", EARLY)
def test_every_option_of_the_features_is_part_of_the_key_and_changes_them(
    option: str, features: dict[str, Tensor]
) -> None:
    assert key_of(**{option: EARLY[option]}) != key_of()
    assert not are_equal(learned(**{option: EARLY[option]})[0], features)


def test_views_are_mirrored_only_where_the_recipe_flips(tmp_path: Path, features: dict[str, Tensor]) -> None:
    upright = cached(tmp_path, recipe=SETTING.recipe.model_copy(update={"augment": "crop"}))
    assert not are_equal(learned(upright)[0], features)
    learned(cached(tmp_path))
    assert len(files_of(tmp_path)) == 2


def test_every_option_belongs_to_the_features_or_to_later_stages() -> None:
    assert EARLY.keys() | LATER.keys() == DBD.model_fields.keys()


def test_an_unusable_cache_folder_costs_a_note_not_the_run(tmp_path: Path, features: dict[str, Tensor]) -> None:
    (tmp_path / "file").write_text("")
    notes: list[str] = []

    class Notes(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    task = cached(tmp_path / "file").task(toy_engine(progress=Notes()))
    model = task.new_model("model")
    DBD.parse(QUICK)._learn_features(task, model)
    assert are_equal(weights_of(model.features), features)
    assert [note.partition(" (")[0] for note in notes] == ["features: not kept for other runs"]


def test_one_changed_pixel_changes_the_key() -> None:
    images = SETTING.data.images.clone()
    images[79, 2, 7, 7] += 1
    other = replace(SETTING, data=ImageDataset(images, SETTING.data.labels, CLASSES))
    assert key_of(other) != key_of()


def test_seed_first_weights_and_arithmetic_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    toy_compiler(monkeypatch)
    keys = [
        key_of(),
        key_of(engine=toy_engine(seed=1)),  # with equal weights
        key_of(replace(SETTING, seed=1)),  # with another model, of equal data and seed
        key_of(engine=toy_engine(bf16=True)),
        key_of(engine=toy_engine(compile=True)),
    ]
    monkeypatch.setattr(dbd, "ENCODERS", 99)
    assert len({*keys, key_of()}) == 6


def cached(folder: Path, **changes: Any) -> Setting:
    return replace(SETTING, cache=folder, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the features of the default options; tests only read it."""
    folder = tmp_path_factory.mktemp("trained")
    learned(cached(folder))
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_a_second_run_takes_the_features_from_the_cache_and_ends_bit_equal(
    tmp_path: Path, plain: tuple[Defended, Watched]
) -> None:
    first, second = defend(cached(tmp_path)), defend(cached(tmp_path))
    assert list(first[1].recipes) == ["simclr", "head", "mixmatch"]
    assert list(second[1].recipes) == ["head", "mixmatch"]
    assert is_same(first, second)
    assert is_same(first, plain)
    assert [row["phase"] for row in second[1].history] == ["simclr"] * 2 + ["head"] * 2 + ["mixmatch"] * 2


def test_a_run_says_that_it_takes_features_from_the_cache(tmp_path: Path) -> None:
    notes: list[str] = []

    class Notes(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    for expected in ([], [f"features: from the cache ({key_of()[:16]})"]):
        task = cached(tmp_path).task(toy_engine(progress=Notes()))
        DBD.parse(QUICK)._learn_features(task, task.new_model("model"))
        assert notes == expected


def test_a_run_waits_for_another_that_trains_the_same_features(tmp_path: Path) -> None:
    (tmp_path / "encoders").mkdir()
    other = FileLock(tmp_path / "encoders" / f"{key_of()}.lock")
    other.acquire()
    notes: list[str] = []

    class Notes(Silent):
        def note(self, message: str) -> None:
            notes.append(message)
            other.release()

    task = cached(tmp_path).task(toy_engine(progress=Notes()))
    DBD.parse(QUICK)._learn_features(task, task.new_model("model"))
    assert notes == ["features: another run trains the same; waiting for it"]


def test_only_the_history_of_the_features_is_kept_with_them(tmp_path: Path) -> None:
    for _ in range(2):
        engine = toy_engine(history=[{"phase": "before"}])
        DBD.parse(QUICK).run(cached(tmp_path).task(engine))
        assert [row["phase"] for row in engine.history[:4]] == ["before", "simclr", "simclr", "head"]


def test_runs_with_other_labels_and_other_later_stages_share_features(trained: Path) -> None:
    data = relabelled(SETTING.data, SETTING.data.labels.flip(0))
    assert list(ask(cached(trained, data=data), **LATER).recipes) == ["head", "mixmatch"]


@pytest.mark.parametrize("option", EARLY)
def test_runs_with_other_features_do_not_share_them(option: str, tmp_path: Path, trained: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    assert "simclr" in ask(cached(tmp_path), **{option: EARLY[option]}).recipes
    assert len(files_of(tmp_path)) == 2


@pytest.mark.parametrize("damage", [lambda _: b"", lambda whole: whole[: len(whole) // 2], lambda _: b"x" * 500])
def test_damaged_features_are_trained_again(
    tmp_path: Path, damage: Callable[[bytes], bytes], trained: Path, features: dict[str, Tensor]
) -> None:
    (good,) = files_of(trained)
    file = tmp_path / good.relative_to(trained)
    file.parent.mkdir()
    file.write_bytes(damage(good.read_bytes()))
    found, history = learned(cached(tmp_path))
    assert are_equal(found, features)
    assert len(history) == 2
    assert "simclr" not in ask(cached(tmp_path)).recipes


def test_without_a_cache_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    defend()
    assert files_of(tmp_path) == []


# stage 2: the head


def learned_head(setting: Setting, **options: Any) -> tuple[Classifier, dict[str, Tensor]]:
    """A fresh model after the second stage alone, and its weights before."""
    task = setting.task(toy_engine())
    model = task.new_model("model")
    before = weights_of(model)
    learner = torch.optim.Adam(model.parameters(), setting.recipe.lr)
    DBD.parse(QUICK | options)._learn_head(task, model, learner, setting.recipe)
    return model, before


def test_the_head_learns_on_features_that_nothing_changes() -> None:
    """Neither parameters nor batch-norm statistics."""
    model, before = learned_head(SETTING)
    after = weights_of(model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert "features.layers.1.running_mean" in after
    assert changed == {"head.weight", "head.bias"}


def test_the_head_sees_features_in_evaluation_mode() -> None:
    """With statistics of batches instead, an image's embedding would depend on its batch."""
    data = toy_data(80)
    seen: list[Tensor] = []
    model = toy_model(data)
    task = replace(SETTING, data=data, recipe=toy_recipe(lr=1e-9)).task(toy_engine())
    model.head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach()))
    DBD.parse(QUICK | {"head_epochs": 1})._learn_head(task, model, torch.optim.Adam(model.parameters()), task.recipe)
    whole = toy_engine().embeddings(model, data.images)
    found = torch.cat(seen[:3])
    # 80 rows in another order: sums over all agree
    torch.testing.assert_close(found.sum(0), whole.sum(0), rtol=1e-4, atol=1e-4)


def test_the_head_learns_at_a_constant_rate_for_epochs_of_its_own() -> None:
    recipe = toy_recipe(lr=0.01, schedule="cosine", warmup=1.0)
    asked = ask(replace(SETTING, recipe=recipe), head_epochs=3, head_batch_size=20).recipes
    assert [asked["head"].lr_at(epoch) for epoch in (0, 0.5, 2.9)] == [0.01] * 3
    assert (asked["head"].epochs, asked["head"].batch_size) == (3, 20)
    assert asked["mixmatch"] == recipe


def test_the_first_step_of_the_head_descends_symmetric_cross_entropy() -> None:
    """One plain step from known weights, against the gradient of the formula."""
    data = toy_data(32)
    task = replace(SETTING, data=data, recipe=toy_recipe(lr=0.5)).task(toy_engine())
    model, other = toy_model(data), toy_model(data).eval()
    options = DBD.parse(QUICK | {"head_epochs": 1, "sce_alpha": 0.3, "sce_beta": 0.7})
    options._learn_head(task, model, torch.optim.SGD(model.parameters(), 0.5), task.recipe)
    logits = other(toy_batch(data).images)
    symmetric_losses(logits, data.labels, 0.3, 0.7).mean().backward()
    assert other.head.weight.grad is not None
    expected = other.head.weight - 0.5 * other.head.weight.grad
    torch.testing.assert_close(model.head.weight, expected, rtol=1e-5, atol=1e-6)


class Points(nn.Module):
    """Reads a point of 8 numbers out of an image: its first row."""

    size = 8

    def __init__(self, _: tuple[int, int, int]) -> None:
        super().__init__()

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, :]


def cloud(count: int) -> ImageDataset:
    """Points around four corners, linearly separable with a wide margin."""
    labels = torch.arange(count) % 4
    places = 60 + 130 * F.one_hot(labels, 8) + 12 * noise(count, 8).clamp(-3, 3)
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0] = places.round().to(torch.uint8)
    return ImageDataset(images, labels, CLASSES)


def mislabelled_cloud() -> tuple[ImageDataset, Tensor]:
    """400 points, every tenth with the label of another corner, and which those are."""
    data = cloud(400)
    is_flipped = torch.arange(400) % 10 == 3
    return relabelled(data, torch.where(is_flipped, (data.labels + 1) % 4, data.labels)), is_flipped


def test_flipped_labels_fall_into_the_half_with_high_losses() -> None:
    data, is_flipped = mislabelled_cloud()
    task = replace(SETTING, data=data).task(toy_engine())
    model = toy_model(data, features=Points)
    learner = torch.optim.Adam(model.parameters(), 0.01)
    DBD.parse({"head_epochs": 10, "head_batch_size": 32})._learn_head(task, model, learner, toy_recipe(lr=0.01))
    credible = lowest(task.engine.losses(model, data), 200)
    assert (~credible[is_flipped]).float().mean() > 0.95


# the split


def mixing_of(model: Classifier, setting: Setting = SETTING, **options: Any) -> tuple[dbd._MixMatch, Task]:
    task = setting.task(toy_engine())
    groups = dbd.ranked_groups(setting.data.labels, "all")
    return dbd._MixMatch(DBD.parse(QUICK | options), task, model, setting.recipe, groups), task


def test_the_lowest_losses_keep_their_labels_and_all_others_lose_them() -> None:
    model = toy_model(SETTING.data)
    mixing, task = mixing_of(model, credible_rate=0.375, steps_per_epoch=10)
    kept, lost = set(mixing.split(0).tolist()), set(mixing.doubted.tolist())
    credible = lowest(task.engine.losses(model, SETTING.data), 30)
    # 160 places are enough for all of the 30 and of the 50
    assert kept == set(credible.nonzero().flatten().tolist())
    assert lost == set((~credible).nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("rate", "count", "kept"), [(0.5, 80, 40), (0.5, 81, 40), (0.26, 79, 20), (0.025, 80, 2), (0.98, 80, 78)]
)
def test_as_many_keep_their_labels_as_the_rate_says_rounded_down(rate: float, count: int, kept: int) -> None:
    engine = ask(replace(SETTING, data=toy_data(count)), credible_rate=rate)
    split = engine.settings["mixmatch"]["before_epoch"]
    assert len(torch.unique(split(0))) <= kept
    assert int(split.__self__._credible(torch.arange(count) / 1.0).sum()) == kept


@pytest.mark.parametrize(("rate", "kept"), [(0.02, 1), (0.01, 0), (0.99, 79)])
def test_a_rate_that_leaves_less_than_two_on_a_side_is_refused(rate: float, kept: int) -> None:
    with pytest.raises(OptionError, match=rf"credible_rate {rate} keeps the labels of {kept} of 80 samples; both"):
        ask(credible_rate=rate)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_rate_of_nothing_or_all_is_no_option(rate: float) -> None:
    with pytest.raises(OptionError, match="credible_rate"):
        DBD.parse({"credible_rate": rate})


def test_the_split_is_made_anew_before_every_epoch_from_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    split, loss = dbd._MixMatch.split, dbd._MixMatch.loss

    def watched_split(self: dbd._MixMatch, epoch: int) -> Tensor:
        rows = split(self, epoch)
        credible = lowest(self.engine.losses(self.model, self.data), 40)
        seen.append({"epoch": epoch, "credible": credible, "rows": [], "doubted": self.doubted, "order": rows})
        return rows

    def watched_loss(self: dbd._MixMatch, model: Classifier, batch: Batch) -> Tensor:
        assert model.training
        seen[-1]["rows"].append(batch.rows)
        return loss(self, model, batch)

    monkeypatch.setattr(dbd._MixMatch, "split", watched_split)
    monkeypatch.setattr(dbd._MixMatch, "loss", watched_loss)
    defend(replace(SETTING, recipe=toy_recipe(lr=0.01, epochs=3)))
    assert [said["epoch"] for said in seen] == [0, 1, 2]
    for said in seen:
        assert torch.equal(torch.cat(said["rows"]), said["order"])
        assert len(said["doubted"]) == len(said["order"]) == 48
        assert said["credible"][said["order"]].all()
        assert not said["credible"][said["doubted"]].any()
    assert not torch.equal(seen[0]["credible"], seen[2]["credible"])
    assert not torch.equal(seen[0]["order"], seen[1]["order"])


def test_split_by_class_every_label_keeps_its_share() -> None:
    # 4 labels of 3, 2, 5 and 0 samples; the losses of label 2 are the lowest of all
    labels = torch.tensor([0, 2, 1, 2, 0, 2, 1, 2, 0, 2])
    losses = torch.tensor([9.0, 0.1, 7.0, 0.5, 8.0, 0.2, 6.0, 0.3, 7.5, 0.4])
    groups = dbd.ranked_groups(labels, "class")
    assert [rows.tolist() for rows in groups] == [[0, 4, 8], [2, 6], [1, 3, 5, 7, 9]]
    mixing, _ = mixing_of(toy_model(SETTING.data))
    mixing.groups = groups
    assert mixing._credible(losses).nonzero().flatten().tolist() == [1, 5, 6, 8]
    mixing.groups = dbd.ranked_groups(labels, "all")
    assert mixing._credible(losses).nonzero().flatten().tolist() == [1, 3, 5, 7, 9]


def test_a_share_of_every_label_that_comes_to_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match=r"credible_rate 0\.04 keeps the labels of 0 of 80 samples; both"):
        ask(credible_rate=0.04, split_by="class")


def test_labels_of_doubted_samples_never_reach_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The split held fixed, other labels there change nothing; other labels here do."""
    fixed = torch.arange(80) < 40
    monkeypatch.setattr(dbd, "lowest", lambda _, __: fixed)

    def fine_tuned(labels: Tensor) -> dict[str, Tensor]:
        setting = replace(SETTING, data=relabelled(SETTING.data, labels))
        model = toy_model(setting.data)
        mixing, task = mixing_of(model, setting)
        task.engine.fit(
            model, task.train, mixing.loss, setting.recipe, phase="mixmatch", epoch_steps=3,
            before_epoch=mixing.split,
        )  # fmt: skip
        return weights_of(model)

    labels = SETTING.data.labels
    wrong = (labels + 1) % 4
    assert are_equal(fine_tuned(labels), fine_tuned(torch.where(fixed, labels, wrong)))
    assert not are_equal(fine_tuned(labels), fine_tuned(torch.where(fixed, wrong, labels)))


def test_without_augmentation_the_augmented_images_are_the_images_themselves() -> None:
    mixing, _ = mixing_of(toy_model(SETTING.data), replace(SETTING, recipe=toy_recipe()))
    assert mixing._augmented(generator(0, "views")).fingerprint == SETTING.data.fingerprint


def test_only_if_asked_the_split_ranks_augmented_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in (False, True):
        mixing, task = mixing_of(toy_model(SETTING.data), split_augmented=asked)
        ranked: list[ImageDataset] = []

        def watched(model: Classifier, data: ImageDataset, ranked: list[ImageDataset] = ranked) -> Tensor:
            ranked.append(data)
            return toy_engine().margins(model, data)

        monkeypatch.setattr(task.engine, "margins", watched)
        for epoch in (0, 0, 1):
            mixing.split(epoch)
        prints = [data.fingerprint for data in ranked]
        assert (SETTING.data.fingerprint in prints) == (not asked)
        assert prints[0] == prints[1]
        assert (prints[0] == prints[2]) == (not asked)
        assert all(torch.equal(data.labels, SETTING.data.labels) for data in ranked)


def test_many_images_are_augmented_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dbd, "CHUNK", 32)
    mixing, _ = mixing_of(toy_model(SETTING.data), replace(SETTING, recipe=toy_recipe()))
    assert mixing._augmented(generator(0, "views")).fingerprint == SETTING.data.fingerprint


# the loss of a step


def step_of(mixing: dbd._MixMatch, model: Classifier, step: int = 0) -> Tensor:
    """The loss of a step that keeps the labels of rows 0..15 and doubts 40..55, whatever the step."""
    mixing.doubted = torch.arange(40, 56).repeat(mixing.options.steps_per_epoch)
    rows = torch.arange(16)
    with scoped(0, "step"):
        return mixing.loss(model, toy_batch(mixing.data, rows)._replace(step=step))


def expected_of(model: Classifier, share: float, weight: float, recipe: Recipe = SETTING.recipe) -> Tensor:
    """The same loss, written down plainly, for a model without batch statistics."""
    data, rng = SETTING.data, generator(0, "mixmatch", "views", 0)
    operations = ("flip",) if recipe.augment == "flip" else ()
    views = [augmented(data.images[40:56], operations, rng) for _ in range(2)]
    guess = (model(views[0]).softmax(1) + model(views[1]).softmax(1)).detach() / 2
    guess = guess**2 / (guess**2).sum(1, keepdim=True)
    images = torch.cat([toy_batch(data, torch.arange(16)).images, *views])
    targets = torch.cat([torch.eye(4)[data.labels[:16]], guess, guess])
    with scoped(0, "step"):
        partner = torch.randperm(48)
    logits = model(share * images + (1 - share) * images[partner])
    wanted = share * targets + (1 - share) * targets[partner]
    labelled = -(wanted[:16] * logits[:16].log_softmax(1)).sum(1).mean()
    unlabelled = (logits[16:].softmax(1) - wanted[16:]).pow(2).sum() / (32 * 4)
    loss: Tensor = labelled + weight * unlabelled
    return loss


@pytest.mark.parametrize("augment", ["none", "flip"])
@pytest.mark.parametrize("share", [1.0, 0.7])
def test_a_step_by_hand(share: float, augment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients; in evaluation mode, so that which images share a batch does not matter."""
    monkeypatch.setattr(dbd, "mixing_share", lambda _: share)
    setting = replace(SETTING, recipe=toy_recipe(augment=augment, epochs=8))
    model, other = toy_model(SETTING.data).eval(), toy_model(SETTING.data).eval()
    mixing, _ = mixing_of(model, setting, unlabelled_weight=12.0, head_epochs=2)
    loss, expected = step_of(mixing, model), expected_of(other, share, 12 * 2 / 8, setting.recipe)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_what_agrees_with_its_guess_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without augmentation, mixing, sharpening and batch statistics every guess is the prediction itself."""
    monkeypatch.setattr(dbd, "mixing_share", lambda _: 1.0)
    setting = replace(SETTING, recipe=toy_recipe())
    model = toy_model(SETTING.data).eval()
    with_all, without = (
        step_of(mixing_of(model, setting, sharpening=1.0, unlabelled_weight=weight)[0], model).item()
        for weight in (1000.0, 0.0)
    )
    assert with_all == pytest.approx(without, abs=1e-6)


def test_a_step_takes_the_doubted_rows_of_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model(SETTING.data).eval()
    mixing, _ = mixing_of(model, replace(SETTING, recipe=toy_recipe()))
    mixing.doubted = torch.arange(48)
    taken: list[Tensor] = []
    batch = Feed.batch

    def watched(feed: Feed, rows: Tensor, operations: tuple[str, ...], rng: torch.Generator) -> Tensor:
        taken.append(rows)
        return batch(feed, rows, operations, rng)

    monkeypatch.setattr(Feed, "batch", watched)
    for step in (0, 1, 2, 3):  # the fourth begins the next epoch
        mixing.loss(model, toy_batch(SETTING.data, torch.arange(16))._replace(step=step))
    assert [rows[0].item() for rows in taken] == [0, 0, 16, 16, 32, 32, 0, 0]
    assert all(len(rows) == 16 for rows in taken)


def test_the_two_views_of_a_step_differ_and_those_of_another_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model(SETTING.data).eval()
    mixing, _ = mixing_of(model, replace(SETTING, recipe=toy_recipe(augment="flip")))
    views: list[Tensor] = []
    batch = Feed.batch

    def watched(*args: Any) -> Tensor:
        views.append(batch(*args))
        return views[-1]

    monkeypatch.setattr(Feed, "batch", watched)
    for step in (0, 3):
        step_of(mixing, model, step)
    assert not any(torch.equal(views[i], views[j]) for i in range(4) for j in range(i))


def test_every_forward_pass_of_a_step_holds_labelled_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norm must not see labelled and unlabelled images apart."""
    monkeypatch.setattr(dbd, "mixing_share", lambda _: 1.0)
    images = SETTING.data.images.clone()
    images[:40], images[40:] = 255, 0
    setting = replace(SETTING, data=ImageDataset(images, SETTING.data.labels, CLASSES), recipe=toy_recipe())
    passes: list[float] = []

    class Watching(Classifier):
        def forward(self, images: Tensor) -> Tensor:
            passes.append(images.mean().item())
            return super().forward(images)

    model = toy_model(setting.data)
    model.__class__ = Watching
    mixing, _ = mixing_of(model, setting)
    step_of(mixing, model)
    # two for the guesses, then thirds of 6, 5, 5 labelled images of 16
    assert passes == pytest.approx([0, 0, 6 / 16, 5 / 16, 5 / 16])


def test_in_half_precision_every_weight_gets_a_gradient() -> None:
    """Older torch keeps weights that were cast while guessing, and those have none."""
    model = toy_model(SETTING.data)
    mixing, _ = mixing_of(model)
    with toy_engine(bf16=True).autocast():
        loss = step_of(mixing, model)
    loss.backward()
    assert all(weight.grad is not None and weight.grad.norm() > 0 for weight in model.parameters())


def test_the_weight_rises_over_all_epochs_of_head_and_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def watched(epoch: float, length: int) -> float:
        asked.append((round(epoch, 6), length))
        return ramp(epoch, length)

    monkeypatch.setattr(dbd, "ramp", watched)
    defend(replace(SETTING, recipe=toy_recipe(epochs=3)), head_epochs=4, steps_per_epoch=2)
    assert asked == [(4.0, 3), (4.5, 3), (5.0, 3), (5.5, 3), (6.0, 3), (6.5, 3)]


def test_the_weight_of_a_step_is_the_final_weight_times_the_ramp() -> None:
    model = toy_model(SETTING.data).eval()
    setting = replace(SETTING, recipe=toy_recipe(epochs=10))

    def added(**options: Any) -> float:
        full, nothing = (
            step_of(mixing_of(model, setting, unlabelled_weight=weight, **options)[0], model, step=6)
            for weight in (15.0, 0.0)
        )
        return (full - nothing).item()

    # step 6 of 3 an epoch is epoch 2: shares 3/10, 6/10, and 1 from epoch 10 on
    base = added(head_epochs=1)
    assert base > 0
    assert added(head_epochs=4) == pytest.approx(2 * base, rel=1e-3)
    assert added(head_epochs=8) == added(head_epochs=50) == pytest.approx(base / 0.3, rel=1e-3)


# stage 3 and the whole method


def test_fine_tuning_changes_features_and_their_statistics(plain: tuple[Defended, Watched]) -> None:
    before, after = plain[1].before["mixmatch"], plain[1].after["mixmatch"]
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == after.keys() - {"mean", "std"}


def test_each_stage_goes_on_from_the_one_before(plain: tuple[Defended, Watched]) -> None:
    _, engine = plain
    for name, value in engine.before["mixmatch"].items():
        if name.startswith("features."):
            assert torch.equal(value, engine.after["simclr"][f"classifier.{name}"])
        if name.startswith("head."):
            assert torch.equal(value, engine.after["head"][name.removeprefix("head.")])


def test_one_adam_goes_from_the_head_to_fine_tuning(plain: tuple[Defended, Watched]) -> None:
    _, engine = plain
    assert isinstance(engine.optimizers["head"], torch.optim.Adam)
    assert engine.optimizers["mixmatch"] is engine.optimizers["head"]
    assert engine.moments["head"] == []
    # weight and bias of the head after 2 epochs of 3 steps; nothing of the features yet
    assert engine.moments["mixmatch"] == [(4, 24, 6), (4, 6)]


def test_crops_reflect_in_the_later_stages_unless_told_otherwise() -> None:
    for padding, crop in (("reflect", "crop-reflect"), ("zero", "crop")):
        for given, expected in (("crop,flip", f"{crop},flip"), ("flip, crop", f"flip,{crop}"), ("none", "none")):
            asked = ask(replace(SETTING, recipe=toy_recipe(augment=given)), crop_padding=padding).recipes
            used = {phase: recipe.augment.replace(" ", "") for phase, recipe in asked.items()}
            assert used == {"simclr": "none", "head": expected, "mixmatch": expected}


def test_scores_are_the_margins_of_the_delivered_model(plain: tuple[Defended, Watched]) -> None:
    result, _ = plain
    assert result.scores is not None
    assert result.scores.shape == (80,)
    assert result.scores.isfinite().all()
    assert torch.equal(result.scores, toy_engine().margins(result.model, SETTING.data))
    assert result.set_aside is None
    assert not result.model.training


def test_equal_seeds_give_equal_runs_and_others_do_not(plain: tuple[Defended, Watched]) -> None:
    assert is_same(defend(), plain)
    engine = Watched(seed=1)
    assert not is_same((DBD.parse(QUICK).run(SETTING.task(engine)), engine), plain)


@pytest.mark.parametrize("option", LATER)
def test_every_option_of_later_stages_changes_the_model(
    option: str, trained: Path, plain: tuple[Defended, Watched]
) -> None:
    """Those of the features are above."""
    result, engine = defend(cached(trained), **{option: LATER[option]})
    assert "simclr" not in engine.recipes
    assert not are_equal(weights_of(result.model), weights_of(plain[0].model))


def test_flipped_labels_end_with_high_scores() -> None:
    data, is_flipped = mislabelled_cloud()
    setting = Setting(data, toy_recipe(lr=0.01))
    task = replace(setting.task(toy_engine()), new_model=lambda purpose: toy_model(data, purpose, features=Points))
    scores = DBD.parse(QUICK | {"ssl_epochs": 1, "head_epochs": 10, "steps_per_epoch": 5}).run(task).scores
    assert scores is not None
    assert (~lowest(scores, 200)[is_flipped]).float().mean() > 0.95


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("phase", ["simclr", "head", "mixmatch"])
@pytest.mark.parametrize("keeps", [True, False], ids=["cache", "no cache"])
def test_an_interrupted_run_ends_bit_equal_to_an_uninterrupted_one(
    keeps: bool, phase: str, step: int, tmp_path: Path, plain: tuple[Defended, Watched]
) -> None:
    """In the first epoch of a phase, before it has a checkpoint, and in the second."""
    setting = replace(SETTING, cache=tmp_path / "cache" if keeps else None)
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(KeyboardInterrupt):
        DBD.parse(QUICK).run(setting.task(Watched(work=work, progress=Fuse(step, phase))))
    engine = Watched(work=work)
    assert is_same((DBD.parse(QUICK).run(setting.task(engine)), engine), plain)
