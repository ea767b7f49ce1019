"""Run a sweep of ablations over seeds, resume it, and write tables and figures.

::

    python -m experiments.ablations experiments/ablations/sweep.yaml --seeds 3
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from experiments.ablations.plan import Job, all_jobs, read_plan
from experiments.ablations.results import write_results
from experiments.ablations.runner import RunsFailed, carry_out, is_finished
from lightning_modules.config import ConfigError

STOPPED = 75
"""Exit status of a plan that was asked to stop and can be resumed, as of a single run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sweep.

    Returns:
        Exit status: 0 success, 1 some runs failed, 2 invalid input, 75 stopped before the end and resumable.
    """
    options = _parse(arguments)
    try:
        return _run(options)
    except (ValueError, OSError) as error:
        if options.traceback:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    plan = read_plan(options.sweep, options.quick)
    count = plan.seeds if options.seeds is None else options.seeds
    for name, value in (("seeds", count), ("jobs", options.jobs), ("threads", options.threads)):
        if value < 1:
            raise ConfigError(f"--{name}: got {value}, allowed: 1 or more")
    seeds = range(options.first_seed, options.first_seed + count)
    overrides = [f"threads={options.threads}", "trainer.enable_progress_bar=false", *options.rest]
    waves = all_jobs(options.sweep, plan, seeds, options.out, overrides)
    jobs = [job for wave in waves for job in wave]
    if options.dry_run:
        print("\n".join(job.name for job in jobs))
        return 0

    failure = None
    try:
        if not options.report:
            carry_out([_selected(wave, options.only) for wave in waves], options.out, options.jobs, options.threads)
    except RunsFailed as error:
        failure = error
    except KeyboardInterrupt:
        print("stopped by a signal; run it again to resume", file=sys.stderr)
        return STOPPED
    finished = [job for job in jobs if is_finished(job)]
    print(write_results(plan, finished, options.results, [job.name for job in jobs if job not in finished]))
    if failure:
        print(f"error: {failure}; run it again to resume", file=sys.stderr)
    return int(failure is not None)


def _selected(jobs: Sequence[Job], patterns: Sequence[str] | None) -> list[Job]:
    """Return the jobs whose regime and variant match a pattern, and the stages 0 and 1 that all others need."""
    if patterns is None:
        return list(jobs)
    return [
        job
        for job in jobs
        if job.group == "prepared" or any(fnmatch(f"{job.group}/{job.variant}", pattern) for pattern in patterns)
    ]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.ablations",
        description="Run the unfinished runs of a sweep of ablations, then write tables and figures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("sweep", type=Path, help="e.g. experiments/ablations/sweep.yaml")
    parser.add_argument("rest", nargs="*", metavar="key=value", help="overridden keys of every run")
    parser.add_argument("--quick", action="store_true", help="use the keys below `quick`: a few steps of each run")
    parser.add_argument("--seeds", type=int, help="number of seeds instead of that in the file")
    parser.add_argument("--first-seed", type=int, default=0, help="the first seed; the others follow it")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="REGIME/VARIANT",
        help="run these alone, e.g. few/e_full or 'few/*'; tables are of all",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("runs/ablations/results"), help="for tables and figures")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--jobs", type=int, default=cores, help="runs at a time; jobs x threads at most the cores")
    parser.add_argument("--dry-run", action="store_true", help="list the runs only")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and figures of finished runs")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    options, after = parser.parse_known_args(arguments)
    if any("=" not in word or word.startswith("-") for word in after):
        parser.error(f"unrecognized arguments: {' '.join(after)}")
    options.rest += after  # argparse accepts no more positional arguments after an option
    return options


if __name__ == "__main__":
    raise SystemExit(main())
