"""bdbench doctor."""

from __future__ import annotations

import os
import platform
from typing import Any

import typer

from bdbench import __version__, machine, plugins
from bdbench.artifacts.finding import ROOT
from bdbench.cli import console
from bdbench.cli.parameters import Json
from bdbench.files import folder_bytes
from bdbench.registry import all_plugins
from bdbench.wording import counted

SECONDS = 0.5
"""How long each device multiplies matrices in each precision."""


def doctor(json: Json = False) -> None:
    """Say what bdbench finds on this machine: cores, GPUs and how fast they are, memory, folders, plugins.

    Takes a few seconds: every device multiplies matrices. Exit code 1 if something is broken: a plugin that cannot be
    used, a GPU that does not compute, a folder that cannot be written.

    Examples:
      bdbench doctor

      bdbench doctor --json
    """
    facts = {**_versions(), "cpu": _cpu(), "memory": _memory(), **_places(), "plugins": _plugins()}
    facts["devices"], faults = _devices()
    problems = [*faults, *_problems(facts)]
    if json:
        console.show_json({**facts, "problems": problems})
    else:
        _show(facts)
    for problem in problems:
        console.say_error(problem)
    if problems:
        raise typer.Exit(1)


def _versions() -> dict[str, Any]:
    import torch

    return {
        "bdbench": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "system": platform.platform(terse=True),
    }


def _cpu() -> dict[str, Any]:
    import torch

    cores, busy = machine.cores(), machine.busy_cores()
    chosen = os.environ.get("OMP_NUM_THREADS")
    return {"cores": cores, "free": max(0, cores - busy), "threads": torch.get_num_threads(), "OMP_NUM_THREADS": chosen}


def _memory() -> dict[str, Any]:
    return {"bytes": machine.memory_bytes(), "free_bytes": machine.free_memory_bytes()}


def _places() -> dict[str, Any]:
    from bdbench.datasets.cache import cache_folder

    cache = cache_folder()
    return {
        name: {
            "folder": str(folder),
            "bytes": folder_bytes(folder) if folder.is_dir() else 0,
            "free_bytes": machine.free_disk_bytes(folder),
            "writable": machine.is_writable(folder),
        }
        for name, folder in (("cache", cache), ("runs", ROOT))
    }


def _plugins() -> list[dict[str, Any]]:
    return [
        {
            "kind": plugin.kind, "name": plugin.name, "package": plugin.package, "version": plugin.version,
            "broken": plugins.try_out(plugin).broken,
        }
        for plugin in all_plugins()
    ]  # fmt: skip


def _devices() -> tuple[list[dict[str, Any]], list[str]]:
    """Return what is known of every device, and what is wrong with those that do not compute."""
    from bdbench.training.devices import try_device, usable_devices

    found, faults = [], []
    for name in usable_devices():
        try:
            found.append(try_device(name, SECONDS)._asdict())
        except RuntimeError as error:
            faults.append(f"{name} does not compute: {str(error).partition(chr(10))[0]}")
    return found, faults


def _problems(facts: dict[str, Any]) -> list[str]:
    """Say what is broken."""
    found = [
        f"plugin {item['name']} of {item['package']} {item['broken']}" for item in facts["plugins"] if item["broken"]
    ]
    for name in ("cache", "runs"):
        if not facts[name]["writable"]:
            advice = "; BDBENCH_CACHE names another folder" if name == "cache" else ""
            found.append(f"{facts[name]['folder']} cannot be written{advice}")
    return found


def _show(facts: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    cpu, memory = facts["cpu"], facts["memory"]
    chosen = f"OMP_NUM_THREADS is {cpu['OMP_NUM_THREADS']}" if cpu["OMP_NUM_THREADS"] else "OMP_NUM_THREADS is not set"
    rows = [
        (
            "versions",
            f"bdbench {facts['bdbench']}, torch {facts['torch']}, Python {facts['python']}, {facts['system']}",
        ),
        ("cores", f"{cpu['cores']}, {cpu['free']} of them free now"),
        ("threads", f"at most {cpu['threads']} a run ({chosen})"),
        ("memory", f"{_size(memory['bytes'])}, {_size(memory['free_bytes'])} free"),
    ]
    rows += [(item["device"], _device(item)) for item in facts["devices"]]
    if not any(item["device"] != "cpu" for item in facts["devices"]):
        built = f"torch is built for CUDA {facts['cuda']}" if facts["cuda"] else "torch is built without CUDA"
        rows.append(("GPU", f"none that is usable ({built})"))
    rows += [(name, _place(facts[name])) for name in ("cache", "runs")]
    broken = sum(item["broken"] is not None for item in facts["plugins"])
    names = ", ".join(f"{item['name']} ({item['package']} {item['version']})" for item in facts["plugins"])
    counts = counted(len(facts["plugins"]), "plugin") + (f", {broken} broken" if broken else "")
    rows.append(("plugins", f"{counts}: {names}" if names else "none"))
    table = Table(box=None, show_header=False, pad_edge=False)
    for heading, text in rows:
        table.add_row(Text(heading, style="bold"), Text(text))
    console.show(table)


def _device(item: dict[str, Any]) -> str:
    speeds = ", ".join(f"{_speed(value)} in {name}" for name, value in item["tflops"].items())
    memory = f"{_size(item['memory_bytes'])}, {_size(item['free_bytes'])} free; " if item["memory_bytes"] else ""
    return f"{item['name']}; {memory}{speeds}; --precision auto takes {'bf16' if item['bf16'] else 'fp32'}"


def _place(place: dict[str, Any]) -> str:
    return f"{place['folder']}: {_size(place['bytes'])}, {_size(place['free_bytes'])} free on its disk"


def _speed(tflops: float) -> str:
    return f"{tflops:,.1f} TFLOP/s" if tflops >= 1 else f"{tflops * 1e3:,.0f} GFLOP/s"


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 or not count else f"{count / 1e6:,.1f} MB"
