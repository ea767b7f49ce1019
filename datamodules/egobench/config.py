"""Configuration of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class EgoBenchConfig:
    """The key ``egobench``: benchmarks of an experiment, and their prompts.

    Attributes:
        benchmarks: entries of ``name``, ``annotations``, ``videos`` and further fields of the benchmark's class. For a
            class of your own ``name`` is its import path, ``module:Class``.
        prompts: YAML file of prompt templates; null for the file of this repository.
        style: amount of instruction around a question: ``base``, ``task``, or ``ego`` (the best in the paper).
        caption: instruction before texts that are scored as captions; null for bare captions as in stage 2.
        cyclic: ask choices in every rotation of the options, which cancels a model's preference for a letter.
        cross_check: number of choices per benchmark that are also answered by generation, to compare both.
        invented: the samples are of a generated world; hides published numbers in tables.
        fast: names of benchmarks of which a fixed subset is scored at every validation of a stage.
    """

    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    prompts: str | None = None
    style: Literal["base", "task", "ego"] = "ego"
    caption: str | None = None
    cyclic: bool = False
    cross_check: int = 200
    invented: bool = False
    fast: list[str] = field(default_factory=list)
