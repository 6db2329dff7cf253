"""`bdbench` and `python -m bdbench`."""

from __future__ import annotations

import io
import os
import signal
import sys


def main() -> None:
    """Run the command line with the process's arguments; Ctrl-C ends it quietly, also while it is still importing."""
    _open_standard_streams()
    try:
        from bdbench.cli.app import run

        run(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(128 + signal.SIGINT) from None


def _open_standard_streams() -> None:
    """Open what was closed at the start: else the next file would get its number, and what is printed with it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
