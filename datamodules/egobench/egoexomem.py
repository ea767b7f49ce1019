"""EgoExoMem: questions with four options about a whole recording that glasses and a fixed camera filmed.

Read: ``qa_merged_v6.json`` for Ego-Exo4D, a list of ``qa_id``, ``qa_type`` (``Q1`` to ``Q8``), ``take_name``,
``required_view`` (``ego``, ``exo`` or ``either``), ``question``, ``options``, ``correct_answer`` (0 to 3) and
``verification.keyframes``; and ``qa_verified.json`` for LEMMA, an object of ``question``, ``options``,
``correct_answer`` and ``status`` by id, ``<take>_Q4_001``, which names take and type.

In the files the first option is right in two of three questions about LEMMA. As in the authors' own evaluation, options
are shown in an order that a generator with the question's id as its seed draws.

Every question is asked three times: of the egocentric video, of the exocentric one, and of both, one after the other.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datamodules.egobench.base import Benchmark, one_line, whole_number
from datamodules.egobench.samples import Clip, Sample, TaskName, VideoInput
from datamodules.io.annotations import Counts, Official, SourceError, option, read_json, text_of, try_parse
from datamodules.io.jsonl import is_text

_OPTIONS = 4
_TYPES = tuple(f"Q{number}" for number in range(1, 9))
_VIEWS = ("ego", "exo", "either")
_GLASSES = re.compile(r"/ego_(aria\d+)_214-1_")
_LEMMA_ID = re.compile(r"(?P<take>.+)_(?P<type>Q[1-8])_\d+")


@dataclass(frozen=True)
class _EgoExoMem(Benchmark):
    """The part that both files have in common."""

    ego_label: str = option("Egocentric video:", "text in front of the egocentric video where both are shown")
    exo_label: str = option("Exocentric video:", "text in front of the exocentric video where both are shown")

    task: ClassVar[TaskName] = "cross_view"
    egocentric: ClassVar[bool] = False

    def _sample(
        self, row: Any, key: str, kind: str, videos: tuple[str, str], groups: Sequence[str], where: str
    ) -> Sample:
        if kind not in _TYPES:
            raise SourceError(f"{where}: type is {kind!r}, expected {_TYPES[0]} to {_TYPES[-1]}: correct it")
        given, right = row.get("options"), whole_number(row, "correct_answer", where)
        texts = (
            [" ".join(text.split()) for text in given] if isinstance(given, list) and all(map(is_text, given)) else []
        )
        if len(texts) != _OPTIONS or len(set(texts)) != _OPTIONS or right >= _OPTIONS:
            raise SourceError(
                f"{where}: 'options' are {given!r} and 'correct_answer' {right}, expected four different texts and "
                "0 to 3: correct them"
            )
        answer = texts[right]
        random.Random(key).shuffle(texts)  # the order of the official evaluation
        ego, exo = Clip(videos[0]), Clip(videos[1], view="exo")
        both = VideoInput((ego, exo), (self.ego_label, self.exo_label))
        return Sample(
            key,
            (ego, exo),
            one_line(row, "question", where),
            tuple(texts),
            texts.index(answer),
            (kind, *groups),
            shown=(VideoInput((ego,)), VideoInput((exo,)), both),
        )


@dataclass(frozen=True)
class EgoExoMemEgoExo4D(_EgoExoMem):
    """The questions about takes of Ego-Exo4D; the exocentric camera is ``cam01``, as in the authors' evaluation."""

    file: str = option(
        "{take}/frame_aligned_videos/{camera}.mp4",
        "path of a video below videos; add downscaled/448/ before {camera} for the small copies",
    )

    name: ClassVar[str] = "egoexomem_egoexo4d"

    def official(self) -> dict[str, Official]:
        """Return the number of questions."""
        return {"samples": Official(764)}

    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Yield a sample for each question; its groups are its type and the view that it needs."""
        names = ["qa_merged_v6.json", "EgoExo4D/qa_merged_v6.json", "data/EgoExo4D/qa_merged_v6.json"]
        file = self.main_file(names, "EgoExoMem's questions about Ego-Exo4D")
        rows = read_json(file, list)
        glasses = _glasses(rows)
        for number, row in enumerate(rows, 1):
            yield try_parse(self._question, row, glasses, f"{file} entry {number}")

    def _question(self, row: Any, glasses: Mapping[str, str], where: str) -> Sample:
        key, take = text_of(row, "qa_id", where), text_of(row, "take_name", where)
        needed = row.get("required_view")
        if needed not in _VIEWS:
            raise SourceError(f"{where}: field 'required_view' is {needed!r}, expected {', '.join(_VIEWS)}: correct it")
        videos = (self._path(take, self._glasses_of(take, glasses)), self._path(take, "cam01"))
        return self._sample(row, key, text_of(row, "qa_type", where), videos, (f"needs_{needed}",), where)

    def _glasses_of(self, take: str, glasses: Mapping[str, str]) -> str:
        """Return the glasses whose file exists; else those of a key frame, or the most frequent ones."""
        pattern = self._path(take, "aria*_214-1")
        found = sorted(self.videos.glob(pattern))
        return found[0].stem if found else f"{glasses.get(take, 'aria01')}_214-1"

    def _path(self, take: str, camera: str) -> str:
        return self.file.replace("{take}", take).replace("{camera}", camera)


@dataclass(frozen=True)
class EgoExoMemLemma(_EgoExoMem):
    """The questions about recordings of LEMMA: ``<take>/fpv1.mp4`` and ``<take>/master.mp4``."""

    name: ClassVar[str] = "egoexomem_lemma"

    def official(self) -> dict[str, Official]:
        """Return the number of questions."""
        return {"samples": Official(1824)}

    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Yield a sample for each question that its authors verified; its group is its type."""
        names = ["qa_verified.json", "LEMMA/qa_verified.json", "data/LEMMA/qa_verified.json"]
        file = self.main_file(names, "EgoExoMem's questions about LEMMA")
        for key, row in read_json(file, dict).items():
            if not isinstance(row, dict) or row.get("status") == "ok":
                yield try_parse(self._question, row, key, f"{file} entry {key!r}")

    def _question(self, row: Any, key: str, where: str) -> Sample:
        found = _LEMMA_ID.fullmatch(key)
        if found is None or not isinstance(row, dict):
            raise SourceError(f"{where}: expected an object under a key <take>_Q1_001: fetch the file again")
        take = found["take"].replace("_", "-")
        return self._sample(row, key, found["type"], (f"{take}/fpv1.mp4", f"{take}/master.mp4"), (), where)


def _glasses(rows: Sequence[Any]) -> dict[str, str]:
    """Return the glasses of each take, such as ``aria01``, as far as the names of its key frames tell."""
    found: dict[str, str] = {}
    for row in rows:
        verification = row.get("verification") if isinstance(row, dict) else None
        frames = verification.get("keyframes") if isinstance(verification, dict) else None
        for frame in frames if isinstance(frames, list) else []:
            named = _GLASSES.search(frame) if isinstance(frame, str) else None
            if named is not None and isinstance(row.get("take_name"), str):
                found.setdefault(row["take_name"], named[1])
    return found
