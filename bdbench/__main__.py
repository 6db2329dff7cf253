"""`bdbench` and `python -m bdbench`."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line with the process's arguments; Ctrl-C ends it quietly, also while it is still importing."""
    try:
        from bdbench.cli.app import run

        run(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    main()
