"""Evaluation of runs as a job of a Ray cluster, with the arguments of `bwlm eval`; docs/cluster.md has the command."""

from __future__ import annotations

import sys

from bwlm.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["eval"]
    main()
