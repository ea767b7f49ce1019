"""Check the videos of a dataset: ``python -m datamodules.tools.data_check INDEX_OR_JSONL --root DATA``.

Every file that the annotations name is opened and compared with them: does it exist, is it a video, is it as long and
as fast as annotated, and do clips of it decode without damage? ``--all`` decodes every frame of every file. The work
is done by worker processes, so that a decoder that hangs or crashes costs one file and not the run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import av
from av.video.frame import VideoFrame
from tqdm import tqdm

from datamodules.ego_exo_clip.index import GROUP_RECORD, PairIndex
from datamodules.egoit.reader import ConversationFile
from datamodules.io.atomic import atomic_path
from datamodules.io.conversation import VIDEO_TAG
from datamodules.io.jsonl import is_array, raw_lines, read_jsonl, read_records
from datamodules.io.parallel import Beat, Failure, run_tasks
from datamodules.io.validate import validate
from datamodules.video.decode import decode_in_order, is_torn
from datamodules.video.errors import ClipDecodeError, Damaged, FrameMissing, NoTimes, SpanOutsideFile
from datamodules.video.probe import file_stamp, open_video, probe
from datamodules.video.remote import data_path, is_remote, require_reachable
from datamodules.video.sampling import segment_midpoints

RATE_TOLERANCE = 0.01  # passes 29.97 for 30 frames per second, not 25 for 24
FRAMES_PER_CLIP = 16


@dataclass(frozen=True)
class Problem:
    """Reason why a file cannot be used.

    Attributes:
        kind: name of the ``ClipDecodeError``, or of another error, that it leads to; ``WrongRate`` or ``WrongLength``
            for one that is not as promised; ``TimedOut`` or ``Crashed`` if it stopped the process at work on it.
        reason: one line, in the decoder's words where it has any.
        spans_s: the clips that lie outside a file which is sound otherwise; empty if the whole file is of no use.
    """

    kind: str
    reason: str
    spans_s: tuple[tuple[float, float], ...] = ()

    def spoils(self, span_s: tuple[float, float]) -> bool:
        """Return True if a clip of the file cannot be used."""
        return not self.spans_s or span_s in self.spans_s


@dataclass
class VideoFile:
    """A video file and its annotations.

    Attributes:
        path: relative to the data root.
        fps: frames per second, None if not annotated; so for the next two.
        num_frames: frames in the file, one fewer is tolerated.
        duration_s: seconds from first frame to end, a frame less is tolerated.
        spans_s: start and end of every clip on the file's clock; an end of infinity is the end of the file.
        samples: clips to decode at most; the others are compared with the file's length.
    """

    path: str
    fps: float | None = None
    num_frames: int | None = None
    duration_s: float | None = None
    spans_s: list[tuple[float, float]] = field(default_factory=list)
    samples: int | None = None


def sampled(spans_s: Iterable[tuple[float, float]], count: int | None) -> list[tuple[float, float]]:
    """Return ``count`` of some clips, evenly through their file, including the one that ends last; None for all."""
    spans = sorted(spans_s, key=lambda span: (span[1], span[0]))
    if count is None or len(spans) <= count:
        return spans
    return [spans[(i + 1) * len(spans) // count - 1] for i in range(count)]


@dataclass(frozen=True)
class Annotations:
    """The video files of a dataset, and those that each line of its annotations needs.

    Attributes:
        file: JSON Lines, a clip a line, or a JSON array of them.
        files: by path relative to the data root, in the order they are named.
        paths_by_line: the files that each line needs, empty lines not counted; None for a line that cannot be read.
        malformed: problems of the lines that cannot be read.
        conversions: a line of the conversions to the form that training reads; empty if there were none.
    """

    file: Path
    files: dict[str, VideoFile]
    paths_by_line: list[tuple[str, ...] | None]
    malformed: list[str] = field(default_factory=list)
    conversions: str = ""

    def spoiled(self, problems: Mapping[str, Problem]) -> list[list[str] | None]:
        """Return for each line the files that it needs and cannot use; None for a line that cannot be read."""
        spans_s = {path: iter(self.files[path].spans_s) for path in problems}  # one for each line that names the path
        return [
            None
            if paths is None
            else [path for path in paths if path in problems and problems[path].spoils(next(spans_s[path]))]
            for paths in self.paths_by_line
        ]


def read_annotations(source: Path) -> Annotations:
    """Read the annotations of a dataset's videos.

    Args:
        source: folder of an index of pairs, or an instruction file of any form that ``ConversationFile`` reads.

    Raises:
        ValueError: there is no such file, it is of another form, or a line of an index is wrong; names file, line and
            field.
    """
    if is_remote(str(source)):
        raise ValueError(f"{source}: annotations are read from local disks: name a local copy (INDEX=folder)")
    if source.is_dir():
        return _read_index(source)
    if not source.is_file():
        raise ValueError(f"{source}: no such file or folder: give an index folder or an instruction file (JSON Lines)")
    files: dict[str, VideoFile] = {}
    paths_by_line: list[tuple[str, ...] | None] = []
    conversations = ConversationFile(source, texts=False, text_only=True)
    for where, record in conversations.entries():
        if isinstance(record, ValueError):
            if where == str(source):  # a file of another form, without lines
                raise record
            paths_by_line.append(None)
            continue
        if "video" not in record:  # text alone
            paths_by_line.append(())
            continue
        path = record["video"]
        window = (float(record.get("start", 0.0)), float(record.get("end", math.inf)))
        files.setdefault(path, VideoFile(path)).spans_s.append(window)
        paths_by_line.append((path,))
    return Annotations(source, files, paths_by_line, conversations.problems, conversations.report())


def _read_index(folder: Path) -> Annotations:
    index = PairIndex.read(folder)
    files: dict[str, VideoFile] = {}
    views: list[tuple[tuple[str, float], ...]] = []  # of each take: paths, and take times at which the files begin
    for group, (where, record) in enumerate(read_jsonl(folder / "groups.jsonl")):
        take = validate(GROUP_RECORD, record, where)
        numbers = range(index.first_view[group], index.first_view[group + 1])
        views.append(tuple((index.view_paths[view], float(index.view_offsets_s[view])) for view in numbers))
        for view in (take.views.ego, *take.views.exo):
            if view.duration is None:
                file = VideoFile(view.path, take.fps, take.num_frames, take.duration)
            else:
                file = VideoFile(view.path, view.fps, None, view.duration)
            files.setdefault(view.path, file)
    paths_of_group = [tuple(path for path, _ in group) for group in views]
    for group, *span in zip(index.clip_groups.tolist(), index.start_s.tolist(), index.end_s.tolist(), strict=True):
        shared = (span[0], span[1])
        for path, begin_s in views[group]:
            files[path].spans_s.append((span[0] - begin_s, span[1] - begin_s) if begin_s else shared)
    return Annotations(folder / "clips.jsonl", files, [paths_of_group[group] for group in index.clip_groups.tolist()])


def read_texts(source: Path) -> Iterator[str]:
    """Yield all narrations of an index of pairs, or all questions and answers of an instruction file."""
    if source.is_dir():
        texts = PairIndex.read(source).texts
        yield from (text for number in range(len(texts)) if (text := texts[number]))
        return
    for _, row in ConversationFile(source, texts=False, text_only=True).rows():
        for entry in row.get("conversations", []):
            yield entry["value"].replace(VIDEO_TAG, " ")
        fields = row.get("prompt")
        if isinstance(fields, dict):
            yield from (fields["query"], fields["target"], *fields.get("options", []))


def check_file(file: VideoFile, root: Path, decode_all: bool, beat: Beat = lambda: None) -> Problem | None:
    """Compare a video with its annotations, and decode its clips.

    Args:
        file: the annotations; ``samples`` of its clips are decoded at ``FRAMES_PER_CLIP`` moments each.
        root: folder that the path is relative to, which may be remote.
        decode_all: decode every frame of the file as well.
        beat: called whenever the decoder makes progress.

    Returns:
        The first problem met, None if there is none; clips outside the file are one only if there is no other.
    """
    from datamodules.video.reader import ClipReader  # torch comes with it, which takes seconds

    path = root / file.path
    reader = ClipReader(max_open=1)
    try:
        # The header against the annotations: rate, number of frames, and length.
        info = probe(path)
        beat()
        if file.fps is not None and abs(info.fps / file.fps - 1) > RATE_TOLERANCE:
            return Problem("WrongRate", f"{info.fps:g} frames per second, the annotations say {file.fps:g}")
        if file.num_frames is not None and info.num_frames < file.num_frames - 1:
            return Problem("WrongLength", f"{info.num_frames} frames, the annotations say {file.num_frames}")
        if file.duration_s is not None:
            try:
                reader.usable_end_s(path, 0.0, file.duration_s - 1e-3)  # 1 ms: durations are rounded decimals
            except SpanOutsideFile as error:
                return Problem("WrongLength", f"{error.reason}, the annotations say {file.duration_s:.3f} s")
        # Clips outside the file are collected: they cost only themselves, so a worse problem is looked for first.
        inside_s: list[tuple[float, float]] = []
        outside: list[SpanOutsideFile] = []
        for start_s, end_s in sorted(set(file.spans_s)):
            try:
                inside_s.append((start_s, reader.usable_end_s(path, start_s, end_s)))
            except SpanOutsideFile as error:
                outside.append(error)
            beat()
        # A header may claim anything: decode a sample of the clips, or everything.
        for start_s, end_s in sampled(inside_s, file.samples):
            times_s = segment_midpoints(start_s, end_s, FRAMES_PER_CLIP)
            reader.read(path, times_s, size=16, fit="squash", span_s=(start_s, end_s))
            beat()
        if decode_all and path.is_dir():
            for number in range(info.num_frames):
                reader.read(path, [number / info.fps], size=16, fit="squash")
                beat()
        elif decode_all:
            for _ in decode_whole(path):
                beat()
        if outside:
            spans_s = tuple((cast(float, error.start_s), cast(float, error.end_s)) for error in outside)
            return Problem("SpanOutsideFile", _reason(outside[0]), spans_s)
    except ClipDecodeError as error:
        return Problem(type(error).__name__, _reason(error))
    finally:
        reader.close()
    return None


def _reason(error: ClipDecodeError) -> str:
    return ("" if error.start_s is None else f"[{error.start_s:.3f}, {error.end_s:.3f}) s: ") + error.reason


def decode_whole(path: Path) -> Generator[VideoFrame, None, None]:
    """Yield every displayed frame of a file in order, with its time stamp and none of them damaged.

    Raises:
        ClipDecodeError: as ``ClipReader.read``, on reaching a damaged packet or frame, or at the end if the decoder
            left out a frame that the file lists or the file ends more than a frame before its header says.
    """
    name = os.fspath(path)
    video = open_video(name, file_stamp(name), thorough=True)
    listed: set[int] = set()
    end_s = packets_s = 0.0
    try:
        with video.container as container:
            codec, tick_s = video.codec, video.tick_s
            if video.in_order_only:
                for frame in decode_in_order(video):
                    end_s = video.time_s(cast(int, frame.pts)) + video.frame_s
                    yield frame
                if end_s < video.header_end_s - video.frame_s - 1e-3:
                    raise Damaged(f"frames end at {end_s:.3f} s, the header promises {video.header_end_s:.3f} s", path)
                return
            # Every packet lists a frame; the decoder must return all of them, undamaged.
            for packet in container.demux(video.stream):
                if packet.is_corrupt or is_torn(packet, video.codec_name, video.nal_length_bytes):
                    raise Damaged(f"corrupt packet after {end_s:.3f} s", path)
                if packet.pts is not None and not packet.is_discard:
                    listed.add(packet.pts)
                    packets_s += (packet.duration or 0) * tick_s
                for frame in codec.decode(packet if packet.size or packet.dts is not None else None):
                    if frame.pts is None:
                        raise NoTimes(f"a frame after {end_s:.3f} s has no display time", path)
                    if frame.is_corrupt:
                        raise Damaged(f"corrupt frame at {video.time_s(frame.pts):.3f} s", path)
                    listed.discard(frame.pts)
                    end_s = video.time_s(frame.pts + (frame.duration or 0))
                    frame.time_base = video.stream.time_base  # the decoder's own knows none when drained
                    yield frame
    except av.error.FFmpegError as error:
        raise Damaged(f"{error.strerror or error} after {end_s:.3f} s", path) from error
    if listed:
        missing_s = video.time_s(min(listed))
        raise FrameMissing(f"{len(listed)} frames are never decoded, the first at {missing_s:.3f} s", path)
    # If frames are not decoded in the order they are displayed, the duration of the last one is another packet's.
    if not video.is_whole and max(end_s, packets_s) < video.header_end_s - video.frame_s - 1e-3:
        raise Damaged(f"frames end at {end_s:.3f} s, the header promises {video.header_end_s:.3f} s", path)


# --------------------------------------------------------------------------------------------------------------------
# command line


def check_files(
    files: Sequence[VideoFile], root: Path, decode_all: bool, workers: int, patience_s: float
) -> dict[str, Problem]:
    """Check files in parallel, with a progress bar.

    Args:
        files: what to check, each with the clips to decode.
        root: folder that their paths are relative to.
        decode_all: decode every frame.
        workers: number of processes.
        patience_s: seconds without progress after which a file is given up.

    Returns:
        The problem of every bad file, by path in the order of ``files``.
    """
    task = partial(check_file, root=root, decode_all=decode_all)
    problems: dict[str, Problem] = {}
    outcomes = run_tasks(task, files, workers, patience_s, preload=["datamodules.video.reader"])
    for file, outcome in tqdm(outcomes, "check", total=len(files), unit="file", mininterval=1):
        if isinstance(outcome, Failure):
            problems[file.path] = Problem(outcome.kind, outcome.reason)
        elif outcome is not None:
            problems[file.path] = outcome
    return {file.path: problems[file.path] for file in files if file.path in problems}


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """Lines of JSON Lines as they stand with their place, empty ones left out; entries of an array as lines."""
    if is_array(file):
        for where, record in read_records(file):
            yield where, b"" if isinstance(record, ValueError) else (json.dumps(record) + "\n").encode()
    else:
        yield from ((f"{file} line {number}", line) for number, line in raw_lines(file))


def _unknown_words(source: Path, tokenizer: str | None) -> str:
    if tokenizer is None:
        return ""
    from datamodules.text import load_tokenizer, unknown_words  # torch comes with it, which takes seconds

    return unknown_words(load_tokenizer(tokenizer), read_texts(source))


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    with atomic_path(path) as partial_path, partial_path.open("wb") as out:
        out.writelines(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.tools.data_check",
        description="Find the videos of a dataset that are missing, damaged, too short or not as fast as annotated. "
        "Exit status 1 if there are any.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "annotations", type=data_path, help="folder of an index of pairs, or an instruction file (JSON Lines)"
    )
    parser.add_argument(
        "--root",
        type=data_path,
        required=True,
        help="folder or address (s3://...) that paths are relative to",
    )
    parser.add_argument("--all", action="store_true", help="decode every frame of every file")
    parser.add_argument("--samples", type=int, default=4, help="clips to decode of each file")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds without progress before a file is given up"
    )
    parser.add_argument("--tokenizer", help="folder or hub name: count the words that it does not know")
    parser.add_argument("--clean", type=Path, help="write the lines of the annotations whose clips are all fine")
    parser.add_argument(
        "--bad", type=Path, help="write the bad files as JSON Lines: path, kind, reason, spans_s, lines"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, report and write the lists; return exit status 0, 1 if a file is bad, or 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    try:
        if options.samples < 1 or options.workers < 1 or not options.timeout >= 1:
            raise ValueError("--samples, --workers and --timeout must be at least 1")
        require_reachable(options.root, "--root")
        annotations = read_annotations(options.annotations)
        unknown = _unknown_words(options.annotations, options.tokenizer)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files = [replace(file, samples=options.samples) for file in annotations.files.values()]
    problems = check_files(files, options.root, options.all, options.workers, options.timeout)
    spoiled = annotations.spoiled(problems)
    is_clean = [paths == [] for paths in spoiled]
    if options.clean is not None:
        kept = (line for (_, line), keep in zip(_lines(annotations.file), is_clean, strict=True) if keep)
        _write_lines(options.clean, kept)
    if options.bad is not None:
        needed = Counter(path for paths in spoiled for path in paths or ())
        records = [{"path": path, **asdict(problem), "lines": needed[path]} for path, problem in problems.items()]
        _write_lines(options.bad, ((json.dumps(record) + "\n").encode() for record in records))
    for problem_of_line in annotations.malformed:
        print(problem_of_line)
    for path, problem in problems.items():
        print(f"{path}: {problem.kind}: {problem.reason}")
    if any(problem.spans_s for problem in problems.values()):
        for (where, _), paths in zip(_lines(annotations.file), spoiled, strict=True):
            for path in paths or ():
                if problems[path].spans_s:
                    print(f"{where}: its clip lies outside {path}")
    if annotations.conversions:
        print(annotations.conversions)
    if unknown:
        print(f"warning: {unknown}")
    kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(p.kind for p in problems.values()).most_common())
    print(f"{len(problems)} of {len(files)} files are bad{f' ({kinds})' if kinds else ''}")
    print(f"{sum(is_clean)} of {len(is_clean)} lines of {annotations.file.name} are clean")
    return 1 if problems or annotations.malformed else 0


if __name__ == "__main__":
    raise SystemExit(main())
