"""Environment variables that Ray, its workers and their allocators read when they start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from bwlm.errors import UserError

_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # so that the dashboard's page `Train` shows cells of several workers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # a cell that ASHA stops first saves and merges its records: past this time Tune would drop its worker's next cell
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "3600",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Tune's own loggers and its experiment state would go to a scratch folder that nothing reads
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    # Ray's log monitor lists its folder twice a second instead of ten times
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    # glibc gives freed tensors back to the kernel at once and faults them in again: 1.4x on small CPU models.
    # Read when a process starts, so it reaches the workers that Ray starts from here.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    # a worker trains each cell in a new thread: with a heap for each thread, the memory of every thread would be kept
    "MALLOC_ARENA_MAX": "1",
    # large pages for the memory that is kept, if the kernel gives them on request: fewer TLB misses
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # a thread of torch that waits for another one sleeps: beside other work on its cores it would spin, and a pass of a
    # small model would take ten times as long
    "OMP_WAIT_POLICY": "passive",
    # segments that can grow fragment a GPU's memory less; as in nanochat
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}


def prepare_environment() -> None:
    """Set the variables that are not set yet. Call it first in a process that starts Ray, and in Ray's workers."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    # torch.compile's default cache lies in /tmp; all cells share this one, and it outlives a reboot
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "bwlm" / "inductor"))


def check_ray_settings() -> None:
    """Raise `UserError` that names the variables if Ray cannot even be imported with its settings.

    Ray's own settings are `RAY_` and a lower-case name. A value that Ray cannot read ends the process that imports
    Ray, so a child process tries the import first. If no such variable is set, nothing is tried.
    """
    settings = sorted(name for name in os.environ if re.match(r"RAY_[a-z]", name))
    if not settings:
        return
    done = subprocess.run([sys.executable, "-c", "import ray"], capture_output=True, check=False)
    if done.returncode:
        raise UserError(
            f"{', '.join(settings)}: Ray cannot be imported with these settings in the environment: unset them, or "
            "give them values of the type that Ray wants"
        )
