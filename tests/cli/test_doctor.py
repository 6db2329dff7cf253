"""bdbench doctor: what it finds, and when something is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bdbench import machine
from bdbench.cli import doctor
from bdbench.plugins import Plugin
from bdbench.training import devices


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.0)


def test_it_says_what_is_here_and_ends_well(here: Path, bdbench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LOADS", here / "loads")
    (here / "loads").write_text("0.1 0.1 0.1 2/99 123")
    cache = here / "cache"
    cache.mkdir()
    (cache / "file").write_bytes(b"x" * 1_500_000)
    monkeypatch.setenv("BDBENCH_CACHE", str(cache))
    result = bdbench("doctor", "--json")
    facts = result.json
    assert (result.code, facts["problems"]) == (0, [])
    assert facts["cpu"]["free"] == max(0, machine.cores() - 1)
    assert facts["cache"]["bytes"] == 1_500_000
    assert facts["runs"]["free_bytes"] > 0
    cpu = facts["devices"][-1]
    assert (cpu["device"], cpu["tflops"]["fp32"] > 0) == ("cpu", True)
    assert ("bf16" in cpu["tflops"]) == cpu["bf16"]
    monkeypatch.setenv("COLUMNS", "80")
    shown = bdbench("doctor").out
    assert "1.5 MB" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert all(word in shown for word in ("versions", "cores", "threads", "memory", "cpu", "cache", "runs", "plugins"))


def test_a_broken_plugin_a_device_that_fails_and_a_closed_folder_end_it_with_1(
    here: Path, bdbench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = Plugin("attack", "stripe", "nothere:Stripe", "mypackage", "1.0")
    monkeypatch.setattr(doctor, "all_plugins", lambda: [plugin])
    (here / "file").write_text("")
    monkeypatch.setenv("BDBENCH_CACHE", str(here / "file"))
    monkeypatch.setattr(devices, "usable_devices", lambda: ["mps", "cpu"])
    result = bdbench("doctor", "--json")
    assert result.code == 1
    fault, *others = result.json["problems"]
    assert fault.startswith("mps does not compute: ")
    assert others == [
        "plugin stripe of mypackage cannot be imported: ModuleNotFoundError: No module named 'nothere'",
        f"{here}/file cannot be written; BDBENCH_CACHE names another folder",
    ]
    assert "Error: plugin stripe of mypackage cannot be imported" in result.err
    assert "1 plugin, 1 broken: stripe (mypackage 1.0)" in " ".join(bdbench("doctor").out.split())


def test_what_the_system_does_not_say_is_not_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MEMORY", tmp_path / "none")
    assert machine.free_memory_bytes() is None
    (tmp_path / "info").write_text("MemTotal: 4 kB\nMemAvailable:   3 kB\n")
    monkeypatch.setattr(machine, "MEMORY", tmp_path / "info")
    assert machine.free_memory_bytes() == 3 * 1024
    monkeypatch.setattr(machine, "CPUS", tmp_path / "cpus")
    assert machine.cpu_name()
    (tmp_path / "cpus").write_text("processor : 0\nmodel name\t: A fast one\n")
    assert machine.cpu_name() == "A fast one"
    assert machine.free_disk_bytes(tmp_path / "a" / "b") == machine.free_disk_bytes(tmp_path)
    assert machine.is_writable(tmp_path / "a" / "b")
