"""`bdbench` and `python -m bdbench`."""

from __future__ import annotations

import sys

from bdbench.cli.app import run


def main() -> None:
    """Run the command line with the process's arguments."""
    run(sys.argv[1:])


if __name__ == "__main__":
    main()
