"""EgoPlan-Bench: choose the next step towards a goal from past steps and the current view; four options.

Read: ``EgoPlan_validation.json`` or ``EgoPlan_test.json``, lists of ``sample_id``, ``video_source``, ``video_id``,
``task_goal``, ``question``, ``choice_a`` to ``choice_d``, ``golden_choice_idx``, ``answer``,
``current_observation_frame`` and ``task_progress_metadata``; answers of the test file are hidden. EgoPlan-Bench2 names
no source, video and question, since all its videos are of Ego4D and begin its ids.

Frames after the current observation show the answer and are never decoded. Ego4D has 30 frames a second, counted from
0. For EPIC-KITCHENS they are numbers of the frames that its authors extracted, counted from 1, 60 a second for videos
of the first release (P01_13) and 50 for later ones (P01_101), whatever the frame rate of the video file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datamodules.egobench.base import LETTERS, Benchmark, one_line, whole_number
from datamodules.egobench.epic100_mir import video_file
from datamodules.egobench.samples import Clip, Sample, TaskName
from datamodules.io.annotations import Counts, Official, SourceError, option, read_json, text_of, try_parse

EGO4D_FPS = 30
WITHOUT_PROGRESS_S = 4.0
"""Seconds shown before the observation if no earlier step is known."""
_CHOICES = tuple(f"choice_{letter}" for letter in "abcd")
_EPIC = re.compile(r"(P\d\d)_(\d{2,3})")
_NO_PROGRESS = "questions without a known step before the observation"


@dataclass(frozen=True)
class EgoPlan(Benchmark):
    """The validation questions, the ones that the paper reports."""

    ego4d_file: str = option("{video}.mp4", "path of a video of Ego4D below videos")
    epic_file: str = option("{participant}/{video}.MP4", "path of a video of EPIC-KITCHENS below videos")

    name: ClassVar[str] = "egoplan"
    task: ClassVar[TaskName] = "choice"
    files: ClassVar[tuple[str, ...]] = ("EgoPlan_validation.json",)
    num_samples: ClassVar[int] = 3355
    hidden: ClassVar[bool] = False

    def official(self) -> dict[str, Official]:
        """Return the number of questions."""
        return {"samples": Official(self.num_samples)}

    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Yield a sample for each question; its group is the source of the video, or the domain."""
        file = self.main_file(self.files, "EgoPlan's questions")
        for number, row in enumerate(read_json(file, list), 1):
            yield try_parse(self._sample, row, counts, f"{file} entry {number}")

    def _sample(self, row: Any, counts: Counts, where: str) -> Sample:
        options = tuple(one_line(row, key, where) for key in _CHOICES)
        if len(set(options)) != len(options):
            raise SourceError(f"{where}: choices are {list(options)}, expected four different ones: correct them")
        source, question = row.get("video_source"), row.get("question")
        named = text_of if isinstance(row.get("sample_id"), str) and not self.hidden else whole_number
        number = str(named(row, "sample_id", where))
        # The ids of the two sources may coincide.
        key = number if self.hidden or source is None else f"{source}_{number}"
        group = source or row.get("domain")
        return Sample(
            key,
            (self._clip(row, counts, where),),
            _goal_question(one_line(row, "task_goal", where)) if question is None else one_line(row, "question", where),
            options,
            self._answer(row, options, where),
            () if group is None else (str(group),),
        )

    def _answer(self, row: Any, options: Sequence[str], where: str) -> int | None:
        letter = row.get("golden_choice_idx")
        if self.hidden:
            return None
        if letter not in tuple(LETTERS[: len(options)]):
            raise SourceError(f"{where}: field 'golden_choice_idx' is {letter!r}, expected A to D: correct it")
        number, answer = LETTERS.index(letter), one_line(row, "answer", where)
        if answer != options[number]:
            raise SourceError(f"{where}: answer is {answer!r}, but choice {letter} {options[number]!r}: correct one")
        return number

    def _clip(self, row: Any, counts: Counts, where: str) -> Clip:
        source = row.get("video_source")
        if source not in (None, "Ego4D", "EpicKitchens"):
            raise SourceError(f"{where}: field 'video_source' is {source!r}, expected Ego4D or EpicKitchens: fix it")
        given = "video_id" if "video_id" in row else "sample_id"
        video = text_of(row, given, where)
        if given == "sample_id":
            video = video.rpartition("_")[0]
        epic = _EPIC.fullmatch(video)
        if not video or (source is not None and (epic is None) != (source == "Ego4D")):
            raise SourceError(f"{where}: field {given!r} is {row[given]!r}, no video of {source}: correct it")
        if epic is None:
            fps, first, file = EGO4D_FPS, 0, video_file(self.ego4d_file, "", video)
        else:
            fps, first, file = 60 if len(epic[2]) == 2 else 50, 1, video_file(self.epic_file, epic[1], video)
        end_s = max(0, whole_number(row, "current_observation_frame", where) - first) / fps
        steps = row.get("task_progress_metadata") or []
        if not isinstance(steps, list):
            raise SourceError(f"{where}: field 'task_progress_metadata' is {steps!r}, expected a list: correct it")
        starts_s = [max(0, whole_number(step, "start_frame", where) - first) / fps for step in steps]
        start_s = min(starts_s, default=end_s)
        if start_s >= end_s:
            counts.add(_NO_PROGRESS)
            start_s = max(0.0, end_s - WITHOUT_PROGRESS_S)
        return Clip(file, start_s, end_s, last_at_end=True)

    def remarks(self, counts: Mapping[str, int]) -> list[str]:
        """Note how many questions have no known past."""
        found = counts.get(_NO_PROGRESS, 0)
        shown = f"{self.name}: {found:,} {_NO_PROGRESS}, which show the {WITHOUT_PROGRESS_S:g} s before it"
        return [shown] if found else []


@dataclass(frozen=True)
class EgoPlanTest(EgoPlan):
    """The test questions, whose answers are hidden."""

    name: ClassVar[str] = "egoplan_test"
    files: ClassVar[tuple[str, ...]] = ("EgoPlan_test.json",)
    num_samples: ClassVar[int] = 1584
    hidden: ClassVar[bool] = True

    def submission(self, samples: Sequence[Sample], predictions: Mapping[str, int]) -> dict[str, str]:
        """Return ``submission.json``, a list like the authors' example."""
        rows = [{"sample_id": int(sample.id), "label": LETTERS[predictions[sample.id]]} for sample in samples]
        return {"submission.json": json.dumps(rows, indent=1)}


@dataclass(frozen=True)
class EgoPlan2(EgoPlan):
    """EgoPlan-Bench2: videos of Ego4D in four domains."""

    name: ClassVar[str] = "egoplan2"
    files: ClassVar[tuple[str, ...]] = ("EgoPlan-Bench2.json", "egoplan2.json")
    num_samples: ClassVar[int] = 1321


def _goal_question(goal: str) -> str:
    """Return the question for a row without one."""
    doing = goal.split()[0].lower().endswith("ing")
    return f"What should I do next {'while' if doing else 'to'} {goal}?"
