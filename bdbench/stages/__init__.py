"""The stages: images -> dataset artifact -> model artifact -> evaluation artifact. The Python API.

    from bdbench import stages

    data = stages.poison("digits", "badnets", options={"rate": 0.1}, seed=0)
    plain = stages.defend(data.path, "none")
    model = stages.defend(data.path, "cbd", preset="tiny", seed=1)
    result = stages.evaluate(model.path)
    print(result.metrics)

Each stage returns the artifact it made, or the equal one that was there. Options are those of the command line, with
underscores. A defense gets the visible training images and nothing that tells which are poisoned.
"""

from bdbench.stages.datasets import poison, take
from bdbench.stages.judging import evaluate, latest, self_test
from bdbench.stages.models import defend, estimate_seconds
from bdbench.stages.scanning import evaluate_scan, scan

__all__ = ["defend", "estimate_seconds", "evaluate", "evaluate_scan", "latest", "poison", "scan", "self_test", "take"]
