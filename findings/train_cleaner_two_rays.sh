#!/bin/bash
# Ray Train 2.60.0: with a second Ray on the machine, the CPUs of workers whose driver was killed are never free again.
#
# Behaviour seen (two workers of a TorchTrainer, whose driving process is killed; Linux, Python 3.11, two cores):
#   one Ray on the machine: Train's cleaner removes the workers' placement group within seconds
#   two Rays: it stays. The cleaner's thread has ended: "ConnectionError: Found multiple active Ray instances"
#   two Rays, RAY_ADDRESS in the environment of the processes: it is removed
# The cleaner asks for the state of its controller without saying of which cluster. Exits 0 while that is so, 1 once it
# changes.
#
# Usage: bash findings/train_cleaner_two_rays.sh
set -euo pipefail
folder=$(mktemp -d /tmp/fnd-XXXXXX)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "ray[default,train]==2.60.0" "torch==2.13.0"
export RAY_USAGE_STATS_ENABLED=0 RAY_TRAIN_ENABLE_PREEMPTION_WATCHER=0
cat > "$folder/second.py" <<'PY'
import sys, time, ray
ray.init(address="local", num_cpus=1, logging_level="error")
print("up", flush=True)
time.sleep(300)
PY
cat > "$folder/killed.py" <<'PY'
import os, signal, subprocess, sys, time
import ray
from ray.util import placement_group_table

mode = sys.argv[1]
second = None
if mode != "one":
    second = subprocess.Popen([sys.executable, sys.argv[2]], stdout=subprocess.PIPE)
    assert second.stdout.readline() == b"up\n"
context = ray.init(address="local", num_cpus=4, include_dashboard=True, logging_level="error", log_to_driver=False)
environment = {"env_vars": {"RAY_ADDRESS": context.address_info["gcs_address"]}} if mode == "told" else {}


@ray.remote(num_cpus=0, runtime_env=environment)
class Driver:
    def pid(self):
        return os.getpid()

    def train(self):
        from ray.train import ScalingConfig
        from ray.train.torch import TorchTrainer

        TorchTrainer(lambda: time.sleep(600), scaling_config=ScalingConfig(num_workers=2)).fit()


def is_held():
    return any(group["state"] == "CREATED" for group in placement_group_table().values())


def wait(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.5)
    return condition()


driver = Driver.options(max_concurrency=2).remote()
pid = ray.get(driver.pid.remote())
driver.train.remote()
assert wait(is_held, 120), "the workers did not start"
time.sleep(10)
os.kill(pid, signal.SIGKILL)
print("removed" if wait(lambda: not is_held(), 45) else "left", flush=True)
ray.shutdown()
if second:
    second.terminate()
    second.wait()
PY
seen=()
for mode in one two told; do
    "$folder/venv/bin/python" "$folder/killed.py" "$mode" "$folder/second.py" > "$folder/out" 2> "$folder/errors" ||
        tail -5 "$folder/errors"
    seen+=("$(grep -xE 'removed|left' "$folder/out")")
done
echo "ray 2.60.0: the group was ${seen[0]} with one Ray, ${seen[1]} with two, ${seen[2]} with two and RAY_ADDRESS"
[ "${seen[*]}" = "removed left removed" ]
