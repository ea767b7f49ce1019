"""Precision and recall of `make data-check SYNC=1` on planted shifts, and its cost: ``make bench-sync``.

Generated takes are rendered once; the camera that is to be off is encoded again from changed frames, so that the
pattern of the encoder does not move with what is shown: it starts late by up to 30 frames, loses a frame at equal
distances (drift), or loses some frames in the middle (jump). With ``--release folder`` the takes of an Ego-Exo4D
release take part; they are assumed to be in sync. Every camera is shifted on the clock of its take, and ``--encode``
cameras of each take are encoded again without their first frames. As controls, each camera is replaced by that of
another take.

A report is right if it names the planted camera, alone or as one of two, and is not more than three frames off.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from datamodules.ego_exo_clip.index import FilterCounts
from datamodules.ego_exo_clip.sources.ego_exo4d import EgoExo4D
from datamodules.toy_world.render import ego_camera, exo_camera, render
from datamodules.toy_world.scene import PRESETS, simulate
from datamodules.toy_world.video import encode
from datamodules.video.motion import read_signal
from datamodules.video.synchrony import Detector, Finding, TakeFiles

SHIFTS = (0, 1, 2, 3, 5, 10, 20, 30)
FPS = 15
EXOS = ("cam01", "cam02", "cam03")


@dataclass
class Sample:
    """A take with its signals, and the ways in which one camera of it is off: kind, camera, frames, signal."""

    take: TakeFiles
    signals: list[np.ndarray]
    planted: list[tuple[str, int, int, np.ndarray]] = field(default_factory=list)


@dataclass
class Score:
    """Counts of one row of the table."""

    planted: int = 0
    right: int = 0
    wrong: int = 0
    takes: int = 0

    def row(self, name: str) -> str:
        """Return the row."""
        recall = f"{self.right} of {self.planted}" if self.planted else ""
        reports = self.right + self.wrong
        precision = f"{self.right} of {reports}" if self.planted else f"{self.wrong} false alarms"
        return f"| {name} | {self.takes} | {recall} | {precision} |"


def generated(
    folder: Path, seeds: Sequence[int], actions: int, fps: int, size: int, method: str, plant: bool
) -> Iterator[Sample]:
    """Yield generated takes of the default world at another rate, with their planted defects."""
    world = replace(PRESETS["easy"], fps=fps)
    rng = np.random.default_rng(seeds[0])
    for seed in seeds:
        take = simulate(seed, world, actions=actions)
        cameras = [ego_camera(take, size), *(exo_camera(take, name, size * 2 // 3 * 2, size) for name in EXOS)]
        frames = [list(render(take, camera, wearer=number > 0)) for number, camera in enumerate(cameras)]

        def signal(number: int, shown: Sequence[np.ndarray], cameras: list = cameras) -> np.ndarray:
            path = folder / "video.mp4"
            encode(path, shown, cameras[number], fps, far_keys=True)
            return read_signal(path, method, fps)

        names = ("glasses", *EXOS)
        files = TakeFiles(f"take {seed}", fps, names, tuple(f"{seed}/{name}.mp4" for name in names), (0,) * 4)
        sample = Sample(files, [signal(number, shown) for number, shown in enumerate(frames)])
        for frames_off in SHIFTS[1:] if plant else ():
            number = int(rng.integers(4))
            sample.planted.append(("shift", number, -frames_off, signal(number, frames[number][frames_off:])))
        for kind in ("drift", "jump") if plant else ():
            number, length = int(rng.integers(4)), len(frames[0])
            lost = (
                np.linspace(0, length, 20).astype(int)[1:-1]
                if kind == "drift"
                else np.arange(length // 2, length // 2 + 15)
            )
            shown = [frame for at, frame in enumerate(frames[number]) if at not in set(lost.tolist())]
            sample.planted.append((kind, number, -len(lost), signal(number, shown)))
        yield sample


def released(root: Path, method: str, encoded: int) -> Iterator[Sample]:
    """Yield the takes of a release; some cameras are encoded again without their first frames."""
    rng = np.random.default_rng(0)
    for group, _ in EgoExo4D(root).read(FilterCounts()):
        views = (group.egos[0], *group.exos)
        paths = tuple(view.path for view in views)
        files = TakeFiles(group.group_id, group.fps, tuple(view.cam for view in views), paths, (0,) * len(views))
        sample = Sample(files, [read_signal(root / path, method, group.fps) for path in paths])
        for frames_off in SHIFTS[1:]:
            for number, signal in enumerate(sample.signals):
                sample.planted.append(("shift", number, frames_off, np.pad(signal, (frames_off, 0))))
                sample.planted.append(("shift", number, -frames_off, signal[frames_off:]))
        for number in rng.permutation(len(views))[:encoded].tolist():
            for frames_off in (5, 20):
                with tempfile.TemporaryDirectory() as folder:
                    again = Path(folder) / "again.mp4"
                    encode_late(root / paths[number], again, frames_off)
                    signal = read_signal(again, method, group.fps)
                sample.planted.append(("encoded", number, -frames_off, signal))
        yield sample


def encode_late(source: Path, target: Path, frames: int) -> None:
    """Encode a video again without its first frames."""
    with av.open(str(source)) as container, av.open(str(target), "w") as out:
        video = container.streams.video[0]
        stream = out.add_stream("libx264", rate=video.average_rate, options={"preset": "veryfast", "crf": "23"})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = video.width, video.height, "yuv420p", 1
        for number, frame in enumerate(container.decode(video)):
            if number >= frames:
                frame.pts, frame.time_base = number - frames, 1 / Fraction(video.average_rate)
                frame.pict_type = 0
                out.mux(stream.encode(frame))
        out.mux(stream.encode())


def is_right(found: Finding, sample: Sample, kind: str, number: int, frames: int) -> bool:
    """Return True if a report names the planted camera and how far it is off."""
    cam = sample.take.cams[number]
    if kind in ("drift", "jump"):
        return found.cam == cam and found.verdict in ("drift", "jump") and abs(found.last_offset - frames) <= 5
    offset = found.offset if found.cam == cam else -found.offset
    return cam in (found.cam, found.rival) and found.verdict == "shifted" and abs(offset - frames) <= 3


def measure(samples: Sequence[Sample], method: str, false_alarms: float) -> dict[str, Score]:
    """Compare all planted defects, the takes as they are, and the controls."""
    fps = samples[0].take.fps
    detector = Detector(
        {sample.take.group_id: sample.signals for sample in samples}, method, fps, false_alarms=false_alarms
    )
    scores: dict[str, Score] = {}

    def count(row: str, sample: Sample, signals: list[np.ndarray], planted: tuple[str, int, int] | None) -> None:
        score = scores.setdefault(row, Score())
        score.takes += 1
        score.planted += planted is not None
        reports = [
            found for found in detector.compare(sample.take, signals) if found.verdict not in ("in sync", "unclear")
        ]
        hits = sum(planted is not None and is_right(found, sample, *planted) for found in reports)
        score.right += min(hits, 1)
        score.wrong += len(reports) - min(hits, 1)

    for number, sample in enumerate(samples):
        count("as they are", sample, sample.signals, None)
        other = samples[(number + 1) % len(samples)]
        for camera in range(len(sample.signals)):
            mixed = [*sample.signals]
            mixed[camera] = other.signals[camera % len(other.signals)]
            count("control: a camera of another take", sample, mixed, None)
        for kind, camera, frames, signal in sample.planted:
            changed = [*sample.signals]
            changed[camera] = signal
            if kind == "shift" and abs(frames) <= 3:
                count("shifted by 1 to 3 frames", sample, changed, None)
                continue
            view = "egocentric" if camera == 0 else "exocentric"
            rows = {
                "shift": f"shifted by {'5' if abs(frames) == 5 else '10 to 30'} frames, {view}",
                "encoded": f"encoded again {abs(frames)} frames late, {view}",
                "drift": "drift of 18 frames",
                "jump": "15 frames lost",
            }
            count(rows[kind], sample, changed, (kind, camera, frames))
    return scores


def main() -> None:
    """Print a table for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--takes", type=int, default=8, help="generated takes")
    parser.add_argument("--first-seed", type=int, default=100, help="of generated takes; 0 to 19 were used in design")
    parser.add_argument("--actions", type=int, default=72, help="actions of each, about 1.15 s long")
    parser.add_argument("--short", type=int, default=20, help="takes as short as those of the default dataset")
    parser.add_argument("--release", type=Path, help="folder of an Ego-Exo4D release that is in sync")
    parser.add_argument("--encode", type=int, default=1, help="cameras of each take of the release to encode again")
    parser.add_argument("--false-alarms", type=float, default=0.01, help="see the command that is measured")
    parser.add_argument("--methods", nargs="+", default=["packets", "motion"])
    options = parser.parse_args()
    seeds = range(options.first_seed, options.first_seed + options.takes)
    short = range(options.first_seed, options.first_seed + options.short)
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            worlds = {
                f"generated, {FPS} fps": list(
                    generated(Path(folder), seeds, options.actions, FPS, 128, method, plant=True)
                ),
                "as short as the default dataset, 8 fps": list(
                    generated(Path(folder), short, 6, 8, 64, method, plant=False)
                ),
            }
        if options.release is not None:
            started = time.process_time()
            list(released(options.release, method, 0))
            spent_s = time.process_time() - started
            worlds["release"] = list(released(options.release, method, options.encode))
            hours = sum(len(s.signals) * len(s.signals[0]) / s.take.fps for s in worlds["release"]) / 3600
            print(f"{method}: {spent_s / hours:.1f} s of CPU time to read an hour of video of the release")
        for name, samples in worlds.items():
            print(f"\n| {method}, {name} | takes | found | reports that are right |\n|---|---:|---:|---:|", flush=True)
            for row, score in measure(samples, method, options.false_alarms).items():
                print(score.row(row), flush=True)


if __name__ == "__main__":
    main()
