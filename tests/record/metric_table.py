"""The table of docs/mlflow.md, from the names themselves: `python -m tests.record.metric_table` writes it anew."""

from __future__ import annotations

from pathlib import Path

from bwlm.record.metrics import METRICS, TASK_METRICS

PAGE = Path(__file__).parents[2] / "docs" / "mlflow.md"
MARK = "<!-- from bwlm/record/metrics.py, by `python -m tests.record.metric_table` -->\n"


def table() -> str:
    head = "| in MLflow | unit | in `metrics.jsonl` | meaning |\n| --- | --- | --- | --- |\n"
    steps = "".join(
        f"| `{metric.mlflow}` | {metric.unit} | `{name}` | {metric.meaning} |\n" for name, metric in METRICS.items()
    )
    tasks = "".join(f"| `{one.mlflow}` | {one.unit} | | {one.meaning} |\n" for one in TASK_METRICS.values())
    return head + steps + tasks


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition(MARK)[0] + MARK + table())
