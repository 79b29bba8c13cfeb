"""cluster.yaml: Ray's own check, what that lets pass, and whether every shipped grid fits on some node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from bwlm.config import ResourceSettings
from bwlm.plan.load import load_grid

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
RESOURCES = {"CPU", "GPU", "memory", "object_store_memory"}
GRIDS = sorted(set((ROOT / "grids").glob("*.yaml")) - {ROOT / "grids/sft_lr.yaml"})  # which begins from a run of yours


@pytest.fixture
def config() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return content


def faults(config: dict[str, Any]) -> list[str]:
    """Lists the faults that Ray's own check does not see."""
    found = [f"{name}: missing" for name in ("cluster_name", "max_workers") if name not in config]
    found += [f"provider.{name}" for name in config["provider"].keys() - SCHEMA["properties"]["provider"]["properties"]]
    for name, node in config["available_node_types"].items():
        found += [f"{name}.{resource}" for resource in node["resources"].keys() - RESOURCES]
        if node.get("max_workers", 0) > config.get("max_workers", 0):
            found.append(f"{name}.max_workers")
        if node.get("min_workers", 0):
            found.append(f"{name}.min_workers")
    return found


def fits(resources: ResourceSettings, config: dict[str, Any]) -> bool:
    """True if the workers of a cell fit on some type of node, of as many as there may be."""
    for node in config["available_node_types"].values():
        has = node["resources"]
        each = has.get("CPU", 0) // resources.cpus_per_worker
        if resources.gpus_per_worker:
            each = min(each, has.get("GPU", 0) // resources.gpus_per_worker)
        if each * node.get("max_workers", 0) >= resources.workers:
            return True
    return False


def test_ray_takes_it(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))


def test_nothing_is_in_it_that_ray_would_pass_over(config: dict[str, Any]) -> None:
    assert faults(config) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda c: c.pop("cluster_name"), "cluster_name: missing"),
        (lambda c: c["provider"].update(regoin="x"), "provider.regoin"),
        (lambda c: c["available_node_types"]["gpu"]["resources"].update(gpu=1), "gpu.gpu"),
        (lambda c: c["available_node_types"]["cpu"].update(max_workers=99), "cpu.max_workers"),
    ],
)
def test_each_of_these_would_be_seen(config: dict[str, Any], change: Any, fault: str) -> None:
    change(config)
    assert faults(config) == [fault]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_shipped_grid_fits_on_some_node(
    config: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # resources as on a cluster
    assert all(fits(cell.experiment.resources, config) for cell in load_grid(path, []).cells)
    assert not fits(ResourceSettings(cpus_per_worker=1000), config)


def test_its_set_up_is_that_of_the_lock(config: dict[str, Any]) -> None:
    assert any("make install" in command for command in config["setup_commands"])
    assert "requirements.lock" in (ROOT / "Makefile").read_text()
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
