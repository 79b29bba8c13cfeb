"""Entry point for `ray job submit --working-dir . -- python jobs/run_grid.py GRID.yaml [--set field=value ..]`."""

from __future__ import annotations

import sys

from bwlm.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["grid", "run"]
    main()
