"""Sweeps on Ray: a real local cluster of several nodes, one of which dies in the middle."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from test_sweep import UNDEFENDED, numbers, tiny_folder

from bdbench.artifacts import finding
from bdbench.errors import DeviceError, OptionError
from bdbench.sweeps import cluster, worker
from bdbench.sweeps.grid import read_grid
from bdbench.sweeps.sweep import Run, Sweep


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_without_ray_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DeviceError, match=r"pip install 'bdbench\[ray\]'"):
        cluster.connect(None, None)


def test_an_address_that_does_not_answer_is_said_in_seconds() -> None:
    pytest.importorskip("ray")
    begun = time.monotonic()
    with pytest.raises(DeviceError, match=r"nothing answers at 127\.0\.0\.1:\d+ .*ray start"):
        cluster.connect(f"127.0.0.1:{free_port()}", None)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("address", ["somewhere", "host:", ":", "ray://host:port"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(OptionError, match="must be HOST:PORT"):
        cluster.connect(address, None)


def test_cells_on_this_machine_share_its_cores_and_what_ray_says_is_in_their_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(cluster, "cores", lambda: 6)
    monkeypatch.setenv("RAY_ADDRESS", "203.0.113.1:6379")  # of somebody else's cluster
    connected = cluster.connect(None, 2)
    try:
        assert ray.util.get_node_ip_address() == "127.0.0.1"
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert (connected.jobs, connected.threads) == (2, 3)

        def lose() -> int:
            raise OSError("the node is gone")

        job = cluster.RayJob(ray, ray.remote(lose).remote(), tmp_path / "cell.log")
        job.wait(60)
        assert job.poll() == worker.INTERRUPTED
        assert "the node is gone" in (tmp_path / "cell.log").read_text()
    finally:
        connected.leave()


@pytest.mark.parametrize(("use_gpus", "jobs", "asked"), [(True, 4, 1.0), (False, 8, 0.0)])
def test_cells_on_the_cpu_leave_the_gpus_of_a_cluster_to_others(
    monkeypatch: pytest.MonkeyPatch, use_gpus: bool, jobs: int, asked: float
) -> None:
    ray = MagicMock()
    ray.cluster_resources.return_value = {"GPU": 4.0, "CPU": 8.0}
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(cluster, "_knock", lambda _: None)
    connected = cluster.connect("head:6379", None, use_gpus=use_gpus)
    assert connected.jobs == jobs
    connected.launch(Path())
    assert ray.remote.return_value.options.call_args.kwargs["num_gpus"] == asked


def test_a_sweep_survives_the_death_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as Nodes

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("BDBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tiny_folder(tmp_path))
    longer = UNDEFENDED.replace("epochs = 6", "epochs = 60")  # that both are at work at one moment
    (tmp_path / "grid.toml").write_text(longer)
    nodes: Any = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        first, _ = (nodes.add_node(num_cpus=1) for _ in range(2))
        nodes.wait_for_nodes()
        connected = cluster.connect(nodes.address, None)
        assert connected.jobs == 2
        folder = tmp_path / "runs" / "grid"
        sweep = Sweep(read_grid(tmp_path / "grid.toml"), folder)
        run = Run(sweep, sweep.grid.cells, connected.launch(folder), connected.jobs, say=lambda _: None)
        killed = False
        for _ in run.steps():
            at_work = [path.name for path in folder.glob(".*.work")]
            if not killed and len(at_work) == 2:  # both nodes are in the middle of a cell
                nodes.remove_node(first, allow_graceful=False)
                killed = True
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert killed
    assert {state.state for state in run.states.values()} == {"done"}
    assert len(numbers(tmp_path)) == 2
    made = Counter(manifest.ask.kind for _, manifest in finding.find_artifacts(tmp_path / "runs"))
    assert made == {"dataset": 2, "model": 2, "evaluation": 2}
