"""EgoExoLearn: descriptions of the camera wearer's work in kitchens and laboratories, for seconds of long videos.

Read below the root, or in its ``annotations``. Each part of the dataset becomes a file of its own, since one file
cannot hold windows and whole videos:

``fine``: ``fine_annotation_trainval_en.csv`` or ``fine_annotation_trainvaltest_en.csv``, a sentence for a few seconds,
in three texts; ``annotation_id`` in the released header is the ``annotation_uid`` of its README, both are read.
``coarse``: ``coarse_annotations.tar.gz``, steps of a longer span.
``mcq`` and ``qa``: the files ``*_mcq.jsonl`` and ``*_qa.jsonl``, also in ``Video_QA``, about whole videos.
"""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datamodules.egoit.records import InstructionRecord, PromptFields
from datamodules.egoit.sources.base import MIN_WINDOW_S, expand_window
from datamodules.io.annotations import Counts, Official, SourceError, number_of, option, read_csv, text_of, try_parse
from datamodules.io.conversation import VIDEO_TAG
from datamodules.io.jsonl import read_records

TEXTS = {
    "no_hand": ("narration_en_no_hand_prompt", ""),
    "hand": ("narration_en_hand_prompt", "State which hand performs each action."),
    "raw": ("narration_en", "Write it as an instruction in the imperative, and name the hand to use."),
}
"""Column of each text, and the request that makes its form predictable."""
_STEPS = "If there are several steps, number them and put each on a line of its own."
_SUBSETS, _VIEWS = ("train", "val", "test"), ("ego", "exo")
_COLUMNS = ("video_uid", "subset", "view", "start_sec", "end_sec")
_EGO_ROWS = {"train": Official(34_584, False), "val": Official(7_701, False), "test": Official(18_244)}
_OPTION = re.compile(r"^\(([A-Z])\) *(.*)$")
_REQUEST = re.compile(r"^Answer with the option's letter.*$")


