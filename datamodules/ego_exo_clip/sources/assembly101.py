"""Assembly101 (arXiv 2203.14712) as synchronised pairs: toys taken apart, eight fixed cameras and four on the headset.

Expected below the root, as distributed::

    recordings/<sequence>/<view>.mp4
    fine-grained-annotations/{train,validation}.csv

Columns, meanings and view numbers are those of the READMEs and scripts of github.com/assembly-101; the dataset itself
was not available, so this was tested on invented files only.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datamodules.ego_exo_clip.index import FilterCounts, Group, Narration, View
from datamodules.io.annotations import SourceError, option

ANNOTATION_FPS = 30.0
"""Frames per second that segments are counted at."""
VIDEO_FPS = 60.0
"""Frames per second of the recordings, by the authors; ``--probe`` reads the rate of each file."""
EGO_VIEWS = {
    "e1": ("HMC_84346135_mono10bit", "HMC_21176875_mono10bit"),
    "e2": ("HMC_84347414_mono10bit", "HMC_21176623_mono10bit"),
    "e3": ("HMC_84355350_mono10bit", "HMC_21110305_mono10bit"),
    "e4": ("HMC_84358933_mono10bit", "HMC_21179183_mono10bit"),
}
"""Cameras of the headset by the authors' numbers; two headsets were used."""
_COLUMNS = ("video", "start_frame", "end_frame", "action_cls", "is_RGB")


@dataclass
class _Sequence:
    """One recording: its views, and its segments in the order of their first rows."""

    egos: dict[str, str] = field(default_factory=dict)  # camera to path below recordings/
    exos: dict[str, str] = field(default_factory=dict)
    segments: dict[tuple[int, int, str], None] = field(default_factory=dict)


@dataclass
class Assembly101:
    """A ``PairSource`` of Assembly101's fine-grained segments.

    A segment is listed once for each view and becomes one narration, "Camera-wearer unscrews chassis with hand.". Its
    bounds are those annotated, the end frame included, so there is no gap rule and no alpha. The egocentric views are
    those marked as monochrome. Until the files are opened, a take lasts until its last segment ends.

    Args:
        root: folder that holds ``recordings``.
        split: train or validation; the test split has no action names.
        annotations: folder of the files; ``<root>/fine-grained-annotations`` if left out.
        ego_view: the view to prefer, by the authors' number; the others replace it if it is missing. Which of them
            shows the hands best was not examined.

    Raises:
        ValueError: ``ego_view`` is not a number of a view.
    """

    root: Path
    split: Literal["train", "validation"] = option("train", "takes of this split", ("train", "validation"))
    annotations: Path | None = option(None, "folder of train.csv (default: <root>/fine-grained-annotations)")
    ego_view: str = option("e1", "preferred egocentric view, by the authors' number", tuple(EGO_VIEWS))

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown view."""
        self.root = Path(self.root)
        if self.ego_view not in EGO_VIEWS:
            raise ValueError(f"ego_view: got {self.ego_view!r}, allowed: {', '.join(EGO_VIEWS)}")

    @property
    def description(self) -> dict[str, str]:
        """Description for ``index.json``."""
        return {"name": "Assembly101", "split": self.split, "ego_view": self.ego_view}

    def read(self, counts: FilterCounts) -> Iterator[tuple[Group, list[Narration]]]:
        """Yield every recording of the file, in the file's order.

        Raises:
            SourceError: the file or a column is missing, or a value is wrong.
        """
        for name, sequence in self._sequences(counts).items():
            last_s = max(end + 1 for _, end, _ in sequence.segments) / ANNOTATION_FPS
            group = Group(
                group_id=name,
                egos=tuple(View(cam, sequence.egos[cam]) for cam in sorted(sequence.egos, key=self._rank)),
                exos=tuple(View(cam, sequence.exos[cam]) for cam in sorted(sequence.exos)),
                duration_s=last_s,
                fps=VIDEO_FPS,
                scenario="Assembly",
            )
            yield group, [_narration(name, *segment) for segment in sequence.segments]

    def _sequences(self, counts: FilterCounts) -> dict[str, _Sequence]:
        folder = self.annotations or self.root / "fine-grained-annotations"
        file = folder / f"{self.split}.csv"
        if not file.is_file():
            raise SourceError(f"{file}: no such file; put Assembly101's fine-grained annotations there")
        sequences: dict[str, _Sequence] = {}
        with file.open(newline="", encoding="utf-8") as lines:
            rows = csv.DictReader(lines)
            missing = [column for column in _COLUMNS if column not in (rows.fieldnames or ())]
            if missing:
                raise SourceError(f"{file}: column {', '.join(missing)} is missing; fetch the file again")
            for row in rows:
                where = f"{file} line {rows.line_num}"
                name, _, video = (row["video"] or "").partition("/")
                if not name or not video.endswith(".mp4") or "/" in video:
                    raise SourceError(f"{where}: video is {row['video']!r}, expected <sequence>/<view>.mp4; correct it")
                if row["is_RGB"] not in ("0", "1"):
                    raise SourceError(f"{where}: is_RGB is {row['is_RGB']!r}, expected 0 or 1; correct it")
                start, end = (_frame(row, column, where) for column in ("start_frame", "end_frame"))
                if end < start or not row["action_cls"]:
                    raise SourceError(
                        f"{where}: {row['action_cls']!r} from frame {start} to {end}, expected an action and an end "
                        "that is not before the start; correct it"
                    )
                sequence = sequences.setdefault(name, _Sequence())
                views = sequence.exos if row["is_RGB"] == "1" else sequence.egos
                views[video.removesuffix(".mp4")] = f"recordings/{row['video']}"
                segment = (start, end, row["action_cls"])
                if counts.keep("rows", "the first of a segment's views", segment not in sequence.segments):
                    sequence.segments[segment] = None
        return sequences

    def _rank(self, camera: str) -> tuple[bool, str, str]:
        """Return the sort key of an egocentric camera: the preferred view, the authors' numbers, then its name."""
        number = next((view for view, cameras in EGO_VIEWS.items() if camera in cameras), "unknown")
        return number != self.ego_view, number, camera


def _frame(row: dict[str, str], column: str, where: str) -> int:
    value = row[column] or ""
    if not value.isdecimal():
        raise SourceError(f"{where}: {column} is {value!r}, expected a frame number; correct it")
    return int(value)


def _narration(sequence: str, start: int, end: int, action: str) -> Narration:
    span_s = start / ANNOTATION_FPS, (end + 1) / ANNOTATION_FPS
    return Narration(
        clip_id=f"{sequence}/{start}-{end}/{action.replace(' ', '_')}",
        annotator="Assembly101",
        time_s=(span_s[0] + span_s[1]) / 2,
        text=action_text(action),
        raw_text=action,
        span_s=span_s,
        subject="C",
    )


def action_text(action: str) -> str:
    """Return an action name as a sentence about the wearer: "pick up screw" becomes "Camera-wearer picks up screw."."""
    verb, _, rest = action.partition(" ")
    if verb.endswith("y") and verb[-2:-1] not in tuple("aeiou"):
        verb = f"{verb[:-1]}ies"
    else:
        verb += "es" if verb.endswith(("s", "sh", "ch", "x", "z", "o")) else "s"
    return f"Camera-wearer {verb}{' ' if rest else ''}{rest}."
