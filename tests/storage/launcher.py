"""A launch without cells, in a process of its own: tells what it has used, and ends when it is asked to."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from bwlm.record.launches import Usage, recorded_launch
from bwlm.storage.opened import open_storage

CPU_SECONDS = 7200.0


def main(address: str) -> None:
    home: Path = open_storage(address) / "grids" / "g"
    with recorded_launch(home) as launch:
        used = Usage(began=time.time(), seconds=60, worker_seconds=3600, cpu_seconds=CPU_SECONDS)
        launch.write(used)
        print(launch.name, flush=True)
        while (by := launch.asked_to_stop()) is None:
            time.sleep(0.2)
            launch.exchange()
        used.end = f"stopped: {by}"
        launch.write(used)


if __name__ == "__main__":
    main(*sys.argv[1:])
