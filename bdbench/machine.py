"""Facts of this machine that need no torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

LOADS = Path("/proc/loadavg")


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
