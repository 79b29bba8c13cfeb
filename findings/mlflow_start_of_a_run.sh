#!/bin/sh
# MLflow 3.17.2: the wait of a scheduled run counts as its duration, and no call can correct its start.
#
# Behaviour seen: a run that is created with the start 1,000 ms, waits as SCHEDULED and is then started (status RUNNING,
# by `update_run` and by `mlflow.start_run`) keeps the start 1,000 ms. `update_run` takes a status and a name, and
# `set_terminated` an end: `MlflowClient` has no call that takes a start besides `create_run`. So the duration that the
# UI shows holds the time in the queue; upstream this is a wish (mlflow/mlflow#7833).
# The way out is to create the run when it begins, as a start in the past is accepted there.
# Exits 0 while that is so, 1 once it changes.
#
# Usage: sh findings/mlflow_start_of_a_run.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mlflow==3.17.2
cat > "$folder/start.py" <<'PYTHON'
import inspect
import sys

import mlflow
from mlflow import MlflowClient

uri = f"sqlite:///{sys.argv[1]}/store.db"
mlflow.set_tracking_uri(uri)
client = MlflowClient(uri)
experiment = client.create_experiment("starts", f"file://{sys.argv[1]}/artifacts")
run_id = client.create_run(experiment, start_time=1_000).info.run_id
starts = {}
client.update_run(run_id, status="SCHEDULED")
starts["scheduled"] = client.get_run(run_id).info.start_time
client.update_run(run_id, status="RUNNING")
starts["running"] = client.get_run(run_id).info.start_time
with mlflow.start_run(run_id=run_id):
    starts["started"] = client.get_run(run_id).info.start_time
client.set_terminated(run_id, end_time=9_000)
ended = client.get_run(run_id).info
starts["ended"] = ended.start_time
takes_start = [
    name
    for name, call in inspect.getmembers(MlflowClient, inspect.isfunction)
    if name.endswith("_run") and "start_time" in inspect.signature(call).parameters
]
print(f"start: {starts}, end: {ended.end_time}; calls on runs that take a start: {takes_start}")
as_noted = set(starts.values()) == {1_000} and ended.end_time == 9_000 and takes_start == ["create_run"]
print("mlflow 3.17.2:", "as noted" if as_noted else "CHANGED")
sys.exit(0 if as_noted else 1)
PYTHON
MLFLOW_LOGGING_LEVEL=ERROR "$folder/venv/bin/python" "$folder/start.py" "$folder"
