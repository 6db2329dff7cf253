"""The training loop: schedule, resume, what is left out, what is said when it goes wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import (
    DroppedFeatures,
    Fuse,
    ToyFeatures,
    are_equal,
    cannot_compile,
    toy_compiler,
    toy_data,
    toy_engine,
    toy_model,
    toy_recipe,
    weights_of,
)

from bdbench import files, machine
from bdbench.data import ImageDataset
from bdbench.errors import DeviceError, OptionError, TrainingError
from bdbench.models.classifier import Classifier
from bdbench.models.structure import frozen
from bdbench.progress import Silent
from bdbench.seeds import scoped
from bdbench.training import devices
from bdbench.training import engine as engine_module
from bdbench.training.devices import out_of_memory_advice, resolve_device, use_bf16
from bdbench.training.engine import Engine
from bdbench.training.loop import Batch, mean_cross_entropy
from bdbench.training.recipe import Recipe

# the schedule


def rates(recipe: Recipe, *epochs: float) -> list[float]:
    return [recipe.lr_at(epoch) for epoch in epochs]


def test_a_constant_rate_stays() -> None:
    assert rates(Recipe(epochs=10, lr=0.4, schedule="constant"), 0, 5, 9.9) == [0.4, 0.4, 0.4]


def test_cosine_falls_from_the_peak_over_a_half_to_nothing() -> None:
    # cos 0 = 1, cos 60 degrees = 1/2, cos 90 = 0, cos 120 = -1/2, cos 180 = -1
    found = rates(Recipe(epochs=6, lr=0.4, schedule="cosine"), 0, 2, 3, 4, 6)
    assert found == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])


def test_steps_divide_by_ten_at_shares_of_the_epochs() -> None:
    recipe = Recipe(epochs=10, lr=1.0, schedule="step", milestones=(0.2, 0.7))
    assert rates(recipe, 0, 1.99, 2, 6.99, 7, 9.9) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_the_papers_milestones_of_a_hundred_epochs_are_20_and_70() -> None:
    recipe = Recipe(epochs=100, lr=1.0, schedule="step")
    assert rates(recipe, 19, 20, 69, 70) == pytest.approx([1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("epochs", [1, 2, 5, 10])
def test_the_first_epoch_has_the_whole_rate_however_few_there_are(epochs: int) -> None:
    recipe = Recipe(epochs=epochs, lr=1.0, schedule="step", milestones=(0.05, 0.5))
    assert rates(recipe, 0, 0.99) == [1, 1]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_warm_up_rises_in_a_line_to_the_peak(schedule: str) -> None:
    recipe = Recipe.parse({"epochs": 20, "lr": 0.4, "schedule": schedule, "warmup": 2})
    assert rates(recipe, 0.5, 1, 1.5, 2) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_the_first_step_of_a_warm_up_is_small_but_not_nothing() -> None:
    assert 0 < Recipe(lr=0.4, warmup=2).lr_at(0) < 0.001


def test_cosine_after_a_warm_up_ends_at_nothing() -> None:
    # half way between 2 and 10
    assert rates(Recipe(epochs=10, lr=0.4, warmup=2), 6, 10) == pytest.approx([0.2, 0.0])


@pytest.mark.parametrize(
    "values",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"lr": 0},
        {"momentum": 1},
        {"weight_decay": -1},
        {"schedule": "linear"},
    ],
)
def test_a_recipe_has_bounds(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(values))):
        Recipe.parse(values)


# one step and one epoch


class Listener:
    """A loss that remembers the batches it saw."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, model: Classifier, batch: Batch) -> Tensor:
        self.batches.append(batch)
        assert model.training
        return F.cross_entropy(model(batch.images), batch.labels)


