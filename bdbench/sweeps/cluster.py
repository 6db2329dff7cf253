"""The cells of a sweep as Ray tasks, on one machine or many; artifacts go to a folder that all of them see."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdbench.errors import DeviceError, OptionError
from bdbench.machine import cores
from bdbench.sweeps import records, worker
from bdbench.sweeps.jobs import Launch, Order, environment, start_worker
from bdbench.sweeps.sweep import usual_jobs

CONNECT_SECONDS = 5.0
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
"""Has a cluster of this machine listen on 127.0.0.1 alone, on every system, and ask for the user's token."""
RETRIES = 3
"""How often Ray starts a cell again whose node or worker is gone."""


@dataclass
class Cluster:
    """A connection to Ray.

    Attributes:
        ray: the package.
        gpus: of the whole cluster, if they may be used; with any, a cell takes one, or its share where more cells are
            asked for.
        jobs: cells that fit at once.
        threads: CPUs of a cell.
    """

    ray: Any
    gpus: int
    jobs: int
    threads: int

    def launch(self, folder: Path) -> Launch:
        """Return what hands a cell to Ray, which starts it where there is room."""
        made = self.ray.remote(make).options(
            num_cpus=self.threads, num_gpus=min(1.0, self.gpus / self.jobs), max_retries=RETRIES, retry_exceptions=False
        )

        def launch(order: Order, _: int) -> RayJob:
            task = made.remote(order.text, order.name, str(folder), str(Path.cwd()), self.threads)
            return RayJob(self.ray, task, records.sweep_file(folder, "logs", f"{order.name}.log"))

        return launch

    def leave(self) -> None:
        """Disconnect; a cluster that was started here ends."""
        self.ray.shutdown()


def connect(address: str | None, jobs: int | None, *, use_gpus: bool = True) -> Cluster:
    """Connect to a Ray cluster, or start one on this machine.

    Args:
        address: HOST:PORT, ray://HOST:PORT, or None for this machine.
        jobs: cells at once; default on this machine: see `bdbench.sweeps.sweep.usual_jobs`, on a cluster: one a
            GPU, else one a CPU.
        use_gpus: cells may ask for GPUs; without them a cluster's are left to others.

    Raises:
        DeviceError: Ray is not installed.
        OptionError: the address has another form.
        DeviceError: nothing answers at the address.
    """
    if address is None:  # read when Ray is imported
        os.environ.update(ALONE)
    try:
        import ray

        found: Any = ray
    except ImportError as error:
        raise DeviceError("--engine ray needs Ray; install it with: pip install 'bdbench[ray]'") from error
    if address is not None:
        _knock(address)
    try:
        ray.init(
            address=address or "local", num_cpus=None if address else max(cores(), jobs or 1),
            include_dashboard=None if address else False, configure_logging=False, log_to_driver=False,
        )  # fmt: skip
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, OSError) as error:
        raise DeviceError(f"cannot use the Ray cluster at {address or 'this machine'}: {error}") from error
    known = found.cluster_resources()
    gpus, cpus = int(known.get("GPU", 0)) if use_gpus else 0, max(1, int(known.get("CPU", 1)))
    if address is None:
        jobs = jobs or usual_jobs(gpus)
        return Cluster(found, gpus, jobs, max(1, cpus // jobs))
    return Cluster(found, gpus, jobs or gpus or cpus, max(1, cpus // gpus) if gpus else 1)


def _knock(address: str) -> None:
    """See whether anything answers, in seconds: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise OptionError(f"address '{address}' must be HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise DeviceError(
            f"nothing answers at {address} ({error.strerror or error}); start a cluster there with `ray start "
            "--head`, or leave --address out"
        ) from error


def make(text: str, name: str, folder: str, place: str, threads: int) -> int:
    """Make one cell in a process of its own on whatever node this runs; return the worker's exit code."""
    with records.sweep_file(Path(folder), "logs", f"{name}.log").open("a", encoding="utf-8") as log:
        settings = {**environment(threads), **os.environ, "OMP_NUM_THREADS": str(threads)}
        process = start_worker(text, stdout=log, stderr=log, cwd=place, env=settings)
        try:
            return process.wait()
        except BaseException:  # cancelled
            process.send_signal(signal.SIGINT)
            process.wait()
            raise


@dataclass
class RayJob:
    """A cell that Ray makes: see `bdbench.sweeps.jobs.Handle`."""

    ray: Any
    task: Any
    log: Path

    def poll(self) -> int | None:
        """Return the exit code of the worker, or None; where Ray gave up, that of an interrupted one, and log why."""
        ready, _ = self.ray.wait([self.task], timeout=0)
        if not ready:
            return None
        try:
            return int(self.ray.get(self.task))
        except self.ray.exceptions.RayError as error:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(f"{error}\n")
            return worker.INTERRUPTED

    def stop(self) -> None:
        """Ask it to end."""
        self.ray.cancel(self.task)

    def wait(self, seconds: float) -> None:
        """Wait for its end, and end it by force when the time is up."""
        ready, _ = self.ray.wait([self.task], timeout=seconds)
        if not ready:
            self.ray.cancel(self.task, force=True)
