"""EgoBench: eight egocentric benchmarks from their official files.

One file for each (``egoschema``, ``qaego4d``, ``egotaskqa``, ``charades_ego``, ``epic100_mir``, ``egoplan``, ``vlnqa``,
``egomcq``). A benchmark of your own is one more subclass of ``Benchmark`` in a file of yours, named ``module:Class``.
"""

from __future__ import annotations

from datamodules.egobench.base import Benchmark
from datamodules.egobench.loading import BENCHMARKS, LoadedBenchmark, benchmark_class, load, select_entries
from datamodules.egobench.samples import Candidate, Clip, Sample, TaskName

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Candidate",
    "Clip",
    "LoadedBenchmark",
    "Sample",
    "TaskName",
    "benchmark_class",
    "load",
    "select_entries",
]