@dataclass(frozen=True)
class EgoExoLearn:
    """EgoExoLearn: descriptions or questions. Splits share videos, since the rows of a video are spread over them."""

    root: Path
    part: str = option("fine", "part of the dataset", ("fine", "coarse", "mcq", "qa"))
    splits: tuple[str, ...] = option(
        ("train",), "splits of the fine part; the authors ask not to train on test", _SUBSETS
    )
    text: str = option("no_hand", "which of the three texts of the fine part", tuple(TEXTS))
    views: tuple[str, ...] = option(("ego",), "views of the fine part", _VIEWS)
    videos: str = option("egoexolearn", "folder below the data root that holds <video>.mp4")

    name: ClassVar[str] = "egoexolearn"

    def official(self) -> dict[str, Official]:
        """Return the numbers of the part; for train and val, at least the rows that have verbs and nouns."""
        if self.part == "fine":
            return {f"ego rows of {split}": _EGO_ROWS[split] for split in self.splits if split in _EGO_ROWS}
        if self.part == "coarse":
            return {"videos": Official(316), "segments": Official(6691)}
        return {"rows": Official(6832), "videos": Official(707)} if self.part == "mcq" else {}

    def read(self, counts: Counts) -> Iterator[InstructionRecord | SourceError]:
        """Yield a record for each row of the part."""
        return {"fine": self._fine, "coarse": self._coarse, "mcq": self._asked, "qa": self._asked}[self.part](counts)

    def _find(self, *names: str) -> Path:
        folders = ("", "annotations/", "Video_QA/", "annotations/Video_QA/")
        found: list[Path] = []
        for folder in folders:
            for name in names:
                found += self.root.glob(f"{folder}{name}")
        if not found:
            raise SourceError(f"{self.root}: holds no {' or '.join(names)}: put EgoExoLearn's annotations there")
        return min(found)

    def _record(
        self,
        key: str,
        video: str,
        prompt: PromptFields,
        split: str,
        where: str,
        window_s: tuple[float, float] | None = None,
        duration_s: float | None = None,
    ) -> InstructionRecord:
        return InstructionRecord(
            id=f"{self.name}/{key}",
            video=f"{self.videos}/{video}.mp4",
            prompt=prompt,
            source=self.name,
            window_s=window_s,
            split=split,
            video_uid=video,
            duration_s=duration_s,
            where=where,
        )

    # ------------------------------------------------------------------------------------------------------- fine

    def _fine(self, counts: Counts) -> Iterator[InstructionRecord | SourceError]:
        names = [f"fine_annotation_{which}_en.csv" for which in ("trainval", "trainvaltest")]
        file = self._find(*reversed(names) if "test" in self.splits else names)
        column, _ = TEXTS[self.text]
        rows = list(read_fine(file, column))
        # A video is known to reach its last annotation; windows are not expanded past it.
        ends_s: dict[str, float] = defaultdict(float)
        for where, fine in rows:
            end_s = fine if isinstance(fine, SourceError) else try_parse(number_of, fine, "end_sec", where)
            if not isinstance(fine, SourceError) and not isinstance(end_s, SourceError):
                ends_s[fine["video_uid"].strip()] = max(ends_s[fine["video_uid"].strip()], end_s)
        for where, fine in rows:
            if isinstance(fine, SourceError):
                yield fine
                continue
            counts.add(f"{fine['view']} rows of {fine['subset']}")
            if fine["subset"] in self.splits and fine["view"] in self.views:
                yield try_parse(self._narrated, fine, ends_s, where)

    def _narrated(self, fine: Mapping[str, str], ends_s: Mapping[str, float], where: str) -> InstructionRecord:
        column, request = TEXTS[self.text]
        start_s, end_s = number_of(fine, "start_sec", where), number_of(fine, "end_sec", where)
        if not 0 <= start_s < end_s:
            raise SourceError(f"{where}: 'start_sec' and 'end_sec' are {start_s} and {end_s}: correct them")
        video = text_of(fine, "video_uid", where)
        window = expand_window(start_s, end_s, MIN_WINDOW_S, ends_s[video])
        prompt = PromptFields("description", query=request, target=text_of(fine, column, where))
        return self._record(text_of(fine, "annotation_uid", where), video, prompt, fine["subset"], where, window)

    # ----------------------------------------------------------------------------------------------------- coarse

    def _coarse(self, counts: Counts) -> Iterator[InstructionRecord | SourceError]:
        file = self._find("coarse_annotations.tar.gz")
        for name, content in _unpacked(file):
            video, where = Path(name).stem, f"{file} {name}"
            counts.add("videos")
            segments = try_parse(_segments, content, where)
            if isinstance(segments, SourceError):
                yield segments
                continue
            for number, segment in enumerate(segments, 1):
                counts.add("segments")
                if isinstance(segment, dict) and segment.get("start") == segment.get("end") is not None:
                    counts.add("segments of no length, left out")  # the released archive has two
                    continue
                yield try_parse(self._segment, segment, video, f"{where} entry {number}")

    def _segment(self, segment: Any, video: str, where: str) -> InstructionRecord:
        start_s, end_s = number_of(segment, "start", where), number_of(segment, "end", where)
        duration_s = number_of(segment, "duration", where)
        if not 0 <= start_s < min(end_s, duration_s):
            raise SourceError(f"{where}: from {start_s} to {end_s} s of a video of {duration_s} s: correct it")
        window = expand_window(start_s, min(end_s, duration_s), MIN_WINDOW_S, duration_s)
        prompt = PromptFields("description", query=_STEPS, target=_text(segment, where))
        key = f"{video}/{text_of(segment, 'id', where)}"
        return self._record(key, video, prompt, "coarse", where, window, duration_s)

    # -------------------------------------------------------------------------------------------------- questions

    def _asked(self, counts: Counts) -> Iterator[InstructionRecord | SourceError]:
        for where, entry in read_records(self._find(f"*_{self.part}.jsonl")):
            counts.add("rows")
            if isinstance(entry, ValueError):
                yield SourceError(str(entry))
                continue
            record = try_parse(self._question, entry, counts, where)
            if isinstance(record, InstructionRecord):
                counts.add_distinct("videos", record.video)
            yield record

    def _question(self, entry: dict[str, Any], counts: Counts, where: str) -> InstructionRecord:
        try:
            asked, answered = (turn["value"] for turn in entry["conversations"])
            video = Path(entry["image"]["video"]).stem
        except (KeyError, TypeError, ValueError):
            raise SourceError(f"{where}: expected a question, an answer and image.video: correct it") from None
        # The question, options such as "(A) Go", and a request for the letter, each on lines of their own.
        lines = [line for line in str(asked).replace(VIDEO_TAG, "").strip().split("\n") if not _REQUEST.match(line)]
        lettered = [found for line in lines if (found := _OPTION.match(line))]
        query = "\n".join(line for line in lines if not _OPTION.match(line)).strip()
        options, target = tuple(found[2].strip() for found in lettered), str(answered).strip()
        if self.part == "mcq":
            if [found[1] for found in lettered] != [chr(ord("A") + n) for n in range(len(options))] or len(options) < 2:
                raise SourceError(
                    f"{where}: options {[found[0] for found in lettered]} are not lettered in order: fix them"
                )
            # Two released rows answer with the option's words.
            letters = {found[1]: text for found, text in zip(lettered, options, strict=True)}
            counts.add("answers in words, given their option's letter", target in options and target not in letters)
            target = letters.get(target, target)
            if target not in options:
                raise SourceError(f"{where}: answer {target!r} is neither a letter nor an option: correct it")
            if len(set(options)) < len(options):
                counts.add("rows with two equal options")
        if not query or not target:
            raise SourceError(f"{where}: question or answer is empty: correct it")
        task = "mcq" if self.part == "mcq" else "qa"
        prompt = PromptFields(task, query, target, options if task == "mcq" else ())
        return self._record(f"{self.part}/{text_of(entry, 'id', where)}", video, prompt, self.part, where)


