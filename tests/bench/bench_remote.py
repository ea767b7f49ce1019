"""Clips of remote videos against the same on local disk: ``make bench-remote``.

A web server in a process of its own serves the videos, each answer after a delay. Random clips of 16 frames are read
from it, with an empty cache and again with a full one, and from disk before or after, in one run. Then 1,000 clips are
read while 5 % of the requests fail: each must show the local frames, or name its file.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from datamodules.video.errors import ClipDecodeError
from datamodules.video.probe import probe
from datamodules.video.reader import ClipReader
from datamodules.video.remote import data_path
from datamodules.video.sampling import segment_midpoints

SIZE, FRAMES = 224, 16
FPS, SECONDS = 30, 15


def generate(folder: Path, minutes: int) -> None:
    """Write a take as long as real ones are, at 1.4 Mbit/s as Ego-Exo4D's 448p: 15 s whose packets are repeated."""
    short = folder / "short"
    rng = np.random.default_rng(0)
    background = np.kron(rng.integers(40, 200, (56, 100, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    grain = rng.integers(0, 9, (8, *background.shape), dtype=np.uint8)
    with av.open(str(short.with_suffix(".mp4")), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "g": str(FPS)})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 800, 448, "yuv420p", 1_400_000
        for number in range(SECONDS * FPS):
            image = np.roll(background, number, axis=1) + grain[number % len(grain)]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    with av.open(str(short.with_suffix(".mp4"))) as old:
        stream = old.streams.video[0]
        packets = [packet for packet in old.demux(stream) if packet.dts is not None]
        ticks = [(packet.pts, packet.dts) for packet in packets]
        length = round(SECONDS / stream.time_base)
        with av.open(str(folder / "take.mp4"), "w") as new:
            copy = new.add_stream_from_template(stream)
            for turn in range(60 * minutes // SECONDS):
                for packet, (pts, dts) in zip(packets, ticks, strict=True):
                    packet.pts, packet.dts, packet.stream = pts + turn * length, dts + turn * length, copy
                    packet.time_base = stream.time_base  # muxing rescales the packet in place
                    packet.duration = length // (SECONDS * FPS)
                    new.mux(packet)
    short.with_suffix(".mp4").unlink()


def serve(folder: str, delay_s: float, failing: float) -> None:
    """Serve until the process is ended; print the address, and the bytes sent on each line that arrives."""
    from range_server import serving

    draw = random.Random(0)
    kinds = ["drop", "cut", 500, 503]
    with serving(folder) as server:
        server.delay_s = delay_s
        print(server.url, flush=True)
        for line in sys.stdin:
            if line.startswith("fail"):
                server.trouble = lambda *_: draw.choice(kinds) if draw.random() < failing else None
            print(server.sent_bytes, len(server.requests), flush=True)


def main() -> int:
    """Measure and print; return 1 if a clip was neither right nor named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="folder of .mp4 files (default: a generated take)")
    parser.add_argument("--minutes", type=int, default=10, help="length of the generated take")
    parser.add_argument("--clips", type=int, default=60, help="clips that are timed")
    parser.add_argument("--reads", type=int, default=1000, help="clips that are read while requests fail")
    parser.add_argument("--delay", type=float, default=0.02, help="seconds before each answer")
    parser.add_argument("--failing", type=float, default=0.05, help="share of the requests that fail")
    parser.add_argument("--serve", nargs=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], options.delay, options.failing)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        return measure(options, Path(scratch))


def measure(options: argparse.Namespace, scratch: Path) -> int:
    """Compare, then read with failing requests."""
    folder = options.videos or scratch / "videos"
    if options.videos is None:
        folder.mkdir()
        generate(folder, options.minutes)
    command = [sys.executable, __file__, "--serve", folder, "--delay", str(options.delay)]
    server = subprocess.Popen(
        [*map(str, command), "--failing", str(options.failing)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    root = data_path(server.stdout.readline().strip())

    def sent(word: str = "") -> tuple[int, int]:
        server.stdin.write(word + "\n")
        server.stdin.flush()
        count, requests = map(int, server.stdout.readline().split())
        return count, requests

    draw = random.Random(1)
    lengths_s = {file.name: probe(file).duration_s for file in sorted(folder.glob("*.mp4"))}

    def clip() -> tuple[str, list[float]]:
        name = draw.choice(list(lengths_s))
        start_s = draw.uniform(0, lengths_s[name] - 1.0)
        return name, segment_midpoints(start_s, start_s + 0.68, FRAMES)

    # Interleaved: local, remote with an empty cache, and the same clip again out of the cache.
    os.environ["EXO2EGO_CACHE"] = str(scratch / "cache")
    local, away = ClipReader(), ClipReader()
    spent: dict[str, list[float]] = {"local disk": [], "storage, empty cache": [], "storage, from the cache": []}
    bytes_per_clip: list[int] = []
    for name in lengths_s:
        local.read(folder / name, [0.1], SIZE)
        away.read(root / name, [0.1], SIZE)
    opened = sent()[0]
    for _ in range(options.clips):
        name, times_s = clip()
        shutil.rmtree(scratch / "cache")
        fresh = ClipReader()
        fresh.read(root / name, [0.1], SIZE)
        before = sent()[0]
        turns = [("storage, empty cache", fresh, root), ("storage, from the cache", away, root)]
        turns.insert(draw.choice([0, 2]), ("local disk", local, folder))
        for kind, reader, place in turns:
            started_s = time.perf_counter()
            reader.read(place / name, times_s, SIZE)
            spent[kind].append(time.perf_counter() - started_s)
        bytes_per_clip.append(sent()[0] - before)
        fresh.close()
    size = statistics.mean((folder / name).stat().st_size for name in lengths_s)
    mean = statistics.mean(bytes_per_clip)
    print(
        f"{len(lengths_s)} files of {size / 1e6:.1f} MB on average; {opened / len(lengths_s) / 1e6:.2f} MB to open one"
    )
    print(f"bytes of a clip: {mean / 1e6:.2f} MB, {100 * mean / size:.2f} % of its file")
    for kind, times in spent.items():
        print(f"{kind:24} {1 / statistics.median(times):6.1f} clips/s (median of {len(times)})")

    # Requests fail from now on, and every clip is read without the cache of the one before.
    sent("fail")
    requests_before = sent()[1]
    right = named = wrong = 0
    for _ in range(options.reads):
        name, times_s = clip()
        shutil.rmtree(scratch / "cache", ignore_errors=True)
        expected = local.read(folder / name, times_s, SIZE)
        fresh = ClipReader()
        try:
            found = fresh.read(root / name, times_s, SIZE).frames.equal(expected.frames)
            right, wrong = right + found, wrong + (not found)
        except ClipDecodeError as error:
            named += str(root / name) in str(error)
            wrong += str(root / name) not in str(error)
        fresh.close()
    requests = sent()[1] - requests_before
    print(f"{options.failing:.0%} of {requests} requests failing: {right} clips right, {named} named, {wrong} wrong")
    server.terminate()
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
