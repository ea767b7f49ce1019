"""Carries out the runs of a plan, each as a process of its own, several at a time; called again, it goes on."""

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
from typing import NoReturn

from experiments.ablations.plan import Job
from lightning_modules.config import read_saved
from lightning_modules.weights.handoff import is_answered, read_manifest
from lightning_modules.weights.resolve import split_source


class RunsFailed(RuntimeError):
    """Some runs of a plan did not finish."""


def carry_out(waves: Iterable[Sequence[Job]], out: Path, parallel: int, threads: int) -> None:
    """Run what is not finished; a wave begins when the one before is through. What fails stops nothing but itself.

    Seconds go to ``seconds.jsonl`` in ``out``, what the runs print to ``log.txt`` beside each run's files. Told to
    stop, it tells the runs, which save their checkpoints.

    Args:
        waves: see ``all_jobs``.
        out: folder of all runs.
        parallel: runs at a time.
        threads: of each.

    Raises:
        RunsFailed: after all others; names those that failed, and those that needed them, with their logs.
        KeyboardInterrupt: told to stop.
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
    """All answers are there, by exactly this configuration, and it started from the hand-offs that are there now."""
    file, handoff = job.folder / "config.yaml", job.folder / "handoff"
    if not file.is_file() or not all(is_answered(folder, handoff) for folder in job.reads.values()):
        return False
    if read_saved(file) != job.config:
        return False
    started_from = read_manifest(handoff).get("started_from", {})
    for part, source in (job.config["model"]["init_args"].get("init") or {}).items():
        before = split_source(source, part)[0] if isinstance(source, str) else Path()
        if (before / "manifest.json").is_file() and read_manifest(before)["digest"] != started_from.get(part):
            return False
    return True


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _run_all(jobs: Sequence[Job], out: Path, parallel: int, threads: int) -> list[Job]:
    """Those that failed."""
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
    command = [sys.executable, "-m", "lightning_modules", "fit", *job.words, "--single-inputs"]
    job.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (job.folder / "log.txt").open("a", encoding="utf-8") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        running.add(process)
        status = process.wait()
        running.remove(process)
    if status == 0:  # a finished run goes on from nothing, and a hundred of them would fill a disk
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
    seconds = round(time.monotonic() - began, 1)
    with (out / "seconds.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"run": job.name, "seconds": seconds, "status": status}) + "\n")
    print(f"{job.name}: {'done' if status == 0 else f'exit status {status}'} after {seconds:.0f} s", flush=True)
    return status
