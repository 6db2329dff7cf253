"""Rows of several trainings at once on one machine or one GPU, and of a compiled training."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from measuring import BATCH, Bench, Row, Rows, compare, first, per_second, summarise, take_turns

from bdbench.devices import resolve_device
from bdbench.engine import Recipe, mean_cross_entropy

GPU_JOBS = (2, 4, 8)


def sharing_rows(bench: Bench) -> Iterator[Row]:
    """Trainings of WRN-16-1 in processes of their own, all at once, beside one with all threads."""
    cores = os.cpu_count() or 1
    numbers = GPU_JOBS if bench.device.type == "cuda" else tuple(sorted({2, cores} - {1}))
    for jobs in numbers:
        alone, shared = Jobs(bench, 1, cores), Jobs(bench, jobs, max(1, cores // jobs))
        try:
            theirs, ours = take_turns((alone.rate, shared.rate), bench.sizes.rounds)
        finally:
            alone.end()
            shared.end()
        note = f"together, of {jobs} processes with {shared.threads} threads; baseline: one with {alone.threads}"
        yield summarise(f"jobs-{jobs}", theirs, ours, "images/s", note=note)


class Jobs:
    """Processes that train an epoch whenever they are told; they start before the clock does."""

    def __init__(self, bench: Bench, jobs: int, threads: int) -> None:
        self.images, self.threads = bench.sizes.train, threads
        command = [sys.executable, __file__, str(bench.device), str(int(bench.bf16)), str(self.images), str(threads)]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(jobs)
        ]
        for process in self.processes:
            answer(process)

    def rate(self) -> float:
        """Train an epoch in each, and return the images/s of all together."""
        begun = time.perf_counter()
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in self.processes:
            answer(process)
        return len(self.processes) * self.images / (time.perf_counter() - begun)

    def end(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.wait()


def answer(process: subprocess.Popen[str]) -> None:
    """Wait for a line of a process."""
    assert process.stdout is not None
    if not process.stdout.readline():
        raise RuntimeError("a training process ended by itself")


def compiled_rows(bench: Bench) -> Iterator[Row]:
    """An epoch of WRN-16-1, compiled by torch, beside one that is not; compiling itself is not counted."""
    data = first(bench.train, bench.sizes.train)
    recipe = Recipe(epochs=1, batch_size=BATCH, augment="crop,flip")
    plain, compiled = bench.model("plain"), bench.model("compiled")
    turns = (
        per_second(
            len(data), lambda: bench.engine().fit(plain, data, mean_cross_entropy, recipe, phase="train")
        ),
        per_second(
            len(data),
            lambda: replace(bench.engine(), compile=True).fit(
                compiled, data, mean_cross_entropy, recipe, phase="train"
            ),
        ),
    )  # fmt: skip
    yield compare("train-compiled", turns, "images/s", bench, note="baseline: not compiled")


def serve(given: Sequence[str]) -> None:
    """Train an epoch for every line of standard input, and answer each with a line."""
    from measuring import FULL
    from rows_networks import train_epoch

    device, bf16, images, threads = given
    torch.set_num_threads(int(threads))
    bench = Bench(
        replace(FULL, train=int(images), data_path=0, epoch=0, forward=0), resolve_device(device), bool(int(bf16))
    )
    data, model = first(bench.train, int(images)), bench.model("model")
    train_epoch(bench, model, first(data, 2 * BATCH))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        train_epoch(bench, model, data)
        bench.wait()
        sys.stdout.write("done\n")
        sys.stdout.flush()


ROWS: dict[str, Rows] = {"jobs": sharing_rows, "train-compiled": compiled_rows}

if __name__ == "__main__":
    serve(sys.argv[1:])
