"""Load benchmarks by name, or by the import path of a class of your own."""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from datamodules.egobench.base import Benchmark, fixed_subset
from datamodules.egobench.charades_ego import CharadesEgo
from datamodules.egobench.egoexobench import EgoExoBench
from datamodules.egobench.egoexomem import EgoExoMemEgoExo4D, EgoExoMemLemma
from datamodules.egobench.egomcq import EgoMCQ
from datamodules.egobench.egoplan import EgoPlan, EgoPlan2, EgoPlanTest
from datamodules.egobench.egoschema import EgoSchema
from datamodules.egobench.egotaskqa import EgoTaskQADirect, EgoTaskQAIndirect, EgoTaskQAMcq
from datamodules.egobench.epic100_mir import Epic100Mir
from datamodules.egobench.qaego4d import QAEgo4DClosed, QAEgo4DOpen
from datamodules.egobench.samples import Candidate, Sample, TaskName
from datamodules.egobench.vlnqa import VlnQA
from datamodules.io.annotations import Counts, SourceError, differences
from datamodules.io.jsonl import InvalidRecords
from datamodules.io.plugins import import_class
from datamodules.video.remote import data_path

_CLASSES: tuple[type[Benchmark], ...] = (
    EgoSchema,
    QAEgo4DClosed,
    QAEgo4DOpen,
    EgoTaskQADirect,
    EgoTaskQAIndirect,
    CharadesEgo,
    Epic100Mir,
    EgoPlan,
    VlnQA,
    EgoMCQ,
    EgoPlanTest,
    EgoPlan2,
    EgoTaskQAMcq,
    EgoExoMemEgoExo4D,
    EgoExoMemLemma,
    EgoExoBench,
)
BENCHMARKS: dict[str, type[Benchmark]] = {kind.name: kind for kind in _CLASSES}
"""Class of each benchmark by its name."""


@dataclass(frozen=True)
class LoadedBenchmark:
    """The content of a benchmark's files.

    Attributes:
        name, task: of the benchmark.
        videos: folder that the clips' files are below.
        samples: in the order of the official file.
        candidates: texts that all samples share.
        notes: a line for each number that differs from the official one, and remarks for readers of the scores.
        benchmark: the object that read the files.
        total: samples in the file, of which ``samples`` may be a part.
    """

    name: str
    task: TaskName
    videos: Path
    samples: Sequence[Sample]
    candidates: Sequence[Candidate]
    notes: Sequence[str]
    benchmark: Benchmark
    total: int

    def fast(self) -> LoadedBenchmark:
        """Return a fixed subset for curves during training."""
        samples, candidates = self.benchmark.fast(self.samples, self.candidates)
        return replace(self, samples=samples, candidates=candidates)

    def missing(self) -> dict[str, str]:
        """Return the samples that cannot be shown: id, and the first of their video files that does not exist."""
        files = {clip.video for sample in self.samples for clip in sample.clips}
        absent = {file for file in files if not (self.videos / file).exists()}
        missing = {}
        for sample in self.samples:
            file = next((clip.video for clip in sample.clips if clip.video in absent), None)
            if file is not None:
                missing[sample.id] = file
        return missing

    def submission(self, predictions: Mapping[str, int]) -> dict[str, str]:
        """Return the files that the authors' server takes, as text by name.

        There are none if the benchmark has no server, or for a part of the samples.

        Args:
            predictions: index of the chosen option, for each sample.

        Raises:
            ValueError: a sample has no prediction, or one that is none of its options.
        """
        if len(self.samples) < self.total or not self.benchmark.submission((), {}):
            return {}
        wrong = [s.id for s in self.samples if not 0 <= predictions.get(s.id, -1) < len(s.options)]
        if wrong:
            raise ValueError(
                f"{self.name}: {len(wrong):,} of {len(self.samples):,} samples have no option chosen, such as "
                f"{wrong[0]}: a server takes all of them or none"
            )
        return self.benchmark.submission(self.samples, predictions)


