"""Plain training: the row that every defence is read against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from bdbench.defenses.base import Defended, Defense, Task, mean_cross_entropy


class NoDefense(Defense):
    """Trains on the poisoned set as it is, with mean cross entropy.

    The `paper` budget is the one that CBD's authors give their clean model: 100 epochs, learning rate divided by 10
    after 20 and 70 of them.
    """

    paper: ClassVar[str] = "none"
    threat: ClassVar[str] = "the defender suspects nothing"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"epochs": 100, "schedule": "step"},
        "fast": {"epochs": 12},
        "tiny": {"epochs": 20, "batch_size": 32, "lr": 0.05},
    }

    def run(self, task: Task) -> Defended:
        """Train one model."""
        model = task.engine.fit(task.new_model("model"), task.train, mean_cross_entropy, task.recipe, phase="train")
        return Defended(model)
