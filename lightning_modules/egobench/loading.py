"""Load the benchmarks of a configuration."""

from __future__ import annotations

from collections.abc import Sequence

from datamodules.clips.dataset import ClipConfig
from datamodules.egobench import load, select_entries
from datamodules.egobench.config import EgoBenchConfig
from datamodules.egobench.dataset import BenchmarkDataset
from datamodules.text import TextEncoder
from lightning_modules.egobench.tasks import TASKS


def load_benchmarks(
    config: EgoBenchConfig,
    names: Sequence[str] | None,
    clips: ClipConfig,
    encoder: TextEncoder,
    timeout_s: float | None = None,
) -> list[BenchmarkDataset]:
    """Read benchmarks and check that all their questions fit.

    Args:
        config: the key ``egobench``.
        names: benchmarks to load; None for all of the configuration.
        clips: frames of a clip.
        encoder: text to token ids.
        timeout_s: longest time to wait for one video file.

    Raises:
        ValueError: a name is unknown, or a file is missing or invalid.
    """
    datasets = []
    for entry in select_entries(config.benchmarks, names):
        loaded = load(entry)
        task = TASKS[loaded.task]
        datasets.append(BenchmarkDataset(loaded, task, config, clips, encoder, timeout_s))
    for dataset in datasets:
        dataset.check()
    return datasets
