"""Clips, texts and questions as batches; nothing here knows a model."""

from datamodules.batch import ClipBatch, Question, QuestionBatch, TextBatch
from datamodules.clip_stream import ClipDecodeError, ClipReader, read_views
from datamodules.clips import ClipConfig, ClipDataModule
from datamodules.ego_exo4d import ReleaseError, read_release
from datamodules.ego_exo_clip import EgoExoClipDataModule
from datamodules.instruction import InstructionDataModule
from datamodules.text import TextEncoder

__all__ = [
    "ClipBatch",
    "ClipConfig",
    "ClipDataModule",
    "ClipDecodeError",
    "ClipReader",
    "EgoExoClipDataModule",
    "InstructionDataModule",
    "Question",
    "QuestionBatch",
    "ReleaseError",
    "TextBatch",
    "TextEncoder",
    "read_release",
    "read_views",
]
