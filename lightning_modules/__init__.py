"""The stages of Exo2Ego as LightningModules over one shared model."""

from lightning_modules.stages.base import OptimConfig, Stage
from lightning_modules.stages.guidance import DemonstratorLearnerGuidance
from lightning_modules.stages.initialisation import Initialisation
from lightning_modules.stages.self_practice import LearnerSelfPractice
from lightning_modules.stages.self_preparation import DemonstratorSelfPreparation

__all__ = [
    "DemonstratorLearnerGuidance",
    "DemonstratorSelfPreparation",
    "Initialisation",
    "LearnerSelfPractice",
    "OptimConfig",
    "Stage",
]
