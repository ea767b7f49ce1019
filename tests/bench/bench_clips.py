"""CPU time of a clip, ours against other readers and against the decoder alone: ``make bench-clips``.

The videos are generated: things that move before a textured background under a shaking camera, with grain, 30 fps,
H.264 with B-frames, 448x448 as a wearer's camera and 796x448 as a tripod's. All methods read the same random spans, one
after another in random order, and deliver the same thing: uint8 frames of 336x336, wide frames padded.
Times are CPU times of the process with all its threads, the better of two reads of a clip; ratios to ours are medians
over clips, so that they survive a noisy machine. torchcodec, decord and OpenCV take part where they are installed
(``pip install torchcodec decord opencv-python-headless``), each with its fastest settings,
one thread and its files kept open.
Two more reads of each clip are profiled, which tells where our time goes beyond the decoder's.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.clips.dataset import ClipConfig, ClipTextDataset, Span
from datamodules.clips.loader import ResumableLoader
from datamodules.clips.sampler import GlobalBatchSampler
from datamodules.text import EncodedText, TextEncoder
from datamodules.toy_world.questions import write_tokenizer
from datamodules.video.convert import PAD_RGB
from datamodules.video.reader import ClipReader
from datamodules.video.sampling import segment_midpoints

FPS, SIZE = 30, 336
VIEWS = {"ego": (448, 448), "exo": (796, 448)}
GOPS = (30, 250)
SAMPLING = [(16, 0.68), (8, 2.0), (16, 8.0)]  # frames, seconds
OURS, LIMIT, SEEK, START = "ours", "decoder alone", "seek, all to RGB", "from the start"

# -------------------------------------------------------------------------------------------------------- the videos


def dead_leaves(rng: np.random.Generator, height: int, width: int, leaves: int) -> np.ndarray:
    """Float32 [height, width, 3], textured discs of all sizes upon one another: edges as in natural images."""
    image = np.full((height, width, 3), 110, np.float32)
    rows, columns = np.ogrid[:height, :width]
    for _ in range(leaves):
        radius = min(5 * rng.uniform() ** -0.8, 0.3 * height)
        distance = (rows - rng.uniform(0, height)) ** 2 + (columns - rng.uniform(0, width)) ** 2
        np.copyto(image, rng.normal(110, 45) + rng.normal(0, 15, 3), where=(distance < radius**2)[..., None])
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    texture = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / (frequency + 0.01), (height, width))
    return image + (14 / texture.std() * texture[..., None]).astype(np.float32)


def scene(view: str, seconds: int) -> Iterator[np.ndarray]:
    """Uint8 [height, width, 3] frames: things that move before a background; the wearer's camera shakes."""
    width, height = VIEWS[view]
    rng = np.random.default_rng(width)
    margin = 64
    background = dead_leaves(rng, height + 2 * margin, width + 2 * margin, 2000)
    sides = rng.integers(40, 130, 5)
    things = [dead_leaves(rng, side, side, 200) for side in sides]
    discs = [np.hypot(*np.ogrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j])[..., None] < 1 for side in sides]
    phases, speeds = rng.uniform(0, 6.3, (5, 2)), rng.uniform(0.4, 1.6, (5, 2))
    grain = rng.normal(0, 3, (8, height, width, 1)).astype(np.float32)
    walk = np.cumsum(rng.normal(0, 2.0 if view == "ego" else 0.1, (FPS * seconds, 2)), axis=0)
    for t in range(FPS * seconds):
        y, x = (margin + (margin - 1) * np.sin(walk[t] / margin)).astype(int)
        frame = background[y : y + height, x : x + width].copy()
        for thing, disc, phase, speed in zip(things, discs, phases, speeds, strict=True):
            side = len(thing)
            free = np.array([height, width]) - side
            top, left = ((0.5 + 0.5 * np.sin(phase + speed * t / FPS)) * free).astype(int)
            np.copyto(frame[top : top + side, left : left + side], thing, where=disc)
        frame += np.roll(grain[t % 8], tuple(rng.integers(0, 64, 2)), axis=(0, 1))
        yield frame.clip(0, 255).astype(np.uint8)