def test_one_step_is_one_step_of_sgd_by_hand() -> None:
    data = toy_data(16)
    model, twin = toy_model(data), toy_model(data)
    recipe = toy_recipe(epochs=1, lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.01, schedule="constant")
    toy_engine().fit(model, data, mean_cross_entropy, recipe, phase="train")

    images = (data.images.float() / 255).contiguous(memory_format=torch.channels_last)
    F.cross_entropy(twin.train()(images), data.labels).backward()
    for name, weight in twin.named_parameters():
        assert weight.grad is not None
        expected = weight.detach() - 0.1 * (weight.grad + 0.01 * weight.detach())
        # the batch has another order there, so sums differ in the last bits
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-4, atol=1e-6)


def test_every_image_is_seen_once_an_epoch_in_a_new_order() -> None:
    data, listener = toy_data(20), Listener()
    toy_engine().fit(toy_model(data), data, listener, toy_recipe(batch_size=8), phase="train")
    assert [len(batch.rows) for batch in listener.batches] == [8, 8, 4, 8, 8, 4]
    first = torch.cat([batch.rows for batch in listener.batches[:3]])
    second = torch.cat([batch.rows for batch in listener.batches[3:]])
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(20))
    assert first.tolist() != second.tolist()


def test_a_batch_has_the_images_and_labels_of_its_rows() -> None:
    data, listener = toy_data(20), Listener()
    toy_engine().fit(toy_model(data), data, listener, toy_recipe(batch_size=8), phase="train")
    for step, batch in enumerate(listener.batches):
        assert torch.equal(batch.images, data.images[batch.rows].float() / 255)
        assert torch.equal(batch.labels, data.labels[batch.rows])
        assert batch.step == step


@pytest.mark.parametrize(("count", "sizes"), [(17, [8, 8]), (18, [8, 8, 2]), (16, [8, 8]), (2, [2])])
def test_a_last_batch_of_one_image_is_left_out(count: int, sizes: list[int]) -> None:
    data, listener = toy_data(count), Listener()
    toy_engine().fit(toy_model(data), data, listener, toy_recipe(epochs=1, batch_size=8), phase="train")
    assert [len(batch.rows) for batch in listener.batches] == sizes


def test_a_single_image_cannot_be_trained_on() -> None:
    data = toy_data(1)
    with pytest.raises(TrainingError, match="phase 'train' has 1 images; training needs at least 2"):
        toy_engine().fit(toy_model(data), data, mean_cross_entropy, toy_recipe(), phase="train")


@pytest.mark.parametrize(("max_steps", "taken"), [(1, 1), (3, 3), (4, 4), (100, 6)])
def test_a_phase_ends_after_the_most_steps_even_inside_an_epoch(max_steps: int, taken: int) -> None:
    data, listener = toy_data(24), Listener()
    toy_engine().fit(toy_model(data), data, listener, toy_recipe(batch_size=8), phase="train", max_steps=max_steps)
    assert len(listener.batches) == taken


def test_stop_is_asked_after_every_epoch_with_the_model_in_evaluation_mode() -> None:
    data, asked = toy_data(16), []

    def stop(model: Classifier) -> bool:
        asked.append(model.training)
        return len(asked) == 2

    engine = toy_engine()
    engine.fit(toy_model(data), data, mean_cross_entropy, toy_recipe(epochs=5), phase="train", stop=stop)
    assert asked == [False, False]
    assert len(engine.history) == 2


def test_history_has_a_row_per_epoch_with_the_mean_loss() -> None:
    data, engine = toy_data(32), toy_engine()

    def loss(model: Classifier, batch: Batch) -> Tensor:
        nothing: Tensor = 0 * model(batch.images).sum()
        return nothing + batch.step

    engine.fit(toy_model(data), data, loss, toy_recipe(schedule="constant"), phase="train")
    # the steps are 0, 1 and 2, 3
    assert [(row["phase"], row["epoch"], row["loss"], row["lr"]) for row in engine.history] == [
        ("train", 1, 0.5, 0.05), ("train", 2, 2.5, 0.05),
    ]  # fmt: skip
    assert all(float(row["images_per_second"]) > 0 for row in engine.history)


