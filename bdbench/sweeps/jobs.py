"""A cell that is being made, and how one is started on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from bdbench.machine import cores
from bdbench.sweeps import records

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Spares a training on a CPU a twentieth of its time or more; a process can only be born with it."""


class Order(NamedTuple):
    """A cell with all that its worker needs; `makes` are the folders that it leaves, the cell's own model first."""

    name: str
    makes: tuple[str, ...]
    text: str


class Handle(Protocol):
    """A cell that is being made."""

    def poll(self) -> int | None:
        """Return the exit code of `bdbench.sweeps.worker`, or None while it works."""

    def stop(self) -> None:
        """Ask it to end; it keeps its checkpoints."""

    def wait(self, seconds: float) -> None:
        """Wait for its end, and end it by force when the time is up."""


Launch = Callable[[Order, int], Handle]
"""From an order and the number of the job that is free to the cell being made."""


@dataclass
class LocalJob:
    """A cell in a process of this machine."""

    process: subprocess.Popen[str]

    def poll(self) -> int | None:
        """See `Handle`."""
        return self.process.poll()

    def stop(self) -> None:
        """See `Handle`."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def wait(self, seconds: float) -> None:
        """See `Handle`."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_worker(order: str, **settings: Any) -> subprocess.Popen[str]:  # noqa: ANN401 - those of Popen
    """Start a worker and hand it its order; the only place where bdbench starts Python.

    A module of the current folder, whatever it is called, is not imported (-P).
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "bdbench.sweeps.worker"], stdin=subprocess.PIPE, text=True, **settings
    )
    assert process.stdin is not None
    process.stdin.write(order + "\n")
    process.stdin.flush()
    return process


def environment(threads: int) -> dict[str, str]:
    """Return what a worker is started with that computes, and compiles, with so many threads."""
    return {**HUGE_PAGES, "OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}


def local(folder: Path, jobs: int, gpus: int) -> Launch:
    """Return what starts a cell here: cores are shared among the jobs, a GPU belongs to one of them."""
    threads = max(1, cores() // jobs)

    def launch(order: Order, job: int) -> LocalJob:
        own = {"CUDA_VISIBLE_DEVICES": _visible(job % gpus)} if gpus else {}
        with records.sweep_file(folder, "logs", f"{order.name}.log").open("a", encoding="utf-8") as log:
            settings = {**environment(threads), **os.environ, **own}
            process = start_worker(order.text, stdout=log, stderr=log, env=settings, start_new_session=True)
        return LocalJob(process)

    return launch


def _visible(number: int) -> str:
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return given[number] if number < len(given) and given[number] else str(number)
