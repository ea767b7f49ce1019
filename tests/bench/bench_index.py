"""Cost of the index of pairs: ``python tests/bench/bench_index.py`` prints building time, loading time and memory.

A release of Ego-Exo4D's size is invented (5,035 takes, 432,467 narrations, video files of one byte) and built as
``make ego-exoclip`` builds it. Its index is then loaded by several ranks with many worker processes each, which look up
pairs at random. Memory of the index is the proportional set size of all those processes together, less that of the same
processes with an index of a single take.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import uuid
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from datamodules.clips.dataset import ClipConfig
from datamodules.ego_exo_clip.datamodule import EgoExoClipDataset
from datamodules.ego_exo_clip.index import PairIndex

TAKES, TRAIN_TAKES, ANNOTATED_SHARE, NARRATIONS = 5035, 3072, 4965 / 5035, 432_467
MEBIBYTE = 2**20
WORDS = "lifts puts turns opens the a kettle bowl bicycle wheel ball on to from table with his left right hand".split()


def write_release(root: Path, takes: int, narrations: int) -> None:
    """Metadata, annotations and files of one byte; a quarter of the takes has two annotators."""
    rng = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    annotations: dict[str, dict[str, Any]] = {"train": {}, "val": {}}
    splits: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for number in range(takes):
        uid, name = str(uuid.UUID(int=number + (1 << 120))), f"site_scenario{number // 8:04d}_{number % 8}"
        split = "train" if number * TAKES < TRAIN_TAKES * takes else "val"
        splits[split].append(uid)
        cameras = ["aria01", *(f"cam0{n}" for n in range(1, 5 + int(rng.random() < 0.29)))]
        seconds = float(np.round(rng.gamma(2.0, 79.0) + 5.0, 3))
        records.append(_take(uid, name, cameras, seconds))
        folder = root / "takes" / name / "frame_aligned_videos" / "downscaled" / "448"
        folder.mkdir(parents=True)
        for camera in cameras:
            (folder / (f"{camera}_214-1.mp4" if camera.startswith("aria") else f"{camera}.mp4")).write_bytes(b"0")
        if rng.random() < ANNOTATED_SHARE:
            narration = max(2, int(rng.normal(narrations / (takes * ANNOTATED_SHARE), 20)))
            parts = [narration - narration // 2, narration // 2] if rng.random() < 0.25 else [narration]
            annotations[split][uid] = [_annotator(rng, number, part, seconds, cameras) for part in parts if part]
    (root / "annotations").mkdir()
    (root / "takes.json").write_text(json.dumps(records))
    (root / "annotations" / "splits.json").write_text(json.dumps({"split_to_take_uids": splits}))
    for split, described in annotations.items():
        file = root / "annotations" / f"atomic_descriptions_{split}.json"
        file.write_text(json.dumps({"ds": "invented", "take_cam_id_map": {}, "annotations": described}))


def _take(uid: str, name: str, cameras: list[str], seconds: float) -> dict[str, Any]:
    streams = {"rgb": "214-1", "slam-left": "1201-1", "slam-right": "1201-2", "et": "211-1"}
    videos: dict[str, Any] = {"collage": {"0": {"relative_path": None}}, "best_exo": {"0": {"relative_path": None}}}
    for camera in cameras:
        files = {s: f"{camera}_{n}.mp4" for s, n in streams.items()} if camera == "aria01" else {"0": f"{camera}.mp4"}
        videos[camera] = {
            stream: {
                "cam_id": camera,
                "stream_id": stream,
                "readable_stream_id": stream,
                "clip_uid": str(uuid.UUID(int=7)),
                "relative_path": f"frame_aligned_videos/{file}",
            }
            for stream, file in files.items()
        }
    return {
        "take_uid": uid,
        "take_name": name,
        "root_dir": f"takes/{name}",
        "duration_sec": seconds,
        "best_exo": "cam02",
        "task_name": "Make tea",
        "parent_task_name": "Cooking",
        "parent_task_id": 1000,
        "validated": True,
        "frame_aligned_videos": videos,
        "capture": {
            "capture_name": name,
            "cameras": [
                {"cam_id": camera, "is_ego": camera == "aria01", "name": camera, "device_type": "camera", "uid": uid}
                for camera in cameras
            ],
        },
    }


def _annotator(rng: np.random.Generator, number: int, count: int, seconds: float, cameras: list[str]) -> dict[str, Any]:
    times = np.sort(rng.uniform(0, seconds, count)).round(5).tolist()
    return {
        "annotation_uid": f"a-{number}",
        "annotator_id": str(number % 50),
        "rejected": False,
        "descriptions": [
            {
                "text": f"C {' '.join(rng.choice(WORDS, 9))} {index}.",
                "timestamp": time_s,
                "subject": "C",
                "ego_visible": bool(rng.random() < 0.9),
                "best_exo": {"raw_cam_id": "2", "cam_id": cameras[1 + index % (len(cameras) - 1)]},
                "unsure": False,
            }
            for index, time_s in enumerate(times)
        ],
    }


def build(root: Path) -> int:
    """Build as the command line does, in a process of its own; its peak resident set in bytes."""
    program = "\n".join(
        (
            "import sys; from datamodules.ego_exo_clip.build import main",
            "status = main(sys.argv[1:])",
            "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))",
            "print('peak', peak.split()[1]); sys.exit(status)",
        )
    )
    command = [sys.executable, "-c", program, "ego-exo4d", str(root)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    table, _, peak = printed.rpartition("peak ")
    print(table, end="")
    return int(peak) * 1024


class _LookUps(Dataset[int]):
    """Looks up pairs without decoding them."""

    def __init__(self, pairs: EgoExoClipDataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, number: int) -> int:
        index = number * 7919 % len(self.pairs)
        span, caption = self.pairs.span(index, 0), self.pairs.pairs.texts[self.pairs._clip(index)]
        return len(str(span.paths)) + len(caption) + len(self.pairs.name(index))


def _rank(folder: Path, workers: int, look_ups: int, pipe: Connection) -> None:
    """Load the index, let the workers look things up, and stay until told to go."""
    start = time.perf_counter()
    pairs = EgoExoClipDataset(
        PairIndex.read(folder), Path("/data"), ["ego", "exo"], "all", None, 0, ClipConfig(16, 336), encoder=None
    )  # type: ignore[arg-type]
    loading_s = time.perf_counter() - start
    loader = DataLoader(
        _LookUps(pairs),
        batch_size=50,
        sampler=range(workers * look_ups),
        num_workers=workers,
        multiprocessing_context="fork",  # as it is in a process that was not spawned itself
        persistent_workers=True,
    )
    checked = sum(int(batch.sum()) for batch in loader)
    processes = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
    pipe.send((loading_s, len(pairs), checked, processes))
    pipe.recv()


def _pss(process: int) -> int:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def memory(folder: Path, ranks: int, workers: int, look_ups: int) -> tuple[float, int, int, int]:
    """Longest loading time, pairs, processes and their proportional set size in bytes."""
    context = multiprocessing.get_context("spawn")  # ranks share no memory
    started = []
    for _ in range(ranks):
        here, there = context.Pipe()
        process = context.Process(target=_rank, args=(folder, workers, look_ups, there))
        process.start()
        there.close()
        started.append((process, here))
    reports = [here.recv() for _, here in started]
    processes = [number for *_, numbers in reports for number in numbers]
    total = sum(map(_pss, processes))
    for process, here in started:
        here.send("go")
        process.join()
    return max(report[0] for report in reports), reports[0][1], len(processes), total


def single_take(folder: Path, out: Path) -> None:
    """The first take of an index as an index of its own."""
    out.mkdir()
    group = (folder / "groups.jsonl").open().readline()
    with (folder / "clips.jsonl").open() as lines:
        clips = [line for _, line in zip(range(500), lines, strict=False)]
    own = [line for line in clips if json.loads(line)["group_id"] == json.loads(group)["group_id"]]
    (out / "groups.jsonl").write_text(group)
    (out / "clips.jsonl").write_text("".join(own))
    (out / "index.json").write_text(json.dumps({"schema_version": 1, "groups": 1, "clips": len(own)}))


def main() -> None:
    """Print both measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--takes", type=int, default=TAKES)
    parser.add_argument("--narrations", type=int, default=NARRATIONS)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--workers", type=int, default=16, help="of each rank")
    parser.add_argument("--look-ups", type=int, default=20_000, help="of each worker")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "release"
        root.mkdir()
        write_release(root, given.takes, given.narrations)
        start = time.perf_counter()
        peak = build(root)
        print(f"built in {time.perf_counter() - start:.1f} s, peak {peak / MEBIBYTE:.0f} MiB of memory")
        index = root / "ego_exo_clip"
        single_take(index, Path(scratch) / "single")
        loading_s, pairs, processes, total = memory(index, given.ranks, given.workers, given.look_ups)
        *_, without = memory(Path(scratch) / "single", given.ranks, given.workers, given.look_ups)
        print(
            f"{pairs:,} pairs loaded in {loading_s:.1f} s\n{given.ranks} ranks with {given.workers} workers each, "
            f"{processes} processes: {total / MEBIBYTE:.0f} MiB in all, {without / MEBIBYTE:.0f} MiB with an index of "
            f"one take, so {(total - without) / MEBIBYTE:.0f} MiB for the index"
        )


if __name__ == "__main__":
    main()
