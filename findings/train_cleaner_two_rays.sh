#!/usr/bin/env bash
# Ray Train's cleaner of placement groups, where a second Ray runs on the machine.
#
# Versions: ray[train] 2.60.0, torch 2.13.0.
# Expected: a process that drives a TorchTrainer is killed. Train's cleaner sees that its controller is gone and removes
#   the placement group of the workers, so that their CPUs are free again.
# Seen: so it does where one Ray runs on the machine. Where a second one runs, the cleaner's thread ends at once with
#   "Found multiple active Ray instances": it asks for the state of its controller without saying of which cluster. The
#   group stays, and its CPUs are taken until the job ends. RAY_ADDRESS in the environment of the processes helps.
# Output: one Ray: removed; two Rays: left; two Rays, RAY_ADDRESS told: removed.
# Exits with 1 if that has changed.
set -euo pipefail
folder=$(mktemp -d /tmp/fnd-XXXXXX)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "ray[train]==2.60.0" "torch==2.13.0"
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
    second.kill()
PY
seen=""
for mode in one two told; do
    seen+=" $("$folder/venv/bin/python" "$folder/killed.py" "$mode" "$folder/second.py" 2>>"$folder/errors" | tail -1 || true)"
    pkill -f "$folder/venv" || true
    sleep 5
done
tail -5 "$folder/errors"
echo "one Ray:$(cut -d' ' -f2 <<<"$seen"); two Rays:$(cut -d' ' -f3 <<<"$seen"); told:$(cut -d' ' -f4 <<<"$seen")"
[ "$seen" = " removed left removed" ]
