"""The stages of Exo2Ego as LightningModules over one shared model.

Names are imported when they are first used, so that ``python -m lightning_modules --help`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.inference.api import Exo2Ego
    from lightning_modules.stages.answer_guidance import AnswerGuidance
    from lightning_modules.stages.base import Stage
    from lightning_modules.stages.guidance import DemonstratorLearnerGuidance
    from lightning_modules.stages.initialisation import Initialisation
    from lightning_modules.stages.optim import OptimConfig
    from lightning_modules.stages.self_practice import LearnerSelfPractice
    from lightning_modules.stages.self_preparation import DemonstratorSelfPreparation

__all__ = [
    "AnswerGuidance",
    "DemonstratorLearnerGuidance",
    "DemonstratorSelfPreparation",
    "Exo2Ego",
    "Initialisation",
    "LearnerSelfPractice",
    "OptimConfig",
    "Stage",
]

_MODULES = {
    "AnswerGuidance": "stages.answer_guidance",
    "DemonstratorLearnerGuidance": "stages.guidance",
    "DemonstratorSelfPreparation": "stages.self_preparation",
    "Exo2Ego": "inference.api",
    "Initialisation": "stages.initialisation",
    "LearnerSelfPractice": "stages.self_practice",
    "OptimConfig": "stages.optim",
    "Stage": "stages.base",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
