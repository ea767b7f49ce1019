"""Write instruction files in the forms of other training stacks.

Other stacks need finished conversations, so prompt fields are rendered here, with the templates that epoch 0 of a run
with the same seed draws. The fields stay in the rows, and ``reader.ConversationFile`` reads every form back.

``llava``: a JSON array for LLaVA-NeXT, with ``<image>`` for the video, the only tag it knows. ``videollama2``: a JSON
array with ``<video>``, for VideoLLaMA2 and Video-LLaVA. ``videollama3``: ``video`` as a list of one. ``llamafactory``:
JSON Lines and an entry in ``dataset_info.json``. ``swift``: JSON Lines (``--dataset file.jsonl#5000`` takes a sample).
``openai``: ``messages`` of content items.

None of these readers cuts windows out of videos, so records with ``start`` and ``end`` need their clips cut: with a
data root given, each window becomes a file of its own below the output folder and the record loses its window.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from datamodules.egoit.reader import ConversationFile, accept
from datamodules.egoit.records import RESERVED, from_json, output_files, window_of, write_rows
from datamodules.egoit.templates import FOLDER, STYLES, Templates, draw
from datamodules.io.conversation import IMAGE_TAG, VIDEO_TAG
from datamodules.io.jsonl import InvalidRecords
from datamodules.io.parallel import parallel_map

Row = dict[str, Any]
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Rendering:
    """The prompts of exported rows.

    Attributes:
        templates: template banks.
        style: key of ``templates.STYLES``.
        seed: templates are drawn as in epoch 0 of a run with this seed.
    """

    templates: Templates
    style: str = "task_ego"
    seed: int = 0

    def rows(self, file: ConversationFile) -> Iterator[tuple[str, Row]]:
        """Yield the place of every valid row, and the row with a finished conversation.

        Invalid rows, and rows that no template fits, become problems of the file.
        """
        for where, row in file.rows():
            if not isinstance(row.get("prompt"), dict):
                yield where, row
                continue
            try:
                rendered = self._rendered(row, where)
            except ValueError as error:
                file.problems.append(f"{where}: {error}")
                continue
            yield where, rendered

    def _rendered(self, row: Row, where: str) -> Row:
        """Return a row with prompt fields as a conversation, the fields side by side as texts.

        A column of lists that begins with empty ones, or a nested one, would stop some readers.
        """
        record = from_json(row, where)
        prompt = record.prompt
        assert prompt is not None, "the row has prompt fields"
        template = draw(self.seed, 0, record.id)
        question, answer = self.templates.render(record, self.style, template)
        ours = {
            "id": record.id,
            "video": record.video,
            **window_of(record),
            "conversations": [
                {"from": "human", "value": f"{VIDEO_TAG}\n{question}"},
                {"from": "gpt", "value": answer},
            ],
            "source": record.source,
            "channel": record.source,  # ms-swift logs a loss for each
            "task": prompt.task,
            "instruction_style": self.style,
            "template_id": template,
            "query": prompt.query,
            "options": "\n".join(prompt.options),
            "target": prompt.target,
        }
        return {**ours, **{key: value for key, value in row.items() if key not in ours and key != "prompt"}}


def _as_is(row: Row) -> Row:
    return row


def _image_tag(row: Row) -> Row:
    first, *others = row["conversations"]
    return {**row, "conversations": [{**first, "value": first["value"].replace(VIDEO_TAG, IMAGE_TAG)}, *others]}


def _videos_in_lists(row: Row) -> Row:
    return {**row, "video": [row["video"]]}


def _messages(row: Row) -> Row:
    video = {"type": "video_url", "video_url": {"url": row["video"]}}
    messages = []
    for number, turn in enumerate(row["conversations"]):
        text = {"type": "text", "text": turn["value"].removeprefix(f"{VIDEO_TAG}\n")}
        role = {"human": "user", "gpt": "assistant"}[turn["from"]]
        messages.append({"role": role, "content": [text] if number else [video, text]})
    return {**{key: value for key, value in row.items() if key not in ("video", "conversations")}, "messages": messages}


@dataclass(frozen=True)
class _Format:
    form: Callable[[Row], Row] = _as_is
    array: bool = False


FORMATS = {
    "llava": _Format(_image_tag, array=True),
    "videollama2": _Format(array=True),
    "videollama3": _Format(_videos_in_lists),
    "llamafactory": _Format(),
    "swift": _Format(),
    "openai": _Format(_messages),
}


@dataclass(frozen=True)
class _Survey:
    """The contents of a file: fields that all records have, fields that are left out, and videos.

    Attributes:
        fields: fields that every record has and no reader reserves.
        left_out: other fields.
        windows: path of the clip by video, start and end.
        whole: videos without a window.
    """

    fields: frozenset[str]
    left_out: tuple[str, ...]
    windows: dict[tuple[str, float, float], str]
    whole: frozenset[str]


def export(
    files: Sequence[Path],
    to: str,
    out: Path,
    trim_root: Path | None = None,
    workers: int = 1,
    rendering: Rendering | None = None,
) -> list[str]:
    """Write files in another form.

    Args:
        files: instruction files of any form that ``ConversationFile`` reads.
        to: name in ``FORMATS``.
        out: folder, made if missing.
        trim_root: data root of the videos, to cut their windows out; the folder of videos is then ``out``.
        workers: processes that cut.
        rendering: prompts of records with prompt fields; this repository's templates by default.

    Returns:
        Lines to print: files written, fields converted or left out, and advice.

    Raises:
        InvalidRecords: records of any file are invalid, or clips cannot be cut; no file is written.
        ValueError: two files have one name or would be overwritten, some records of a file have windows and others
            not, or ``dataset_info.json`` is invalid.
    """
    rendering = rendering or Rendering(Templates())
    written_to = output_files(files, out, ".json" if FORMATS[to].array else ".jsonl")
    info = out / "dataset_info.json"
    registered = _registered(info) if to == "llamafactory" else {}
    # First pass: check every row of every file, and collect fields and windows.
    read = [ConversationFile(file) for file in files]
    surveys = [_survey(file, rendering, trim_root is not None) for file in read]
    if any(file.problems for file in read):
        raise InvalidRecords(chain.from_iterable(file.problems for file in read))
    if trim_root is not None:
        _trim(surveys, trim_root, out, workers)
    # Second pass: write the rows.
    lines = []
    for file, survey, target in zip(read, surveys, written_to, strict=True):
        lines += [file.report()] if file.report() else []
        if survey.left_out:
            lines.append(
                f"{file.path}: left out, since some records lack them or other readers reserve them: "
                f"{', '.join(survey.left_out)}"
            )
        if survey.windows and trim_root is None:
            lines.append(
                f"{file.path}: has windows, which readers of this form ignore: add --trim ROOT to cut them out"
            )
        rows = _rows(ConversationFile(file.path), rendering, survey, trim_root is not None)
        formed = ((f"{target}: record {row.get('id', '?')}", FORMATS[to].form(row)) for row in rows)
        written = write_rows(target, accept(formed), FORMATS[to].array)
        lines.append(f"{written:,} records written to {target}")
        if to == "llamafactory":
            registered[target.stem] = _entry(target)
            info.write_text(json.dumps(registered, indent=2) + "\n", encoding="utf-8")
            lines.append(
                f"{info}: entry {target.stem}; media_dir is the folder "
                f"that videos are below, {out if trim_root is not None else 'the data root'}"
            )
    return lines


def _survey(file: ConversationFile, rendering: Rendering, trimmed: bool) -> _Survey:
    every: set[str] | None = None
    some: set[str] = set()
    windows: dict[tuple[str, float, float], str] = {}
    whole: set[str] = set()
    for where, row in rendering.rows(file):
        if trimmed and (PurePosixPath(row["video"]).is_absolute() or ".." in PurePosixPath(row["video"]).parts):
            file.problems.append(
                f"{where}: field 'video' is {row['video']!r}, but clips are cut below the data root only: give a path "
                "below it, without .."
            )
            continue
        every = set(row) if every is None else every & row.keys()
        some |= row.keys()
        if "start" in row:
            window = (row["video"], float(row["start"]), float(row["end"]))
            windows[window] = windows.get(window) or clip_path(*window)
        else:
            whole.add(row["video"])
    kept = frozenset(every or ()) - RESERVED
    if windows and whole:
        raise ValueError(
            f"{file.path}: some records have 'start' and 'end' and others not: give them to all or to none"
        )
    return _Survey(kept, tuple(sorted(some - kept)), windows, frozenset(whole))


def clip_path(video: str, start_s: float, end_s: float) -> str:
    """Return the path of the clip of a window, below the output folder; a name that is too long is shortened."""
    path = PurePosixPath(video)
    window = f"{start_s:.6f}_{end_s:.6f}"
    name = f"{path.name}_{window}.mp4"
    if len(name.encode()) > _LONGEST_NAME:  # file systems take 255 bytes, and a name in the making is longer
        begin = path.name.encode()[:100].decode(errors="ignore")
        name = f"{begin}_{hashlib.sha256(path.name.encode()).hexdigest()[:16]}_{window}.mp4"
    return str(PurePosixPath("clips") / path.parent / name)


def _rows(file: ConversationFile, rendering: Rendering, survey: _Survey, trimmed: bool) -> Iterator[Row]:
    for _, row in rendering.rows(file):
        kept = {key: value for key, value in row.items() if key in survey.fields}
        if "start" in kept:
            start_s, end_s = float(kept["start"]), float(kept["end"])
            kept |= {"start": start_s, "end": end_s}
            if trimmed:
                kept["video"] = survey.windows[kept["video"], start_s, end_s]
                del kept["start"], kept["end"]
                kept |= {"duration": end_s - start_s} if "duration" in kept else {}
        yield kept


def _trim(surveys: Sequence[_Survey], root: Path, out: Path, workers: int) -> None:
    from datamodules.tools.trim import cut  # PyAV and torch, which nothing else here needs

    clips: dict[tuple[str, float, float], str] = {}
    for survey in surveys:
        clips |= survey.windows
    jobs = sorted((*window, clip) for window, clip in clips.items())
    problems = [problem for problem in parallel_map(partial(cut, root, out), jobs, workers, "cut", "clip") if problem]
    if problems:
        raise InvalidRecords(problems)
    # Whole videos are linked, so that all paths are below one folder.
    for video in sorted(set().union(*(survey.whole for survey in surveys))):
        link = out / video
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to((root / video).resolve())


def _registered(info: Path) -> dict[str, Any]:
    """Return LLaMA-Factory's list of datasets, empty if the file does not exist."""
    try:
        known = json.loads(info.read_bytes()) if info.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{info}: invalid JSON ({error}): fix or remove this file") from None
    if not isinstance(known, dict):
        raise ValueError(f"{info}: expected a JSON object, got {type(known).__name__}: fix or remove this file")
    return known


def _entry(file: Path) -> dict[str, Any]:
    """Return the entry of a file in that list; the default tags fit."""
    return {
        "file_name": file.name,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "videos": "video"},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.tools.export", description="Write instruction files for other training stacks."
    )
    parser.add_argument("files", nargs="+", type=Path, help="instruction files")
    parser.add_argument("--to", choices=FORMATS, required=True, help="form to write")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--trim",
        type=Path,
        metavar="ROOT",
        help="cut clips out of the videos below this data root, for readers without "
        "windows; videos of the result are below --out",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that cut")
    parser.add_argument("--templates", type=Path, default=FOLDER, help="folder of template banks (default: EgoIT's)")
    parser.add_argument("--style", choices=STYLES, default="task_ego", help="style of prompts (default: task_ego)")
    parser.add_argument("--seed", type=int, default=0, help="draw templates as epoch 0 of a run with this seed")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; return exit status 2 after one line on stderr if it cannot be done."""
    given = _parser().parse_args(words)
    try:
        rendering = Rendering(Templates(given.templates), given.style, given.seed)
        for line in export(given.files, given.to, given.out, given.trim, given.workers, rendering):
            print(line)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
