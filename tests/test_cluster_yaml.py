"""cluster.yaml, jobs/rayjob.yaml and the Dockerfile: schemas, names that these let pass, versions, room for grids."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from bwlm.cluster.capacity import room_on
from bwlm.config import ResourceSettings
from bwlm.plan.load import load_grid

ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
RAYJOB_SCHEMA = json.loads((ROOT / "tests/data/kuberay_rayjob.schema.json").read_text())
"""KubeRay's own (1.7, Apache 2.0), without descriptions and what no manifest here uses; unknown fields are refused."""
PROVIDER = {"type", "region", "availability_zone", "cache_stopped_nodes", "security_group", "use_internal_ips"}
"""Of the schema's provider fields, which are those of all clouds, the ones that AWS knows."""
NODE = {
    "InstanceType",
    "ImageId",
    "BlockDeviceMappings",
    "InstanceMarketOptions",
    "KeyName",
    "SubnetIds",
    "TagSpecifications",
}
"""Fields of EC2's RunInstances that a node may have; Ray hands them on unread."""
RESOURCES = {"CPU", "GPU", "memory", "object_store_memory"}
LOCK = dict(
    line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if re.match(r"[\w.-]+==", line)
)
GRIDS = sorted(set((ROOT / "grids").glob("*.yaml")) - {ROOT / "grids/sft_lr.yaml"})  # which begins from a run of yours
Node = dict[str, float]


@pytest.fixture
def config() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return content


@pytest.fixture
def rayjob() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "jobs/rayjob.yaml").read_text())
    return content


# ---- cluster.yaml ----


def faults(config: dict[str, Any]) -> list[str]:
    """Lists the faults that Ray's own check does not see."""
    found = [f"{name}: missing" for name in ("cluster_name", "max_workers") if name not in config]
    found += [f"provider.{name}" for name in config["provider"].keys() - PROVIDER]
    allowed = SCHEMA["properties"]["available_node_types"]["patternProperties"][".*"]["properties"].keys()
    for name, node in config["available_node_types"].items():
        found += [f"{name}.{field}" for field in node.keys() - allowed]
        found += [f"{name}.{resource}" for resource in node["resources"].keys() - RESOURCES]
        found += [f"{name}.node_config.{field}" for field in node["node_config"].keys() - NODE]
        if node.get("max_workers", 0) > config.get("max_workers", 0):
            found.append(f"{name}.max_workers")
        if node.get("min_workers", 0):
            found.append(f"{name}.min_workers")
    return found


def test_ray_takes_it(config: dict[str, Any]) -> None:
    validate_config(prepare_config(config))


def test_nothing_is_in_it_that_ray_would_pass_over(config: dict[str, Any]) -> None:
    assert faults(config) == []
    assert SCHEMA["properties"]["provider"]["properties"].keys() >= PROVIDER


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda c: c.pop("cluster_name"), "cluster_name: missing"),
        (lambda c: c["provider"].update(regoin="x"), "provider.regoin"),
        (lambda c: c["provider"].update(project_id="x"), "provider.project_id"),
        (lambda c: c["available_node_types"]["gpu"]["resources"].update(gpu=1), "gpu.gpu"),
        (lambda c: c["available_node_types"]["cpu"].update(max_workers=99), "cpu.max_workers"),
        (lambda c: c["available_node_types"]["cpu"].update(min_workers=1), "cpu.min_workers"),
        (lambda c: c["available_node_types"]["gpu"]["node_config"].update(Spot=True), "gpu.node_config.Spot"),
    ],
)
def test_each_of_these_would_be_seen(config: dict[str, Any], change: Any, fault: str) -> None:
    change(config)
    assert faults(config) == [fault]


def test_a_field_of_a_node_type_that_nobody_knows_is_refused_by_ray(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu"]["max_wokers"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        validate_config(prepare_config(config))


def test_its_set_up_is_that_of_the_lock(config: dict[str, Any]) -> None:
    commands = "\n".join(config["setup_commands"])
    assert "make install" in commands
    assert "uv python find 3.11" in commands
    assert "requirements.lock" in (ROOT / "Makefile").read_text()
    for name in ("RAY_AUTH_MODE=token", "BWLM_STORAGE=/shared/runs", "MLFLOW_TRACKING_URI=http://127.0.0.1:5000"):
        assert name in commands


def test_no_file_of_ours_is_kept_from_a_node(config: dict[str, Any]) -> None:
    """rsync matches a pattern without a slash at its beginning with every folder of that name."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    anywhere = [pattern for pattern in config["rsync_exclude"] if not pattern.startswith("/")]
    assert anywhere
    kept_out = [name for name in listed for part in Path(name).parts if any(fnmatch.fnmatch(part, p) for p in anywhere)]
    assert kept_out == []


@pytest.mark.faults
def test_the_mlflow_of_the_head_has_the_options_that_it_is_started_with(config: dict[str, Any]) -> None:
    [command] = [command for command in config["head_start_ray_commands"] if "mlflow server" in command]
    options = set(re.findall(r"--[\w-]+", command.partition("nohup")[2]))
    assert {"--host", "--backend-store-uri", "--artifacts-destination"} <= options
    mlflow = [Path(sys.executable).with_name("mlflow"), "server", "--help"]
    known = subprocess.run(mlflow, capture_output=True, text=True, check=True).stdout
    assert not [option for option in options if option not in known]


# ---- jobs/rayjob.yaml ----


def strict(manifest: dict[str, Any]) -> list[str]:
    """Paths of the fields that KubeRay's schema does not allow."""
    validator = jsonschema.Draft202012Validator(RAYJOB_SCHEMA)
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(manifest)]


