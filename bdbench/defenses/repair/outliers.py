"""What methods share that prune the channels that stand out from their layer, without any training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import Field
from torch import Tensor

from bdbench.defenses.base import Defended, Task
from bdbench.defenses.parts.channels import Spread, farthest, outlying
from bdbench.defenses.repair.base import Repair, copied
from bdbench.models.classifier import Classifier
from bdbench.wording import counted

Cut = Callable[[Classifier, dict[str, Tensor]], dict[str, int]]


class OutlierPruning(Repair):
    """Base of those that give every channel of a norm a value, and prune the channels whose value stands out.

    Nothing is chosen: the limit is fixed.
    """

    deviations: float = Field(
        3.0, ge=0, description="How far out of its layer a channel must lie to be pruned (u in the paper)."
    )
    spread: Spread = Field(
        "std", description="Which deviations: standard, from the mean, or median absolute, from the median."
    )

    def standing_out(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return which channels stand out, (C,) bool by layer, of their values (C,): higher is worse."""
        return {name: outlying(own, self.deviations, self.spread) for name, own in values.items()}

    def without(self, task: Task, suspect: Classifier, channels: dict[str, Tensor], cut: Cut) -> Defended:
        """Return a copy of the suspect without some channels; where there are none, the suspect itself.

        Args:
            task: whose reader is told.
            suspect: stays as it is.
            channels: (C,) bool by layer.
            cut: takes them from a network, in place, and says how many of each layer.
        """
        total, gone = sum(map(len, channels.values())), sum(int(own.sum()) for own in channels.values())
        if gone:
            model = copied(suspect).eval()
            pruned = cut(model, channels)
            said = f"{gone} of {counted(total, 'channel')} pruned"
        else:
            model, pruned = suspect, {}
            said = self._nothing(max(map(len, channels.values()), default=0))
        task.engine.progress.note(said)
        return Defended(model, findings={"said": said, "unchanged": not gone, "channels": total, "pruned": pruned})

    def _nothing(self, widest: int) -> str:
        """Say why no channel was pruned, in a network whose widest layer has so many."""
        if self.spread == "std" and farthest(widest) <= self.deviations:
            return (
                f"of {counted(widest, 'channel')}, the most that a layer has, none can lie more than "
                f"{farthest(widest):.2f} standard deviations out (limit {self.deviations:g}); model unchanged; lower "
                "--deviations, or take --spread mad"
            )
        return f"no channel lies more than {self.deviations:g} deviations out in its layer; model unchanged"
