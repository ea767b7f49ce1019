"""A paired dataset of your own: recordings of one ego and several exo cameras, with a CSV file of narrations.

Put this file into the folder that you work in. The class is named on the command line by its import path, and its
fields become options::

    python -m datamodules.ego_exo_clip.build paired_dataset:CookingLessons /data/lessons --probe

The data root ``/data/lessons`` holds ``narrations.csv`` and the videos::

    lesson,seconds,text                       lesson01/glasses.mp4
    lesson01,3.2,C cracks an egg.             lesson01/left.mp4
    lesson01,9.8,C whisks the egg.            lesson01/right.mp4

The command writes an index to ``/data/lessons/ego_exo_clip``. Train on it by setting ``data.init_args.root`` and
``data.init_args.index``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datamodules.ego_exo_clip.index import FilterCounts, Group, Narration, View
from datamodules.ego_exo_clip.sources.ego_exo4d import camera_wearer_text
from datamodules.io.annotations import SourceError, option


@dataclass
class CookingLessons:
    """Cooking lessons, recorded with glasses and with cameras on tripods.

    Args:
        root: folder that holds ``narrations.csv`` and a folder of videos for each lesson.
        split: "train" or another part; parts other than "train" are cut with the mean narration gap of "train".
        ego: file name of the egocentric videos.
    """

    root: Path
    split: str = option("train", "lessons of this split: narrations.csv, or narrations_<split>.csv")
    ego: str = option("glasses.mp4", "file name of the egocentric videos")

    @property
    def description(self) -> dict[str, str]:
        """Description for ``index.json``, without folders."""
        return {"name": "Cooking lessons", "split": self.split}

    def read(self, counts: FilterCounts) -> Iterator[tuple[Group, list[Narration]]]:
        """Yield every lesson with its narrations, without opening a video.

        Args:
            counts: gets the number of lessons before and after each filter.

        Raises:
            SourceError: a file or a value is missing or wrong.
        """
        for lesson, rows in self._rows().items():
            videos = sorted(path.name for path in (self.root / lesson).glob("*.mp4"))
            if not counts.keep("takes", "with a folder of videos", bool(videos)):
                continue
            views = [View(cam=Path(name).stem, path=f"{lesson}/{name}") for name in videos]
            narrations = [self._narration(lesson, number, row) for number, row in enumerate(rows)]
            group = Group(
                group_id=lesson,
                egos=tuple(view for view in views if view.path.endswith(f"/{self.ego}")),
                exos=tuple(view for view in views if not view.path.endswith(f"/{self.ego}")),
                # Until the videos are opened (--probe), a lesson lasts until a second after its last narration.
                duration_s=max(narration.time_s for narration in narrations) + 1.0,
                fps=30.0,
                scenario="Cooking",
            )
            yield group, narrations

    def _rows(self) -> dict[str, list[dict[str, str]]]:
        """Return the rows of the CSV file by lesson."""
        file = self.root / ("narrations.csv" if self.split == "train" else f"narrations_{self.split}.csv")
        if not file.is_file():
            raise SourceError(f"{file}: no such file: put the narrations there")
        rows: dict[str, list[dict[str, str]]] = {}
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                rows.setdefault(row["lesson"], []).append(row)
        return rows

    def _narration(self, lesson: str, number: int, row: dict[str, str]) -> Narration:
        """Return a narration; its clip is cut by the EgoVLP rule because it has no span of its own."""
        try:
            time_s = float(row["seconds"])
        except ValueError:
            raise SourceError(f"{lesson}, narration {number}: seconds is {row['seconds']!r}: give a number") from None
        return Narration(
            clip_id=f"{lesson}/{number}",
            annotator="the teacher",
            time_s=time_s,
            text=camera_wearer_text(row["text"]),  # "C" becomes "Camera-wearer"
            raw_text=row["text"],
            subject="C",
        )