def test_kuberay_takes_it(rayjob: dict[str, Any]) -> None:
    assert strict(rayjob) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda spec: spec.update(backofLimit=0), "backofLimit"),
        (lambda spec: spec["rayClusterSpec"].update(enableInTreeAutoscaler=True), "enableInTreeAutoscaler"),
        (lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(maxReplica=1), "maxReplica"),
        (lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="tokens"), "tokens"),
        (lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(volume=[]), "volume"),
    ],
)
def test_what_kuberay_would_not_know_is_seen(rayjob: dict[str, Any], change: Any, fault: str) -> None:
    change(rayjob["spec"])
    assert any(fault in line for line in strict(rayjob))


def test_a_failed_job_makes_no_second_cluster_and_is_stopped_like_any_other(rayjob: dict[str, Any]) -> None:
    spec = rayjob["spec"]
    assert (spec["backoffLimit"], spec["submitterConfig"]["backoffLimit"]) == (0, 0)
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == yaml.safe_load((ROOT / "jobs/env.yaml").read_text())
    script, grid = spec["entrypoint"].split()[1:]
    for path in (script, grid):
        assert (ROOT / Path(path).relative_to("/bwlm")).exists()


def test_its_ray_is_that_of_the_lock(rayjob: dict[str, Any]) -> None:
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == LOCK["ray"]


# ---- Dockerfile ----


def instructions(name: str) -> list[list[str]]:
    """The words after each instruction of this name."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"{name} ")]


def test_the_image_has_the_python_and_the_packages_of_the_lock(config: dict[str, Any]) -> None:
    [[image]] = instructions("FROM")
    assert image == "python:3.11-slim"
    installs = [" ".join(words) for words in instructions("RUN") if words[0] == "pip"]
    assert installs[0] == "pip install --no-cache-dir -r requirements.lock"
    assert "--no-deps" in installs[1]
    assert len(installs) == 2


@pytest.mark.processes
def test_the_image_holds_what_a_job_needs(tmp_path: Path, rayjob: dict[str, Any]) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for *sources, target in instructions("COPY"):
        for source in sources:
            assert f"!{source}" in ignored
            to = tmp_path / target if target == source else tmp_path / source
            shutil.copytree(ROOT / source, to) if (ROOT / source).is_dir() else shutil.copy(ROOT / source, to)
    script, grid = (tmp_path / Path(path).relative_to("/bwlm") for path in rayjob["spec"]["entrypoint"].split()[1:])
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    words = [sys.executable, script, grid, "--set", "axes.direction=[sideways]"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sideways" in done.stderr, "the grid was read by the code of the image"


# ---- room ----


def node_types(config: dict[str, Any]) -> Iterator[list[Node]]:
    """As many nodes of each type of cluster.yaml as there may be."""
    for node in config["available_node_types"].values():
        yield [node["resources"]] * node.get("max_workers", 0)


def groups(rayjob: dict[str, Any]) -> Iterator[list[Node]]:
    """As many pods of each group of a RayJob as there may be."""
    for group in rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        has = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        yield [has] * group["maxReplicas"]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_shipped_grid_fits_on_some_type_of_node(
    config: dict[str, Any], rayjob: dict[str, Any], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # resources as on a cluster
    for types in (list(node_types(config)), list(groups(rayjob))):
        assert not any(room_on(nodes, ResourceSettings(cpus_per_worker=1000)) for nodes in types)
        for cell in load_grid(path, []).cells:
            needs = cell.experiment.resources
            assert any(room_on(nodes, needs) >= needs.workers for nodes in types)
            on_gpus = needs.model_copy(update={"gpus_per_worker": 1})
            assert any(room_on(nodes, on_gpus) >= needs.workers for nodes in types)
