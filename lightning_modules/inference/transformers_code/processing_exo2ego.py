"""Frames and tokens of a question about a video, as in training, in the form of a processor of transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from datamodules.batch import IGNORE_INDEX
from datamodules.io.conversation import Turn
from datamodules.text import EncodedText, PromptConfig, TextEncoder
from datamodules.video.reader import ClipReader
from datamodules.video.sampling import read_views


class Exo2EgoProcessor(ProcessorMixin):  # type: ignore[misc]
    """Turn chat messages with a video into the inputs of an exported model.

    A message's content is a text, or a list of ``{"type": "text", "text": ...}`` and, in the first question, one
    ``{"type": "video", "path": ..., "start": 3.0, "end": 8.0}``, whose times are seconds and may be left out.

    Args:
        encoder: text to tokens.
        clips: number, size, fit and padding of the frames.
    """

    def __init__(self, encoder: TextEncoder, clips: Mapping[str, Any]) -> None:
        self.encoder, self.tokenizer, self.clips = encoder, encoder.tokenizer, clips
        self.chat_template = encoder.tokenizer.chat_template
        self._reader = ClipReader()

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Exo2EgoProcessor:  # type: ignore[override]
        """Load the processor of an exported folder, or of a repository on the hub."""
        options.pop("trust_remote_code", None)
        settings, _ = cls.get_processor_dict(source, **options)
        text = settings["text"]
        encoder = TextEncoder(str(source), text["max_text_tokens"], PromptConfig(**text["prompt"]))
        return cls(encoder, settings["clips"])

    def apply_chat_template(self, conversation: Any, tokenize: bool = True, **options: Any) -> Any:  # type: ignore[override]
        """Return the inputs of the model for one conversation, or for a list of them.

        Args:
            conversation: messages, the last of which is a question.
            tokenize: must be true, since the clip has no text.
            **options: options of transformers without a meaning here.

        Returns:
            ``input_ids`` int64 [B, L] and ``attention_mask`` [B, L], padded on the right, and ``pixel_values_videos``
            uint8 [B, T, S, S, 3].

        Raises:
            ValueError: a message or the video cannot be used.
        """
        if not tokenize:
            raise ValueError("tokenize: got False, but a clip has no text: call it with tokenize=True")
        several = bool(conversation) and not isinstance(conversation[0], Mapping)
        rows, videos = [], []
        for messages in conversation if several else [conversation]:
            row, frames = self._encode(messages)
            rows.append(row)
            videos.append(frames)
        batch = self.encoder.batch(rows)
        data = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "pixel_values_videos": torch.stack(videos),
        }
        return BatchFeature(data)

    def __call__(self, text: str, videos: Any, **options: Any) -> BatchFeature:
        """Return the inputs of the model for one question about one video, a path or frames."""
        key = "frames" if isinstance(videos, Tensor) else "path"
        content = [{"type": "video", key: videos}, {"type": "text", "text": text}]
        features: BatchFeature = self.apply_chat_template([{"role": "user", "content": content}])
        return features

    def encode_answers(self, question: str, answers: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each answer to a question with its end token, as ``log_likelihoods`` takes them.

        Raises:
            ValueError: a text holds a special token, or is empty, or is longer than the model reads.
        """
        rows = [self.encoder.conversation([(question, answer)]) for answer in answers]
        found = [[label for label in row.labels if label != IGNORE_INDEX] for row in rows]
        if any(tokens[-1] != self.tokenizer.eos_token_id for tokens in found):
            raise ValueError(
                f"a question and its answer do not fit {self.encoder.max_text_tokens} tokens: shorten them"
            )
        return found

    def batch_decode(self, sequences: Any, **options: Any) -> list[str]:
        """Decode rows of tokens; the clip's placeholder is left out."""
        return [self.decode(row, **options) for row in sequences]

    def decode(self, tokens: Any, **options: Any) -> str:
        """Decode one row of tokens; the clip's placeholder is left out."""
        kept = [int(token) for token in tokens if int(token) >= 0]
        return str(self.tokenizer.decode(kept, **options))

    def post_process_image_text_to_text(self, generated_outputs: Any, **options: Any) -> list[str]:  # type: ignore[override]
        """Decode answers, for ``pipeline("image-text-to-text")``."""
        options["skip_special_tokens"] = True
        return [text.strip() for text in self.batch_decode(generated_outputs, **options)]

    def _encode(self, messages: Sequence[Mapping[str, Any]]) -> tuple[EncodedText, Tensor]:
        """Return the tokens and the frames, uint8 [T, S, S, 3], of a conversation."""
        texts: list[str] = []
        videos: list[Mapping[str, Any]] = []
        for number, message in enumerate(messages):
            expected = ("user", "assistant")[number % 2]
            if message["role"] != expected:
                raise ValueError(f"message {number}: role is {message['role']}, expected {expected}: correct it")
            content = message["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            texts.append(" ".join(item["text"] for item in content if item["type"] == "text"))
            videos += [item for item in content if item["type"] == "video"]
        if len(videos) != 1 or len(texts) % 2 == 0:
            raise ValueError(f"messages: got {len(videos)} videos and {len(texts)} messages, expected one video and a "
                             "question at the end: correct them")  # fmt: skip
        earlier: list[Turn] = list(zip(texts[:-1:2], texts[1::2], strict=True))
        return self.encoder.prompt(texts[-1], earlier), self._frames(videos[0])

    def _frames(self, video: Mapping[str, Any]) -> Tensor:
        if "frames" in video:
            frames: Tensor = video["frames"]
            return frames
        path = video.get("path") or video.get("video") or video.get("url")
        end = video.get("end")
        c = self.clips
        pad_rgb = None if c["pad_rgb"] is None else tuple(c["pad_rgb"])
        views = read_views(
            self._reader,
            {"ego": Path(str(path))},
            video.get("start") or 0.0,
            math.inf if end is None else end,
            c["num_frames"],
            c["image_size"],
            c["frame_fit"],
            pad_rgb=pad_rgb,
        )
        return views["ego"].frames
