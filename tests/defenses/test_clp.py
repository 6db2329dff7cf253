"""CLP: the Lipschitz bounds by hand, which channels stand out, and what becomes of the network."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from backdoored import suspect_model, task_of
from torch import Tensor, nn
from toys import are_equal, toy_batch, toy_data, toy_model, weights_of

from bdbench.defenses.base import Defended
from bdbench.defenses.parts.channels import farthest, outlying
from bdbench.defenses.repair.clp import ChannelLipschitzPruning, bounds_of, filter_norms
from bdbench.errors import OptionError
from bdbench.models.classifier import Classifier, build_classifier
from bdbench.models.wide_resnet import WideResNet
from bdbench.seeds import generator, scoped


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "noise"), dtype=torch.float64)


def mended(suspect: Classifier, **options: Any) -> Defended:
    return ChannelLipschitzPruning.parse(options).run(task_of(suspect=suspect))


# the bound


def test_the_bound_of_a_filter_is_the_largest_singular_value_of_its_matrix() -> None:
    weight = noise(5, 4, 3, 3)
    expected = [torch.linalg.matrix_norm(own.reshape(4, 9), 2).item() for own in weight]
    assert filter_norms(weight).tolist() == pytest.approx(expected)


def test_of_one_place_it_is_the_length_of_the_row() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]]).view(2, 2, 1, 1)
    assert filter_norms(weight).tolist() == pytest.approx([5.0, 2.0])


def test_by_hand() -> None:
    # input channels see (1, 0) and (0, 2): singular values 1 and 2
    weight = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])
    assert filter_norms(weight).tolist() == pytest.approx([2.0])


def test_a_scaled_filter_has_a_scaled_bound() -> None:
    weight = noise(5, 4, 3, 3)
    torch.testing.assert_close(filter_norms(-3 * weight), 3 * filter_norms(weight))


def test_the_norm_scales_the_bound() -> None:
    conv, norm = nn.Conv2d(1, 3, 1, bias=False), nn.BatchNorm2d(3, eps=1.0)
    assert norm.running_var is not None
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1, 1))
        norm.weight.copy_(torch.tensor([-2.0, 3.0, 4.0]))
        norm.running_var.copy_(torch.tensor([3.0, 8.0, 0.0]))
    # 1 * 2 / sqrt(3 + 1), 2 * 3 / sqrt(8 + 1), and a dead channel: 5 * 4 / sqrt(0 + 1), not infinite
    assert bounds_of(conv, norm).tolist() == pytest.approx([1.0, 2.0, 20.0])


# what stands out


def test_what_lies_beyond_the_limit_stands_out() -> None:
    # mean 2, standard deviation sqrt(9 * 1 + 81) / 3 = sqrt(10): the last lies 2.846 of it out
    values = torch.tensor([1.0] * 9 + [11.0])
    for deviations, expected in ((2.84, True), (2.85, False)):
        found = outlying(values, deviations, "std")
        assert found.tolist() == [False] * 9 + [expected]


def test_what_lies_below_does_not() -> None:
    assert not outlying(torch.tensor([11.0] * 9 + [1.0]), 1.0, "std").any()


@pytest.mark.parametrize("count", [2, 10, 16, 32])
def test_no_channel_lies_farther_out_than_the_number_of_channels_allows(count: int) -> None:
    values = torch.zeros(count, dtype=torch.float64)
    values[0] = 1e6
    limit = farthest(count)
    assert limit == pytest.approx((count - 1) / math.sqrt(count))
    assert outlying(values, limit * 0.999, "std")[0]
    assert not outlying(values, limit * 1.001, "std")[0]


def test_the_median_deviation_has_no_such_limit() -> None:
    # median 3, deviations 2, 1, 0, 1, 1e6: their median 1, times 1.4826
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 1e6])
    assert outlying(values, 1000.0, "mad").tolist() == [False] * 4 + [True]
    assert outlying(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.9]), 2.0, "mad").tolist() == [False] * 5
    assert outlying(torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0]), 2.0, "mad").tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("spread", ["std", "mad"])
@pytest.mark.parametrize("values", [[], [5.0], [0.1] * 7])
def test_of_one_and_of_equal_ones_none_stands_out(values: list[float], spread: Literal["std", "mad"]) -> None:
    assert outlying(torch.tensor(values), 0.0, spread).tolist() == [False] * len(values)


def test_where_most_are_equal_the_median_deviation_tells_nothing() -> None:
    assert not outlying(torch.tensor([1.0, 1.0, 1.0, 1.0, 9.0]), 3.0, "mad").any()


# the whole method


@cache
def _wide() -> dict[str, Tensor]:
    """A WRN-16-1 of which channel 5 of blocks.3.norm2 and channel 7 of the first norm stand out."""
    with scoped(0, "weights"):
        model = build_classifier(WideResNet, (3, 8, 8), 4, torch.zeros(3), torch.ones(3))
    with torch.no_grad():
        for conv in (part for part in model.modules() if isinstance(part, nn.Conv2d)):
            wanted = 1 + 0.1 * (-1.0) ** torch.arange(len(conv.weight))  # no filter stands out
            conv.weight.mul_((wanted / filter_norms(conv.weight)).float().view(-1, 1, 1, 1))
        for name, channel in (("blocks.3.norm2", 5), ("blocks.0.norm1", 7)):
            norm = model.features.get_submodule(name)
            norm.weight[channel] = 50.0
            norm.bias.fill_(0.25)
    return weights_of(model)


def wide() -> Classifier:
    model = build_classifier(WideResNet, (3, 8, 8), 4, torch.zeros(3), torch.ones(3))
    model.load_state_dict(_wide())
    return model.eval()


def changed(model: Classifier) -> dict[str, list[int]]:
    """The channels of the parts of the state that differ from the wide network's."""
    before, after = _wide(), weights_of(model)
    found = {name: (before[name] != after[name]).reshape(len(before[name]), -1) for name in before if before[name].ndim}
    return {name: differs.any(1).nonzero().flatten().tolist() for name, differs in found.items() if differs.any()}


