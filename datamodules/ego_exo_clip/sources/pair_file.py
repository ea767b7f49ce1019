"""Pairs of your own as one table: CSV or JSON Lines, a row per narrated span of an ego video and its exo videos.

::

    ego,exo,start,end,text,offset
    monday/glasses.mp4,monday/left.mp4|monday/right.mp4,3.0,5.5,Camera-wearer cracks an egg.,0|0.4
    monday/glasses.mp4,monday/left.mp4|monday/right.mp4,5.5,9.0,,0|0.4

Columns, in any order; others are ignored:

    ego     egocentric video, relative to the data root
    exo     exocentric videos that ran at the same time, with ``|`` between them (in JSON Lines a list), or a row for
            each of them that is the same otherwise
    start   first second of the span in the egocentric video
    end     second at which it ends, at most the video's length
    text    what happens, trained as it is written; empty for video without narration, which guides stage 2 all the
            same
    offset  optional: seconds by which an exo video lags: second t of ``ego`` is second t + offset of ``exo``; one
            number for all of the row's exo videos, or one for each of them, with ``|`` between them (a list)
    split   optional: part of the dataset that the row belongs to, chosen by ``--split``
    id      optional: name of the narration, unique; by default the file's name and the number of the row

CSV may be separated by commas, semicolons or tabs. Rows with one egocentric video, the same exocentric videos and the
same offsets become one take. Files may differ in rate and length: the seconds that all files of a take cover can be
trained on.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from datamodules.ego_exo_clip.index import FilterCounts, Group, Narration, View
from datamodules.io.annotations import SourceError, number_of, option, read_csv, read_text, text_of
from datamodules.io.jsonl import read_records

REQUIRED = ("ego", "exo", "start", "end", "text")
OPTIONAL = ("offset", "split", "id")
_SHOWN = 20
_NOMINAL_FPS = 30.0


def is_pair_file(name: str) -> bool:
    """Return True for the name of a file with pairs, and not of a source."""
    return name.lower().removesuffix(".gz").endswith((".csv", ".tsv", ".jsonl", ".json"))


@dataclass
class _Row:
    """A narration: a row, and the rows of its other cameras.

    Attributes:
        where: file and line of the first row.
        exos: exocentric videos and the seconds by which they lag.
    """

    where: str
    ego: str
    exos: dict[str, float]
    start_s: float
    end_s: float
    text: str
    split: str | None
    id: str

    def span(self) -> tuple[str, float, float, str, str | None]:
        """Return what the rows of a narration's cameras have in common."""
        return self.ego, self.start_s, self.end_s, self.text, self.split


@dataclass
class PairFile:
    """A ``PairSource`` of one table of pairs.

    Args:
        root: folder that the paths of the table are relative to.
        file: the table.
        split: rows whose ``split`` is this one; a table without that column belongs to it as a whole.
        part_s: spans without text that are longer are cut into parts of equal length, at most this long; None keeps
            them whole.
        allow_missing: count videos that are not there, instead of refusing the table.

    Raises:
        SourceError: no file is given, or ``part_s`` is not above 0.
    """

    root: Path
    file: Path | None = option(None, "table of pairs: .csv, .tsv or .jsonl (in place of the source's name)")
    split: str = option("train", "rows of this split; without a column split, all rows")
    part_s: float | None = option(None, "cut spans without text into parts of at most so many seconds")
    allow_missing: bool = option(False, "count missing videos instead of refusing the table")

    opens_videos: ClassVar[bool] = True
    """Rates and lengths are those of the files, so that building the index opens them."""

    def __post_init__(self) -> None:
        """Raise SourceError for missing and impossible values."""
        self.root = Path(self.root)
        if self.file is None:
            raise SourceError("file: none is given: name the table, such as pairs.csv, in place of the source")
        self.file = Path(self.file)
        if self.part_s is not None and not 0 < self.part_s < math.inf:
            raise SourceError(f"part_s: got {self.part_s}, allowed: above 0")

    @property
    def description(self) -> dict[str, Any]:
        """Description for ``index.json``."""
        assert self.file is not None
        return {"name": self.file.name, "split": self.split, "part_s": self.part_s}

    def read(self, counts: FilterCounts) -> Iterator[tuple[Group, list[Narration]]]:
        """Yield every take of the split, in the order of its first row.

        Raises:
            SourceError: the file or a column is missing, rows are wrong, or videos are missing; names all of them.
        """
        assert self.file is not None
        if not self.root.is_dir():
            raise SourceError(
                f"{self.root}: no such folder: give the one that the paths of {self.file} are relative to"
            )
        table = _Table(self.file)
        chosen = []
        for row in table.rows():
            if counts.keep("narrations", f"in split {self.split}", row.split in (None, self.split)):
                chosen.append(row)
        if not self.allow_missing:
            table.errors += self._missing(chosen)
        table.refuse()
        yield from _takes(chosen, self.part_s)

    def _missing(self, rows: list[_Row]) -> list[str]:
        """Return a line for each video that is not there, with the first row that names it."""
        first: dict[str, tuple[str, str]] = {}
        for row in rows:
            first.setdefault(row.ego, (row.where, "ego"))
            for path in row.exos:
                first.setdefault(path, (row.where, "exo"))
        return [
            f"{where}: field {column!r} is {path!r}, but there is no file {self.root / path}: correct it or the root, "
            "or count missing videos with --allow-missing"
            for path, (where, column) in first.items()
            if not (self.root / path).is_file()
        ]


