"""Task types of benchmarks, one class each; ``TASKS`` finds them by the name in a benchmark's ``task``."""

from __future__ import annotations

from lightning_modules.egobench.tasks.base import Task
from lightning_modules.egobench.tasks.clip_choice import ClipChoice
from lightning_modules.egobench.tasks.cross_view import CrossView
from lightning_modules.egobench.tasks.multiple_choice import MultipleChoice
from lightning_modules.egobench.tasks.open_ended import OpenEnded
from lightning_modules.egobench.tasks.retrieval import TextRetrieval
from lightning_modules.egobench.tasks.vocabulary import Vocabulary

__all__ = ["TASKS", "Task"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (MultipleChoice(), OpenEnded(), Vocabulary(), TextRetrieval(), ClipChoice(), CrossView())
}
