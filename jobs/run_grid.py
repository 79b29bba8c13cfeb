"""Runs a grid as a job of a Ray cluster: docs/cluster.md has the command. Takes what `bwlm grid run` takes."""

from __future__ import annotations

import sys

from bwlm.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["grid", "run"]
    main()
