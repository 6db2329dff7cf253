"""Progress where no terminal draws it: a line now and then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from toys import toy_data, toy_engine, toy_model, toy_recipe

from bdbench.cli import live, sweep
from bdbench.progress import duration
from bdbench.sweeps.sweep import State
from bdbench.training.loop import mean_cross_entropy


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    return now


def test_a_line_says_the_share_and_the_time_left(clock: list[float]) -> None:
    said: list[str] = []
    lines = live.LineProgress(said.append, "cbd")
    lines.start("clean", 1000)
    lines.advance(0)
    for second in range(1, 51):
        clock[0] = second
        lines.advance(10)
    lines.finish()
    assert said == ["cbd: clean 20 %, about 80 s left", "cbd: clean 40 %, about 60 s left"]


def test_what_a_resumed_phase_had_done_tells_nothing_of_the_speed(clock: list[float]) -> None:
    said: list[str] = []
    lines = live.LineProgress(said.append)
    lines.start("clean", 1000)
    lines.advance(800)
    clock[0] = 20
    lines.advance(100)
    assert said == ["clean 90 %, about 20 s left"]


def test_short_phases_one_after_another_give_a_line_too(clock: list[float]) -> None:
    said: list[str] = []
    lines = live.LineProgress(said.append)
    for index in range(6):
        lines.start(f"phase {index}", 2)
        lines.advance(1)
        clock[0] += 5
        lines.advance(1)
        lines.finish()
    assert said == ["phase 3 100 %, about 0 s left"]


def test_a_training_says_how_far_it_is(clock: list[float]) -> None:
    said: list[str] = []
    data = toy_data(64)

    def loss(model: Any, batch: Any) -> Any:
        clock[0] += 7
        return mean_cross_entropy(model, batch)

    engine = toy_engine(progress=live.LineProgress(said.append, "none"))
    engine.fit(toy_model(data), data, loss, toy_recipe(), phase="train")
    assert said == ["none: train 37 %, about 35 s left", "none: train 75 %, about 14 s left"]


def test_a_sweep_says_in_a_line_what_it_is_doing() -> None:
    running = State("running", {"phase": "clean", "done": 41, "total": 100})
    grid = SimpleNamespace(name=lambda cell: cell)
    run: Any = SimpleNamespace(
        states={"a": State("waiting", {}), "b": running, "c": State("running", {})}, jobs=1, paused="",
        sweep=SimpleNamespace(grid=grid),
    )  # fmt: skip
    assert sweep.line(run) == "0 of 3 cells done; b: clean 41 %; c: starting"


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (70, "70 s"), (245, "4 min 05 s"), (7500, "2 h 05 min")])
def test_a_time_is_said_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said
