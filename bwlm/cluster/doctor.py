"""Checks of a cluster: the nodes run the same versions and code, share the storage, reach each other, agree on time.

One actor on each living node looks; it holds no CPU, so that it also starts beside cells.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bwlm.cluster.environment import prepare_environment
from bwlm.format import counted, listed
from bwlm.phases import PHASES
from bwlm.plan.doctor import Check, bucket_words, checked
from bwlm.record.code import module_digests
from bwlm.remote import address_of, working_folder, working_root

_PACKAGES = ("ray", "torch", "numpy", "pyarrow")
"""Libraries that cells compute or exchange data with; bwlm itself is compared by its code."""
_SECONDS = 60.0
"""Longest wait for all nodes to answer."""
_CLOCK_SECONDS = 1.0
"""Largest difference between the clocks of two nodes."""
_CLOCK_LOOKS = 5


class Probe:
    """Actor that looks at its node."""

    def __init__(self) -> None:
        prepare_environment()

    def versions(self) -> dict[str, str]:
        """Return the versions of what cells run with, and a digest of bwlm's code."""
        found = {name: importlib.metadata.version(name) for name in _PACKAGES}
        digests = [digest for phase in PHASES for digest in module_digests(phase).values()]
        code = hashlib.sha256("".join(digests).encode()).hexdigest()[:8]
        return {"python": platform.python_version(), **found, "bwlm's code": code}

    def share(self, folder: str, own: str) -> None:
        """Write a file that holds its own name."""
        (Path(folder) / own).write_text(own)

    def names_in(self, folder: str) -> list[str]:
        """Return the names of the files in a folder that hold their own names."""
        return sorted(path.name for path in Path(folder).iterdir() if path.read_text("utf-8") == path.name)

    def fault_of_bucket(self, address: str) -> str:
        """Return why a launch cannot use a bucket from this node; '' if it can."""
        check = checked("bucket", lambda: bucket_words(working_folder(address)), "")
        return "" if check.is_ok else check.found

    def now(self) -> float:
        """Return this node's clock in seconds."""
        return time.time()

    def meeting_point(self) -> str:
        """Return an address of this node at which the ranks of an all-reduce can meet."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def all_reduce(self, backend: str, address: str, rank: int, world: int) -> float:
        """Return the sum over all ranks of rank + 1, by a collective of torch. Raises an exception after a time."""
        import torch
        import torch.distributed as dist

        device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
        limit = timedelta(seconds=_SECONDS / 2)
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=world, timeout=limit)
        try:
            value = torch.full((1024,), float(rank + 1), device=device)
            dist.all_reduce(value)
            return float(value[-1])
        finally:
            dist.destroy_process_group()


class Nodes:
    """Living nodes of the cluster, each with a probe."""

    def __init__(self) -> None:
        alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"]))
        self.names = [f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})" for node in alive]
        self._ids = [node["NodeID"] for node in alive]
        self._with_gpu = [node["NodeID"] for node in alive if node["Resources"].get("GPU")]
        self._probes = [_probe_on(id) for id in self._ids]

    def checks(self, storage: Path) -> Iterator[Check]:
        """Yield the checks of the nodes, each as soon as it is done."""
        yield checked("nodes", self._all_answer, "see `ray list nodes` and the node's raylet.err in the dashboard")
        yield checked("versions", self._same_versions, "install requirements.lock and the same checkout on every node")
        if working_root(storage):
            yield checked("storage", partial(self._reach_bucket, storage), "")
        else:
            mount = "mount the same folder at this path on every node"
            yield checked("storage", partial(self._share_storage, storage), mount)
        yield checked(
            "clocks", self._same_time, "start time synchronisation (chrony or systemd-timesyncd) on each node"
        )
        mend = "open all TCP ports between the nodes (security group); GLOO_SOCKET_IFNAME names the network device"
        yield checked("all-reduce (gloo)", partial(_all_reduce, "gloo", self._probes), mend)
        if self._with_gpu:
            yield checked("all-reduce (nccl)", self._all_reduce_on_gpus, f"NCCL_DEBUG=INFO says why; {mend}")

    def _all_answer(self) -> str:
        self._ask(lambda probe: probe.now.remote())
        return f"{counted(len(self.names), 'node')}, {len(self._with_gpu)} with GPUs"

    def _same_versions(self) -> str:
        found = [Probe().versions(), *self._ask(lambda probe: probe.versions.remote())]
        for what in found[0]:
            if len({versions[what] for versions in found}) > 1:
                where = zip(("this process", *self.names), found, strict=True)
                each = (
                    f"{versions[what]} {'in' if name == 'this process' else 'on'} {name}" for name, versions in where
                )
                raise RuntimeError(f"{what} differs: {'; '.join(each)}")
        return ", ".join(f"{name} {version}" for name, version in found[0].items())

    def _share_storage(self, storage: Path) -> str:
        folder = storage / f".doctor-{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        try:
            _answers(
                [one.share.remote(str(folder), name) for one, name in zip(self._probes, self.names, strict=True)],
                self.names,
            )
            seen = self._ask(lambda probe: probe.names_in.remote(str(folder)))
            for node, names in zip(self.names, seen, strict=True):
                if missing := set(self.names) - set(names):
                    raise RuntimeError(f"{node} does not see what {listed(missing)} wrote to {storage}")
        finally:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
        return f"{storage} is written and read by every node"

    def _reach_bucket(self, storage: Path) -> str:
        address = address_of(storage)
        faults = self._ask(lambda probe: probe.fault_of_bucket.remote(address))
        if wrong := [f"{node}: {fault}" for node, fault in zip(self.names, faults, strict=True) if fault]:
            raise RuntimeError("; ".join(wrong))
        return f"{address} is read and written by every node"

    def _same_time(self) -> str:
        offsets = [_clock_offset(probe) for probe in self._probes]
        apart = max(offsets) - min(offsets)
        if apart > _CLOCK_SECONDS:
            fastest = self.names[offsets.index(max(offsets))]
            slowest = self.names[offsets.index(min(offsets))]
            raise RuntimeError(f"{apart:.1f} s apart: {fastest} is ahead of {slowest}")
        return f"at most {apart:.2f} s apart"

    def _all_reduce_on_gpus(self) -> str:
        probes = [_probe_on(id, gpus=1) for id in self._with_gpu]
        try:
            return _all_reduce("nccl", probes)
        finally:
            for probe in probes:
                ray.kill(probe)

    def _ask(self, ask: Callable[[Any], Any]) -> list[Any]:
        return _answers([ask(probe) for probe in self._probes], self.names)


def _probe_on(node: str, gpus: int = 0) -> Any:
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(Probe).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=there).remote()


def _answers(asked: list[Any], names: list[str]) -> list[Any]:
    """Return the answers of all nodes. Raises `RuntimeError` that names the nodes that do not answer in time."""
    _, late = ray.wait(asked, num_returns=len(asked), timeout=_SECONDS)
    if late:
        silent = [name for name, one in zip(names, asked, strict=True) if one in late]
        raise RuntimeError(f"no answer within {_SECONDS:.0f} s from {listed(silent)}")
    try:
        return list(ray.get(asked))
    except ray.exceptions.RayTaskError as error:
        raise RuntimeError(str(error.cause)) from None


def _clock_offset(probe: Any) -> float:
    """Return how far a node's clock is ahead of ours in seconds, by the quickest of a few answers."""
    looks = list[tuple[float, float]]()
    for _ in range(_CLOCK_LOOKS):
        sent = time.time()
        there = ray.get(probe.now.remote(), timeout=_SECONDS)
        looks.append((time.time() - sent, there - (sent + time.time()) / 2))
    return min(looks)[1]


def _all_reduce(backend: str, probes: list[Any]) -> str:
    world, names = len(probes), [f"rank {rank}" for rank in range(len(probes))]
    [address] = _answers([probes[0].meeting_point.remote()], names[:1])
    began = time.monotonic()
    asked = [probe.all_reduce.remote(backend, address, rank, world) for rank, probe in enumerate(probes)]
    sums = _answers(asked, names)
    if set(sums) != {world * (world + 1) / 2}:
        raise RuntimeError(f"a wrong sum over {counted(world, 'node')}: {sums}")
    return f"{counted(world, 'node')} in {time.monotonic() - began:.1f} s, the start of torch included"
