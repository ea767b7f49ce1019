"""Plain ``nn.Module`` parts of Exo2Ego; usable without Lightning."""

from lightning_modules.model.exo2ego import PARTS, Exo2EgoModel, NetworkConfig, ProjectorConfig

__all__ = ["PARTS", "Exo2EgoModel", "NetworkConfig", "ProjectorConfig"]
