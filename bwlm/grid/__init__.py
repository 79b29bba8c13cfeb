"""The grid: its specification, and the only package that drives Ray Train and Ray Tune.

Sets what Ray, its workers and their allocators read from the environment when they start: before Ray is imported.
"""

import os
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# a cell that ASHA stops saves and merges its records: past this time Tune would drop the next one that takes its worker
os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "3600")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
# Tune's own loggers and its experiment state go to a scratch folder that nothing reads
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")
# Ray's log monitor lists its folder twice a second instead of ten times
os.environ.setdefault("RAY_LOG_MONITOR_MANY_FILES_THRESHOLD", "0")
# glibc gives freed tensors back to the kernel at once and faults them in again: 1.4x on small CPU models.
# Read when a process starts, so it reaches the workers that Ray starts from here.
os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "100000000000")
os.environ.setdefault("MALLOC_TOP_PAD_", "268435456")
# a worker trains each cell in a new thread, and with heaps of their own the memory of each would be kept
os.environ.setdefault("MALLOC_ARENA_MAX", "1")
# large pages for what is kept, where the kernel gives them to who asks: fewer misses of the TLB
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# segments that can grow fragment less of a GPU's memory; as in nanochat
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# torch.compile's own default lies in /tmp; this one is shared by all cells and outlives a reboot
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "bwlm" / "inductor"))
