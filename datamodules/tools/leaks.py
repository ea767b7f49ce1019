"""Find recordings that an instruction mix shares with the evaluation benchmarks.

Different clips may come from one recording: EgoTimeQA, QAEgo4D, EgoMCQ, EgoSchema and EgoPlan are all cut out of Ego4D,
and OpenEQA asks several questions about one home. So recordings are compared and not clips: ``video_uid`` of the
records with that of a benchmark's official annotation file, where an Ego4D clip stands for its video. Names are
compared within a collection, such as Ego4D or the scanned rooms; names of an unknown source are compared with all
collections.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.egoit.reader import ConversationFile
from datamodules.egoit.records import output_files, write_rows
from datamodules.egoit.sources.egotimeqa import read_clips
from datamodules.egoit.sources.openeqa import scene_of
from datamodules.io.annotations import read_csv, read_json
from datamodules.io.jsonl import InvalidRecords

Clips = Mapping[str, tuple[str, float]]
Recording = tuple[str, str]
"""A collection and a name in it; some collections name recordings by number, so a name alone is ambiguous."""
EGO4D = "ego4d"
_COLLECTIONS = {"egotimeqa": EGO4D, "openeqa": "scans", **{name: name for name in ("egtea", "ssv2", "egoexolearn")}}
"""Collection by source. Another source has the unknown collection "", and its names are compared with all."""


@dataclass(frozen=True)
class Benchmark:
    """The official files of a benchmark, and the recordings they name.

    Attributes:
        files: names of the official files, any of which may exist.
        recordings: returns the recordings, "" for a row that names none, of a file's content (rows of a table as
            mappings) and the Ego4D videos by clip.
    """

    files: tuple[str, ...]
    recordings: Callable[[Any, Clips], Iterable[Recording]]


def _qaego4d(rows: Any, clips: Clips) -> Iterator[Recording]:
    for row in rows:
        yield EGO4D, row.get("video_uid") or clips.get(row["video_id"], ("", 0.0))[0]


def _egoplan(rows: Any, _: Clips) -> Iterator[Recording]:
    for row in rows:
        collection = EGO4D if row.get("video_source", "Ego4D") == "Ego4D" else "epic_kitchens"
        yield collection, row.get("video_id") or row["sample_id"].rpartition("_")[0]


def _egomcq(asked: Any, _: Clips) -> Iterator[Recording]:
    for item in asked.values():
        yield EGO4D, item["query"]["video_uid"]
        yield from ((EGO4D, choice["video_uid"]) for choice in item["choices"].values())


def _episode(video: str) -> str:
    """Return the episode of a video of VLN-QA: ``left/4504_frame52.mp4`` is of episode 4504."""
    return PurePosixPath(video).stem.partition("_")[0]


BENCHMARKS = {
    "egoschema": Benchmark(
        ("uid_to_ego4d.json",), lambda rows, _: ((EGO4D, cut["video_uid"]) for cut in rows.values())
    ),
    "qaego4d": Benchmark(
        ("annotations.QaEgo4D_test.json", "annotations.QaEgo4D_test_close.json", "annotations.test.json"), _qaego4d
    ),
    "egotaskqa": Benchmark(
        ("test_qas.json", "egotaskqa_mcq.json"),
        lambda rows, _: (("lemma", (row.get("interval") or row["video_path"]).split("|")[0]) for row in rows),
    ),
    "charades_ego": Benchmark(
        ("CharadesEgo_v1_test_only1st.csv", "CharadesEgo_v0_egocentric_test.csv"),
        lambda rows, _: (("charades_ego", row["id"]) for row in rows),
    ),
    "epic100_mir": Benchmark(
        ("EPIC_100_retrieval_test.csv",), lambda rows, _: (("epic_kitchens", row["video_id"]) for row in rows)
    ),
    "egoplan": Benchmark(("EgoPlan_validation.json", "egoplan2.json"), _egoplan),
    "vlnqa": Benchmark(
        ("vlnqa.json",),
        lambda rows, _: (("r2r", _episode(row.get("video_path") or row["video"])) for row in rows),
    ),
    "egomcq": Benchmark(("egomcq.json",), _egomcq),
    "openeqa": Benchmark(
        ("open-eqa-v0.json",), lambda rows, _: (("scans", scene_of(row["episode_history"])) for row in rows)
    ),
}


def benchmark_recordings(root: Path, clips: Clips) -> tuple[dict[str, frozenset[Recording]], list[str]]:
    """Return the recordings of every benchmark that has an official file anywhere below a folder.

    Returns:
        Recordings by benchmark, and a line for each file with rows that name none.

    Raises:
        ValueError: a file has an unexpected form.
    """
    found: dict[str, frozenset[Recording]] = {}
    notes: list[str] = []
    for name, benchmark in BENCHMARKS.items():
        files: list[Path] = []
        for file_name in benchmark.files:
            files += root.rglob(file_name)
        recordings: set[Recording] = set()
        for file in sorted(files):
            try:
                named = list(benchmark.recordings(_load(file), clips))
                recordings |= {recording for recording in named if recording[1]}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{file}: not a file of {name} ({error!r}): remove it or fetch it again") from None
            if unnamed := sum(not uid for _, uid in named):
                notes.append(
                    f"{name}: {unnamed:,} of {len(named):,} rows of {file} name no recording and were not compared; "
                    "for Ego4D, add --clips"
                )
        if files:
            found[name] = frozenset(recordings)
    return found, notes


def _load(file: Path) -> Any:
    if file.suffix != ".csv":
        return read_json(file, object)
    (_, header), *rows = read_csv(file)
    return [dict(zip(header, cells, strict=False)) for _, cells in rows]


def report(
    files: Sequence[Path],
    root: Path,
    clip_files: tuple[Path, ...] = (),
    clean: Path | None = None,
    only: Sequence[str] | None = None,
) -> str:
    """Count shared recordings, and write files without them if ``clean`` is given.

    Args:
        files: instruction files.
        root: folder of the benchmarks' official files.
        clip_files: see ``egotimeqa.read_clips``.
        clean: folder for copies of the files without records of shared recordings.
        only: benchmarks whose recordings are left out; all that were found if None.

    Returns:
        A table and notes on records that were not compared or were left out, as text.

    Raises:
        InvalidRecords: records are invalid.
        ValueError: a folder, benchmark or file is missing or invalid, or a copy would overwrite an input.
    """
    if not root.is_dir():
        raise ValueError(f"--benchmarks: no folder {root}: give the one that holds the official annotation files")
    clips = read_clips(clip_files)
    found, notes = benchmark_recordings(root, clips)
    # a recording of an unknown collection may be that of any
    benchmarks = {name: recordings | {("", uid) for _, uid in recordings} for name, recordings in found.items()}
    copies = [None] * len(files) if clean is None else output_files(files, clean, ".jsonl")
    if unknown := sorted(set(only or ()) - benchmarks.keys()):
        raise ValueError(f"--only: got {', '.join(unknown)}, found below {root}: {', '.join(benchmarks) or 'none'}")
    refused = frozenset[Recording]().union(*(benchmarks[name] for name in (benchmarks if only is None else only)))
    header = ["file", "records", "recordings", "unknown", *benchmarks]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for path, target in zip(files, copies, strict=True):
        file = ConversationFile(path)
        records = Counter(_recording(row, clips) for _, row in file.rows())
        if file.problems:
            raise InvalidRecords(file.problems)
        named = {recording for recording in records if recording[1]}
        unnamed = sum(count for (_, uid), count in records.items() if not uid)
        cells = [path.name, f"{records.total():,}", f"{len(named):,}", f"{unnamed:,}"]
        for recordings in benchmarks.values():
            shared = named & recordings
            cells.append(f"{len(shared):,} ({sum(records[uid] for uid in shared):,} records)" if shared else "0")
        lines.append(f"| {' | '.join(cells)} |")
        if target is not None:
            again = ConversationFile(path)
            kept = (row for _, row in again.rows() if _recording(row, clips) not in refused)
            left_out = records.total() - write_rows(target, kept)
            notes.append(f"{target}: {left_out:,} records of shared recordings left out")
        if unnamed:
            notes.append(f"{path}: {unnamed:,} records name no recording and were not compared; for Ego4D, --clips")
    for name in BENCHMARKS.keys() - benchmarks.keys():
        notes.append(f"{name}: not compared, no {' or '.join(BENCHMARKS[name].files)} below {root}")
    return "\n".join([*lines, "", *sorted(notes)]).rstrip()


def _recording(row: Mapping[str, Any], clips: Clips) -> Recording:
    if uid := row.get("video_uid"):
        return _COLLECTIONS.get(str(row.get("source")), ""), str(uid)
    return EGO4D, clips.get(PurePosixPath(row["video"]).stem, ("", 0.0))[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.tools.leaks",
        description="Recordings that instruction files share with evaluation benchmarks.",
    )
    parser.add_argument("files", nargs="+", type=Path, help="instruction files")
    parser.add_argument("--benchmarks", type=Path, required=True, help="folder of the benchmarks' official files")
    parser.add_argument("--clips", type=Path, nargs="+", default=[], help="files that name the Ego4D video of a clip")
    parser.add_argument("--clean", type=Path, metavar="FOLDER", help="write the files without shared recordings here")
    parser.add_argument(
        "--only", nargs="+", metavar="BENCHMARK", help="with --clean, leave out what these share (default: any)"
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; return exit status 2 after one line on stderr if it cannot be done."""
    given = _parser().parse_args(words)
    try:
        print(report(given.files, given.benchmarks, tuple(given.clips), given.clean, given.only))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
