"""Plug-in for lmms-eval: ``--model exo2ego --model_args pretrained=folder`` evaluates an exported folder.

It needs nothing of this repository but the two modules here: transformers loads the folder with the code that lies in
it. The entry point ``lmms_eval.models`` of this package names ``manifest``.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """Return the ``ModelManifest`` that lmms-eval finds the model by, without importing the model.

    It is a simple model in the words of lmms-eval, since the messages of chat models cannot be scored by likelihood.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="exo2ego", simple_class_path="lightning_modules.lmms_eval.model.Exo2EgoModel")
