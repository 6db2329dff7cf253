"""An estimate of a training before it starts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from bdbench.defenses.base import Defense, Task
from bdbench.errors import BdbenchError
from bdbench.progress import duration
from bdbench.training.rehearsal import Rehearsal

SHORT = 5.0
"""Seconds of a phase that is not worth a word of its own."""


def planned_seconds(defense: Defense, task: Task) -> dict[str, float]:
    """Return about how many seconds each phase of a defense will take, by a few steps of each; its work is undone.

    A phase that depends on what an earlier one finds may be missing.
    """
    real = task.engine
    engine = Rehearsal(real.device, real.bf16, real.seed, image_memory=real.image_memory)
    # it has learned nothing, and may say so; what really is wrong shows when it is run
    with suppress(BdbenchError, ArithmeticError, LookupError, RuntimeError, ValueError):
        defense.run(replace(task, engine=engine, suspect=copy.deepcopy(task.suspect)))
    return engine.seconds


def plan_text(method: str, seconds: Mapping[str, float]) -> str:
    """Say in a line how long a training will take, and its longer phases: "cbd: about 4 min (twin 20 s, ...)"."""
    long = [f"{phase} {duration(value)}" for phase, value in seconds.items() if value >= SHORT]
    phases = f" ({', '.join(long)})" if len(long) > 1 else ""
    return f"{method}: about {duration(max(1.0, sum(seconds.values())))}{phases}"
