"""Facts of this machine that need no torch."""

from __future__ import annotations

import os
import sys


def memory_bytes() -> int:
    """Return how much RAM there is; on Windows, which does not say, no limit."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return sys.maxsize
