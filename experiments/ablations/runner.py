"""Run the jobs of a plan, each in a process of its own and several at a time; a second call resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from experiments.ablations.plan import Job
from lightning_modules.config import compose
from lightning_modules.evaluation import is_answered
from lightning_modules.weights.handoff import read_manifest
from lightning_modules.weights.resolve import split_source


class RunsFailed(RuntimeError):
    """Some runs of a plan failed."""


def carry_out(waves: Iterable[Sequence[Job]], out: Path, parallel: int, threads: int) -> None:
    """Run unfinished jobs, wave by wave. A job that fails does not stop the others.

    Durations go to ``seconds.jsonl`` in ``out``, output of a run to ``log.txt`` in its folder. SIGTERM and Ctrl-C are
    passed on to the runs, which save their checkpoints.

    Args:
        waves: see ``all_jobs``.
        out: folder of all runs.
        parallel: number of runs at a time.
        threads: number of threads of each run.

    Raises:
        RunsFailed: after all others have run; names the failed runs, and those that needed them, with their logs.
        KeyboardInterrupt: stopped by a signal.
    """
    out.mkdir(parents=True, exist_ok=True)
    failed: list[Job] = []
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        for wave in waves:
            missing = [job for job in wave if not is_finished(job)]
            if missing:
                print(f"{missing[0].stage}: {len(wave) - len(missing)} of {len(wave)} runs are finished", flush=True)
                failed += _run_all(missing, out, parallel, threads)
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed:
        named = ", ".join(f"{job.name} ({job.folder}/log.txt)" for job in failed)
        raise RunsFailed(f"{len(failed)} runs did not finish: {named}")


def is_finished(job: Job) -> bool:
    """Return True if the answers exist, of this very configuration and the present weights of earlier stages."""
    file, handoff = job.folder / "config.yaml", job.folder / "handoff"
    if not file.is_file() or not is_answered(job.folder, handoff):
        return False
    if _without_benchmarks(compose(file, None)) != _without_benchmarks(job.config):
        return False
    started_from = read_manifest(handoff).get("started_from", {})
    for part, source in (job.config["model"]["init_args"].get("init") or {}).items():
        before = split_source(source, part)[0] if isinstance(source, str) else Path()
        if (before / "manifest.json").is_file() and read_manifest(before)["digest"] != started_from.get(part):
            return False
    return True


def _without_benchmarks(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out the benchmarks, which no run of a sweep is scored on: a new one makes no finished run stale."""
    return {key: value for key, value in config.items() if key != "egobench"}


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _run_all(jobs: Sequence[Job], out: Path, parallel: int, threads: int) -> list[Job]:
    """Run jobs in parallel and return those that failed."""
    running: set[subprocess.Popen[bytes]] = set()
    with ThreadPoolExecutor(parallel) as pool:
        try:
            statuses = list(pool.map(lambda job: _run(job, out, threads, running), jobs))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            raise
    return [job for job, status in zip(jobs, statuses, strict=True) if status]


def _run(job: Job, out: Path, threads: int, running: set[subprocess.Popen[bytes]]) -> int:
    command = [sys.executable, "-m", "lightning_modules", "fit", *job.words]
    job.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (job.folder / "log.txt").open("a", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        running.add(process)
        status = process.wait()
        running.remove(process)
    if status == 0:  # a finished run is never resumed, and the checkpoints of a hundred runs would fill a disk
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
    seconds = round(time.monotonic() - began, 1)
    with (out / "seconds.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"run": job.name, "seconds": seconds, "status": status}) + "\n")
    print(f"{job.name}: {'done' if status == 0 else f'exit status {status}'} after {seconds:.0f} s", flush=True)
    return status
