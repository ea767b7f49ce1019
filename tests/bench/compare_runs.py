"""Compare the validation answers of finished stages: ``python tests/bench/compare_runs.py A ... --minus B ...``.

Folders are those of stages, such as ``runs/toy_fair/stage2``, several for several seeds. The first one of A is compared
with the first one of B, and so on. Differences are taken question by question, averaged over the seeds, and get a 95 %
interval by bootstrap over takes, since clips of one take are alike. With ``--alone x`` or ``--alone mapped``, B answers
from that visual input alone, so that A and B may be the same stage.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

SCORES = ("choice", "qa", "caption", "caption_verb")
DRAWS = 4000

Key = tuple[str, str, int]
"""Clip, question, and how many answers to it came before."""


def read(folder: Path) -> dict[str, dict[Key, float]]:
    """Return the scores of all egocentric answers by name, and as ``<name>, hidden`` those about hidden actions."""
    found: dict[str, dict[Key, float]] = defaultdict(dict)
    before: Counter[tuple[str, str, str]] = Counter()
    for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        if answer["view"] != "ego":
            continue
        for name, score in answer["scores"].items():
            clip, question = answer["clip"], answer["question"]
            key = (clip, question, before[name, clip, question])
            before[name, clip, question] += 1
            found[name][key] = score
            if not answer["ego_visible"]:
                found[f"{name}, hidden"][key] = score
    return found


def read_alone(folder: Path, given: str) -> dict[str, dict[Key, float]]:
    """Return the scores of answers from one visual input, ``x`` or ``mapped``, in the form of ``read``."""
    found: dict[str, dict[Key, float]] = defaultdict(dict)
    before: Counter[tuple[str, str, str]] = Counter()
    for line in (folder / "consistency.jsonl").read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        name, clip, question = answer["task"].partition("_")[0], answer["clip"], answer["question"]
        key = (clip, question, before[name, clip, question])
        before[name, clip, question] += 1
        found[name][key] = float(answer["right"][given])
        if not answer["ego_visible"]:
            found[f"{name}, hidden"][key] = float(answer["right"][given])
    return found


def interval(differences: dict[Key, list[float]]) -> tuple[float, float, float]:
    """Return the mean of differences and the ends of its interval."""
    by_take: dict[str, list[float]] = defaultdict(list)
    for (clip, _, _), of_seeds in differences.items():
        by_take[clip.partition("/")[0]].append(float(np.mean(of_seeds)))
    sums = np.array([sum(values) for values in by_take.values()])
    counts = np.array([len(values) for values in by_take.values()])
    drawn = np.random.default_rng(0).integers(0, len(sums), (DRAWS, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def main() -> None:
    """Print a row for each score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", type=Path, metavar="A", help="folders of finished stages")
    parser.add_argument("--minus", nargs="+", type=Path, metavar="B", required=True, help="as many to compare with")
    parser.add_argument("--alone", choices=("x", "mapped"), help="visual input that B answers from")
    options = parser.parse_args()
    if len(options.stages) != len(options.minus):
        parser.error(f"--minus: got {len(options.minus)} folders for {len(options.stages)}: name as many")
    pairs = [
        (read(ours), read_alone(theirs, options.alone) if options.alone else read(theirs))
        for ours, theirs in zip(options.stages, options.minus, strict=True)
    ]
    print("| per cent | A | B | A - B |\n|---|---:|---:|---:|")
    for name in [*SCORES, *(f"{name}, hidden" for name in SCORES[:2])]:
        if not all(of[name] for pair in pairs for of in pair):
            continue  # captions are not asked from one input alone
        differences: dict[Key, list[float]] = defaultdict(list)
        for ours, theirs in pairs:
            for key in sorted(ours[name].keys() & theirs[name].keys()):
                differences[key].append(ours[name][key] - theirs[name][key])
        means = [100 * np.mean([np.mean(list(of[side][name].values())) for of in pairs]) for side in (0, 1)]
        mean, low, high = (100 * value for value in interval(differences))
        print(f"| {name} | {means[0]:.1f} | {means[1]:.1f} | {mean:+.1f} [{low:+.1f}, {high:+.1f}] |")


if __name__ == "__main__":
    main()
