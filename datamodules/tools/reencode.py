"""Re-encode videos for random access: ``python -m datamodules.tools.reencode --root ROOT --index INDEX --out OUT``.

Reading a clip decodes everything from the last key frame onwards, so frequent key frames, small frames and a bitstream
without its costly parts save most of the work. Every file is written again as H.264 in MP4 under its own
relative path (an ``.mkv`` keeps its name), upright and with square pixels, without sound. Every frame keeps its time,
so annotations and indices stay valid with ``OUT`` as the data root.

A file takes its name only after it was read back: all frames are present, at the times of the source, and each shows
the source's frame of that time. So every file with a final name is complete, and a run that was interrupted is
continued by running it again. Sources are never touched.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import OutputContainer
from av.filter import Graph
from av.packet import Packet
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from tqdm import tqdm

from datamodules.io.atomic import atomic_path
from datamodules.io.jsonl import InvalidRecords
from datamodules.io.parallel import Beat, Failure, run_tasks
from datamodules.tools.data_check import decode_whole, read_annotations
from datamodules.video.errors import ClipDecodeError, FileMissing
from datamodules.video.media import media_url, open_input, quarter_turns
from datamodules.video.probe import probe
from datamodules.video.remote import data_path, is_remote, require_reachable
from datamodules.video.sampling import segment_midpoints

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
TUNES = ("none", "fastdecode", "film", "animation", "grain", "stillimage", "zerolatency")

CLIP_S = 0.68  # mean clip of Ego-ExoClip (Exo2Ego, arXiv 2503.09143), for the measured saving
_MARK = "re-encoded with "
_FIX = "; nothing was kept: use the file as it is"
INTERLACED = (
    "its frames are interlaced, and scaling would mix fields of different times: deinterlace it first, such as by "
    "ffmpeg -i IN -vf bwdif -c:v libx264 -crf 16 -an OUT.mp4"
)
_THUMBNAIL = 16  # pixels
_SAME_LEVELS = 8.0  # of 255: mean difference of thumbnails that show the same frame, however strongly compressed
_FULL_RANGE = 2  # FFmpeg's number of it
_UNSPECIFIED = 2  # colour matrix, in the numbering of ISO/IEC 23001-8
_MOVED_LEVELS = 1.0  # neighbouring frames that differ by more can be told apart after compression
_SHIFTED_LEVELS = 0.5  # the same for all frames of a file taken together


class ReencodeError(ValueError):
    """A file could not be re-encoded; one line with the file and how to fix it."""


@dataclass(frozen=True)
class Encoding:
    """Compression of the frames; options of x264 under its own names.

    Attributes:
        short_side: pixels of the shorter side, even; smaller sources keep their size.
        gop: frames from one key frame to the next.
        crf: quality, 0 (best) to 40.
        preset: effort of the encoder.
        tune: ``fastdecode`` leaves out what is costly to decode; ``none`` for x264's default.
    """

    short_side: int = 336
    gop: int = 8
    crf: float = 20.0
    preset: str = "medium"
    tune: str = "fastdecode"

    def __post_init__(self) -> None:
        """Raise ValueError for options that x264 does not have."""
        if self.short_side < 16 or self.short_side % 2:
            raise ValueError(f"--short-side is {self.short_side}; expected an even number from 16 on")
        if self.gop < 1:
            raise ValueError(f"--gop is {self.gop}; expected at least 1")
        if not 0 <= self.crf <= 40:  # beyond, a frame cannot be told from its neighbours
            raise ValueError(f"--crf is {self.crf:g}; expected 0 to 40")
        for option, value, allowed in (("preset", self.preset, PRESETS), ("tune", self.tune, TUNES)):
            if value not in allowed:
                raise ValueError(f"--{option} is {value!r}; expected one of {', '.join(allowed)}")

    @property
    def x264_options(self) -> dict[str, str]:
        """Options in the form of the encoder."""
        options = {"preset": self.preset, "crf": f"{self.crf:g}", "g": str(self.gop), "sc_threshold": "0"}
        return options if self.tune == "none" else {**options, "tune": self.tune}


@dataclass(frozen=True)
class Reencoded:
    """A line of the manifest.

    Attributes:
        path: of the file, relative to both roots.
        source_bytes, output_bytes: size before and after.
        num_frames, duration_s, fps, width, height: of the new file.
        cpu_s: seconds of processor time that encoding and checking took; None if a former run was ended before it
            could write the line.
    """

    path: str
    source_bytes: int
    output_bytes: int
    num_frames: int
    duration_s: float
    fps: float
    width: int
    height: int
    cpu_s: float | None


def reencode(source: Path, output: Path, encoding: Encoding, beat: Beat = lambda: None) -> bool:
    """Write a video again, unless that was done before.

    Args:
        source: any video that ``ClipReader`` reads.
        output: MP4, whatever it is called; its folder is made.
        encoding: how.
        beat: called whenever a frame is done.

    Returns:
        False if ``output`` was already there, made from a source of this size with this encoding.

    Raises:
        ClipDecodeError: the source is missing or damaged.
        ReencodeError: ``output`` exists and is not one of this function's, or the written file is not the same video.
        OSError: the disk is full, and the like.
    """
    if not source.is_file():
        raise FileMissing("No such file or directory", source)
    mark = _mark(source, encoding)
    if _is_done(output, mark):
        return False
    probe(source)  # refuses what no frame can be written upright from
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as unfinished:
        frames = _encode(source, unfinished, encoding, mark, beat)
        _verify(source, unfinished, frames, encoding, beat)
    return True


def _mark(source: Path, encoding: Encoding) -> str:
    return _MARK + json.dumps({**asdict(encoding), "source_bytes": source.stat().st_size})


def _is_done(output: Path, mark: str) -> bool:
    if not output.exists():
        return False
    try:
        with open_input(os.fspath(output)) as container:
            found = container.metadata.get("comment", "")
    except av.error.FFmpegError:
        found = ""
    if not found.startswith(_MARK):
        raise ReencodeError(f"{output}: exists and is not a re-encoded video: remove it or choose another --out")
    try:
        probe(output)
    except ClipDecodeError:
        return False
    return found == mark


# --------------------------------------------------------------------------------------------------------------------
# writing


class _Frames:
    """Time and thumbnail of every frame of a file.

    Attributes:
        first_s: time stamp of the first frame.
        times_s: of every frame, from the first one.
        duration_s: from the first frame to the end of the last; of sources only.
        colours: those of the first frame.
        thumbnails: uint8 [side, side] luma of every frame, upright.
    """

    def __init__(self) -> None:
        self.first_s = Fraction(0)
        self.times_s: list[Fraction] = []
        self.duration_s = Fraction(0)
        self.colours: Colours | None = None
        self.thumbnails: list[NDArray[np.uint8]] = []
        self._scaler = VideoReformatter()

    def add(self, frame: VideoFrame) -> None:
        """Add the next frame."""
        tick, tick_s, side = cast(int, frame.pts), cast(Fraction, frame.time_base), _THUMBNAIL
        if not self.times_s:
            self.first_s = tick * tick_s
        self.times_s.append(tick * tick_s - self.first_s)
        small = self._scaler.reformat(frame, side, side, "gray", interpolation=Interpolation.AREA, threads=1)
        plane = small.planes[0]
        luma = np.frombuffer(cast(Any, plane), dtype=np.uint8).reshape(side, plane.line_size)[:, :side]
        self.thumbnails.append(np.rot90(luma, quarter_turns(frame)).copy())


def _encode(source: Path, unfinished: Path, encoding: Encoding, mark: str, beat: Beat) -> _Frames:
    """Encode ``source`` and return its frames."""
    written = _Frames()
    with (
        closing(decode_whole(source)) as frames,
        av.open(media_url(os.fspath(unfinished)), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        # The mark lets a later run recognise the file; geometry and colours follow from the first frame.
        container.metadata["comment"] = mark
        first = next(frames)
        rate, pixel_aspect = header(source)
        graph, width, height = upright(first, pixel_aspect, encoding.short_side)
        stream = add_h264_stream(container, first, rate, (width, height), encoding.x264_options)
        tick_s = cast(Fraction, first.time_base)
        written.colours = colours(first)

        def small_frames() -> Iterator[VideoFrame | None]:
            shown = max(1, round(1 / (rate * tick_s)))  # ticks
            size = first.width, first.height, first.format.name
            for frame, following in pairwise(chain((first,), frames, (None,))):
                frame, time_s = cast(VideoFrame, frame), float(written.duration_s)
                if (frame.width, frame.height, frame.format.name) != size:
                    raise ReencodeError(f"{source}: other frame size or format from {time_s:.3f} s on{_FIX}")
                if frame.interlaced_frame:
                    raise ReencodeError(f"{source}: {INTERLACED}")
                # A frame is displayed until the next one; the last one as long as it says, or as the one before.
                if following is not None:
                    shown = cast(int, following.pts) - cast(int, frame.pts)
                elif frame.duration:
                    shown = frame.duration
                if shown <= 0:
                    raise ReencodeError(f"{source}: frames are out of order after {time_s:.3f} s{_FIX}")
                written.add(frame)
                written.duration_s = written.times_s[-1] + shown * tick_s
                graph.vpush(frame)
                small = graph.vpull()
                small.pict_type = PictureType.NONE  # the encoder places the key frames
                yield small
                beat()
            yield None  # for what the encoder holds back

        # MP4 stores durations of packets: set that of the last displayed frame and of the last decoded one by hand.
        first_dts: int | None = None
        packets = chain.from_iterable(map(stream.encode, small_frames()))
        for packet, next_packet in pairwise(chain(packets, (None,))):
            packet = cast("Packet[VideoStream]", packet)
            pts, dts = cast(int, packet.pts), cast(int, packet.dts)
            first_dts = dts if first_dts is None else first_dts
            if pts * tick_s - written.first_s == written.times_s[-1]:
                packet.duration = round((written.duration_s - written.times_s[-1]) / tick_s)
            if next_packet is None:  # the header counts in the order of decoding
                packet.duration = round(written.duration_s / tick_s) - (dts - first_dts)
            container.mux(packet)
    return written


Colours = tuple[int, int, int, bool]


def colours(frame: VideoFrame) -> Colours | None:
    """Return the matrix, primaries and transfer of a frame, and True if its range is full; None for an RGB frame."""
    if frame.format.is_rgb:
        return None
    full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
    return int(frame.colorspace), int(frame.color_primaries), int(frame.color_trc), full


def add_h264_stream(
    container: OutputContainer, first: VideoFrame, rate: Fraction, size: tuple[int, int], options: dict[str, str]
) -> VideoStream:
    """Add a stream for frames that ``upright`` filtered, with the colours and the ticks of the source.

    Args:
        container: file to write.
        first: first frame of the source, before it is filtered.
        rate: frames per second.
        size: width and height after filtering.
        options: of x264.
    """
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.width, stream.height = size
    stream.pix_fmt = "yuv420p"
    codec = stream.codec_context
    codec.thread_count, codec.time_base = 1, cast(Fraction, first.time_base)
    if not first.format.is_rgb:
        full = first.format.name.startswith("yuvj")
        codec.color_range, codec.colorspace = _FULL_RANGE if full else first.color_range, first.colorspace
        codec.color_primaries, codec.color_trc = first.color_primaries, first.color_trc
    return stream


def header(source: Path) -> tuple[Fraction, float]:
    """Return the frames per second, and the width of a stored pixel over its height."""
    with open_input(os.fspath(source)) as container:
        stream = cast(VideoStream, container.streams.best("video"))
        rate = cast(Fraction, stream.average_rate or stream.guessed_rate)
        return rate, float(stream.sample_aspect_ratio or 1) or 1.0


def upright(first: VideoFrame, pixel_aspect: float, short_side: int) -> tuple[Graph, int, int]:
    """Return filters to small, upright frames with square pixels for frames like ``first``; their width and height."""
    shown_width = first.width * pixel_aspect
    scale = min(1.0, short_side / min(shown_width, first.height))
    width, height = (2 * round(length * scale / 2) for length in (shown_width, first.height))
    keep_colours = ""  # else the filter turns every matrix that is not BT.601 into it
    if not first.format.is_rgb and first.colorspace != _UNSPECIFIED:
        keep_colours = f":in_color_matrix={first.colorspace}:out_color_matrix={first.colorspace}"
    graph = Graph()
    graph.threads = 1
    nodes = [
        graph.add_buffer(width=first.width, height=first.height, format=first.format, time_base=first.time_base),
        graph.add("scale", f"{width}:{height}:flags=bicubic{keep_colours}"),
        graph.add("setsar", "1"),
        graph.add("format", "yuv420p"),
    ]
    turns = quarter_turns(first)
    nodes += [graph.add("transpose", "cclock") for _ in range(turns)]
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    return (graph, height, width) if turns % 2 else (graph, width, height)


# --------------------------------------------------------------------------------------------------------------------
# reading back


def _verify(source: Path, unfinished: Path, wanted: _Frames, encoding: Encoding, beat: Beat) -> None:
    """Decode the written file and compare it with the source.

    Raises:
        ReencodeError: it is not the same video, or has too few key frames.
        ClipDecodeError: it is damaged.
    """
    found = _Frames()
    since_key = 0
    with closing(decode_whole(unfinished)) as frames:
        for frame in frames:
            since_key = 0 if frame.key_frame else since_key + 1
            if since_key == encoding.gop:
                raise ReencodeError(f"{source}: {encoding.gop} frames after a key frame none was written{_FIX}")
            if not found.times_s:
                found.colours = colours(frame)
            found.add(frame)
            beat()
    if wanted.colours is not None and found.colours != wanted.colours:
        raise ReencodeError(f"{source}: the colours are not those of the source{_FIX}")
    # Times within the file are equal now; compare the header's start, length and rate too, which readers rely on.
    before, after = probe(source), probe(unfinished)
    count, duration_s = len(wanted.times_s), float(wanted.duration_s)
    difference = _difference(wanted, found)
    if difference is None:
        if abs((found.first_s - after.start_s) - (wanted.first_s - before.start_s)) > 1e-6:
            difference = "the first frame has another time"
        elif abs(after.duration_s - duration_s) > 0.5 * duration_s / count:
            difference = f"{after.duration_s:.3f} s long for {duration_s:.3f} s"
        elif abs(after.fps * duration_s - count) > 1:
            difference = f"{after.fps:g} frames per second for {count / duration_s:g}"
    if difference is not None:
        raise ReencodeError(f"{source}: the written file is not the same video: {difference}{_FIX}")


def _difference(wanted: _Frames, found: _Frames) -> str | None:
    """Return the first difference between frames or times of two files, apart from the loss of compression."""
    if len(wanted.times_s) != len(found.times_s):
        return f"{len(found.times_s)} frames for {len(wanted.times_s)}"
    for number, (wanted_s, found_s) in enumerate(zip(wanted.times_s, found.times_s, strict=True)):
        if wanted_s != found_s:
            return f"frame {number} at {float(found_s):.6f} s for {float(wanted_s):.6f} s"
    # Compression changes thumbnails slightly; a moved frame must still resemble itself more than its neighbours.
    old, new = np.stack(wanted.thumbnails), np.stack(found.thumbnails)
    apart = _levels_apart(old, new)
    if apart.max() > _SAME_LEVELS:
        return f"frame {apart.argmax()} differs by {apart.max():.1f} levels"
    moved = _levels_apart(old[:-1], old[1:]) > _MOVED_LEVELS
    for own, other in ((apart[:-1], _levels_apart(old[:-1], new[1:])), (apart[1:], _levels_apart(old[1:], new[:-1]))):
        mistaken = np.flatnonzero(moved & (other <= own))
        if mistaken.size:
            return f"a frame near number {mistaken[0]} shows its neighbour"
        if own.size and own.mean() > _SHIFTED_LEVELS and other.mean() < own.mean() / 2:
            return "every frame shows its neighbour"
    return None


def _levels_apart(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the mean absolute difference of each pair of thumbnails, [N]."""
    return np.array([np.abs(x.astype(np.int16) - y).mean() for x, y in zip(a, b, strict=True)])


