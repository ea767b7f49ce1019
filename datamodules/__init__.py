"""Batches of clips, texts and questions; nothing here imports a model.

Names are imported when they are first used, so that what needs no torch, such as building an index, starts without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.batch import ClipBatch, Question, QuestionBatch, TextBatch
    from datamodules.clips.datamodule import ClipDataModule
    from datamodules.clips.dataset import ClipConfig
    from datamodules.ego_exo_clip.build import BuildOptions, build_index
    from datamodules.ego_exo_clip.datamodule import EgoExoClipDataModule
    from datamodules.ego_exo_clip.index import PairIndex, PairSource
    from datamodules.ego_exo_clip.sources.assembly101 import Assembly101
    from datamodules.ego_exo_clip.sources.ego_exo4d import EgoExo4D
    from datamodules.egoit.datamodule import InstructionDataModule
    from datamodules.egoit.mix import MixConfig, MixSource
    from datamodules.egoit.reader import ConversationFile
    from datamodules.io.annotations import SourceError
    from datamodules.text import TextEncoder
    from datamodules.video.errors import ClipDecodeError
    from datamodules.video.reader import ClipReader
    from datamodules.video.sampling import read_views

__all__ = [
    "Assembly101",
    "BuildOptions",
    "ClipBatch",
    "ClipConfig",
    "ClipDataModule",
    "ClipDecodeError",
    "ClipReader",
    "ConversationFile",
    "EgoExo4D",
    "EgoExoClipDataModule",
    "InstructionDataModule",
    "MixConfig",
    "MixSource",
    "PairIndex",
    "PairSource",
    "Question",
    "QuestionBatch",
    "SourceError",
    "TextBatch",
    "TextEncoder",
    "build_index",
    "read_views",
]

_MODULES = {
    "ego_exo_clip.sources.assembly101": ("Assembly101",),
    "batch": ("ClipBatch", "Question", "QuestionBatch", "TextBatch"),
    "ego_exo_clip.build": ("BuildOptions", "build_index"),
    "video.errors": ("ClipDecodeError",),
    "video.reader": ("ClipReader",),
    "video.sampling": ("read_views",),
    "clips.dataset": ("ClipConfig",),
    "clips.datamodule": ("ClipDataModule",),
    "egoit.reader": ("ConversationFile",),
    "ego_exo_clip.sources.ego_exo4d": ("EgoExo4D",),
    "ego_exo_clip.datamodule": ("EgoExoClipDataModule",),
    "egoit.datamodule": ("InstructionDataModule",),
    "egoit.mix": ("MixConfig", "MixSource"),
    "ego_exo_clip.index": ("PairIndex", "PairSource"),
    "io.annotations": ("SourceError",),
    "text": ("TextEncoder",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