def load(entry: Mapping[str, Any]) -> LoadedBenchmark:
    """Read a benchmark.

    Args:
        entry: ``name`` (or ``class``), fields of the benchmark's class, and optionally ``limit``, the largest number of
            samples, drawn with a constant seed. The name is that of a class in ``BENCHMARKS``, or ``module:Class`` for
            a class of your own, with the working directory on the import path.

    Raises:
        ValueError: keys or values are invalid; the message lists all of them.
        SourceError: a file is missing, or none of its rows can be parsed.
        InvalidRecords: rows are invalid; the message lists them.
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
        raise SourceError(f"{benchmark.name}: the file holds no samples: fetch it again")
    notes = differences(benchmark.name, counts, benchmark.official()) + benchmark.remarks(counts.totals)
    name, task, videos, total = benchmark.name, benchmark.task, benchmark.videos, len(samples)
    if limit is not None and limit < total:
        notes.append(f"{name}: limited to {limit:,} of {total:,} samples")
        samples = fixed_subset(samples, limit)
    return LoadedBenchmark(name, task, videos, samples, candidates, notes, benchmark, total)


def select_entries(entries: Sequence[Mapping[str, Any]], names: Sequence[str] | None) -> list[Mapping[str, Any]]:
    """Return the entries of ``egobench.benchmarks`` that are named on the command line, in the order of the list.

    Args:
        entries: of the configuration.
        names: names or import paths. ``module:Class`` that is in no entry is added with its own defaults. None for
            all entries.

    Raises:
        ValueError: a name is in no entry.
    """
    if names is None:
        return list(entries)
    keys = [_names_of(entry) for entry in entries]
    added = []
    for name in names:
        if any(name in of_entry for of_entry in keys):
            continue
        if ":" not in name:
            known = ", ".join(of_entry[0] for of_entry in keys) or "none"
            raise ValueError(f"benchmark {name}: not in egobench.benchmarks: {known}, or module:Class of your own")
        added.append({"name": name})
    selected = [entry for entry, of_entry in zip(entries, keys, strict=True) if set(names) & set(of_entry)]
    return [*selected, *added]


def benchmark_class(name: Any) -> type[Benchmark]:
    """Return a benchmark's class by its name, or by its import path ``module:Class``.

    Raises:
        ValueError: there is no such class, or it is no benchmark.
    """
    if isinstance(name, str) and name in BENCHMARKS:
        return BENCHMARKS[name]
    if not isinstance(name, str) or ":" not in name:
        raise ValueError(f"benchmarks: name is {name!r}, allowed: {', '.join(BENCHMARKS)}, or module:Class of your own")
    kind = import_class(name, "benchmarks")
    if not isinstance(kind, type) or not issubclass(kind, Benchmark):
        raise ValueError(f"benchmarks: {name}: is no benchmark: derive it from datamodules.egobench.Benchmark")
    known = get_args(TaskName)
    if getattr(kind, "task", None) not in known or not isinstance(getattr(kind, "name", None), str):
        raise ValueError(f"benchmarks: {name}: set its name, and its task to one of {', '.join(known)}")
    return kind


def _names_of(entry: Mapping[str, Any]) -> list[str]:
    """Return the names of an entry on the command line: as written, and that of its class."""
    written = str(entry.get("name", entry.get("class")))
    return [benchmark_class(written).name, written] if ":" in written else [written]


def _configured(entry: Mapping[str, Any]) -> tuple[Benchmark, int | None]:
    """Return the benchmark of an entry and its limit."""
    kind = benchmark_class(entry.get("name", entry.get("class")))
    entry = _with_new_keys(entry, kind)
    known = {field.name: field for field in fields(kind)}
    hints = get_type_hints(kind)
    problems: list[str] = []
    values: dict[str, Any] = {}
    limit = entry.get("limit")
    if limit is not None and (type(limit) is not int or limit < 1):
        problems.append(f"limit is {limit!r}, allowed: null or a number from 1")
    for key, value in entry.items():
        if key in known:
            choices = known[key].metadata.get("choices")
            values[key] = _converted(value, hints[key])
            if values[key] is MISSING or (choices and values[key] not in choices):
                expected = ", ".join(choices) if choices else str(getattr(hints[key], "__name__", hints[key]))
                problems.append(f"{key} is {value!r}, allowed: {expected}")
        elif key not in ("name", "class", "limit"):
            problems.append(f"unknown key {key!r}, allowed: {', '.join(['name', *known, 'limit'])}")
    for key, field in known.items():
        if key not in entry and field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"{key} is missing")
    if problems:
        raise ValueError(f"benchmarks: {kind.name}: {'; '.join(problems)}")
    return kind(**values), limit


def _with_new_keys(entry: Mapping[str, Any], kind: type[Benchmark]) -> dict[str, Any]:
    """Return an entry with keys of earlier versions under their new names, and print a line for each."""
    renamed = dict(entry)
    for old, (new, values) in kind.renamed.items():
        if old in renamed:
            value = renamed.pop(old)
            renamed[new] = values.get(value, value)
            print(f"egobench.benchmarks: {kind.name}: {old} is now called {new}", file=sys.stderr)
    return renamed


def _converted(value: Any, hint: Any) -> Any:
    """Convert a value of a YAML file to the type of a field; ``MISSING`` if that is impossible."""
    kinds = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    if value is None:
        return None if type(None) in kinds else MISSING
    if Path in kinds and isinstance(value, (str, Path)) and str(value):
        return data_path(value)
    return value if type(value) in kinds else MISSING
