"""benchmarks/speed.py: FLOPs and shares of the limit are right, and both sides of a comparison do the same work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import baseline
import limits
import measuring
import numpy as np
import pytest
import rows_data
import rows_defenses
import rows_growth
import rows_networks
import rows_processes
import rows_sharing
import speed
import torch
from PIL import Image
from torch import nn

from bdbench.datasets.paths import PathSource
from bdbench.defenses.base import lowest
from bdbench.defenses.training.plain import NoDefense
from bdbench.progress import Silent
from bdbench.protocol.poisoning import poison_source

SIZES = measuring.Sizes(
    rounds=1, train=4, train_large=4, data_path=4, epoch=4, inversion=4, forward=4, single=2, decode=4, png=4,
    trigger=4, poison=20, cifar=20, sweeps=1, growth=(10, 20),
)  # fmt: skip


@pytest.fixture
def bench() -> Any:
    """A bench of four images, on a machine of 1 GFLOP/s and 1 GB/s."""
    made = measuring.Bench(SIZES, torch.device("cpu"), bf16=False)
    vars(made)["ceilings"] = limits.Ceilings(fp32=1e9, bf16=None, copy=1e9)
    return made


def test_flops_are_counted_forward_and_backward() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 8 * 8, 5))
    images = torch.zeros(2, 3, 8, 8)
    convolution, linear = 2 * 2 * (8 * 8) * 4 * (3 * 3 * 3), 2 * 2 * (4 * 8 * 8) * 5
    assert limits.count_flops(lambda: network(images)) == convolution + linear
    # Backward: the gradient of each weight, and of the linear layer's input; none of the images.
    assert limits.count_flops(lambda: network(images).sum().backward()) == 2 * convolution + 3 * linear


def test_a_phase_counts_the_flops_of_a_training_image_as_the_training_row_does(bench: Any) -> None:
    engine = rows_defenses.CountingEngine(bench.device, bench.bf16, 0)
    rows_defenses.run_defense(bench, measuring.first(bench.train, 4), NoDefense(), engine)
    counted = rows_networks.training_flops(bench, "wrn-16-1")
    assert engine.flops_per_image("train") == pytest.approx(counted)
    assert counted == pytest.approx(3 * rows_networks.forward_limit(bench).cost, rel=0.01)


@pytest.mark.parametrize(("value", "unit"), [(100.0, "images/s"), (0.01, "s")])
def test_the_share_of_the_limit_is_work_a_second_through_the_ceiling(value: float, unit: str) -> None:
    assert limits.Limit(cost=2e9, ceiling=400e9).share(value, unit) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("bf16", "ceilings", "ceiling"),
    [(True, (100.0, 400.0, 1.0), 400.0), (False, (100.0, 400.0, 1.0), 100.0), (False, (100.0, None, 1.0), 100.0)],
)
def test_the_limit_is_that_of_the_precision_in_use(bf16: bool, ceilings: tuple[Any, ...], ceiling: float) -> None:
    bench = measuring.Bench(SIZES, torch.device("cpu"), bf16=bf16)
    vars(bench)["ceilings"] = limits.Ceilings(*ceilings)
    assert bench.computing(1.0).ceiling == ceiling
    assert bench.copying(1.0).ceiling == 1.0


def test_less_seconds_and_more_images_a_second_are_faster() -> None:
    assert measuring.times_faster(6.0, 2.0, "s") == 3
    assert measuring.times_faster(2.0, 6.0, "images/s") == 3


def test_the_ratio_is_the_median_of_turns_not_of_medians() -> None:
    row = measuring.summarise("row", [1.0, 2.0, 3.0], [2.0, 2.0, 12.0], "images/s")
    assert (row.baseline, row.bdbench, row.ratio) == (2.0, 2.0, 2.0)
    assert row.spread["ratio"] == (1.0, 4.0)


def test_the_json_is_a_list_of_rows_with_the_promised_keys(bench: Any) -> None:
    rows = list(rows_networks.sample_loss_rows(bench))
    parsed = json.loads(speed.as_json(rows))
    assert {"name", "baseline", "bdbench", "ratio", "unit", "limit_share"} <= set(parsed[0])
    assert parsed[0]["name"] == "sample-losses"
    cost = rows_networks.forward_limit(bench).cost
    assert parsed[0]["limit_share"] == pytest.approx(parsed[0]["bdbench"] * cost / 1e9)


def test_a_row_without_baseline_or_limit_says_so_with_null() -> None:
    parsed = json.loads(speed.as_json([measuring.summarise("row", None, [1.0], "s")]))[0]
    assert [parsed[key] for key in ("baseline", "bdbench", "ratio", "limit_share")] == [None, 1.0, None, None]


def test_a_command_that_fails_leaves_its_row_empty_and_says_why() -> None:
    failed = rows_processes.run_command([sys.executable, "-c", "raise SystemExit('no such thing')"])
    row = rows_processes.command_row("row", [failed], [failed], "note")
    assert (row.baseline, row.bdbench, row.note) == (None, None, "failed (1): no such thing")
    assert len(speed.cells(row)) == 8


def test_turns_end_when_the_time_is_up_but_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(measuring.time, "monotonic", lambda: now[0])

    def turn() -> float:
        now[0] += 2
        return now[0]

    assert measuring.take_turns([turn], 5, until=7) == [[4, 6]]
    assert measuring.take_turns([turn], 5, until=7) == [[10]]


def test_sizes_follow_the_first_look_within_bounds() -> None:
    half, tiny, huge = (measuring.fitted(measuring.QUICK, factor, measuring.FULL) for factor in (0.5, 0.0, 100.0))
    assert (half.train, half.epoch, half.inversion, half.growth) == (512, 512, 32, (500, 5_000))
    assert tiny.train == measuring.REHEARSAL.train
    assert (huge.train, huge.cifar) == (measuring.FULL.train, measuring.QUICK.cifar)


def test_a_training_is_told_its_threads_or_chooses_them(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int | None] = []

    def run(command: Any, folder: Any = None, threads: int | None = 0) -> rows_processes.Ran:
        told.append(threads)
        return rows_processes.Ran(0, 2.0 if threads else 1.0, 100.0, "")

    monkeypatch.setattr(rows_processes, "run_command", run)
    monkeypatch.setattr(rows_processes.os, "cpu_count", lambda: 4)
    rows = list(rows_processes.neighbour_rows(bench))
    assert [row.ratio for row in rows] == [2, 2]
    assert told == [0, *[4, None] * 4]


def test_the_fastest_baseline_is_the_one_that_counts() -> None:
    assert measuring.fastest({0: lambda: 1.0, 2: lambda: 3.0, 4: lambda: 2.0}) == 2


@pytest.mark.parametrize(("attack", "tolerance"), [("badnets", 0), ("blended", 1), ("sig", 1), ("wanet", 1)])
def test_the_baseline_poisons_an_image_as_bdbench_does(attack: str, tolerance: int) -> None:
    """Blended, SIG and WaNet are cut to bytes by the standard parts, and rounded by bdbench."""
    data, method = measuring.synthetic_images(2, "train"), rows_data.attack_of(attack)
    state = method.fit(data, rows_data.lab())
    trigger = rows_data.plain_trigger(method, attack, state, cover=False)
    plainly = np.asarray(trigger(rows_data.to_pil(data.images)[1]))
    own = method.trigger(data, torch.tensor([1]), state, "poison", 0)[0].permute(1, 2, 0).numpy()
    assert np.abs(plainly.astype(int) - own).max() <= tolerance
    assert (plainly != data.images[1].permute(1, 2, 0).numpy()).any()


def test_both_sides_decode_the_same_pixels(tmp_path: Path) -> None:
    data = measuring.synthetic_images(10, "decode")
    rows_data.write_parquet(data, tmp_path / "speed.parquet")
    pixels, labels = baseline.read_parquet(tmp_path / "speed.parquet")
    assert (pixels == measuring.pixels_last(data.images)).all()
    assert labels.tolist() == data.labels.tolist()
    source = PathSource.parse({"path": tmp_path / "speed.parquet"}).load(Silent())
    ours = torch.cat([source.train.images, source.test.images])
    assert sorted(image.tobytes() for image in ours.numpy()) == sorted(image.tobytes() for image in data.images.numpy())


def test_both_sides_isolate_the_lowest_losses() -> None:
    losses = [0.5, 0.1, 0.9, 0.2]
    isolated, rest = baseline.isolate(np.zeros((4, 1)), [0, 1, 2, 3], losses, 0.5)
    assert [label for _, label in isolated] == [1, 3]
    assert [label for _, label in rest] == [0, 2]
    assert torch.nonzero(lowest(torch.tensor(losses), 2)).flatten().tolist() == [1, 3]


def test_both_sides_compute_the_same_losses(bench: Any) -> None:
    model, plain = bench.model("model"), bench.plain_network()
    plain[0].load_state_dict(model.features.state_dict())
    plain[1].load_state_dict(model.head.state_dict())
    data = measuring.first(bench.train, 4)
    plainly = baseline.losses(plain, rows_networks.one_by_one(bench, data), bench.device)
    # Other memory layouts and batches add in another order.
    torch.testing.assert_close(torch.tensor(plainly), bench.engine().losses(model, data), rtol=1e-4, atol=1e-4)


def test_networks_learn_together_what_they_learn_one_after_another(bench: Any) -> None:
    networks = rows_sharing.Networks(bench, 2, size=4)
    steps = [(networks.one_after_another(), networks.together()) for _ in range(2)]
    for apart, together in steps:
        torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3)
    assert steps[0][0][0] != steps[0][0][1]
    assert (steps[0][0] != steps[1][0]).all()


def test_differences_alone_are_fewer_bytes_of_the_same_data_set(tmp_path: Path) -> None:
    source, attack = rows_data.synthetic_source(20), rows_data.attack_of("badnets")
    made = poison_source(source, attack, rows_data.lab(), 0.0)
    rows_data.seal(made, attack, "badnets", tmp_path / "whole")
    rows_data.seal(made, attack, "badnets", tmp_path / "delta", {"fingerprint": source.fingerprint})
    names = [{file.name for file in (tmp_path / kind).iterdir()} for kind in ("whole", "delta")]
    assert names[0] - names[1] == {"train.safetensors", "test.safetensors", "originals.safetensors"}
    assert names[1] - names[0] == {"delta.safetensors"}


def test_a_thousand_runs_make_the_table(tmp_path: Path) -> None:
    rows_data.write_evaluations(tmp_path, 50)
    rows = rows_data.results.read_rows([tmp_path])
    assert len(rows) == 50
    assert len(rows_data.results.over_seeds(rows)) == 5
    assert rows[0]["ba"] == 0.9


def test_growth_says_how_many_times_the_seconds(bench: Any) -> None:
    sizes = (rows_growth.Size(1_000, 32), rows_growth.Size(10_000, 32))
    row = rows_growth.growth_row("growth-open-images", bench, sizes, (lambda: 100.0, lambda: 50.0))
    assert row.ratio == 0.5
    assert row.note.endswith("20.0 times the seconds; linear: 10")


def test_png_files_of_the_baseline_are_those_of_the_chosen_rows(tmp_path: Path) -> None:
    images = [Image.new("RGB", (8, 8)) for _ in range(3)]
    baseline.poison_to_png(images, {2: lambda image: image}, tmp_path, "train")
    assert [file.name for file in tmp_path.iterdir()] == ["train-2.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "must be at least 1"),
        (["--json", "nowhere/rows.json"], "name a file in a folder that exists"),
        (["--device", "abacus"], "unknown device 'abacus'"),
        (["--only", "everything"], "train-wrn-16-1"),
    ],
)
def test_wrong_arguments_end_at_once_with_a_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        speed.parse_arguments(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_group_that_fails_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("no [such] kernel\nand more")

    good = measuring.summarise("row", None, [1.0], "s")
    monkeypatch.setattr(speed, "GROUPS", {"broken": broken, "good": lambda _: iter([good])})
    monkeypatch.setattr(measuring, "measure_ceilings", lambda *_, **__: limits.Ceilings(1e9, None, 1e9))
    assert speed.main(["--json", str(tmp_path / "rows.json")]) == 1
    assert "failed: broken: no [such] kernel\n" in capsys.readouterr().out
    assert [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["row"]