def read_fine(file: Path, text: str) -> Iterator[tuple[str, dict[str, str] | SourceError]]:
    """Rows of a file of fine annotations with their place, under the names of the README; or why one is none.

    Args:
        file: the table.
        text: the column that is described with.

    Raises:
        SourceError: a column is missing, or the file is no table.
    """
    rows = read_csv(file)
    _, header = next(rows, ("", []))
    named = ["annotation_uid" if name == "annotation_id" else name for name in header]
    if missing := [name for name in (*_COLUMNS, "annotation_uid") if name not in named]:
        raise SourceError(f"{file}: column {', '.join(missing)} is missing: fetch the file again")
    if text not in named:
        raise SourceError(f"{file}: column {text} is missing: take a file whose name ends in _en.csv")
    for where, cells in rows:
        row = dict(zip(named, cells, strict=False))
        if len(cells) != len(named):
            problem = (
                f"{len(cells)} cells in {len(named)} columns: quote texts that hold a comma, or add the missing cells"
            )
            yield where, SourceError(f"{where}: {problem}")
        elif row["subset"] not in _SUBSETS or row["view"] not in _VIEWS:
            problem = f"subset is {row['subset']!r} and view is {row['view']!r}"
            allowed = f"{', '.join(_SUBSETS)} and {', '.join(_VIEWS)}"
            yield where, SourceError(f"{where}: {problem}, allowed: {allowed}")
        else:
            yield where, row


def _unpacked(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of the JSON files in an archive.

    Raises:
        SourceError: it cannot be unpacked.
    """
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.name.endswith(".json") else None
                if content is not None:
                    yield member.name, content.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        words = " ".join(str(error).split())
        raise SourceError(f"{file}: cannot be unpacked ({words}): fetch the file again") from None


def _segments(content: bytes, where: str) -> list[Any]:
    try:
        segments = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: invalid JSON ({error}): fetch the file again") from None
    if not isinstance(segments, list):
        raise SourceError(f"{where}: expected a JSON list, got {type(segments).__name__}: fetch the file again")
    return segments


def _text(segment: Any, where: str) -> str:
    """Return the text of a segment with its lines trimmed."""
    return "\n".join(line.strip() for line in text_of(segment, "textAttribute_en", where).splitlines() if line.strip())
