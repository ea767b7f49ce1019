"""Functions behind the web page: each takes the values of the page's fields and checks them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from datamodules.video.errors import ClipDecodeError
from lightning_modules.inference.api import Exo2Ego
from lightning_modules.serving.server import Limits

BOTH = "both"
_INPUTS = {"x only": ("ego",), "F(x) only": ("mapped",)}
_MAX_CHARACTERS = 10_000
_MAX_OPTIONS = 26


class Page:
    """Answers about uploaded videos.

    Errors are ``ValueError``s of one line. They name a video as the user does, without the folder that it is in.

    Args:
        model: its methods are called from several threads.
        uploads: folder of the uploads; no file outside is read.
        limits: ``new_tokens`` and ``seconds`` bound an answer.

    Attributes:
        inputs: names of the visual inputs that can be chosen from; the first is that of training.
    """

    def __init__(self, model: Exo2Ego, uploads: Path, limits: Limits) -> None:
        self.model, self.uploads, self.limits = model, uploads.resolve(), limits
        self.inputs: dict[str, tuple[str, ...] | None] = {BOTH: None, **_INPUTS}
        if len(model.visual_inputs) < len(_INPUTS):
            self.inputs = {next(name for name, inputs in _INPUTS.items() if inputs == model.visual_inputs): None}

    def length_s(self, video: str | None) -> float:
        """Return the length of an uploaded video in seconds.

        Raises:
            ValueError: nothing was uploaded, or no video that can be read.
        """
        with self._uploaded(video) as path:
            return self.model.end_of(path)

    def frames(self, video: str | None, start: float | None, end: float | None) -> list[tuple[np.ndarray, str]]:
        """Return the frames that the model sees of a span, uint8 [S, S, 3], each with its time.

        Args:
            video: uploaded file.
            start: start of the span in seconds; None for 0.
            end: its end; None for the end of the video.

        Raises:
            ValueError: nothing was uploaded, or the video cannot be read or does not have the span.
        """
        with self._uploaded(video) as path:
            clip = self.model.look(path, start or 0.0, end or None)
        return [(frame.numpy(), f"{time_s:.2f} s") for frame, time_s in zip(clip.frames, clip.times_s, strict=True)]

    def answer(
        self, video: str | None, start: float | None, end: float | None, question: str, inputs: str
    ) -> Iterator[str]:
        """Answer a question; yield the answer so far whenever it grows.

        Args:
            video, start, end: see ``frames``.
            question: text.
            inputs: one of ``self.inputs``.

        Raises:
            ValueError: see ``frames``; or the question is empty or too long, or the answer takes too long.
        """
        until = time.monotonic() + self.limits.seconds
        self._check_question(question)
        answer = ""
        with self._uploaded(video) as path:
            pieces = self.model.stream(
                path, question, start or 0.0, end or None, self.limits.new_tokens, self._visual_inputs(inputs)
            )
            for piece in pieces:
                answer += piece
                yield answer
                if time.monotonic() > until:
                    raise ValueError(f"the answer was cut after {self.limits.seconds:g} s: ask for less, or later")
        if not answer:
            yield "(an empty answer)"

    def choose(
        self, video: str | None, start: float | None, end: float | None, question: str, options: str, inputs: str
    ) -> dict[str, float]:
        """Return the probability of each option.

        Args:
            video, start, end, question, inputs: see ``answer``.
            options: one a line; empty lines are left out.

        Raises:
            ValueError: see ``answer``; or there are too few, too many or equal options.
        """
        self._check_question(question)
        texts = [line.strip() for line in options[:_MAX_CHARACTERS].splitlines() if line.strip()]
        if not 2 <= len(texts) <= _MAX_OPTIONS:
            raise ValueError(f"options: got {len(texts)}, allowed: 2 to {_MAX_OPTIONS}: write one a line")
        with self._uploaded(video) as path:
            return self.model.choose(path, question, texts, start or 0.0, end or None, self._visual_inputs(inputs))

    @contextmanager
    def _uploaded(self, video: str | None) -> Iterator[Path]:
        """Check that a file was uploaded, and let errors name it as the user does."""
        if not video:
            raise ValueError("video: there is none: upload one")
        path = Path(video).resolve()
        if not path.is_relative_to(self.uploads):
            raise ValueError("video: this file was not uploaded here: upload it")
        try:
            yield path
        except ClipDecodeError as error:
            raise type(error)(error.reason, path.name, error.start_s, error.end_s) from None

    def _check_question(self, question: str) -> None:
        if not question.strip():
            raise ValueError("question: it is empty: write one")
        longest = self.model.encoder.max_text_tokens
        too_long = f"question: longer than {longest} tokens: shorten it"
        if len(question) > _MAX_CHARACTERS or len(self.model.encoder.prompt(question).input_ids) > longest:
            raise ValueError(too_long)

    def _visual_inputs(self, name: str) -> tuple[str, ...] | None:
        if name not in self.inputs:
            raise ValueError(f"visual inputs: got {name[:80]!r}, allowed: {', '.join(self.inputs)}")
        return self.inputs[name]
