"""Facts of this machine that need no torch."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

LOADS = Path("/proc/loadavg")
MEMORY = Path("/proc/meminfo")
CPUS = Path("/proc/cpuinfo")


def busy_cores() -> int:
    """Return how many other processes and threads want a core at this moment; 0 where the system does not say."""
    try:
        return max(0, int(LOADS.read_text().split()[3].partition("/")[0]) - 1)
    except (OSError, IndexError, ValueError):
        return 0


def cores() -> int:
    """Return how many cores this process may use: those that it is bound to, where the system says so, else all."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows bind nothing
        return os.cpu_count() or 1


def memory_bytes() -> int:
    """Return how much RAM there is; on Windows, which does not say, no limit."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return sys.maxsize


def free_memory_bytes() -> int | None:
    """Return how much RAM is free for new work; None where the system does not say."""
    try:
        fields = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


def free_disk_bytes(folder: Path) -> int | None:
    """Return the free space on the disk of a folder, which need not exist yet; None where the system does not say."""
    for place in (folder, *folder.absolute().parents):
        if place.is_dir():
            try:
                return shutil.disk_usage(place).free
            except OSError:
                return None
    return None


def is_writable(folder: Path) -> bool:
    """Say whether files can be written into a folder, which need not exist yet."""
    nearest = next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)
    return nearest.is_dir() and os.access(nearest, os.W_OK)


def cpu_name() -> str:
    """Return the name of the processor, or of its kind where the system does not say more."""
    try:
        lines = CPUS.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), "") or platform.processor() or platform.machine()
