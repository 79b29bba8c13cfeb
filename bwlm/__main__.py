"""Entry point of the command `bwlm`, and of `python -m bwlm`."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; on Windows, which has no POSIX file locks, say so in a line and exit with 2."""
    if sys.platform == "win32":
        print(f"bwlm: runs on Linux, and this is {sys.platform}: on Windows use WSL", file=sys.stderr)
        sys.exit(2)
    from bwlm.cli import main as run

    run()


if __name__ == "__main__":
    main()
