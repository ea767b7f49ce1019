"""Measure how soon ``--help`` and ten common mistakes are answered: ``make bench-mistakes``.

CPU seconds of one process, median of the rounds; with other checkouts as arguments, all of them by turns.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

MISTAKES = {
    "`--help`": "--help",
    "no such experiment": "fit experiments/tyo stage1",
    "no such stage": "fit experiments/toy stge1",
    "no stage": "fit experiments/toy",
    "no such option": "fit experiments/toy stage1 --froce",
    "no such key": "fit experiments/toy stage2 trainer.max_step=3",
    "no such key of the model": "fit experiments/toy stage2 network.mapper.knd=linear",
    "a value of a wrong type": "fit experiments/toy stage2 trainer.max_steps=many",
    "no such class": "fit experiments/toy stage2 model.class_path=lightning_modules.Stage9",
    "no data": "fit experiments/toy stage1 data_root=nowhere",
    "no weights of the stage before": "fit experiments/toy stage2 data_root=. tokenizer=. data.init_args.held_out=null",
}


def cpu_seconds(checkout: Path, words: str) -> float:
    """Run a command of a checkout and return the CPU seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "lightning_modules", *words.split()]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=checkout, env=environment, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a row for each mistake, a column for each checkout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path(__file__).parents[2]])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for mistake, words in MISTAKES.items():
        seconds: dict[Path, list[float]] = {checkout: [] for checkout in options.checkouts}
        for _ in range(options.rounds):
            for checkout in options.checkouts:
                seconds[checkout].append(cpu_seconds(checkout.resolve(), words))
        cells = [f"{statistics.median(taken):.2f}" for taken in seconds.values()]
        print(f"| {mistake} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