def write_video(path: Path, view: str, gop: int, seconds: int) -> None:
    """H.264 as released footage is: medium, B-frames, a key frame every ``gop`` frames."""
    options = {"preset": "medium", "crf": "25", "g": str(gop), "keyint_min": str(gop), "sc_threshold": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height = VIEWS[view]
        stream.pix_fmt, stream.thread_count = "yuv420p", 1
        for frame in scene(view, seconds):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# ------------------------------------------------------------------------------------------------------- the readers


@dataclass(frozen=True)
class Wanted:
    """A clip to read: a file and ascending times."""

    path: Path
    times_s: np.ndarray

    @property
    def frame_numbers(self) -> list[int]:
        """Presentation indices; the generated files have a constant rate."""
        return (np.floor(self.times_s * FPS + 0.03)).astype(int).tolist()


def letterbox(frames: Tensor) -> Tensor:
    """Uint8 [N, 3, h, w] to [N, SIZE, SIZE, 3], padded."""
    height, width = frames.shape[2:]
    short = round(min(height, width) * SIZE / max(height, width) / 2) * 2
    scaled = F.interpolate(frames, size=(short, SIZE), mode="bicubic", antialias=True).permute(0, 2, 3, 1)
    if short == SIZE:
        return scaled.contiguous()
    clip = torch.tensor(PAD_RGB, dtype=torch.uint8).repeat(len(frames), SIZE, SIZE, 1)
    top = (SIZE - short) // 2
    clip[:, top : top + short] = scaled
    return clip


def usual_pyav(wanted: Wanted, seek: bool) -> Tensor:
    """The procedure of most loaders: reopen, seek or not, every frame on the way to RGB, pick, resize in torch."""
    frames: dict[int, np.ndarray] = {}
    with av.open(str(wanted.path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        assert stream.time_base is not None
        if seek:
            container.seek(int(wanted.times_s[0] / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            number, image = round(frame.time * FPS), frame.to_ndarray(format="rgb24")
            if number >= wanted.frame_numbers[0]:
                frames[number] = image
            if number >= wanted.frame_numbers[-1]:
                break
    return letterbox(torch.from_numpy(np.stack([frames[n] for n in wanted.frame_numbers])).permute(0, 3, 1, 2))


class DecoderAlone:
    """Decodes the packets that a clip depends on and nothing else: no reading, no seeking, no conversion.

    For each wanted frame these are the packets from its key frame to itself, without those frames that no other
    refers to and nobody asked for.
    """

    def __init__(self) -> None:
        self.files: dict[Path, tuple[av.container.InputContainer, list[av.Packet], dict[int, int]]] = {}

    def prepare(self, wanted: Wanted) -> Callable[[], int]:
        """Find the packets; the returned call decodes them and returns the number of wanted frames."""
        if wanted.path not in self.files:
            container = av.open(str(wanted.path))
            container.streams.video[0].thread_type = "NONE"
            packets = [p for p in container.demux(video=0) if p.pts is not None]
            by_time = {number: pts for number, pts in enumerate(sorted(p.pts for p in packets))}
            self.files[wanted.path] = container, packets, by_time
        container, packets, by_time = self.files[wanted.path]
        pts = {by_time[number] for number in wanted.frame_numbers}
        keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
        runs: dict[int, int] = {}  # key packet -> last wanted packet after it
        for at in (i for i, packet in enumerate(packets) if packet.pts in pts):
            runs[max(key for key in keys if key <= at)] = at
        codec = container.streams.video[0].codec_context

        def decode() -> int:
            got = 0
            for key, last in runs.items():
                for packet in [*packets[key : last + 1], None]:
                    if packet is not None:
                        codec.skip_frame = "DEFAULT" if packet.pts in pts else "NONREF"
                    got += sum(frame.pts in pts for frame in codec.decode(packet))
                codec.flush_buffers()
            return got

        return decode


def torchcodec_reader() -> Callable[[Wanted], Tensor]:
    """torchcodec, approximate seeking, one thread, decoders kept."""
    from torchcodec.decoders import VideoDecoder

    @cache
    def decoder(path: Path) -> VideoDecoder:
        return VideoDecoder(str(path), seek_mode="approximate", num_ffmpeg_threads=1)

    return lambda wanted: letterbox(decoder(wanted.path).get_frames_played_at(wanted.times_s.tolist()).data)


def decord_reader() -> Callable[[Wanted], Tensor]:
    """decord, one thread, resized by decord itself, readers kept."""
    import decord

    @cache
    def reader(path: Path) -> decord.VideoReader:
        return decord.VideoReader(str(path), num_threads=1)

    def read(wanted: Wanted) -> Tensor:
        frames = reader(wanted.path).get_batch(wanted.frame_numbers).asnumpy()
        return letterbox(torch.from_numpy(frames).permute(0, 3, 1, 2))

    return read


def opencv_reader() -> Callable[[Wanted], Tensor]:
    """OpenCV, one thread, seeks by frame number, converts wanted frames only, captures kept."""
    import cv2

    cv2.setNumThreads(1)

    @cache
    def capture(path: Path) -> cv2.VideoCapture:
        return cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])

    def read(wanted: Wanted) -> Tensor:
        video, numbers = capture(wanted.path), wanted.frame_numbers
        video.set(cv2.CAP_PROP_POS_FRAMES, numbers[0])
        frames = {}
        for number in range(numbers[0], numbers[-1] + 1):
            video.grab()
            if number in numbers:
                frames[number] = cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB)
        return letterbox(torch.from_numpy(np.stack([frames[n] for n in numbers])).permute(0, 3, 1, 2))

    return read


# -------------------------------------------------------------------------------------------------- the measurements

OTHERS = {
    "torchcodec": ("torchcodec", torchcodec_reader),
    "decord": ("decord", decord_reader),
    "OpenCV": ("opencv-python-headless", opencv_reader),
}
LENT = "BENCH_CLIPS_FFMPEG"
DECODING, CONVERTING, REST = "decoding", "scaling, RGB", "rest"
PHASES = {  # functions of datamodules/video, without the functions that they call there
    DECODING: {"decode_packets"},
    CONVERTING: {"_scaled_rgb"},
    "copying": {"write"},
    "packets": {"demux_span", "take_until"},
    "checks": {"is_torn"},
    REST: set(),
}


def installed() -> tuple[dict[str, Callable[[Wanted], Tensor]], dict[str, str]]:
    """The readers that can be imported and read a clip, and the version or the trouble of each."""
    readers, notes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        trial = Wanted(Path(folder, "trial.mp4"), np.array([0.1, 0.4]))
        write_video(trial.path, "ego", GOPS[0], 1)
        for name, (package, make) in OTHERS.items():
            try:
                notes[name] = version(package)
                read = make()
                read(trial)
                readers[name] = read
            except PackageNotFoundError:
                notes[name] = "not installed"
            except (ImportError, OSError, RuntimeError) as error:
                if name == "torchcodec" and LENT not in os.environ:
                    lend_ffmpeg()
                notes[name] += f" does not work ({str(error).strip().splitlines()[0]})"
    return readers, notes


def lend_ffmpeg() -> None:
    """Start again with the FFmpeg inside PyAV as the system's: torchcodec brings none, and so decodes with the same."""
    folder = tempfile.mkdtemp()
    for file in (Path(av.__file__).parents[1] / "av.libs").glob("lib*.so.*"):
        Path(folder, re.sub(r"-[0-9a-f]{8}(\.so\.\d+).*", r"\1", file.name)).symlink_to(file)
    os.environ[LENT] = folder
    os.environ["LD_LIBRARY_PATH"] = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    os.execv(sys.executable, sys.orig_argv)


def cpu_ms(call: Callable[[], object]) -> float:
    """Milliseconds of CPU time in all threads of this process."""
    before = time.process_time()
    call()
    return 1000 * (time.process_time() - before)


def phases(read: Callable[[], object]) -> dict[str, float]:
    """CPU milliseconds of this thread in each of ``PHASES``, of the better of two reads by ``ClipReader``."""
    return min((_phases(read) for _ in range(2)), key=lambda spent: sum(spent.values()))


def _phases(read: Callable[[], object]) -> dict[str, float]:
    profile = cProfile.Profile(time.thread_time, builtins=False)
    profile.runcall(read)
    spent = dict.fromkeys(PHASES, 0.0)
    for entry in profile.getstats():
        name = entry.code.co_name  # type: ignore[union-attr]  # a string for builtins only
        phase = next((phase for phase, names in PHASES.items() if name in names), REST)
        spent[phase] += 1000 * entry.inlinetime
    return spent


def bench_readers(
    videos: dict[str, Path], seconds: int, rounds: int, others: dict[str, Callable[[Wanted], Tensor]]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[dict[str, float]]]]:
    """By configuration, CPU milliseconds of every method on the same clips, and the phases of ours.

    ``START`` reads every fifth clip only.
    """
    reader, decoder, draw = ClipReader(), DecoderAlone(), random.Random(0)
    methods: dict[str, Callable[[Wanted], object]] = {
        OURS: lambda wanted: reader.read(wanted.path, wanted.times_s, SIZE),
        SEEK: lambda wanted: usual_pyav(wanted, seek=True),
        **others,
    }
    taken: dict[str, dict[str, list[float]]] = {}
    profiles: dict[str, list[dict[str, float]]] = {}
    configurations = [(video, *sampling) for video in videos for sampling in SAMPLING]
    for turn in range(-1, rounds):  # the first one opens files and is not counted
        for video, frames, span_s in draw.sample(configurations, len(configurations)):
            start_s = draw.uniform(0, seconds - span_s - 0.1)
            wanted = Wanted(videos[video], segment_midpoints(start_s, start_s + span_s, frames))
            calls: dict[str, Callable[[], object]] = {LIMIT: decoder.prepare(wanted)}
            calls |= {name: lambda method=method, wanted=wanted: method(wanted) for name, method in methods.items()}
            if turn % 5 == 0:
                calls[START] = lambda wanted=wanted: usual_pyav(wanted, seek=False)
            configuration = f"{video}, {frames} of {span_s:g} s"
            row = taken.setdefault(configuration, {})
            for name in draw.sample(list(calls), len(calls)):
                spent = min(cpu_ms(calls[name]) for _ in range(1 if name == START else 2))
                if turn >= 0:
                    row.setdefault(name, []).append(spent)
            if turn >= 0:
                profiles.setdefault(configuration, []).append(phases(calls[OURS]))
        print(f"  round {turn + 1} of {rounds}", file=sys.stderr)
    return taken, profiles


class Pairs(ClipTextDataset):
    """Random pairs of the two generated cameras, as stage 2 reads them."""

    def __init__(self, videos: dict[str, Path], seconds: int, tokenizer: str) -> None:
        super().__init__(ClipConfig(num_frames=16, image_size=SIZE), TextEncoder(tokenizer, max_text_tokens=64))
        self.videos_30, self.latest_s = {view: videos[f"{view} {GOPS[0]}"] for view in VIEWS}, seconds - 0.8
        self.reader = ClipReader(timeout_s=60)

    def __len__(self) -> int:
        return 10_000

    def name(self, index: int) -> str:
        return str(index)

    def span(self, index: int, epoch: int) -> Span:
        start_s = random.Random(index).uniform(0, self.latest_s)
        return Span(self.videos_30, start_s, start_s + 0.68)

    def text(self, index: int, epoch: int) -> EncodedText:
        return self.encoder.plain("left")


def children_cpu_s() -> float:
    """Seconds of CPU time of all child processes that are alive."""
    ticks = 0
    for child in multiprocessing.active_children():
        with suppress(FileNotFoundError):
            ticks += sum(map(int, Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def bench_loader(dataset: Pairs, blocks: int) -> dict[int, dict[str, list[float]]]:
    """CPU and wall milliseconds of one pair through the loader, by number of reading processes."""
    taken: dict[int, dict[str, list[float]]] = {workers: {"cpu": [], "wall": []} for workers in (0, 1, 2)}
    draw = random.Random(0)
    for block in range(blocks):
        for workers in draw.sample(list(taken), len(taken)):
            sampler = GlobalBatchSampler(len(dataset), 4, accumulate=1, rank=0, world=1, seed=block)
            batches = iter(ResumableLoader(dataset, sampler, workers))
            for _ in range(4):  # until the processes are as far ahead as they get
                next(batches)
            cpu_s, wall_s = time.process_time() + children_cpu_s(), time.perf_counter()
            for _ in range(10):
                next(batches)
            taken[workers]["cpu"].append(25 * (time.process_time() + children_cpu_s() - cpu_s))
            taken[workers]["wall"].append(25 * (time.perf_counter() - wall_s))
            del batches
    return taken


def growth(videos: dict[str, Path], seconds: int, reads: int) -> dict[str, float]:
    """Return the growth of a process from fifty reads to many: threads, descriptors, megabytes."""
    reader, draw = ClipReader(timeout_s=60), random.Random(0)

    def held() -> dict[str, float]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        counts = {"threads": len(os.listdir("/proc/self/task")), "descriptors": len(os.listdir("/proc/self/fd"))}
        return {**counts, "MB": pages * os.sysconf("SC_PAGE_SIZE") / 1e6}

    before = {}
    for read in range(reads):
        if read == 50:
            before = held()
        start_s = draw.uniform(0, seconds - 0.5)
        reader.read(draw.choice(list(videos.values())), segment_midpoints(start_s, start_s + 0.3, 4), SIZE)
    after = held()
    return {name: after[name] - before[name] for name in after}


# -------------------------------------------------------------------------------------------------------- the tables


def ratios(row: dict[str, list[float]], name: str) -> float:
    """Median over clips of a method's time over ours."""
    return statistics.median(other / ours for other, ours in zip(row[name], _same_clips(row, name), strict=True))


def _same_clips(row: dict[str, list[float]], name: str) -> list[float]:
    return row[OURS][::5] if name == START else row[OURS]


def geometric_mean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(statistics.mean(map(math.log, values)))


def summary(taken: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """For each method but ours: geometric mean over configurations, worst and best of the ratios."""
    names = [name for name in next(iter(taken.values())) if name != OURS]
    rows = {name: [ratios(row, name) for row in taken.values()] for name in names}
    return {name: {"mean": geometric_mean(row), "least": min(row), "most": max(row)} for name, row in rows.items()}


def reader_table(taken: dict[str, dict[str, list[float]]]) -> str:
    """Milliseconds of ours and ratios of all others, in Markdown."""
    others = [name for name in (LIMIT, *OTHERS, SEEK, START) if name in next(iter(taken.values()))]
    lines = [f"| file, frames of span | {OURS}, ms | {' | '.join(others)} |", f"|---|---:|{'---:|' * len(others)}"]
    for configuration, row in sorted(taken.items()):
        cells = [f"{ratios(row, name):.2f}" for name in others]
        lines.append(f"| {configuration} | {statistics.median(row[OURS]):.0f} | {' | '.join(cells)} |")
    means = summary(taken)
    cells = [f"{means[name]['mean']:.2f}" for name in others]
    lines.append(f"| geometric mean | | {' | '.join(cells)} |")
    return "\n".join(lines)


def phase_table(taken: dict[str, dict[str, list[float]]], profiles: dict[str, list[dict[str, float]]]) -> str:
    """Per cent of our time by phase, and the share of the decoder reached and left by converting, in Markdown."""
    lines = [
        f"| file, frames of span | {' | '.join(PHASES)} | {LIMIT} | at most |",
        f"|---|{'---:|' * (len(PHASES) + 2)}",
    ]
    shares: list[tuple[float, float]] = []
    for configuration, clips in sorted(profiles.items()):
        together = {phase: sum(clip[phase] for clip in clips) for phase in PHASES}
        cells = [f"{100 * spent / sum(together.values()):.1f}" for spent in together.values()]
        at_most = together[DECODING] / (together[DECODING] + together[CONVERTING])
        shares.append((ratios(taken[configuration], LIMIT), at_most))
        lines.append(f"| {configuration} | {' | '.join(cells)} | {shares[-1][0]:.2f} | {at_most:.2f} |")
    reached, at_most = (geometric_mean(list(column)) for column in zip(*shares, strict=True))
    lines.append(f"| geometric mean | {'| ' * len(PHASES)}| {reached:.2f} | {at_most:.2f} |")
    return "\n".join(lines)


def loader_table(taken: dict[int, dict[str, list[float]]]) -> str:
    """Milliseconds of a pair through the loader, in Markdown."""
    lines = ["| reading processes | CPU ms a pair | wall ms a pair |", "|---|---:|---:|"]
    for workers, row in taken.items():
        lines.append(f"| {workers} | {statistics.median(row['cpu']):.0f} | {statistics.median(row['wall']):.0f} |")
    return "\n".join(lines)


def targets(means: dict[str, dict[str, float]], from_start: float, loader: dict[int, dict[str, list[float]]]) -> str:
    """Return the targets and the results in Markdown."""
    in_process, one_worker = (statistics.median(loader[workers]["cpu"]) for workers in (0, 1))
    aims = [
        (f"share of {LIMIT}, geometric mean", means[LIMIT]["mean"], 0.90),
        (f"share of {LIMIT}, worst configuration", means[LIMIT]["least"], 0.75),
        (f"{SEEK}, geometric mean", means[SEEK]["mean"], 1.7),
        (f"{SEEK}, worst configuration", means[SEEK]["least"], 1.5),
        (f"{START}, geometric mean", means[START]["mean"], 5.0),
        (f"{START}, exo {GOPS[0]}, 16 of 0.68 s", from_start, 12.0),
        ("one reading process in place of none, CPU saved", in_process / one_worker, 1 / 1.2),
    ]
    for name, mean, least in (("torchcodec", 1.4, 1.2), ("decord", 1.6, 1.1), ("OpenCV", 1.3, 1.3)):
        if name in means:
            aims.append((f"{name}, geometric mean", means[name]["mean"], mean))
            aims.append((f"{name}, worst configuration", means[name]["least"], least))
    lines = ["| ratio to ours | reached | aim | |", "|---|---:|---:|---|"]
    lines += [f"| {n} | {got:.2f} | {aim:.2f} | {'' if got >= aim else 'missed'} |" for n, got, aim in aims]
    return "\n".join(lines)


def main() -> None:
    """Generate, measure, print, keep."""
    parser = argparse.ArgumentParser(description="CPU time of clips, ours and others'")
    parser.add_argument("--quick", action="store_true", help="videos of 12 s, 5 rounds: minutes, and rougher")
    parser.add_argument("--json", type=Path, help="file for every single measurement")
    parser.add_argument("--videos", type=Path, help="folder that keeps the generated videos and is used again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    others, notes = installed()
    seconds, rounds, blocks = (12, 5, 2) if options.quick else (48, 25, 5)
    folder = options.videos or Path(tempfile.mkdtemp())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        videos = {f"{view} {gop}": folder / f"{view}_{gop}_{seconds}.mp4" for view in VIEWS for gop in GOPS}
        for name, path in videos.items():
            if not path.exists():
                print(f"  writing {name}", file=sys.stderr)
                write_video(path.with_suffix(".part.mp4"), name.split()[0], int(name.split()[1]), seconds)
                path.with_suffix(".part.mp4").rename(path)
        rates = {name: path.stat().st_size * 8e-6 / seconds for name, path in videos.items()}
        taken, profiles = bench_readers(videos, seconds, rounds, others)
        more = growth(videos, seconds, 200 if options.quick else 1000)
        write_tokenizer(folder)
        loader = bench_loader(Pairs(videos, seconds, str(folder)), blocks)
    finally:
        if options.videos is None:
            shutil.rmtree(folder)
        if LENT in os.environ:
            shutil.rmtree(os.environ[LENT])
    means = summary(taken)
    versions = {"Python": platform.python_version(), "PyAV": av.__version__, "torch": torch.__version__, **notes}
    print(f"\n{', '.join(f'{name} {text}' for name, text in versions.items())}; {os.cpu_count()} cores")
    print("Mbit/s: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))
    print(f"\nA clip of 336 px, {OURS} in CPU ms, others in multiples of it\n\n{reader_table(taken)}")
    print("\nPer cent of our CPU time; at most: share if nothing but scaling were added to decoding")
    print(f"\n{phase_table(taken, profiles)}")
    print(f"\nA pair of clips, 16 of 0.68 s each, in batches of 4\n\n{loader_table(loader)}")
    print("\nHeld after all reads over the first 50: " + ", ".join(f"{name} {n:+.0f}" for name, n in more.items()))
    from_start = ratios(taken[f"exo {GOPS[0]}, 16 of 0.68 s"], START)
    print(f"\n{targets(means, from_start, loader)}")
    if options.json is not None:
        kept = {"versions": versions, "cores": os.cpu_count(), "mbit_per_s": rates, "quick": options.quick}
        kept |= {"ratios": means, "clip_cpu_ms": taken, "phase_cpu_ms": profiles, "loader_ms": loader, "growth": more}
        options.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
