#!/bin/sh
# MLflow 3.17.2 on SQLite: a search for the best run cannot see that a run diverged.
#
# Behaviour seen:
#   order_by metrics.loss ASC and DESC both put the run whose loss is NaN last;
#   `metrics.loss != 2.0` matches the run whose loss is NaN, `metrics.loss > 1e300` the one whose loss is infinite;
#   a loss logged as infinity is read back as 1.7976931348623157e+308, a finite number.
# Exits 0 while that is so, 1 once it changes.
#
# Usage: sh findings/mlflow_not_finite.sh
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mlflow==3.17.2
cat > "$folder/search.py" <<'PYTHON'
import math
import sys

from mlflow import MlflowClient

client = MlflowClient(f"sqlite:///{sys.argv[1]}/store.db")
experiment = client.create_experiment("losses", f"file://{sys.argv[1]}/artifacts")
for name, loss in {"low": 1.0, "high": 2.0, "nan": math.nan, "infinite": math.inf}.items():
    run = client.create_run(experiment, run_name=name)
    client.log_metric(run.info.run_id, "loss", loss)


def names(filter_string: str = "", *order: str) -> list[str]:
    return [run.info.run_name for run in client.search_runs([experiment], filter_string, order_by=list(order))]


seen = {
    "ascending": names("", "metrics.loss ASC"),
    "descending": names("", "metrics.loss DESC"),
    "not 2": sorted(names("metrics.loss != 2.0")),
    "above 1e300": names("metrics.loss > 1e300"),
    "infinity": client.search_runs([experiment], "metrics.loss > 1e300")[0].data.metrics["loss"],
}
for question, answer in seen.items():
    print(f"{question}: {answer}")
expected = {
    "ascending": ["low", "high", "infinite", "nan"],
    "descending": ["infinite", "high", "low", "nan"],
    "not 2": ["infinite", "low", "nan"],
    "above 1e300": ["infinite"],
    "infinity": sys.float_info.max,
}
print("mlflow 3.17.2:", "as noted" if seen == expected else "CHANGED")
sys.exit(0 if seen == expected else 1)
PYTHON
MLFLOW_LOGGING_LEVEL=ERROR "$folder/venv/bin/python" "$folder/search.py" "$folder"
