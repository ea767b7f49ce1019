"""Configuration of an exported Exo2Ego model, for transformers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class Exo2EgoConfig(PreTrainedConfig):
    """Description of an exported model.

    Args:
        description: network, vocabulary size, parts, frames of a clip and prompt style.
        provenance: stage, step, digests and versions.
        **others: see ``PreTrainedConfig``.
    """

    model_type = "exo2ego"

    def __init__(
        self, description: dict[str, Any] | None = None, provenance: dict[str, Any] | None = None, **others: Any
    ) -> None:
        self.description, self.provenance = description or {}, provenance or {}
        super().__init__(**others)
