"""Kill stages at random moments, resume them, and compare the weights with undisturbed runs: ``make chaos``.

Every stage of a tiny network is trained once without and once with interruptions, by one process or by several sharded
ones of which a random one is hit; the exported weights must be bit-identical. Processes are forked from one that has
imported everything, so that a start takes two seconds instead of ten. Each is hit at a moment drawn uniformly from the
duration of an undisturbed one, including its start and end.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import tiny

from datamodules.toy_world.release import Settings, generate
from lightning_modules.callbacks.checkpoint import newest
from lightning_modules.cli import main
from lightning_modules.exits import STOPPED
from lightning_modules.weights.handoff import read_manifest

STEPS = 40


def words(stage: str, world: Path, runs: Path, processes: int) -> list[str]:
    """Return the command line of a stage."""
    options = [f"data_root={world}", f"runs={runs}", f"trainer.max_steps={STEPS}", "checkpoint_every_n_steps=3"]
    options += ["trainer.val_check_interval=15", "data.init_args.num_workers=1", "data.init_args.global_batch_size=8"]
    if processes > 1:
        options += [f"trainer.devices={processes}", "trainer.strategy=fsdp2", "stall_timeout_s=60"]
    return ["fit", str(tiny.EXPERIMENTS / "toy"), stage, *tiny.OVERRIDES, *options]


def start(arguments: list[str], processes: int, log: Path) -> list[int]:
    """Fork the processes of a run and return their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            if processes > 1:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
                os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = main(arguments)
            sys.stdout.flush()
            os._exit(status)
        pids.append(pid)
    return pids


def statuses(pids: list[int], at_most_s: float = 120.0) -> list[int]:
    """Wait for processes and return their exit statuses; it is an error if one outlives the limit."""
    left, ended, deadline = set(pids), {}, time.monotonic() + at_most_s
    while left:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.remove(pid)
                ended[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"chaos: {len(left)} of {len(pids)} processes did not end within {at_most_s:g} s")
        time.sleep(0.01)
    return [ended[pid] for pid in pids]


def digest(runs: Path, stage: str) -> str:
    """Return the digest of the weights that a stage exported."""
    return str(read_manifest(runs / "toy" / stage / "handoff")["digest"])


def hit(stage: str, arguments: list[str], folder: Path, hits: int, o: argparse.Namespace, draw: random.Random) -> dict:
    """Train one stage with this many interruptions; start from scratch when it completes before they are used up."""
    number, log = signal.Signals[f"SIG{o.signal}"], folder / "log.txt"
    run = folder / "toy" / stage
    reference = o.reference[stage]
    done, runs, reached, longest = 0, 0, [], 0.0
    while True:
        disturbed = done < hits
        if disturbed and (run / "handoff" / "manifest.json").exists():
            shutil.rmtree(run)
        pids = start(arguments, o.processes, log)
        if disturbed:
            time.sleep(draw.uniform(0, o.seconds[stage]))
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(pids), number)
        begun = time.monotonic()
        ended = statuses(pids)
        if ended == [0] * o.processes:
            runs += 1
            if digest(folder, stage) != reference:
                raise SystemExit(f"chaos: {stage} exported other weights after {done} interruptions, see {log}")
        elif not disturbed or not {STOPPED, -number} & set(ended):  # it failed by itself
            raise SystemExit(f"chaos: {stage} ended with {ended}, see {log}")
        else:
            done += 1
            longest = max(longest, time.monotonic() - begun)
            at = newest(run / "checkpoints")
            reached.append(int(at.name) if at else 0)
        if not disturbed:
            return {"hits": done, "runs": runs, "at": sorted(reached), "longest_end_s": round(longest, 1)}


def chaos(o: argparse.Namespace, folder: Path) -> dict:
    """Run all stages, first undisturbed and then with interruptions."""
    world = folder / "world"
    print("  generating a world", file=sys.stderr)
    counts = {"train_takes": 9, "val_takes": 2, "initialisation_takes": 6, "practice_takes": 4, "benchmark_takes": 1}
    generate(world, Settings(**counts), workers=2)
    o.reference, o.seconds = {}, {}
    for stage in tiny.STAGES:
        begun = time.monotonic()
        arguments = words(stage, world, folder / "straight", o.processes)
        if statuses(start(arguments, o.processes, folder / "straight.txt")) != [0] * o.processes:
            raise SystemExit(f"chaos: {stage} fails undisturbed, see {folder}/straight.txt")
        o.seconds[stage], o.reference[stage] = time.monotonic() - begun, digest(folder / "straight", stage)
    draw, found = random.Random(o.seed), {}
    for index, stage in enumerate(tiny.STAGES):
        hits = o.hits // 4 + (index < o.hits % 4)
        found[stage] = hit(stage, words(stage, world, folder / "hit", o.processes), folder / "hit", hits, o, draw)
        print(f"  {stage}: {found[stage]}", file=sys.stderr)
    return found


def run() -> None:
    """Parse the command line, interrupt stages, print the result."""
    parser = argparse.ArgumentParser(
        description="interrupt stages at random moments and compare the weights they export"
    )
    parser.add_argument("--hits", type=int, default=100, help="number of interruptions over all stages")
    parser.add_argument("--processes", type=int, default=1, help="number of processes a run; more than one are sharded")
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--json", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    (folder / "hit").mkdir()
    begun = time.monotonic()
    found = chaos(options, folder)
    total, finished = (sum(stage[count] for stage in found.values()) for count in ("hits", "runs"))
    slowest = max(stage["longest_end_s"] for stage in found.values())
    print(
        f"SIG{options.signal} {total} times, {options.processes} process(es) a run: {finished} finished stages, all "
        f"bit-identical to undisturbed ones; every process had ended {slowest} s after the signal at the latest "
        f"({time.monotonic() - begun:.0f} s in all)"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    run()
