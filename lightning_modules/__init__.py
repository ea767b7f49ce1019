"""The stages of Exo2Ego as LightningModules over one shared model."""

from lightning_modules.stage import OptimConfig, Stage
from lightning_modules.stage0_initialisation import Initialisation
from lightning_modules.stage1_self_preparation import DemonstratorSelfPreparation
from lightning_modules.stage2_guidance import DemonstratorLearnerGuidance
from lightning_modules.stage3_self_practice import LearnerSelfPractice

__all__ = [
    "DemonstratorLearnerGuidance",
    "DemonstratorSelfPreparation",
    "Initialisation",
    "LearnerSelfPractice",
    "OptimConfig",
    "Stage",
]
