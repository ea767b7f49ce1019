"""Conversations about clips of one view, from JSON Lines: EgoIT (stage 3) and any instruction data of that form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datamodules.clip_stream import probe
from datamodules.clips import ClipConfig, ClipDataModule, ClipTextDataset, Span
from datamodules.jsonl import read_jsonl, require, seconds
from datamodules.text import VIDEO_TAG, EncodedText, TextEncoder, Turn


@dataclass(frozen=True)
class Conversation:
    """One line of an instruction file."""

    name: str
    video: str
    start_s: float | None
    end_s: float | None
    turns: tuple[Turn, ...]


class InstructionDataset(ClipTextDataset):
    """Clips with conversations.

    Args:
        conversations: the samples.
        root: folder the video paths are relative to.
        view: which encoder the clips are for.
        clips: frames of a clip.
        encoder: text to tokens.
    """

    def __init__(
        self, conversations: list[Conversation], root: Path, view: str, clips: ClipConfig, encoder: TextEncoder
    ) -> None:
        super().__init__(clips, encoder)
        self.conversations, self.root, self.view = conversations, root, view

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self.conversations)

    def name(self, index: int) -> str:
        """The record's id."""
        return self.conversations[index].name

    def span(self, index: int, epoch: int) -> Span:
        """The record's window, or the whole file."""
        sample = self.conversations[index]
        path = self.root / sample.video
        if sample.start_s is None or sample.end_s is None:
            return Span({self.view: path}, 0.0, probe(path).duration_s)
        return Span({self.view: path}, sample.start_s, sample.end_s)

    def text(self, index: int, epoch: int) -> EncodedText:
        """All turns of the conversation."""
        return self.encoder.conversation(self.conversations[index].turns)


class InstructionDataModule(ClipDataModule):
    """Conversations about clips, one JSON object a line.

    Required fields: ``video`` (path below ``root``) and ``conversations``, an even list of ``{"from": "human" | "gpt",
    "value": text}`` whose first value starts with ``<video>``. ``start`` and ``end`` in seconds select a window;
    without them the whole file is used. Other fields are for other tools and not read.

    Args:
        sources: instruction files; all their lines together are one epoch.
        view: which encoder the clips are for.
        **shared: see ``ClipDataModule``.
    """

    def __init__(self, sources: list[str], view: Literal["ego", "exo"] = "ego", **shared: Any) -> None:
        super().__init__(**shared)
        for source in sources:
            if not Path(source).is_file():
                raise ValueError(f"data.sources: no file {source}: run `make data`, or set data.init_args.sources")
        self.sources, self.view = [Path(source) for source in sources], view

    def read(self) -> InstructionDataset:
        """Read every line of every source."""
        samples = [_conversation(record, where) for source in self.sources for where, record in read_jsonl(source)]
        return InstructionDataset(samples, self.root, self.view, self.clips, self.encoder)

    def annotation_files(self) -> list[Path]:
        """The sources."""
        return self.sources


def _conversation(record: dict[str, Any], where: str) -> Conversation:
    values = require(record, "conversations", where)
    if not isinstance(values, list):
        raise ValueError(f"{where}: field 'conversations' must be a list of turns")
    if not values or len(values) % 2:
        raise ValueError(f"{where}: field 'conversations' has {len(values)} entries: human and gpt must alternate")
    texts = []
    for number, entry in enumerate(values):
        speaker = ("human", "gpt")[number % 2]
        if not isinstance(entry, dict) or entry.get("from") != speaker or not isinstance(entry.get("value"), str):
            raise ValueError(f"{where}: conversations[{number}] must be {{'from': '{speaker}', 'value': text}}")
        texts.append(entry["value"])
    if VIDEO_TAG not in texts[0]:
        raise ValueError(f"{where}: conversations[0].value lacks {VIDEO_TAG}, the place of the clip")
    if any(VIDEO_TAG in text for text in texts[1:]):
        raise ValueError(f"{where}: {VIDEO_TAG} stands for the one clip: only conversations[0].value may hold it")
    texts[0] = texts[0].replace(VIDEO_TAG, "").strip()
    window = [None if record.get(key) is None else seconds(record, key, where) for key in ("start", "end")]
    if (window[0] is None) != (window[1] is None):
        raise ValueError(f"{where}: only one of 'start' and 'end' is given: give both, or neither for the whole file")
    turns = tuple(zip(texts[::2], texts[1::2], strict=True))
    return Conversation(str(record.get("id", where)), str(require(record, "video", where)), window[0], window[1], turns)
