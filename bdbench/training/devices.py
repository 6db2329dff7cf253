"""Which device and which precision, and what to say when memory runs out."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bdbench.errors import DeviceError, OptionError, unknown_name
from bdbench.machine import busy_cores, cpu_name, memory_bytes

Precision = Literal["auto", "fp32", "bf16"]


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        OptionError: no such device.
        DeviceError: the device is absent here.
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
        raise OptionError(f"unknown device '{name}'; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or (device.index or 0) >= count:
            raise DeviceError(
                f"device '{name}' was asked for, but {count} CUDA devices are usable; use --device auto or cpu"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device 'mps' was asked for, but this machine has none; use --device auto or cpu")
    return device


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Return values on a device, such as numbers that were drawn on the CPU, without waiting for the device."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


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


SMALL_WORK = 10**8
"""Weights of a network times pixels of an image: below it a second thread costs more than it gives. `convnet` has up to
3 * 10^7 on images of up to 16 pixels a side, `wrn-16-1` on 32 pixels 1.8 * 10^8."""


@contextmanager
def suited_threads(device: torch.device, work: int, say: Callable[[str], object]) -> Iterator[None]:
    """Compute with the threads that the work is worth, and say before it where others keep the cores busy.

    Small work on a CPU takes one thread, unless OMP_NUM_THREADS tells how many; all else as many as torch has. What
    others do plays no part in it, since the last bits of a result depend on the threads.

    Args:
        device: where.
        work: weights of the network times pixels of an image.
        say: told one line.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" and work < SMALL_WORK and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        if crowded := crowding(device):
            say(crowded)
        yield
    finally:
        torch.set_num_threads(before)


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


class Speed(NamedTuple):
    """What a device is, and how fast it multiplies matrices.

    Attributes:
        device: as `--device` takes it.
        name: of the hardware.
        memory_bytes, free_bytes: of a GPU; None of what shares the machine's own.
        bf16: whether `--precision auto` computes in bfloat16 on it.
        tflops: 10^12 operations a second, by precision.
    """

    device: str
    name: str
    memory_bytes: int | None
    free_bytes: int | None
    bf16: bool
    tflops: dict[str, float]


def usable_devices() -> list[str]:
    """Return what `--device` can be here, the fastest first."""
    found = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*found, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def try_device(name: str, seconds: float = 0.5, side: int | None = None) -> Speed:
    """Multiply matrices on a device for some seconds in each precision.

    Args:
        name: from `usable_devices`.
        seconds: for each precision.
        side: of the matrices; by default 8,192 on a GPU, 1,024 on a CPU.

    Raises:
        RuntimeError: the device does not work.
    """
    device = torch.device(name)
    side = side or (1024 if device.type == "cpu" else 8192)
    bf16 = use_bf16("auto", device)
    precisions = {"fp32": torch.float32, **({"bf16": torch.bfloat16} if bf16 else {})}
    tflops = {key: _operations(device, dtype, side, seconds) / 1e12 for key, dtype in precisions.items()}
    if device.type != "cuda":
        return Speed(name, cpu_name() if device.type == "cpu" else device.type, None, None, bf16, tflops)
    free, total = torch.cuda.mem_get_info(device)
    return Speed(name, torch.cuda.get_device_name(device), total, free, bf16, tflops)


def _operations(device: torch.device, dtype: torch.dtype, side: int, seconds: float) -> float:
    """Return how many additions and multiplications a second a product of square matrices does."""
    one = torch.ones(side, side, device=device, dtype=dtype)

    def product() -> None:
        torch.mm(one, one)[0, 0].item()  # waits for the device

    product()
    begun, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - begun) < seconds or not count:
        product()
        count += 1
    return 2.0 * side**3 * count / max(spent, 1e-9)


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
