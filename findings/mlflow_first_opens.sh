#!/bin/sh
# MLflow 3.17.2: several clients that open a fresh SQLite store at the same moment mostly fail.
#
# Behaviour seen (8 processes, 7 of them failed, Linux, Python 3.11, two cores):
#   OperationalError (sqlite3.OperationalError) table experiments already exists
#   OperationalError (sqlite3.OperationalError) duplicate column name: step
# Each client that finds tables missing creates and migrates them, without a lock. 8 clients of a store that is there
# all succeed. Exits 0 while that is so, 1 once it changes.
#
# Usage: sh findings/mlflow_first_opens.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mlflow==3.17.2
cat > "$folder/open.py" <<'PYTHON'
import sys

import mlflow.store.tracking.sqlalchemy_store  # what takes long, before the start
from mlflow import MlflowClient

print("ready", flush=True)
sys.stdin.readline()
try:
    MlflowClient(sys.argv[1]).search_experiments()
    print("opened")
except Exception as error:
    print(type(error).__name__, str(error).splitlines()[0])
PYTHON
cat > "$folder/race.py" <<'PYTHON'
import subprocess
import sys


def opened(uri: str, clients: int) -> int:
    command, pipe = [sys.executable, sys.argv[1], uri], subprocess.PIPE
    processes = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        for _ in range(clients)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate()[0].strip() for process in processes]
    print(*answers, sep="\n")
    return answers.count("opened")


folder = sys.argv[2]
fresh = opened(f"sqlite:///{folder}/fresh.db", 8)
opened(f"sqlite:///{folder}/made.db", 1)
made = opened(f"sqlite:///{folder}/made.db", 8)
print(f"mlflow 3.17.2: a fresh store was opened by {fresh} of 8, one that was there by {made} of 8")
sys.exit(0 if fresh < 8 and made == 8 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/race.py" "$folder/open.py" "$folder"
