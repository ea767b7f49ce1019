"""Find cameras that are shifted in time: ``python -m datamodules.tools.sync INDEX --root DATA``.

Cameras of a take that see the same person move at the same time, so their motion over time correlates at the lag by
which they are shifted. Three signals are known, in order of cost:

- ``packets``: the size of each compressed frame next to others of its kind. Nothing is decoded; an encoder spends its
  bits where something moves.
- ``motion``: the mean difference of small grey frames, which decodes every frame.
- ``sound``: the loudness of the sound track as it rises, for files that have one.

Each camera is compared with the mean of the others of its take. How high such a correlation rises by chance is measured
on controls, the same cameras compared with other takes, and only what chance does not explain at the stated rate of
false alarms is reported. The index is read and never changed: shifts are written to a file for ``--frame-offsets`` of
``datamodules.ego_exo_clip.build``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from datamodules.ego_exo_clip.index import GROUP_RECORD, read_header
from datamodules.io.atomic import atomic_path
from datamodules.io.jsonl import read_jsonl
from datamodules.io.parallel import Beat, Failure, run_tasks
from datamodules.io.validate import validate
from datamodules.video.errors import ClipDecodeError
from datamodules.video.motion import METHODS, read_signal
from datamodules.video.remote import data_path, require_reachable
from datamodules.video.synchrony import Detector, Finding, TakeFiles

Array = NDArray[np.float64]

CONTROL_TAKES = 12  # that all others are compared with
MIN_WINDOW = 4  # frames; takes shorter than four windows are not compared


def read_takes(index: Path) -> list[TakeFiles]:
    """Read the cameras of an index of pairs.

    Raises:
        ValueError: there is no complete index in the folder, or a line is wrong; or its views are not synchronised.
    """
    if read_header(index).get("synchronised") is False:
        raise ValueError(f"{index}: its views show the same action at different times: there is no shift to look for")
    takes = []
    for where, record in read_jsonl(index / "groups.jsonl"):
        group = validate(GROUP_RECORD, record, where)
        views = (group.views.ego, *group.views.exo)
        known = group.frame_offset or {}
        takes.append(
            TakeFiles(
                group_id=group.group_id,
                fps=group.fps,
                cams=tuple(view.cam for view in views),
                paths=tuple(view.path for view in views),
                offsets=tuple(known.get(view.cam, 0) for view in views),
            )
        )
    return takes


def _read_take(take: TakeFiles, root: Path, method: str, beat: Beat) -> tuple[dict[int, Array], list[str]]:
    """Return the signals of a take's cameras by number, and the problems of those that have none."""
    signals: dict[int, Array] = {}
    problems = []
    for number, (path, offset) in enumerate(zip(take.paths, take.offsets, strict=True)):
        try:
            signal = read_signal(root / path, method, take.fps, beat)
        except ClipDecodeError as error:
            problems.append(f"{path}: no {method} compared: {error.reason}")
            continue
        signals[number] = np.pad(signal[max(0, offset) :], (max(0, -offset), 0))
    return signals, problems


def check_sync(
    takes: Sequence[TakeFiles],
    root: Path,
    methods: Sequence[str] = ("packets",),
    window: int = 60,
    tolerance: int = 3,
    false_alarms: float = 0.01,
    workers: int = 1,
    patience_s: float = 60.0,
) -> tuple[list[Finding], list[str]]:
    """Look for cameras that are shifted in time.

    Args:
        takes: of an index; all of them serve as controls of each other.
        root: folder that paths are relative to.
        methods: signals; each is tried on the takes with a camera that the ones before leave unclear.
        window, tolerance, false_alarms: see ``Detector``.
        workers: number of processes.
        patience_s: seconds without progress after which a take is given up.

    Returns:
        The findings in the order of the takes, and the problems of files that cannot be compared.
    """
    findings: dict[str, dict[str, Finding]] = {take.group_id: {} for take in takes}
    problems: list[str] = []
    pending = list(takes)
    for method in methods:
        for fps in sorted({take.fps for take in pending}):
            of_rate = [take for take in pending if take.fps == fps]
            read = _reader(root, method, workers, patience_s, problems)
            # The controls come first and are kept; of the others only the findings are.
            known = dict(read([of_rate[i] for i in _evenly(len(of_rate), CONTROL_TAKES)]))
            if not known:
                continue
            controls = {part.group_id: signals for part, signals in known.values()}
            detector = Detector(controls, method, fps, window, tolerance, false_alarms)
            rest = read([take for take in of_rate if take.group_id not in known])
            for group_id, (part, signals) in chain(known.items(), rest):
                earlier = findings[group_id]
                for finding in detector.compare(part, signals):
                    if earlier.get(finding.cam, finding).verdict in ("unclear", finding.verdict):
                        earlier[finding.cam] = finding
        pending = [
            take
            for take in pending
            if len(findings[take.group_id]) < len(take.cams)
            or any(finding.verdict == "unclear" for finding in findings[take.group_id].values())
        ]
    found = [findings[take.group_id][cam] for take in takes for cam in take.cams if cam in findings[take.group_id]]
    return found, problems