class _Table:
    """The rows of a file, and the problems met in reading them.

    Attributes:
        errors: a line for each problem.
    """

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise SourceError(f"{file}: no such file: correct the path of the table")
        self.file = file
        self.errors: list[str] = []
        self._ids: dict[str, _Row] = {}

    def rows(self) -> list[_Row]:
        """Return the narrations of all splits, those of several cameras as one."""
        narrations: dict[Any, _Row] = {}
        number = 0
        try:
            for number, (where, record) in enumerate(self._records(), 1):
                self._add(narrations, number, where, record)
        except SourceError as error:  # the file cannot be read from here on
            self.errors.append(str(error))
        if not number and not self.errors:
            self.errors.append(f"{self.file}: holds no row: add one for each narration")
        return list(narrations.values())

    def _add(
        self, narrations: dict[Any, _Row], number: int, where: str, record: Mapping[str, Any] | ValueError
    ) -> None:
        """Add a row to the narrations, or its problem to the errors."""
        try:
            if isinstance(record, ValueError):
                raise record
            row = _parse(record, where)
            same = narrations.setdefault(row.id or row.span(), row)
            if same is not row:
                _add_cameras(same, row)
                return
            row.id = row.id or f"{self.file.name.split('.')[0]}/{number}"
            other = self._ids.setdefault(row.id, row)
            if other is not row:
                raise SourceError(f"{where}: field 'id' is {row.id!r}, the name of {other.where}: name it differently")
        except ValueError as error:
            self.errors.append(str(error))

    def refuse(self) -> None:
        """Raise one SourceError for all problems, if there are any."""
        if not self.errors:
            return
        shown, more = self.errors[:_SHOWN], len(self.errors) - _SHOWN
        rest = [f"and {more} more"] if more > 0 else []
        if len(self.errors) == 1:
            raise SourceError(self.errors[0])
        raise SourceError("\n  ".join([f"{self.file}: {len(self.errors)} problems, nothing was built:", *shown, *rest]))

    def _records(self) -> Iterator[tuple[str, Mapping[str, Any] | ValueError]]:
        """Yield every row by its columns, with its place.

        Raises:
            SourceError: the file has another form, or lacks a column.
        """
        kind = "".join(self.file.suffixes).lower().removesuffix(".gz")
        if kind.endswith((".csv", ".tsv")):
            yield from self._cells()
            return
        for where, record in read_records(self.file):
            if isinstance(record, dict):
                self._check_columns(list(record), where)
            yield where, record

    def _cells(self) -> Iterator[tuple[str, Mapping[str, Any] | ValueError]]:
        columns: list[str] = []
        for where, cells in self._rows_of_csv():
            if not columns:
                columns = [cell.strip().lower() for cell in cells]
                missing = [column for column in REQUIRED if column not in columns]
                if missing:
                    raise SourceError(
                        f"{where}: column {', '.join(missing)} is missing: name the columns in the first line, "
                        f"{','.join((*REQUIRED, *OPTIONAL))} (the last three are optional)"
                    )
                twice = sorted({column for column in columns if columns.count(column) > 1})
                if twice:
                    raise SourceError(f"{where}: column {', '.join(twice)} is there twice: remove one")
                self._check_columns(columns, where)
            elif not any(cell.strip() for cell in cells):
                continue
            elif len(cells) != len(columns):
                yield (
                    where,
                    SourceError(
                        f"{where}: {len(cells)} cells, but the first line names {len(columns)} columns: add what is "
                        "missing, and put texts with the separator into double quotes"
                    ),
                )
            else:
                yield where, dict(zip(columns, cells, strict=True))

    def _rows_of_csv(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the rows, by the separator that the line of the columns has most of."""
        columns = read_text(self.file).lstrip().partition("\n")[0]
        yield from read_csv(self.file, max(",;\t", key=columns.count))

    def _check_columns(self, columns: list[str], where: str) -> None:
        """Refuse names that are nearly those of optional columns, which would be ignored."""
        for column in columns:
            near = difflib.get_close_matches(column, (*REQUIRED, *OPTIONAL), 1, 0.75)
            if near and near[0] != column and near[0] not in columns:
                raise SourceError(f"{where}: column {column!r} is unknown: did you mean {near[0]!r}?")


def _parse(record: Mapping[str, Any], where: str) -> _Row:
    """Return a row.

    Raises:
        SourceError: a field is missing or wrong; names it.
    """
    ego = _path(text_of(record, "ego", where), "ego", where)
    paths = [_path(text, "exo", where) for text in _several(record, "exo", where)]
    if not paths:
        raise SourceError(f"{where}: field 'exo' is {record.get('exo')!r}, expected a path: name the exo video")
    if ego in paths:
        raise SourceError(f"{where}: field 'exo' names the egocentric video {ego!r}: name the other camera's")
    if len(set(paths)) < len(paths):
        raise SourceError(f"{where}: field 'exo' names a video twice: remove one")
    offsets = [_seconds(text, "offset", where) for text in _several(record, "offset", where)] or [0.0]
    if len(offsets) not in (1, len(paths)):
        raise SourceError(
            f"{where}: field 'offset' holds {len(offsets)} numbers for {len(paths)} exo videos: give one for all of "
            "them, or one for each"
        )
    start_s, end_s = number_of(record, "start", where), number_of(record, "end", where)
    if start_s < 0:
        raise SourceError(f"{where}: field 'start' is {start_s:g}, expected 0 or more: give seconds of the ego video")
    if end_s <= start_s:
        raise SourceError(f"{where}: field 'end' is {end_s:g}, expected more than start={start_s:g}: correct one")
    text = "" if record.get("text") in (None, "") else record["text"]
    if not isinstance(text, str):
        raise SourceError(
            f"{where}: field 'text' is {text!r}, expected a text, or nothing for no narration: correct it"
        )
    return _Row(
        where=where,
        ego=ego,
        exos=dict(zip(paths, offsets * (len(paths) if len(offsets) == 1 else 1), strict=True)),
        start_s=start_s,
        end_s=end_s,
        text=" ".join(text.split()),
        split=text_of(record, "split", where) if "split" in record else None,
        id=str(record.get("id") or "").strip(),
    )


def _several(record: Mapping[str, Any], column: str, where: str) -> list[str]:
    """Return the values of a field that may hold several: a list, or a text with bars between them."""
    value = record.get(column)
    if value is None or value == "":
        return []
    if isinstance(value, list):
        return [str(each) for each in value]
    values = [each.strip() for each in str(value).split("|")]
    if "" in values:
        raise SourceError(f"{where}: field {column!r} is {value!r}, with nothing next to a bar: remove the bar")
    return values


def _path(text: str, column: str, where: str) -> str:
    if PurePosixPath(text).is_absolute():
        raise SourceError(
            f"{where}: field {column!r} is {text!r}, expected a path relative to the data root: shorten it"
        )
    return str(PurePosixPath(text))


def _seconds(text: str, column: str, where: str) -> float:
    return number_of({column: text}, column, where)


def _add_cameras(narration: _Row, row: _Row) -> None:
    """Add the cameras of a further row to a narration.

    Raises:
        SourceError: the rows contradict each other, or the row repeats a camera.
    """
    if row.span() != narration.span():
        raise SourceError(
            f"{row.where}: field 'id' is {row.id!r} as in {narration.where}, but not the other columns: "
            "correct one of the two"
        )
    for path, offset_s in row.exos.items():
        if path in narration.exos:
            raise SourceError(f"{row.where}: repeats {narration.where} with {path!r}: remove one of the two")
        narration.exos[path] = offset_s


def _takes(rows: list[_Row], part_s: float | None) -> Iterator[tuple[Group, list[Narration]]]:
    recordings: dict[tuple[str, frozenset[tuple[str, float]]], list[_Row]] = {}
    for row in rows:
        recordings.setdefault((row.ego, frozenset(row.exos.items())), []).append(row)
    seen: Counter[str] = Counter()
    for (ego, _), of_take in recordings.items():
        seen[ego] += 1
        exos = of_take[0].exos
        cameras = _cameras([ego, *exos])
        group = Group(
            group_id=ego if seen[ego] == 1 else f"{ego}#{seen[ego]}",
            egos=(View(cameras[ego], ego),),
            exos=tuple(View(cameras[path], path) for path in exos),
            # Until the videos are opened, the take lasts as long as its rows say.
            duration_s=max(row.end_s for row in of_take),
            fps=_NOMINAL_FPS,
            lag_s={cameras[path]: offset_s for path, offset_s in exos.items()},
        )
        yield group, [narration for row in of_take for narration in _narrations(row, part_s)]


def _cameras(paths: list[str]) -> dict[str, str]:
    """Return a name for the camera of each path: the file's if these differ, else the path."""
    names = {path: PurePosixPath(path).stem for path in paths}
    return names if len(set(names.values())) == len(paths) else {path: path for path in paths}


def _narrations(row: _Row, part_s: float | None) -> Iterator[Narration]:
    """Yield the narration of a row, or the parts of a long span without text."""
    parts = 1
    if part_s is not None and not row.text:
        parts = math.ceil((row.end_s - row.start_s) / part_s - 1e-9)
    for part in range(parts):
        start_s, end_s = (row.start_s + (row.end_s - row.start_s) * edge / parts for edge in (part, part + 1))
        yield Narration(
            clip_id=row.id if parts == 1 else f"{row.id}/{part}",
            annotator="",
            time_s=(start_s + end_s) / 2,
            text=row.text,
            raw_text=row.text,
            span_s=(start_s, end_s),
        )