class Statuses(Silent):
    """Keeps what is said beside the bar."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def advance(self, amount: int, status: str = "") -> None:  # noqa: ARG002
        self.said += [status] if status else []


def test_a_phase_whose_dose_is_steps_is_counted_in_steps() -> None:
    data, progress = toy_data(32), Statuses()
    engine = toy_engine(progress=progress)
    engine.fit(toy_model(data), data, mean_cross_entropy, toy_recipe(epochs=9), phase="dose", max_steps=5, unit="step")
    assert [row["step"] for row in engine.history] == [2, 4, 5]
    assert [said.split(" loss")[0] for said in progress.said] == ["step 2", "step 4", "step 5"]
    with pytest.raises(TrainingError, match=r"loss of phase 'bad' is nan in step 2; lower"):
        engine.fit(
            toy_model(data), data, lambda model, batch: model(batch.images).sum() * math.nan, toy_recipe(),
            phase="bad", unit="step",
        )  # fmt: skip


def test_the_rate_falls_within_an_epoch_too() -> None:
    data, engine = toy_data(32), toy_engine()
    engine.fit(toy_model(data), data, mean_cross_entropy, toy_recipe(lr=0.4, schedule="cosine"), phase="train")
    # two epochs of two steps at 0, 45, 90 and 135 degrees; a row has the rate of its last step
    expected = [0.2 * (1 + math.sqrt(0.5)), 0.2 * (1 - math.sqrt(0.5))]
    assert [row["lr"] for row in engine.history] == pytest.approx(expected)


def test_a_trained_model_comes_back_in_evaluation_mode() -> None:
    data = toy_data(16)
    assert not toy_engine().fit(toy_model(data), data, mean_cross_entropy, toy_recipe(), phase="train").training


def test_training_learns_the_classes() -> None:
    data, test = toy_data(120), toy_data(40, seed=1)
    engine = toy_engine()
    model = engine.fit(toy_model(data), data, mean_cross_entropy, toy_recipe(epochs=15, lr=0.2), phase="train")
    assert (engine.logits(model, test.images).argmax(1) == test.labels).float().mean() > 0.8


def run(seed: int = 0, phase: str = "train", **changes: Any) -> dict[str, Tensor]:
    data = toy_data(40)
    engine = toy_engine(seed=seed)
    recipe = toy_recipe(augment="crop,flip,cutout", **changes)
    return weights_of(engine.fit(toy_model(data), data, mean_cross_entropy, recipe, phase=phase))


def test_equal_seeds_give_equal_models_and_others_do_not() -> None:
    assert are_equal(run(), run())
    assert not are_equal(run(), run(seed=1))
    assert not are_equal(run(), run(phase="other"))


def test_training_leaves_the_global_randomness_alone_and_does_not_depend_on_it() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert are_equal(run(), first)


def test_frozen_norms_keep_their_statistics_and_learn_their_weights() -> None:
    data = toy_data(32)
    model = toy_model(data)
    before = weights_of(model)
    toy_engine().fit(model, data, mean_cross_entropy, toy_recipe(), phase="train", frozen_norms=True)
    after = weights_of(model)
    for name in before:
        is_buffer = "running" in name or "tracked" in name or name in ("mean", "std")
        assert torch.equal(before[name], after[name]) == is_buffer, name


def test_free_norms_follow_the_batches() -> None:
    data = toy_data(32)
    model = toy_model(data)
    before = weights_of(model)
    toy_engine().fit(model, data, mean_cross_entropy, toy_recipe(), phase="train")
    name = "features.layers.1.running_mean"
    assert not torch.equal(before[name], weights_of(model)[name])


# resume


class Critic(nn.Module):
    """A companion with dropout: what it says depends on the global stream."""

    def __init__(self) -> None:
        super().__init__()
        with scoped(0, "critic"):
            self.layers = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1))


def work_of(folder: Path | None, progress: Silent, features: type[nn.Module], phase: str = "train") -> Any:
    """Train with a critic that learns by Adam inside the loss; 3 steps an epoch, 4 epochs."""
    data = toy_data(48)
    critic = Critic()
    learner = torch.optim.Adam(critic.parameters(), 0.01)

    def loss(model: Classifier, batch: Batch) -> Tensor:
        logits = model(batch.images)
        learner.zero_grad()
        critic.layers(logits.detach()).sum().backward()
        learner.step()
        said: Tensor = critic.layers(logits).mean()
        return F.cross_entropy(logits, batch.labels) + 0.1 * said

    engine = toy_engine(folder, progress=progress)
    model = engine.fit(
        toy_model(data, features=features), data, loss, toy_recipe(epochs=4, augment="crop,flip"),
        phase=phase, companions={"critic": critic, "learner": learner},
    )  # fmt: skip
    return weights_of(model) | {f"critic.{key}": value for key, value in weights_of(critic).items()}, engine.history


def losses_of(history: list[dict[str, float | int | str]]) -> list[Any]:
    return [(row["epoch"], row["loss"], row["lr"]) for row in history]


@pytest.mark.parametrize("features", [ToyFeatures, DroppedFeatures])
@pytest.mark.parametrize("steps", [0, 2, 3, 4, 8, 11])
def test_an_interrupted_phase_ends_bit_equal_to_an_uninterrupted_one(
    tmp_path: Path, steps: int, features: type[nn.Module]
) -> None:
    whole, history = work_of(None, Silent(), features)
    with pytest.raises(KeyboardInterrupt):
        work_of(tmp_path, Fuse(steps, size=16), features)
    resumed, resumed_history = work_of(tmp_path, Silent(), features)
    assert are_equal(whole, resumed)
    assert losses_of(history) == losses_of(resumed_history)


def test_only_what_was_missing_is_done_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        work_of(tmp_path, Fuse(7, size=16), ToyFeatures)
    rest = Fuse(6, size=16)  # two epochs of three are left
    work_of(tmp_path, rest, ToyFeatures)
    assert rest.left == 0


def test_a_finished_phase_is_not_done_again(tmp_path: Path) -> None:
    first, history = work_of(tmp_path, Silent(), ToyFeatures)
    again = Fuse(0, size=16)
    second, second_history = work_of(tmp_path, again, ToyFeatures)
    assert again.started == []
    assert are_equal(first, second)
    assert history == second_history


def test_a_stopped_phase_stays_stopped(tmp_path: Path) -> None:
    data = toy_data(16)
    for _ in range(2):
        engine = toy_engine(tmp_path)
        engine.fit(
            toy_model(data),
            data,
            mean_cross_entropy,
            toy_recipe(epochs=9),
            phase="train",
            stop=lambda _: True,
        )
        assert len(engine.history) == 1


def test_a_phase_does_not_take_the_checkpoint_of_another(tmp_path: Path) -> None:
    first, _ = work_of(tmp_path, Silent(), ToyFeatures, "twin")
    second, history = work_of(tmp_path, Silent(), ToyFeatures, "clean")
    assert len(history) == 4
    assert not are_equal(first, second)


def test_checkpoints_wait_for_their_time(tmp_path: Path) -> None:
    data = toy_data(32)
    engine = toy_engine(tmp_path, progress=Fuse(3, size=16), checkpoint_seconds=60.0)
    with pytest.raises(KeyboardInterrupt):
        engine.fit(toy_model(data), data, mean_cross_entropy, toy_recipe(epochs=3), phase="train")
    assert not list(tmp_path.iterdir())


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run()
    assert not list(tmp_path.iterdir())


class Counter(Silent):
    """A progress that counts images, and ends the work after the first epoch if it is told to."""

    def __init__(self, *, ends: bool = False) -> None:
        self.total, self.done, self.ends = 0, 0, ends

    def start(self, label: str, total: int, unit: str = "images") -> None:  # noqa: ARG002
        self.total = total

    def advance(self, amount: int, status: str = "") -> None:
        self.done += amount
        if status and self.ends:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("count", "settings", "total"),
    [
        (40, {}, 80),  # 16, 16 and 8 an epoch
        (33, {}, 64),  # the last one alone is left out
        (40, {"epoch_steps": 2}, 64),
        (40, {"max_steps": 4}, 56),
    ],
)
def test_progress_counts_the_images_that_are_seen(
    tmp_path: Path, count: int, settings: dict[str, int], total: int
) -> None:
    data, whole, first, rest = toy_data(count), Counter(), Counter(ends=True), Counter()
    fit = {"phase": "train", **settings}
    toy_engine(progress=whole).fit(toy_model(data), data, mean_cross_entropy, toy_recipe(), **fit)
    assert (whole.total, whole.done) == (total, total)
    with pytest.raises(KeyboardInterrupt):
        toy_engine(tmp_path, progress=first).fit(toy_model(data), data, mean_cross_entropy, toy_recipe(), **fit)
    toy_engine(tmp_path, progress=rest).fit(toy_model(data), data, mean_cross_entropy, toy_recipe(), **fit)
    assert (rest.total, rest.done) == (total, total)


# what goes wrong


def failing_after(step: int) -> Any:
    def loss(model: Classifier, batch: Batch) -> Tensor:
        value = F.cross_entropy(model(batch.images), batch.labels)
        return value * (math.nan if batch.step >= step else 1.0)

    return loss


def test_a_loss_that_is_not_finite_names_phase_epoch_and_rate(tmp_path: Path) -> None:
    data = toy_data(32)
    with pytest.raises(
        TrainingError, match=r"loss of phase 'clean' is nan in epoch 3; lower --lr \(now 0\.05\); the last good"
    ):
        toy_engine(tmp_path).fit(toy_model(data), data, failing_after(5), toy_recipe(epochs=5), phase="clean")


def test_the_last_good_checkpoint_survives_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    data = toy_data(32)
    with pytest.raises(TrainingError):
        toy_engine(tmp_path).fit(toy_model(data), data, failing_after(5), toy_recipe(epochs=5), phase="clean")
    engine, steps = toy_engine(tmp_path), list[int]()

    def loss(model: Classifier, batch: Batch) -> Tensor:
        steps.append(batch.step)
        return mean_cross_entropy(model, batch)

    model = engine.fit(toy_model(data), data, loss, toy_recipe(epochs=5), phase="clean")
    assert steps == [4, 5, 6, 7, 8, 9]
    assert [row["epoch"] for row in engine.history] == [1, 2, 3, 4, 5]
    assert engine.logits(model, data.images).isfinite().all()


@pytest.mark.parametrize(("step", "kept"), [(0, False), (2, True)])
def test_a_checkpoint_is_promised_only_where_there_is_one(tmp_path: Path, step: int, kept: bool) -> None:
    data = toy_data(32)
    for _ in range(2):  # the second time there is what the first one left
        with pytest.raises(TrainingError) as said:
            toy_engine(tmp_path).fit(toy_model(data), data, failing_after(step), toy_recipe(), phase="clean")
        assert ("the last good checkpoint is kept" in str(said.value)) is kept


def test_weights_that_are_not_finite_are_not_delivered() -> None:
    """The loss of the last step is fine; its gradient is not."""
    data = toy_data(16)

    def loss(model: Classifier, batch: Batch) -> Tensor:
        value = F.cross_entropy(model(batch.images), batch.labels)
        return value + (model.head.bias - model.head.bias.detach()).abs().sqrt().sum()

    with pytest.raises(TrainingError, match="lower --lr"):
        toy_engine().fit(toy_model(data), data, loss, toy_recipe(epochs=1), phase="train")


def test_a_setting_that_is_no_augmentation_is_refused() -> None:
    data = toy_data(16)
    with pytest.raises(OptionError, match="unknown augmentation 'jitter'"):
        toy_engine().fit(toy_model(data), data, mean_cross_entropy, toy_recipe(augment="jitter"), phase="train")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_running_out_of_memory_comes_with_advice(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy_data(16)

    def full(*_: object) -> Tensor:
        raise error

    with pytest.raises(DeviceError, match=r"out of memory; lower --batch-size .*, or --image-memory$"):
        toy_engine().fit(toy_model(data), data, full, toy_recipe(), phase="train")
    monkeypatch.setattr(engine_module, "Feed", full)  # the images do not fit
    with pytest.raises(DeviceError, match=r"or --image-memory$"):
        toy_engine().fit(toy_model(data), data, mean_cross_entropy, toy_recipe(), phase="train")
    monkeypatch.setattr(Classifier, "to", full)  # nor the network
    with pytest.raises(DeviceError, match="out of memory; lower the load of the device"):
        toy_engine().logits(toy_model(data), data.images)


def test_other_errors_keep_their_kind() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_advice("--batch-size"):
        raise RuntimeError("shapes do not fit")


# evaluation


def test_logits_do_not_depend_on_the_evaluation_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    data, engine = toy_data(40), toy_engine()
    model = engine.fit(toy_model(data), data, mean_cross_entropy, toy_recipe(), phase="train")
    at_once = engine.logits(model, data.images)
    monkeypatch.setitem(engine_module.PIXELS_AT_ONCE, "cpu", 7 * 8 * 8)
    # matrix products of other sizes may add in another order
    torch.testing.assert_close(engine.logits(model, data.images), at_once, rtol=1e-5, atol=1e-6)


def test_logits_are_those_of_the_model_in_evaluation_mode() -> None:
    data, engine = toy_data(8), toy_engine()
    model = toy_model(data, features=DroppedFeatures)
    found = engine.logits(model.train(), data.images)
    with torch.no_grad():
        torch.testing.assert_close(found, model.eval()(data.images.float() / 255), rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32
    assert engine.embeddings(model, data.images).shape == (8, 6)


def test_evaluating_changes_nothing_in_the_model() -> None:
    data, engine = toy_data(8), toy_engine()
    model = toy_model(data)
    before = weights_of(model)
    engine.logits(model, data.images)
    assert are_equal(before, weights_of(model))


def test_losses_are_cross_entropies_by_hand() -> None:
    data, engine = toy_data(4), toy_engine()
    model = toy_model(data)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.0, math.log(2), math.log(3), math.log(4)]))
    # shares 1/10, 2/10, 3/10, 4/10 for the labels 0, 1, 2, 3
    expected = [math.log(10), math.log(5), math.log(10 / 3), math.log(2.5)]
    assert engine.losses(model, data).tolist() == pytest.approx(expected, rel=1e-6)


def test_losses_come_in_the_order_of_the_rows() -> None:
    data, engine = toy_data(40), toy_engine()
    model = toy_model(data)
    flipped = ImageDataset(data.images.flip(0), data.labels.flip(0), data.class_names)
    torch.testing.assert_close(engine.losses(model, flipped).flip(0), engine.losses(model, data), rtol=1e-5, atol=1e-6)


def test_bfloat16_gives_nearly_the_same_logits_as_float32() -> None:
    data = toy_data(8)
    model = toy_model(data)
    low = toy_engine(bf16=True).logits(model, data.images)
    assert low.dtype == torch.float32
    # eight bits of mantissa
    torch.testing.assert_close(low, toy_engine().logits(model, data.images), rtol=0.05, atol=0.05)


def test_no_images_have_no_logits() -> None:
    data = toy_data(4)
    assert len(toy_engine().logits(toy_model(data), data.images[:0])) == 0


def test_a_frozen_module_has_no_gradients_and_is_in_evaluation_mode() -> None:
    model = frozen(toy_model(toy_data(4)))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


# devices


@pytest.mark.parametrize(
    ("work", "device", "told", "threads"),
    [
        (devices.SMALL_WORK - 1, "cpu", None, 1),
        (devices.SMALL_WORK, "cpu", None, 3),
        (devices.SMALL_WORK - 1, "cpu", "3", 3),
        (devices.SMALL_WORK - 1, "cuda", None, 3),
    ],
)
def test_small_work_takes_one_thread_unless_told_otherwise(
    work: int, device: str, told: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(devices, "crowding", lambda _: f"crowded with {torch.get_num_threads()}")
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    said: list[str] = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with devices.suited_threads(torch.device(device), work, said.append):
            assert torch.get_num_threads() == threads
            assert said == [f"crowded with {threads}"]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_auto_finds_a_device() -> None:
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("loads", "threads", "advice"),
    [
        ("0.00 0.01 0.05 1/87 32463\n", 8, None),
        ("3.00 0.01 0.05 4/87 32463\n", 8, None),
        ("3.00 0.01 0.05 5/87 32463\n", 8, "OMP_NUM_THREADS=4"),
        ("3.00 0.01 0.05 30/87 32463\n", 8, "OMP_NUM_THREADS=1"),
        ("3.00 0.01 0.05 30/87 32463\n", 1, None),
        ("nonsense", 8, None),
        (None, 8, None),
    ],
)
def test_a_crowded_machine_is_told_of(
    loads: str | None, threads: int, advice: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "LOADS", tmp_path / "loadavg")
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    if loads is not None:
        machine.LOADS.write_text(loads)
    said = devices.crowding(torch.device("cpu"))
    assert bool(said) == (advice is not None)
    assert (advice or "") in said
    assert devices.crowding(torch.device("cuda")) == ""


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "meta", "cuda:-1"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f"unknown device '{name}'; use auto, cpu, cuda, cuda:N or mps"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_an_absent_gpu_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        DeviceError, match=f"device '{name}' was asked for, but 0 CUDA devices are usable; use --device auto"
    ):
        resolve_device(name)


def test_a_gpu_beyond_the_last_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match="but 2 CUDA devices are usable"):
        resolve_device("cuda:2")


def test_precision_is_as_asked() -> None:
    cpu = torch.device("cpu")
    assert use_bf16("bf16", cpu)
    assert not use_bf16("fp32", cpu)


@pytest.mark.parametrize("name", ["fp16", "BF16", ""])
def test_an_unknown_precision_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(OptionError, match=f"unknown precision '{name}'.* Known: auto, bf16, fp32"):
        use_bf16(cast("devices.Precision", name), torch.device("cpu"))


def test_automatic_precision_asks_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not use_bf16("auto", torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert use_bf16("auto", torch.device("cpu"))
    assert not use_bf16("auto", torch.device("mps"))


def test_engines_do_not_share_their_history() -> None:
    assert Engine(torch.device("cpu"), False, 0).history is not Engine(torch.device("cpu"), False, 0).history


# compiling


def compiled_run(
    holding: Callable[[Classifier], nn.Module] = lambda model: model,
    loss: Callable[[Any, Batch], Tensor] = mean_cross_entropy,
    **settings: Any,
) -> tuple[dict[str, Tensor], list[str], Engine]:
    """Train two epochs, compiled unless told otherwise; return the weights, what was noted, and the engine."""
    notes: list[str] = []
    engine = toy_engine(**{"compile": True} | settings)
    engine.progress.note = notes.append  # type: ignore[method-assign]
    data = toy_data(40)
    model = engine.fit(holding(toy_model(data)), data, loss, toy_recipe(), phase="train")
    return weights_of(model), notes, engine


def noisy_sum(model: Classifier, batch: Batch) -> Tensor:
    """A loss that draws numbers and calls the network twice."""
    noisy = batch.images + 0.1 * torch.randn_like(batch.images)
    return F.cross_entropy(model(noisy) + model(batch.images), batch.labels)


@pytest.mark.parametrize("good", [0, 1])  # of the two calls of a step
def test_what_cannot_be_compiled_is_trained_as_if_nobody_had_tried(monkeypatch: pytest.MonkeyPatch, good: int) -> None:
    plain, _, _ = compiled_run(loss=noisy_sum, compile=False)
    compiler = toy_compiler(monkeypatch, cannot_compile(), good)
    weights, notes, engine = compiled_run(loss=noisy_sum)
    assert notes == ["not compiled: no C++ compiler"]
    assert are_equal(weights, plain)
    assert compiler.stances == []  # nothing is left behind for other code of the process
    assert (engine.compiled, engine.cannot_compile) == (False, True)


def test_other_errors_of_a_compiled_step_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    toy_compiler(monkeypatch, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes"):
        compiled_run()


def test_what_can_be_compiled_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = toy_compiler(monkeypatch)
    _, notes, engine = compiled_run()
    assert (notes, engine.compiled) == ([], True)
    assert compiler.calls == 2 * 2  # two whole batches an epoch; the third is short
    assert compiler.resets == 1
    data = toy_data(40)
    engine.losses(toy_model(data), data)
    assert compiler.calls == 2 * 2


def test_a_network_inside_of_what_is_trained_is_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = toy_compiler(monkeypatch)
    compiled_run(
        lambda model: nn.ModuleDict({"network": model, "projection": nn.Linear(model.head.out_features, 2)}),
        lambda both, batch: both["projection"](both["network"](batch.images)).square().mean(),
    )
    assert compiler.calls > 0


def test_a_phase_that_trains_no_network_runs_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was compiled before: else a run that found an earlier phase done would end with other bits."""
    compiler = toy_compiler(monkeypatch)
    data, engine = toy_data(40), toy_engine(compile=True)
    model = engine.fit(toy_model(data), data, mean_cross_entropy, toy_recipe(), phase="train")
    calls = compiler.calls

    def loss(head: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            embedding = model.embed(batch.images)
        return F.cross_entropy(head(embedding), batch.labels)

    def asks(_: object) -> None:
        model(torch.zeros(2, 3, 8, 8))

    engine.fit(model.head, data, loss, toy_recipe(), phase="head", before_epoch=asks)
    assert calls == compiler.calls


def test_what_is_asked_between_epochs_runs_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = toy_compiler(monkeypatch)
    data = toy_data(40)
    model = toy_model(data)

    def asks(_: object) -> None:
        model(torch.zeros(2, 3, 8, 8))

    toy_engine(compile=True).fit(model, data, mean_cross_entropy, toy_recipe(), phase="train", before_epoch=asks)
    assert compiler.calls == 2 * 2


def test_what_was_not_compiled_is_not_kept_as_if_it_were(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toy_compiler(monkeypatch, cannot_compile())
    notes: list[str] = []
    data, engine = toy_data(40), toy_engine(compile=True)
    engine.progress.note = notes.append  # type: ignore[method-assign]
    model = toy_model(data)

    def train() -> None:
        engine.fit(model, data, mean_cross_entropy, toy_recipe(), phase="train")

    engine.reuse_or_train(tmp_path, "key", {"model": model}, "features", train)
    assert notes[-1] == "features: not kept for other runs (not compiled)"
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    engine.reuse_or_train(tmp_path, "key", {"model": model}, "features", lambda: None)  # known from the start
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_what_a_killed_run_left_of_a_kept_network_is_removed(tmp_path: Path) -> None:
    model = toy_model(toy_data(40))

    def killed() -> None:
        with pytest.raises(ZeroDivisionError), files.replace_file(tmp_path / "key.safetensors") as temporary:
            _ = 1 / 0
        temporary.touch()  # as SIGKILL leaves it
        left.append(temporary)

    left: list[Path] = []
    toy_engine().reuse_or_train(tmp_path, "key", {"model": model}, "features", killed)
    assert left[0].exists()
    toy_engine().reuse_or_train(tmp_path, "key", {"model": model}, "features", lambda: None)
    assert not left[0].exists()
