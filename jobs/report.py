"""Report of grids or runs as a job, with the arguments of `bwlm analyze report`; docs/cluster.md has the command."""

from __future__ import annotations

import sys

from bwlm.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["analyze", "report"]
    main()
