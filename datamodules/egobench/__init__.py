"""EgoBench: eight egocentric benchmarks from their official files, and two that compare views.

One file for each (``egoschema``, ``qaego4d``, ``egotaskqa``, ``charades_ego``, ``epic100_mir``, ``egoplan``, ``vlnqa``,
``egomcq``; ``egoexomem``, ``egoexobench``). A benchmark of your own is one more subclass of ``Benchmark`` in a file of
yours, named ``module:Class``.
"""

from __future__ import annotations

from datamodules.egobench.base import Benchmark
from datamodules.egobench.loading import BENCHMARKS, LoadedBenchmark, benchmark_class, load, select_entries
from datamodules.egobench.samples import Candidate, Clip, Sample, TaskName, VideoInput, View

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Candidate",
    "Clip",
    "LoadedBenchmark",
    "Sample",
    "TaskName",
    "VideoInput",
    "View",
    "benchmark_class",
    "load",
    "select_entries",
]
