"""No attack: the row that shows what a defense does where there is nothing to find."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from bdbench.options import Options


class NoAttack(Options):
    """Nothing is poisoned and nothing is triggered; the trusted images are reserved as for an attack.

    The row "no poison" shows what a defense costs where there is nothing to find: its BA, and the clean samples that it
    sets aside. ASR has no meaning there, and is blank. An attack with `--rate 0` also poisons nothing, but triggers
    the test images: it shows what the trigger itself does to a model that never saw it.
    """

    version: ClassVar[int] = 1

    def files(self) -> tuple[Path, ...]:
        """Return nothing: no file has a part in it."""
        return ()
