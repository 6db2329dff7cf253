"""Which device and which precision, and what to say when memory runs out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from bdbench.errors import DeviceError, unknown_name
from bdbench.machine import busy_cores, memory_bytes

Precision = Literal["auto", "fp32", "bf16"]


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        DeviceError: the device is unknown or absent here.
    """
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"unknown device '{name}'; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise DeviceError(
                f"device '{name}' was asked for, but {count} CUDA devices are usable; use --device auto or cpu"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device 'mps' was asked for, but this machine has none; use --device auto or cpu")
    return device


def use_bf16(precision: Precision, device: torch.device) -> bool:
    """Say whether to compute in bfloat16: as asked, or, for ``auto``, where the hardware really accelerates it.

    Raises:
        OptionError: no such precision.
    """
    if precision not in get_args(Precision):
        raise unknown_name("precision", precision, get_args(Precision))
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and _cpu_accelerates_bf16()


def _cpu_accelerates_bf16() -> bool:
    """Say whether this CPU has AVX-512-BF16 or AMX-BF16 (torch offers only private names for it)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def crowding(device: torch.device) -> str:
    """Say that threads will wait for each other where other processes keep half of the cores or more, else ""."""
    threads, cores, busy = torch.get_num_threads(), os.cpu_count() or 1, busy_cores()
    if device.type != "cpu" or threads == 1 or 2 * busy < cores:
        return ""
    free = max(1, cores - busy)
    return (
        f"others keep {busy} of the {cores} cores of this machine busy: {threads} threads that wait for each other can "
        f"be ten times slower than one; set OMP_NUM_THREADS={free}"
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Return the largest memory that this process has held so far, in bytes: of the GPU if it works on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has no such account
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_for_images(device: torch.device) -> int:
    """Return how many bytes of training images may lie on a device: half of what a GPU has free, half of all RAM."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return memory_bytes() // 2


OUT_OF_MEMORY = (
    "can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip
"""What torch says of it in errors of no class of their own."""


@contextmanager
def out_of_memory_advice(setting: str) -> Iterator[None]:
    """Turn running out of memory inside the block into an error that says which setting to lower.

    Raises:
        DeviceError: in place of torch's own out-of-memory errors.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise DeviceError(f"out of memory; lower {setting}") from error
    except RuntimeError as error:
        if any(text in str(error) for text in OUT_OF_MEMORY):
            raise DeviceError(f"out of memory; lower {setting}") from error
        raise