# --------------------------------------------------------------------------------------------------------------------
# command line


class _Manifest:
    """JSON Lines with a line for each finished file; appended to, and on disk before ``append`` returns."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        written = file.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        os.ftruncate(self._descriptor, len(whole))  # a run that was killed may have left half a line
        self.paths = {json.loads(line)["path"] for line in whole.splitlines()}

    def append(self, record: Reencoded) -> None:
        self.paths.add(record.path)
        os.write(self._descriptor, (json.dumps(asdict(record)) + "\n").encode())
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def _reencode_below(path: str, root: Path, out: Path, encoding: Encoding, beat: Beat) -> Reencoded:
    started_s = time.process_time()
    fresh = reencode(root / path, out / path, encoding, beat)
    info = probe(out / path)
    return Reencoded(
        path=path,
        source_bytes=(root / path).stat().st_size,
        output_bytes=(out / path).stat().st_size,
        num_frames=info.num_frames,
        duration_s=info.duration_s,
        fps=info.fps,
        width=info.width,
        height=info.height,
        cpu_s=round(time.process_time() - started_s, 3) if fresh else None,
    )


def clip_cost(root: Path, out: Path, paths: Sequence[str], size: int) -> tuple[float, float, float] | None:
    """Measure the processor time for reading clips of ``CLIP_S`` seconds before and after, at the same random places.

    Args:
        root: folder of the sources.
        out: folder of the re-encoded files.
        paths: relative to both; a few of them are tried, those that cannot be read are left out.
        size: side of the frames in pixels.

    Returns:
        Medians of milliseconds before and after, and of their ratio; None if nothing could be read.
    """
    from datamodules.video.reader import ClipReader  # torch comes with it, which takes seconds

    draw = random.Random(0)
    reader = ClipReader()
    costs: list[tuple[float, float]] = []

    def read(path: str, start_s: float, duration_s: float) -> tuple[float, float]:
        times_s = segment_midpoints(start_s, min(start_s + CLIP_S, duration_s), 16)
        spent_ms = {}
        for folder in draw.sample((root, out), 2):
            started_s = time.process_time()
            reader.read(folder / path, times_s, size)
            spent_ms[folder] = 1000 * (time.process_time() - started_s)
        return spent_ms[root], spent_ms[out]

    for path in draw.sample(paths, min(5, len(paths))):
        with suppress(ClipDecodeError):
            duration_s = probe(out / path).duration_s
            read(path, 0.0, duration_s)  # opens the files
            for _ in range(8):
                costs.append(read(path, draw.uniform(0.0, max(0.0, duration_s - CLIP_S)), duration_s))
    reader.close()
    if not costs:
        return None
    before, after = zip(*costs, strict=True)
    ratios = (one / other for one, other in costs)
    return statistics.median(before), statistics.median(after), statistics.median(ratios)


def _paths(options: argparse.Namespace) -> list[str]:
    """Return the files of this shard, relative to the root."""
    require_reachable(options.root, "--root")
    if is_remote(str(options.out)):
        raise ValueError(f"--out is {options.out}: files are written to local disks: name a folder")
    if options.root.resolve() == options.out.resolve():
        raise ValueError(f"--out is {options.out}, which is --root: sources are kept, choose another folder")
    number, count = options.shard
    if options.index is not None:
        annotations = read_annotations(options.index)
        if annotations.malformed:
            raise InvalidRecords(annotations.malformed)
        named = [Path(path) for path in annotations.files]
    else:
        named = [
            path.relative_to(options.root) if path.is_relative_to(options.root) else path for path in options.files
        ]
    for path in named:
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{path}: not below --root {options.root}")
    return sorted({path.as_posix() for path in named})[number - 1 :: count]


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected i/n with i from 1 to n, such as 2/8")
    return int(number), int(count)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.tools.reencode",
        description="Write videos again so that clips of them are cheap to read. Run it again to continue. "
        "Exit status 1 if a file could not be re-encoded.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Encoding()
    parser.add_argument(
        "--root",
        type=data_path,
        required=True,
        help="folder or address (s3://...) that paths are relative to",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--files", type=data_path, nargs="+", help="videos below the root")
    which.add_argument("--index", type=data_path, help="index of pairs or instruction file: all videos it names")
    parser.add_argument("--out", type=data_path, required=True, help="folder of the new dataset, with the same paths")
    parser.add_argument("--short-side", type=int, default=default.short_side, help="pixels, even")
    parser.add_argument("--gop", type=int, default=default.gop, help="frames from one key frame to the next")
    parser.add_argument("--crf", type=float, default=default.crf, help="x264's quality, 0 (best) to 40")
    parser.add_argument("--preset", choices=PRESETS, default=default.preset, help="x264's effort")
    parser.add_argument("--tune", choices=TUNES, default=default.tune, help="x264's purpose")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes, one file each")
    parser.add_argument("--shard", type=_shard, default="1/1", help="i/n: the i-th of n parts, for as many machines")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds without progress before a file is given up"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Re-encode and report; return exit status 0, 1 if a file failed, or 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    try:
        encoding = Encoding(options.short_side, options.gop, options.crf, options.preset, options.tune)
        if options.workers < 1 or not options.timeout >= 1:
            raise ValueError("--workers and --timeout must be at least 1")
        paths = _paths(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    number, count = options.shard
    manifest = _Manifest(options.out / ("reencode.jsonl" if count == 1 else f"reencode.{number}-of-{count}.jsonl"))
    task = partial(_reencode_below, root=options.root, out=options.out, encoding=encoding)
    outcomes = run_tasks(task, paths, options.workers, options.timeout, preload=["datamodules.video.reader"])
    done: list[Reencoded] = []
    failed = 0
    for path, outcome in tqdm(outcomes, "re-encode", total=len(paths), unit="file", mininterval=1):
        if isinstance(outcome, Failure):
            failed += 1
            tqdm.write(f"{path}: {outcome.kind}: {outcome.reason}")
            continue
        done.append(outcome)
        if outcome.cpu_s is not None or path not in manifest.paths:
            manifest.append(outcome)
    manifest.close()
    fresh = sum(record.cpu_s is not None for record in done)
    print(f"{len(paths)} files: {fresh} re-encoded, {len(done) - fresh} done before, {failed} failed")
    if done:
        before, after = sum(record.source_bytes for record in done), sum(record.output_bytes for record in done)
        print(f"storage: {before / 1e9:.3f} GB before, {after / 1e9:.3f} GB after ({after / before:.2f}x)")
        spent = clip_cost(options.root, options.out, sorted(record.path for record in done), encoding.short_side)
        if spent is not None:
            print("reading a {} s clip: {:.1f} ms CPU before, {:.1f} ms after, {:.1f}x less".format(CLIP_S, *spent))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
