"""EgoBench: eight egocentric benchmarks from their official files.

One file for each (``egoschema``, ``qaego4d``, ``egotaskqa``, ``charades_ego``, ``epic100_mir``, ``egoplan``, ``vlnqa``,
``egomcq``); what they give is in ``sample``. One of your own is one more such class in ``BENCHMARKS``.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from datamodules.egobench.charades_ego import CharadesEgo
from datamodules.egobench.egomcq import EgoMCQ
from datamodules.egobench.egoplan import EgoPlan, EgoPlan2, EgoPlanTest
from datamodules.egobench.egoschema import EgoSchema
from datamodules.egobench.egotaskqa import EgoTaskQADirect, EgoTaskQAIndirect, EgoTaskQAMcq
from datamodules.egobench.epic100_mir import Epic100Mir
from datamodules.egobench.official import fixed_subset
from datamodules.egobench.qaego4d import QAEgo4DClosed, QAEgo4DOpen
from datamodules.egobench.samples import Benchmark, Candidate, Sample, Task
from datamodules.egobench.vlnqa import VlnQA
from datamodules.io.annotations import Counts, SourceError, differences
from datamodules.io.jsonl import InvalidRecords

__all__ = ["BENCHMARKS", "LoadedBenchmark", "load"]
_CLASSES: tuple[Any, ...] = (
    *(EgoSchema, QAEgo4DClosed, QAEgo4DOpen, EgoTaskQADirect, EgoTaskQAIndirect, CharadesEgo, Epic100Mir),
    *(EgoPlan, VlnQA, EgoMCQ, EgoPlanTest, EgoPlan2, EgoTaskQAMcq),
)
BENCHMARKS: dict[str, Any] = {kind.name: kind for kind in _CLASSES}
"""Class of each benchmark by its name."""


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark that was read.

    Attributes:
        name, task: of the benchmark.
        videos: folder that the clips' files are below.
        samples: what is asked, in the order of the official file.
        candidates: shared by all samples share.
        notes: a line for each number that is not the official one, and for what a reader of the scores should know.
        benchmark: how it was read.
        total: samples in the file, of which ``samples`` may be a part.
    """

    name: str
    task: Task
    videos: Path
    samples: Sequence[Sample]
    candidates: Sequence[Candidate]
    notes: Sequence[str]
    benchmark: Benchmark
    total: int

    def fast(self) -> LoadedBenchmark:
        """A fixed part for curves while training."""
        samples, candidates = self.benchmark.fast(self.samples, self.candidates)
        return replace(self, samples=samples, candidates=candidates)

    def missing(self) -> dict[str, str]:
        """Samples that cannot be shown: id, and the first of its clips' files that does not exist."""
        files = {clip.video for sample in self.samples for clip in sample.clips}
        absent = {file for file in files if not (self.videos / file).exists()}
        first = (
            (sample.id, next((c.video for c in sample.clips if c.video in absent), None)) for sample in self.samples
        )
        return {key: file for key, file in first if file is not None}

    def submission(self, predictions: Mapping[str, int]) -> dict[str, str]:
        """Files that the authors' server takes, as text by name; none where it has none, or for a part of the samples.

        Args:
            predictions: number of the option chosen, for each sample.

        Raises:
            ValueError: a sample has no prediction, or one that is no option of it.
        """
        if len(self.samples) < self.total or not self.benchmark.submission((), {}):
            return {}
        wrong = [sample.id for sample in self.samples if not 0 <= predictions.get(sample.id, -1) < len(sample.options)]
        if wrong:
            raise ValueError(
                f"{self.name}: {len(wrong):,} of {len(self.samples):,} samples have no option chosen, "
                f"such as {wrong[0]}: a server takes all of them or none"
            )
        return self.benchmark.submission(self.samples, predictions)


def load(entry: Mapping[str, Any]) -> LoadedBenchmark:
    """Read a benchmark.

    Args:
        entry: ``name``, fields of the class of that name, and optionally ``limit``, at most so many samples, drawn by a
            seed that never changes.

    Raises:
        ValueError: keys or values are not what they should be; names all of them.
        SourceError: a file is missing or none of its rows can be read.
        InvalidRecords: rows are wrong; names them.
    """
    benchmark, limit = _configured(entry)
    counts, samples, problems = Counts(), [], []
    for sample in benchmark.read(counts):
        if isinstance(sample, SourceError):
            problems.append(str(sample))
        else:
            samples.append(sample)
    repeated = [key for key, count in Counter(sample.id for sample in samples).items() if count > 1]
    problems += [f"{benchmark.name}: {key!r} is the id of several samples: give each its own" for key in repeated]
    if problems:
        raise InvalidRecords(problems, "`load` in datamodules.egobench (attribute problems of its error)")
    candidates = list(benchmark.candidates())
    counts.add("samples", len(samples))
    counts.add("candidates", len(candidates))
    if not samples:
        raise SourceError(f"{benchmark.name}: its file asks nothing: fetch it again")
    notes = differences(benchmark.name, counts, benchmark.official()) + benchmark.remarks(counts.totals)
    loaded = LoadedBenchmark(
        benchmark.name, benchmark.task, benchmark.videos, samples, candidates, notes, benchmark, len(samples)
    )
    if limit is None or limit >= len(samples):
        return loaded
    limited = f"{benchmark.name}: limited to {limit:,} of {len(samples):,} samples"
    return replace(loaded, samples=fixed_subset(samples, limit), notes=[*notes, limited])


def _configured(entry: Mapping[str, Any]) -> tuple[Benchmark, int | None]:
    name = entry.get("name")
    if not isinstance(name, str) or name not in BENCHMARKS:
        raise ValueError(f"benchmarks: name is {name!r}, allowed: {', '.join(BENCHMARKS)}")
    kind, problems, values = BENCHMARKS[name], [], {}
    known = {field.name: field for field in fields(kind)}
    hints = get_type_hints(kind)
    limit = entry.get("limit")
    if limit is not None and (type(limit) is not int or limit < 1):
        problems.append(f"limit is {limit!r}, allowed: null or a number from 1")
    for key, value in entry.items():
        if key in known:
            allowed = known[key].metadata.get("choices")
            converted = _converted(value, hints[key])
            if converted is MISSING or (allowed and converted not in allowed):
                expected = ", ".join(allowed) if allowed else str(getattr(hints[key], "__name__", hints[key]))
                problems.append(f"{key} is {value!r}, allowed: {expected}")
            values[key] = converted
        elif key not in ("name", "limit"):
            problems.append(f"unknown key {key!r}, allowed: {', '.join(['name', *known, 'limit'])}")
    problems += [f"{key} is missing" for key in ("annotations", "videos") if key not in entry]
    if problems:
        raise ValueError(f"benchmarks: {name}: {'; '.join(problems)}")
    benchmark: Benchmark = kind(**values)
    return benchmark, limit


def _converted(value: Any, hint: Any) -> Any:
    """A value of a YAML file as a field takes it; ``MISSING`` if it cannot."""
    kinds = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    if value is None:
        return None if type(None) in kinds else MISSING
    if Path in kinds and isinstance(value, (str, Path)) and str(value):
        return Path(value)
    return value if type(value) in kinds else MISSING
