"""Rows of growth: what happens to each stage with ten times the images, and with four times the pixels."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from measuring import SEED, SIDE, Bench, Row, Rows, Turn, per_second, summarise, take_turns
from rows_data import attack_of, lab, poisoning, seal, synthetic_source
from rows_networks import train_epoch

from bdbench.artifacts.dataset import DatasetArtifact
from bdbench.protocol.networks import fresh_model
from bdbench.protocol.poisoning import poison_source


class Size(NamedTuple):
    """How many training images, and their side in pixels."""

    images: int
    side: int

    def __str__(self) -> str:
        return f"{self.images:,} images of {self.side}x{self.side}"


def growth_rows(bench: Bench) -> Iterator[Row]:
    """Images a second of every stage at a small size and at a larger one: equal where time grows as their number."""
    few, many = bench.sizes.growth
    small = Size(few, SIDE)
    larger = {"images": Size(many, SIDE), "side": Size(few, 2 * SIDE)}
    with tempfile.TemporaryDirectory() as folder:
        turns = {size: stage_turns(bench, size, Path(folder) / str(size)) for size in (small, *larger.values())}
        for stage in turns[small]:
            for name, size in larger.items():
                pair = turns[small][stage], turns[size][stage]
                yield growth_row(f"growth-{stage}-{name}", bench, (small, size), pair)


def stage_turns(bench: Bench, size: Size, path: Path) -> dict[str, Turn]:
    """Return a turn for each stage, in images a second, on a dataset of this size that is written at `path`."""
    source, attack = synthetic_source(*size), attack_of("badnets")
    seal(poison_source(source, attack, lab(), 0.0), attack, "badnets", path)
    data = DatasetArtifact.open(path).train
    model, engine = fresh_model("wrn-16-1", data, SEED, "model"), bench.engine()
    return {
        "poison": poisoning(attack, "badnets", source),
        "open": per_second(size.images, lambda: DatasetArtifact.open(path).train),
        "train": per_second(size.images, lambda: train_epoch(bench, model, data)),
        "evaluate": per_second(size.images, lambda: engine.logits(model, data.images)),
    }


def growth_row(name: str, bench: Bench, sizes: tuple[Size, Size], turns: tuple[Turn, Turn]) -> Row:
    """Measure a stage at two sizes, the small one first; what runs a network is long and measured once."""
    small, large = sizes
    if "train" in name or "evaluate" in name:
        turns[0]()
        before, after = [turns[0]()], [turns[1]()]
    else:
        before, after = take_turns(turns, bench.sizes.rounds, bench.until)
    grown = large.images / small.images * statistics.median(before) / statistics.median(after)
    linear = large.images * large.side**2 / (small.images * small.side**2)
    note = f"{small} against {large}: {grown:.1f} times the seconds; linear: {linear:g}"
    return summarise(name, before, after, "images/s", note=note)


ROWS: dict[str, Rows] = {"growth": growth_rows}