_Read = Iterator[tuple[str, tuple[TakeFiles, list[Array]]]]


def _reader(
    root: Path, method: str, workers: int, patience_s: float, problems: list[str]
) -> Callable[[Sequence[TakeFiles]], _Read]:
    """Return a function that reads takes and yields by group_id their usable cameras with the signals of these."""

    def read(takes: Sequence[TakeFiles]) -> _Read:
        task = partial(_read_take, root=root, method=method)
        outcomes = run_tasks(task, takes, workers, patience_s, preload=["datamodules.video.motion"])
        for take, outcome in tqdm(outcomes, method, total=len(takes), unit="take", mininterval=1, disable=not takes):
            if isinstance(outcome, Failure):
                problems.append(f"{take.paths[0]}: no {method} compared: {outcome.kind}: {outcome.reason}")
                continue
            signals, of_take = outcome
            problems.extend(of_take)
            usable = sorted(number for number, signal in signals.items() if len(signal) >= 4 * MIN_WINDOW)
            if len(usable) < 2:
                problems.append(f"{take.paths[0]}: no {method} compared: fewer than two cameras of its take have any")
                continue
            part = replace(
                take,
                cams=tuple(take.cams[number] for number in usable),
                paths=tuple(take.paths[number] for number in usable),
                offsets=tuple(take.offsets[number] for number in usable),
            )
            yield take.group_id, (part, [signals[number] for number in usable])

    return read


def _evenly(count: int, wanted: int) -> list[int]:
    return sorted({i * count // wanted for i in range(wanted)}) if count > wanted else list(range(count))


def frame_offsets(findings: Iterable[Finding]) -> dict[str, dict[str, int]]:
    """Return the offsets of shifted cameras by group_id and camera, as ``--frame-offsets`` reads them."""
    offsets: dict[str, dict[str, int]] = {}
    for finding in findings:
        if finding.verdict == "shifted" and finding.rival is None:
            offsets.setdefault(finding.group_id, {})[finding.cam] = finding.offset
    return offsets


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.tools.sync",
        description="Find cameras of an index of pairs whose views are shifted in time. Exit status 1 if any is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("index", type=Path, help="folder of an index of pairs")
    parser.add_argument(
        "--root", type=data_path, required=True, help="folder or address (s3://...) that paths are relative to"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=["packets"],
        help="signals to compare; each next one is tried on takes that are still unclear",
    )
    parser.add_argument("--window", type=int, default=60, help="largest shift to look for, in frames")
    parser.add_argument("--tolerance", type=int, default=3, help="largest shift that is in sync, in frames")
    parser.add_argument(
        "--false-alarms", type=float, default=0.01, help="probability of a false alarm for each camera and method"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds without progress before a take is given up"
    )
    parser.add_argument(
        "--offsets", type=Path, help="write the shifts as JSON for --frame-offsets of the index builder"
    )
    parser.add_argument("--report", type=Path, help="write all findings as JSON Lines")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, report and write; return exit status 0, 1 if a camera is off or a file unusable, or 2 for arguments."""
    options = _parser().parse_args(arguments)
    try:
        if options.workers < 1 or not options.timeout >= 1:
            raise ValueError("--workers and --timeout must be at least 1")
        if not 0 <= options.tolerance < options.window:
            raise ValueError(f"--tolerance: got {options.tolerance}, allowed: 0 or more, below --window")
        if not 0 < options.false_alarms < 0.5:
            raise ValueError(f"--false-alarms: got {options.false_alarms}, allowed: above 0, below 0.5")
        require_reachable(options.root, "--root")
        takes = read_takes(options.index)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    findings, problems = check_sync(
        takes,
        options.root,
        options.methods,
        options.window,
        options.tolerance,
        options.false_alarms,
        options.workers,
        options.timeout,
    )
    offsets = frame_offsets(findings)
    if options.report is not None:
        with atomic_path(options.report) as partial_path:
            lines = [json.dumps(asdict(finding)) + "\n" for finding in findings]
            partial_path.write_text("".join(lines), encoding="utf-8")
    if options.offsets is not None:
        with atomic_path(options.offsets) as partial_path:
            partial_path.write_text(json.dumps(offsets, indent=1) + "\n", encoding="utf-8")
    off = [finding for finding in findings if finding.verdict in ("shifted", "drift", "jump")]
    for line in (*problems, *(finding.line() for finding in off)):
        print(line)
    counts = Counter(finding.verdict for finding in findings)
    verdicts = ", ".join(
        f"{counts[verdict]} {verdict}" for verdict in ("in sync", "shifted", "drift", "jump", "unclear")
    )
    print(f"{len(findings)} cameras of {len(takes)} takes: {verdicts}")
    if options.offsets is not None:
        print(f"{sum(map(len, offsets.values()))} frame offsets written to {options.offsets}")
    elif offsets:
        print('ARGS="--offsets offsets.json" writes them for --frame-offsets of the index builder')
    return 1 if off or problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
