"""Training of a run or a chain as a job of a Ray cluster, with the arguments of `bwlm train` (docs/cluster.md)."""

from __future__ import annotations

import sys

from bwlm.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()
