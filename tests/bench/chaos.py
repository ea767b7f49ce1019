"""Kill stages at random moments, resume them, and compare the weights with undisturbed runs: ``make chaos``.

Every stage of a tiny network is trained once without and once with interruptions, by one process or by several sharded
ones of which a random one or all are hit; the exported weights must be bit-identical. Processes are forked from one
that has imported everything, so that a start takes two seconds instead of ten. Each is hit at a moment drawn uniformly
from the duration of an undisturbed one, including its start and end.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing import util
from pathlib import Path

import tiny

from datamodules.io.processes import STOP_SIGNALS
from datamodules.toy_world.release import Settings, generate
from lightning_modules.callbacks.checkpoint import newest
from lightning_modules.cli import main
from lightning_modules.signals import STOPPED
from lightning_modules.weights.handoff import read_manifest

STEPS = 40
_WHOLE_RUN_S = 1800.0  # longest run without an interruption, on a machine that others use too


def words(stage: str, world: Path, runs: Path, processes: int) -> list[str]:
    """Return the command line of a stage."""
    options = [f"data_root={world}", f"runs={runs}", f"trainer.max_steps={STEPS}", "checkpoint_every_n_steps=3"]
    options += ["trainer.val_check_interval=15", "data.init_args.num_workers=1", "data.init_args.global_batch_size=8"]
    if processes > 1:
        options += [f"trainer.devices={processes}", "trainer.strategy=fsdp2", "stall_timeout_s=60"]
    return ["fit", str(tiny.EXPERIMENTS / "toy"), stage, *tiny.OVERRIDES, *options]


def start(arguments: list[str], processes: int, log: Path) -> list[int]:
    """Fork the processes of a run, one group of which the first one starts the others; return their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    read_end, write_end = os.pipe()
    first = os.fork()
    if first == 0:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if processes > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
            os.environ |= {"LOCAL_RANK": "0", "WORLD_SIZE": str(processes)}
        for rank in range(1, processes):
            pid = os.fork()
            if pid == 0:
                os.environ["LOCAL_RANK"] = str(rank)
                break
            os.write(write_end, f"{pid}\n".encode())
        os.close(write_end)
        os.close(read_end)
        status = main(arguments)
        sys.stdout.flush()
        os._exit(status)
    os.close(write_end)
    with open(read_end) as others:
        return [first, *(int(line) for line in others)]


def fork_servers() -> None:
    """Let the servers of reading processes be forked from this process too, as it has imported what they import."""
    execute = util.spawnv_passfds

    def start_warm(path: bytes, words: list, passed: list[int]) -> int:
        if "multiprocessing.forkserver" not in str(words[-1]):
            return execute(path, words, passed)
        pid = os.fork()
        if pid == 0:  # undo what a new program would not inherit
            signal.set_wakeup_fd(-1)
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            kept = [2, *sorted(passed), os.sysconf("SC_OPEN_MAX")]
            for low, high in itertools.pairwise(kept):
                os.closerange(low + 1, high)
            try:
                exec(words[-1], {})
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(0)
        return pid

    util.spawnv_passfds = start_warm


def members(group: int) -> list[int]:
    """Return the living processes of a group, with those that read for it."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


def end(pids: list[int], at_most_s: float) -> int:
    """Wait for all processes of a run and return the first one's status; it is an error if one outlives the limit."""
    status, deadline = None, time.monotonic() + at_most_s
    while status is None or members(pids[0]):
        if status is None:
            done, code = os.waitpid(pids[0], os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if done else None
        if time.monotonic() > deadline:
            left = members(pids[0])
            os.killpg(pids[0], signal.SIGKILL)
            raise SystemExit(f"chaos: {len(left)} processes did not end within {at_most_s:g} s")
        time.sleep(0.02)
    return status


def digest(runs: Path, stage: str) -> str:
    """Return the digest of the weights that a stage exported."""
    return str(read_manifest(runs / "toy" / stage / "handoff")["digest"])


def hit(stage: str, arguments: list[str], folder: Path, hits: int, o: argparse.Namespace, draw: random.Random) -> dict:
    """Train one stage with this many interruptions; start from scratch when it completes before they are used up."""
    number, log = signal.Signals[f"SIG{o.signal}"], folder / "log.txt"
    run = folder / "toy" / stage
    done, runs, reached, longest = 0, 0, [], 0.0
    statuses: Counter[int] = Counter()
    while True:
        disturbed = done < hits
        if disturbed and (run / "metrics.json").exists():
            shutil.rmtree(run)
        printed = log.stat().st_size if log.exists() else 0
        pids = start(arguments, o.processes, log)
        if disturbed:
            time.sleep(draw.uniform(0, o.seconds[stage]))
            with contextlib.suppress(ProcessLookupError):
                if o.group:
                    os.killpg(pids[0], number)
                else:
                    os.kill(draw.choice(pids), number)
        begun = time.monotonic()
        status = end(pids, 120.0 if disturbed else _WHOLE_RUN_S)
        at = newest(run / "checkpoints")
        if status == 0:
            runs += 1
            if digest(folder, stage) != o.reference[stage]:
                raise SystemExit(f"chaos: {stage} exported other weights after {done} interruptions, see {log}")
        elif not disturbed or (o.group and status not in (STOPPED, -number)):  # it failed by itself
            raise SystemExit(f"chaos: {stage} ended with {status}, see {log}")
        else:
            done += 1
            statuses[status] += 1
            longest = max(longest, time.monotonic() - begun)
            reached.append(int(at.name) if at else 0)
            stopped = re.findall(r"stopped at step (\d+)", log.read_bytes()[printed:].decode())
            if stopped and reached[-1] != int(stopped[-1]):
                raise SystemExit(f"chaos: {stage} stopped at step {stopped[-1]}, but saved {at}, see {log}")
        if not disturbed:
            found = {"hits": done, "statuses": dict(statuses), "runs": runs}
            return found | {"at": sorted(reached), "longest_end_s": round(longest, 1)}


def chaos(o: argparse.Namespace, folder: Path) -> dict:
    """Run all stages, first undisturbed and then with interruptions."""
    world = folder / "world"
    print("  generating a world", file=sys.stderr)
    counts = {"train_takes": 9, "val_takes": 2, "initialisation_takes": 6, "practice_takes": 4, "benchmark_takes": 1}
    generate(world, Settings(**counts), workers=1)
    o.reference, o.seconds = {}, {}
    for stage in tiny.STAGES:
        begun = time.monotonic()
        arguments = words(stage, world, folder / "straight", o.processes)
        if end(start(arguments, o.processes, folder / "straight.txt"), _WHOLE_RUN_S) != 0:
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
    parser.add_argument("--group", action="store_true", help="signal all processes of a run, as clusters do")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--json", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    fork_servers()
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    (folder / "hit").mkdir()
    begun = time.monotonic()
    found = chaos(options, folder)
    total, finished = (sum(stage[count] for stage in found.values()) for count in ("hits", "runs"))
    slowest = max(stage["longest_end_s"] for stage in found.values())
    statuses = sum((Counter(stage["statuses"]) for stage in found.values()), Counter())
    ended = ", ".join(f"{count} with status {status}" for status, count in sorted(statuses.items()))
    print(
        f"SIG{options.signal} {total} times to {'all' if options.group else 'one'} of {options.processes} process(es) "
        f"of a run, which ended {ended}: {finished} finished stages, all "
        f"bit-identical to undisturbed ones; every process had ended {slowest} s after the signal at the latest "
        f"({time.monotonic() - begun:.0f} s in all)"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    shutil.rmtree(folder)


if __name__ == "__main__":
    run()
