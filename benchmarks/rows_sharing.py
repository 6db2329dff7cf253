"""Rows of several trainings at once on one machine or one GPU, and of a compiled training."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from measuring import (
    BATCH,
    CLASSES,
    SEED,
    SHAPE,
    Bench,
    Row,
    Rows,
    Turn,
    compare,
    first,
    per_second,
    summarise,
    take_turns,
)
from torch import Tensor, nn

from bdbench.models.classifier import Classifier
from bdbench.seeds import generator
from bdbench.training.devices import resolve_device
from bdbench.training.engine import Engine
from bdbench.training.loop import mean_cross_entropy
from bdbench.training.recipe import Recipe

SEVERAL = (2, 4, 8)
"""Trainings at once on a GPU."""
Named = dict[str, Tensor]


def sharing_rows(bench: Bench) -> Iterator[Row]:
    """Trainings of WRN-16-1 in processes of their own, all at once, beside one with all threads."""
    cores = os.cpu_count() or 1
    numbers = SEVERAL if bench.device.type == "cuda" else tuple(sorted({2, cores} - {1}))
    for jobs in numbers:
        alone, shared = Jobs(bench, 1, cores), Jobs(bench, jobs, max(1, cores // jobs))
        try:
            theirs, ours = take_turns((alone.rate, shared.rate), bench.sizes.rounds, bench.until)
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


class Networks:
    """Several WRN-16-1 of different first weights, each with batches of its own, that learn at the same time.

    Either one after another, in the memory layout of bdbench's engine, or with stacked parameters, so that one step
    trains all: what a GPU that waits for launches may do faster. Stacked parameters allow no layout but torch's own.
    """

    def __init__(self, bench: Bench, number: int, size: int = BATCH) -> None:
        self.bench = bench
        self.apart = [Bare(bench.model(f"seed {index}")).to(bench.device).train() for index in range(number)]
        rng = generator(SEED, "networks")
        self.images = torch.randn(number, size, *SHAPE, generator=rng).to(bench.device)
        self.labels = torch.randint(CLASSES, (number, size), generator=rng).to(bench.device)
        weights, self.statistics = torch.func.stack_module_state(list(self.apart))
        self.weights: Named = {name: nn.Parameter(weight) for name, weight in weights.items()}
        self.pattern = copy.deepcopy(self.apart[0])
        self.optimizer = Recipe().optimizer(nn.ParameterList(self.weights.values()))
        self.batches = []
        for network, images, labels in zip(self.apart, self.images, self.labels, strict=True):
            network.to(memory_format=torch.channels_last)
            laid_out = images.contiguous(memory_format=torch.channels_last)
            self.batches.append((network, Recipe().optimizer(network), laid_out, labels))

    def one_after_another(self) -> Tensor:
        """Take a step with each; return the losses (number,)."""
        losses = []
        for network, optimizer, images, labels in self.batches:
            optimizer.zero_grad(set_to_none=True)
            with self.bench.engine().autocast():
                loss = F.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def together(self) -> Tensor:
        """Take the same steps with stacked parameters; return the losses (number,)."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.bench.engine().autocast():
            losses = torch.func.vmap(self._loss)(self.weights, self.statistics, self.images, self.labels)
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach()

    def _loss(self, weights: Named, statistics: Named, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(self.pattern, (weights, statistics), (images,)), labels)


class Bare(nn.Module):
    """A classifier for normalised images, which leaves their layout alone."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.features, self.head = model.features, model.head

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K) float32."""
        embedding = self.features(images).float()
        with torch.autocast(embedding.device.type, enabled=False):
            return cast("Tensor", self.head(embedding))


def stacked_rows(bench: Bench) -> Iterator[Row]:
    """Training steps of several networks in one process: with stacked parameters, beside one after another."""
    for number in SEVERAL if bench.device.type == "cuda" else (2,):
        networks, steps = Networks(bench, number), max(1, bench.sizes.train // (number * BATCH))
        turns = (
            per_second(steps * number * BATCH, partial(repeat, networks.one_after_another, steps, bench)),
            per_second(steps * number * BATCH, partial(repeat, networks.together, steps, bench)),
        )
        note = f"{number} seeds in one process, steps alone; baseline: one after another"
        yield compare(f"stacked-{number}", turns, "images/s", bench, note=note)


def repeat(step: Callable[[], object], times: int, bench: Bench) -> None:
    """Take steps, and wait for the device."""
    for _ in range(times):
        step()
    bench.wait()


def compiled_rows(bench: Bench) -> Iterator[Row]:
    """An epoch of WRN-16-1, compiled by torch, beside one that is not; compiling itself is not counted.

    On a GPU also compiled so that its kernels are captured and replayed, which bdbench does not offer yet.
    """
    data = first(bench.train, bench.sizes.train)
    recipe = Recipe(epochs=1, batch_size=BATCH, augment="crop,flip")
    engine = replace(bench.engine(), compile=True)

    def epoch(model: Classifier, by: Engine) -> Turn:
        return per_second(len(data), lambda: by.fit(model, data, mean_cross_entropy, recipe, phase="train"))

    compiled = epoch(bench.model("compiled"), engine)
    row = compare("train-compiled", (epoch(bench.model("plain"), bench.engine()), compiled), "images/s", bench)
    yield row._replace(note="torch could not compile it" if engine.cannot_compile else "baseline: not compiled")
    if bench.device.type == "cuda":
        captured = bench.model("captured")
        captured.features.compile(mode="reduce-overhead", dynamic=False)
        row = compare("train-captured", (compiled, epoch(captured, bench.engine())), "images/s", bench)
        skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]  # noqa: SLF001 - torch says it nowhere else
        yield row._replace(note=f"baseline: compiled alone; {skipped} graphs that could not be captured")


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


ROWS: dict[str, Rows] = {"jobs": sharing_rows, "stacked": stacked_rows, "train-compiled": compiled_rows}

if __name__ == "__main__":
    serve(sys.argv[1:])
