"""What a machine can do and what work costs: matrix products, copies, FLOPs, and the share of the limit reached."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

REPEATS = 5
PATIENCE = 3.0
"""Seconds after which a ceiling is not measured again."""


class Limit(NamedTuple):
    """What a row's work costs, and how much of that this machine does in a second.

    Attributes:
        cost: FLOPs or bytes: of an image, or of all the work of a row in seconds.
        ceiling: FLOPs or bytes a second.
    """

    cost: float
    ceiling: float

    def share(self, value: float, unit: str) -> float:
        """Return the share of the ceiling that is reached, in [0, 1].

        Args:
            value: of the row, as it is printed.
            unit: "s", or anything a second.
        """
        per_second = 1 / value if unit == "s" else value
        return per_second * self.cost / self.ceiling


class Ceilings(NamedTuple):
    """What this machine does in a second, on one device and with the threads that torch has now.

    Attributes:
        fp32, bf16: FLOPs of products of two square matrices; bf16 is None where it is not used.
        copy: bytes, those read and those written both counted.
    """

    fp32: float
    bf16: float | None
    copy: float


def measure_ceilings(device: torch.device, *, bf16: bool) -> Ceilings:
    """Measure the ceilings: the best of a few repeats."""
    return Ceilings(
        matrix_products(device, torch.float32),
        matrix_products(device, torch.bfloat16) if bf16 else None,
        copy_bandwidth(device),
    )


def matrix_products(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs a second of a product of matrices of side 2,048, on a GPU 8,192."""
    side = 8192 if device.type == "cuda" else 2048
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / best_seconds(device, lambda: one @ other)


def copy_bandwidth(device: torch.device, megabytes: int = 256) -> float:
    """Return the bytes a second of a copy, bytes read and bytes written both counted."""
    one = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=device)
    other = torch.empty_like(one)
    return 2 * len(one) / best_seconds(device, lambda: other.copy_(one))


def best_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Return the least time of some repeats, after one that does not count."""
    work()
    wait_for(device)
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < PATIENCE:
        begun = time.perf_counter()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(work: Callable[[], object]) -> int:
    """Do the work once and return its FLOPs, forward and backward: two for each product of a matrix or convolution."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def machine_facts(device: torch.device, precision: str, ceilings: Ceilings) -> dict[str, str | float]:
    """Return what the figures depend on."""
    on_cuda = device.type == "cuda"
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "precision": precision,
        "fp32_gflops": round(ceilings.fp32 / 1e9, 1),
        "bf16_gflops": "not used" if ceilings.bf16 is None else round(ceilings.bf16 / 1e9, 1),
        "copy_gb_per_s": round(ceilings.copy / 1e9, 1),
    }


def cpu_name() -> str:
    """Return the processor's name, as well as the system knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
