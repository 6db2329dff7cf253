"""Look for what bdbench must never do, with hostile and damaged files, odd command lines, kills and several processes.

    python benchmarks/campaign.py artifacts --cases 1000 --seed 0
    python benchmarks/campaign.py all --cases 100
    python benchmarks/campaign.py inputs --cases 1 --seed 417        # one case again

A finding is: an exception that reaches the caller, an exit code that is not documented, a traceback, a control
character in the output, more than 30 s of the processor, a file outside the case's folder, a program that ran, a
crash, a damaged artifact, or another number in the table. Each is printed with its case; then one line of figures a
campaign. The exit code is 1 if there was a finding. Case N of a campaign is the same in every run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import campaign_artifacts
import campaign_commands
import campaign_inputs
import campaign_processes
import campaign_sweeps
from campaign_running import Case, Room, Verdict

BATCH = 250
CAMPAIGNS: dict[str, Callable[[Case], Verdict]] = {
    "artifacts": campaign_artifacts.case,
    "inputs": campaign_inputs.case,
    "commands": campaign_commands.case,
    "kills": campaign_processes.kill_case,
    "sweeps": campaign_sweeps.case,
    "together": campaign_processes.together_case,
}


def run_case(name: str, number: int, room: Room) -> Verdict:
    """Run a case in a fresh folder."""
    shutil.rmtree(room.place, ignore_errors=True)
    room.place.mkdir()
    os.chdir(room.place)
    try:
        verdict = CAMPAIGNS[name](Case(number, random.Random(f"{name} {number}"), room))  # noqa: S311
        problem = verdict.problem or room.disturbed()
        return verdict._replace(problem=problem)
    finally:
        os.chdir(room.root)


def batch(name: str, numbers: Sequence[int], room: Room, log: Path) -> int:
    """Run cases in a child, so that a crash is one finding; return how many were run."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with log.open("a") as stream:
                for number in numbers:
                    verdict = run_case(name, number, room)
                    stream.write(json.dumps([number, *verdict]) + "\n")
                    stream.flush()
            code = 0
        except BaseException:  # noqa: BLE001 - a defect of the campaign
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    done = [json.loads(line)[0] for line in log.read_text().splitlines()]
    ran = len(set(done) & set(numbers))
    if status and ran < len(numbers):
        with log.open("a") as stream:
            stream.write(json.dumps([numbers[ran], "?", f"the process ended with status {status}", ""]) + "\n")
        ran += 1
    return ran


def campaign(name: str, cases: int, seed: int, seconds: float) -> bool:
    """Run a campaign, print its findings and its line; return whether there were none."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        room = Room.make(Path(folder))
        log = room.root / "log"
        log.touch()
        number = seed
        while number < seed + cases and time.monotonic() - begun < seconds:
            number += batch(name, range(number, min(number + BATCH, seed + cases)), room, log)
        found = [json.loads(line) for line in log.read_text().splitlines()]
        os.chdir("/")
    findings = [item for item in found if item[2]]
    for case, what, problem, detail in findings:
        sys.stdout.write(f"case {case}: {what}\n    {problem}\n    {detail[-400:]!r}\n")
    spent = time.monotonic() - begun
    sys.stdout.write(f"{name}: {len(found):,} cases from {seed}, {len(findings)} findings, {spent:,.0f} s\n")
    sys.stdout.flush()
    return not findings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=[*CAMPAIGNS, "all"])
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no batch after so long")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    names = list(CAMPAIGNS) if given.campaign == "all" else [given.campaign]
    return 0 if min([campaign(name, given.cases, given.seed, given.seconds) for name in names]) else 1


if __name__ == "__main__":
    sys.exit(main())
