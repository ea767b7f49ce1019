"""EgoMCQ: choose the one of five clips of Ego4D that a narration was written for.

Read: ``egomcq.json``, for each question ``query`` and ``choices`` ``0`` to ``4`` (``clip_text``, ``video_uid``,
``clip_start`` and ``clip_end`` in seconds), ``answer`` and ``types``. Public programs disagree whether 1 or 2
of ``types`` stands for choices of one video, so that is derived from the choices. Videos are whole recordings: the
chunks that other programs cut may end in the middle of a clip.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datamodules.ego_exo_clip.sources.ego_exo4d import camera_wearer_text
from datamodules.egobench.base import Benchmark, fixed_subset, mapping_of, one_line, whole_number
from datamodules.egobench.samples import Clip, Sample, TaskName
from datamodules.io.annotations import Counts, Official, SourceError, number_of, option, read_json, text_of, try_parse

_CLIPS, _FAST_OF_A_GROUP = 5, 1000


@dataclass(frozen=True)
class EgoMCQ(Benchmark):
    """All questions; ``intra`` are those whose clips are of one video, ``inter`` the others."""

    narrations: str = option(
        "rendered", "raw: narrations as in the file; rendered: as captions of stages 1 and 2", ("rendered", "raw")
    )

    name: ClassVar[str] = "egomcq"
    task: ClassVar[TaskName] = "rank_clips"
    renamed: ClassVar = {"wording": ("narrations", {"as_trained": "rendered", "as_written": "raw"})}

    def official(self) -> dict[str, Official]:
        """Return the rounded number of questions that the authors give."""
        return {"samples": Official(39_000, exact=False)}

    def read(self, counts: Counts) -> Iterator[Sample | SourceError]:
        """Yield a sample for each question."""
        file = self.main_file(["egomcq.json"], "EgoMCQ's questions")
        entries = read_json(file, dict)
        samples = {key: try_parse(self._sample, entry, key, f"{file} entry {key!r}") for key, entry in entries.items()}
        named: dict[int, Counter[str]] = {}
        for key, sample in samples.items():
            if isinstance(sample, Sample):
                named.setdefault(int(entries[key]["types"]), Counter())[sample.groups[0]] += 1
        stands_for = {kind: groups.most_common(1)[0][0] for kind, groups in named.items()}
        if len(set(stands_for.values())) < len(stands_for):
            (group,) = set(stands_for.values())
            raise SourceError(f"{file}: 'types' 1 and 2 both have clips of {_OF[group]}: fetch the file again")
        for key, sample in samples.items():
            if isinstance(sample, Sample):
                kind, (group,) = int(entries[key]["types"]), sample.groups
                if stands_for[kind] != group:
                    yield SourceError(
                        f"{file} entry {key!r}: clips are of {_OF[group]}, 'types' {kind} has those of "
                        f"{_OF[stands_for[kind]]}: correct it"
                    )
                    continue
                counts.add(group)
            yield sample

    def _sample(self, entry: Any, key: str, where: str) -> Sample:
        text = one_line(mapping_of(entry, "query", where), "clip_text", f"{where} query")
        if self.narrations == "rendered":
            text = camera_wearer_text(text) or text  # fewer than three words stay as they are
        choices = mapping_of(entry, "choices", where)
        if set(choices) != set(map(str, range(_CLIPS))):
            raise SourceError(f"{where}: choices are {', '.join(choices)}, expected 0 to 4: correct them")
        clips = tuple(_clip(choices[str(number)], f"{where} choice {number}") for number in range(_CLIPS))
        answer, kind = whole_number(entry, "answer", where), whole_number(entry, "types", where)
        if answer >= _CLIPS or kind not in (1, 2):
            raise SourceError(f"{where}: 'answer' is {answer} and 'types' {kind}, expected 0 to 4 and 1 or 2: fix it")
        group = "intra" if len({clip.video for clip in clips}) == 1 else "inter"
        return Sample(key, clips, text, (), answer, (group,))

    def fast_samples(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return equally many of both groups."""
        subset: set[str] = set()
        for group in ("inter", "intra"):
            of_group = [sample for sample in samples if group in sample.groups]
            subset.update(sample.id for sample in fixed_subset(of_group, _FAST_OF_A_GROUP))
        return [sample for sample in samples if sample.id in subset]


_OF = {"intra": "one video", "inter": "several videos"}


def _clip(choice: Any, where: str) -> Clip:
    start_s, end_s = max(0.0, number_of(choice, "clip_start", where)), number_of(choice, "clip_end", where)
    if end_s <= start_s:
        raise SourceError(f"{where}: 'clip_start' and 'clip_end' give {start_s:g} to {end_s:g} s: correct them")
    return Clip(f"{text_of(choice, 'video_uid', where)}.mp4", start_s, end_s)