def test_channels_that_stand_out_lose_weight_and_bias_and_nothing_else_changes() -> None:
    defended = mended(wide())
    assert changed(defended.model) == {
        "features.blocks.0.norm1.weight": [7], "features.blocks.0.norm1.bias": [7],
        "features.blocks.3.norm2.weight": [5], "features.blocks.3.norm2.bias": [5],
    }  # fmt: skip
    assert weights_of(defended.model)["features.blocks.3.norm2.weight"][5] == 0
    assert dict(defended.findings) == {
        "said": "2 of 240 channels pruned", "unchanged": False, "channels": 16 + 16 + 16 + 2 * 32 + 2 * 64,
        "pruned": {"features.blocks.0.norm1": 1, "features.blocks.3.norm2": 1},
    }  # fmt: skip


def test_the_output_of_a_pruned_channel_is_0() -> None:
    model = mended(wide()).model
    seen: list[Tensor] = []
    model.features.get_submodule("blocks.3.norm2").register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        model(toy_batch(toy_data(4)).images)
    assert not seen[0][:, 5].any()
    assert seen[0][:, 4].any()


def test_a_norm_that_takes_a_sum_is_never_pruned() -> None:
    """The published pairing takes the convolution that was registered before it."""
    suspect = wide()
    with torch.no_grad():
        for place in range(1, 6):
            suspect.features.get_submodule(f"blocks.{place}.norm1").weight[0] = 1e4
        suspect.features.norm.weight[0] = 1e4
    assert set(mended(suspect).findings["pruned"]) == {"features.blocks.0.norm1", "features.blocks.3.norm2"}


def test_the_suspect_is_not_touched() -> None:
    suspect = wide()
    assert mended(suspect).model is not suspect
    assert are_equal(weights_of(suspect), _wide())


def test_the_higher_the_limit_the_fewer_are_pruned() -> None:
    def pruned(deviations: float) -> set[tuple[str, int]]:
        found = changed(mended(wide(), deviations=deviations).model)
        return {(name, channel) for name, channels in found.items() for channel in channels}

    sets = [pruned(deviations) for deviations in (0.5, 3.0, 4.0, 5.6)]
    assert all(more > fewer for more, fewer in pairwise(sets))


def test_an_endless_limit_returns_the_suspect_itself() -> None:
    suspect = wide()
    defended = mended(suspect, deviations=1e30, spread="mad")
    assert defended.model is suspect
    assert are_equal(weights_of(suspect), _wide())
    assert defended.findings["unchanged"]
    assert defended.findings["said"] == "no channel lies more than 1e+30 deviations out in its layer; model unchanged"


def test_where_layers_are_too_narrow_for_the_limit_it_is_told() -> None:
    defended = mended(suspect_model())  # one layer of 6 channels
    assert defended.findings["said"] == (
        "of 6 channels, the most that a layer has, none can lie more than 2.04 standard deviations out (limit 3); "
        "model unchanged; lower --deviations, or take --spread mad"
    )


@pytest.mark.parametrize(("unpaired", "expected"), [("skip", []), ("weight", [3])])
def test_convolutions_without_a_norm_of_their_own_are_judged_by_their_filters(
    unpaired: str, expected: list[int]
) -> None:
    suspect = wide()
    with torch.no_grad():
        suspect.features.get_submodule("blocks.1.conv2").weight[3] *= 1000
    before = weights_of(suspect)
    defended = mended(suspect, unpaired=unpaired)
    zeroed = weights_of(defended.model)["features.blocks.1.conv2.weight"].flatten(1).abs().sum(1) == 0
    assert zeroed.nonzero().flatten().tolist() == expected
    assert defended.findings["pruned"].get("features.blocks.1.conv2", 0) == len(expected)
    assert are_equal(weights_of(suspect), before)


def test_a_filter_with_a_bias_loses_it_too() -> None:
    class Bare(nn.Module):
        size = 12

        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12)
            self.second = nn.Conv2d(12, 12, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.second(self.norm(self.first(images)).relu()).mean((2, 3))

    suspect = Classifier(Bare(), 4, torch.zeros(3), torch.ones(3))
    with torch.no_grad():
        suspect.features.second.weight[1] *= 1000
    state = weights_of(mended(suspect, unpaired="weight").model)
    assert state["features.second.bias"][1] == 0
    assert not state["features.second.weight"][1].any()
    assert (state["features.second.bias"] == 0).sum() == 1


def test_it_needs_neither_trusted_images_nor_training() -> None:
    method = ChannelLipschitzPruning()
    assert not method.needs_trusted
    task = task_of(suspect=wide())
    without = type(task)(**{**vars(task), "trusted": None})
    assert are_equal(weights_of(method.run(without).model), weights_of(method.run(task).model))
    assert task.engine.history == []


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([nn.Conv2d(3, 6, 3)], "method 'clp' works on batch norms, and this network has none"),
        ([nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)], "method 'clp' needs convolutions whose output a batch"),
        ([nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)], "method 'clp' needs convolutions whose"),
    ],
)
def test_a_network_without_what_it_needs_is_refused(parts: list[nn.Module], message: str) -> None:
    suspect = toy_model(toy_data())
    suspect.features.layers = nn.Sequential(*parts)
    with pytest.raises(OptionError, match=message):
        mended(suspect)
