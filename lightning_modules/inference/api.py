"""Ask a trained model about videos from Python."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID
from datamodules.io.conversation import Turn
from datamodules.text import EncodedText, TextEncoder, UnusableText
from datamodules.video.errors import ClipDecodeError
from datamodules.video.live import LiveReader, check_window
from datamodules.video.reader import Clip, ClipReader
from datamodules.video.sampling import read_views
from lightning_modules.inference.description import ModelDescription
from lightning_modules.inference.loading import build_model, open_model
from lightning_modules.model.exo2ego import VISUAL_INPUTS, Exo2EgoModel
from lightning_modules.model.prefix_cache import SharedPrefix

Video = str | os.PathLike[str] | Tensor
"""A video file, a folder of images, or frames that were read before, uint8 [T, S, S, 3]."""

MAX_NEW_TOKENS = 128
CAPTION = "Describe the video."
"""The question that narrations answer; the experiments train captions with it."""
_CLIPS_KEPT = 2
_NARRATED_TOGETHER = 8


class Narration(NamedTuple):
    """A sentence about a part of a video, from ``start_s`` to ``end_s``."""

    start_s: float
    end_s: float
    text: str


class Observation(NamedTuple):
    """An answer about the last seconds of a live source.

    Attributes:
        time: when the window ended, in seconds since 1970.
        start_s, end_s: the window, in seconds after the first frame.
        answer: about the window.
        lag_s: from the end of the window until the answer, in seconds.
        dropped: frames since the observation before that are in no window, or were not decoded.
    """

    time: float
    start_s: float
    end_s: float
    answer: str
    lag_s: float
    dropped: int


class Piece(NamedTuple):
    """A piece of an answer as it is decoded.

    Attributes:
        text: follows the text of the pieces before; the last piece may have none.
        completion_tokens: tokens of the answer so far, without its end token.
        prompt_tokens: positions that were read before the answer, those of the clip included.
    """

    text: str
    completion_tokens: int
    prompt_tokens: int


class Exo2Ego:
    """A trained model that answers questions about egocentric video.

    Frames, tokens and weights are those of training and evaluation. The keys and values of the clip that was asked
    about last are kept, so that further questions about it read text only. Methods may be called from several threads.

    Args:
        model: its parameters are on one device.
        encoder: turns questions into tokens.
        description: frames of a clip and shapes.
        name: where the model comes from.
        read_timeout_s: longest time that reading a clip may take, None for no limit.
    """

    def __init__(
        self,
        model: Exo2EgoModel,
        encoder: TextEncoder,
        description: ModelDescription,
        name: str = "",
        read_timeout_s: float | None = None,
    ) -> None:
        self.model, self.encoder, self.description, self.name = model, encoder, description, name
        self._reader, self._lock = ClipReader(timeout_s=read_timeout_s), threading.Lock()
        self._prefixes: OrderedDict[Any, SharedPrefix] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        read_timeout_s: float | None = None,
    ) -> Exo2Ego:
        """Load a trained model; only the parts that answering uses are read.

        Args:
            source: a run, such as ``runs/toy/stage3``, an exported folder, or ``owner/name`` on the Hugging Face hub.
            device: the first GPU by default, or the CPU where there is none.
            dtype: type of all parameters; by default float32 on the CPU, and on a GPU that of training.
            read_timeout_s: longest time that reading a clip may take, None for no limit.

        Raises:
            ValueError: there is no such model, or its files are damaged; the message names the fix.
        """
        files = open_model(source)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = dtype or ("float32" if place.type == "cpu" else files.description.dtype)
        encoder = files.encoder()
        model = build_model(files, place, getattr(torch, chosen))
        return cls(model, encoder, files.description, files.where, read_timeout_s)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    # ---------------------------------------------------------------------------------------------------------- video

    def look(
        self, video: Video, start: float = 0.0, end: float | None = None, reader: ClipReader | None = None
    ) -> Clip:
        """Read the frames that the model sees of a span: at the middles of equal parts, as in training.

        Args:
            video: file or folder of images.
            start: start of the span in seconds.
            end: its end; None for the end of the video.
            reader: reads in place of the model's own reader, which keeps the files that were read last open.

        Returns:
            The frames, uint8 [T, S, S, 3], and their times.

        Raises:
            ClipDecodeError: the video cannot be read, or does not have the span.
        """
        if isinstance(video, Tensor):
            raise ValueError("video: got frames, which were read before: name a file")
        c, path = self.description.clips, Path(video)
        with nullcontext() if reader else self._lock:
            views = read_views(
                reader or self._reader,
                {"ego": path},
                start,
                math.inf if end is None else end,
                c.num_frames,
                c.image_size,
                c.frame_fit,
                pad_rgb=c.pad_rgb,
            )
        return views["ego"]

    def end_of(self, video: str | os.PathLike[str], start: float = 0.0, end: float | None = None) -> float:
        """Check a span of a video and return its end in seconds.

        Args:
            video: file or folder of images.
            start: start of the span in seconds.
            end: its end; None for the end of the video.

        Raises:
            ClipDecodeError: the video cannot be opened, or does not have the span.
        """
        with self._lock:
            return self._reader.usable_end_s(Path(video), start, math.inf if end is None else end)

    @torch.no_grad()
    def visual_tokens(self, frames: Tensor, visual_inputs: Sequence[str] | None = None) -> Tensor:
        """Encode the frames of a clip: uint8 [T, S, S, 3] to float [N, D].

        Args:
            frames: see ``look``.
            visual_inputs: those of ``ego`` (x) and ``mapped`` (F(x)) that are read; None for those of training.

        Raises:
            ValueError: the model does not have them.
        """
        model, video = self.model, frames[None].to(self.device)
        if visual_inputs is None or tuple(visual_inputs) == self.visual_inputs:
            tokens: Tensor = model.encode(video)
            return tokens[0]
        if not visual_inputs or not set(visual_inputs) <= set(self.visual_inputs):
            raise ValueError(
                f"visual_inputs: got {', '.join(visual_inputs)}, but this model reads "
                f"{', '.join(self.visual_inputs)}: name some of these"
            )
        ego = model.ego_encoder(video)
        chosen = [name for name in VISUAL_INPUTS if name in visual_inputs]
        return model.project(*(model.ego_to_exo(ego) if name == "mapped" else ego for name in chosen))[0]

    @property
    def visual_inputs(self) -> tuple[str, ...]:
        """Visual inputs that can be chosen from: ``ego`` (x) and ``mapped`` (F(x)); the demonstrator has one."""
        return self.model.visual_inputs if "ego_encoder" in self.model.parts else ("ego",)

    # ------------------------------------------------------------------------------------------------------ questions

    @overload
    def answer(
        self,
        video: Video,
        question: str,
        start: float = ...,
        end: float | None = ...,
        max_new_tokens: int = ...,
        visual_inputs: Sequence[str] | None = ...,
    ) -> str: ...

    @overload
    def answer(
        self,
        video: Video,
        question: list[str],
        start: float = ...,
        end: float | None = ...,
        max_new_tokens: int = ...,
        visual_inputs: Sequence[str] | None = ...,
    ) -> list[str]: ...

    def answer(
        self,
        video: Video,
        question: str | list[str],
        start: float = 0.0,
        end: float | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        visual_inputs: Sequence[str] | None = None,
    ) -> str | list[str]:
        """Answer a question, or several about the same clip, greedily; several are decoded together.

        Args:
            video: file, folder of images, or frames.
            question: one question, or a list of independent ones.
            start: start of the span in seconds.
            end: its end; None for the end of the video.
            max_new_tokens: longest answer.
            visual_inputs: see ``visual_tokens``.

        Returns:
            The answer, or a list of answers.

        Raises:
            ClipDecodeError: the video cannot be read, or does not have the span.
            UnusableText: a question holds a special token.
        """
        questions = [question] if isinstance(question, str) else question
        prompts = [self.encoder.prompt(text) for text in questions]
        rows = [tuple(_after_clip(prompt)) for prompt in prompts]
        with self._prefix(prompts, video, start, end, visual_inputs) as prefix, torch.no_grad():
            answers = [self._decode(tokens) for tokens in prefix.greedy_each(rows, max_new_tokens, self._end)]
        return answers[0] if isinstance(question, str) else answers

    def stream(
        self,
        video: Video,
        question: str,
        start: float = 0.0,
        end: float | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        visual_inputs: Sequence[str] | None = None,
        earlier: Sequence[Turn] = (),
    ) -> Iterator[str]:
        """Answer a question piece by piece; the pieces joined are the text that ``answer`` returns.

        Args:
            video, question, start, end, max_new_tokens, visual_inputs: see ``answer``.
            earlier: questions and answers of the same conversation.

        Returns:
            An iterator of pieces of text. The clip is read before the first one.

        Raises:
            UnusableText: a question holds a special token.
        """
        pieces = self.pieces(video, question, start, end, max_new_tokens, visual_inputs, earlier)
        return (piece.text for piece in pieces if piece.text)

    def pieces(
        self,
        video: Video,
        question: str,
        start: float = 0.0,
        end: float | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        visual_inputs: Sequence[str] | None = None,
        earlier: Sequence[Turn] = (),
    ) -> Iterator[Piece]:
        """Answer a question piece by piece and count tokens; see ``stream``.

        Returns:
            An iterator of pieces; the last one counts all tokens. ``completion_tokens`` equal to ``max_new_tokens``
            means that the answer was cut.
        """
        prompt = self.encoder.prompt(question, earlier)
        return self._pieces(prompt, video, start, end, max_new_tokens, visual_inputs)

    @torch.no_grad()
    def _pieces(
        self,
        prompt: EncodedText,
        video: Video,
        start: float,
        end: float | None,
        max_new_tokens: int,
        visual_inputs: Sequence[str] | None,
    ) -> Iterator[Piece]:
        with (
            self._prefix([prompt], video, start, end, visual_inputs) as prefix,
            prefix.extended(_after_clip(prompt)) as context,
        ):
            tokens: list[int] = []
            shown, prompt_tokens = "", context.length
            for token in context.stream(max_new_tokens, self._end):
                tokens.append(token)
                text = self._decode(tokens)
                # A character of several tokens is incomplete until its last one.
                if text.startswith(shown) and len(text) > len(shown) and not text.endswith("\ufffd"):
                    yield Piece(text[len(shown) :], len(tokens), prompt_tokens)
                    shown = text
            yield Piece(self._decode(tokens)[len(shown) :], len(tokens), prompt_tokens)

    def choose(
        self,
        video: Video,
        question: str,
        options: Sequence[str],
        start: float = 0.0,
        end: float | None = None,
        visual_inputs: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """Return the probability of each option; the clip is read once.

        Options are compared by their mean log-likelihood per token, as in validation; the softmax of these means sums
        to 1 over the options.

        Args:
            video, question, start, end, visual_inputs: see ``answer``.
            options: at least two different answers.

        Raises:
            ClipDecodeError: the video cannot be read, or does not have the span.
            UnusableText: a text holds a special token, or is empty, or is longer than ``max_text_tokens``.
            ValueError: an option is repeated, or there are fewer than two.
        """
        if len(set(options)) < max(2, len(options)):
            raise ValueError(f"options: got {list(options)}, expected at least two different texts: correct them")
        rows = [self.encoder.conversation([(question, option)]) for option in options]
        context, continuations = self._split(rows)
        with (
            self._prefix(rows, video, start, end, visual_inputs) as prefix,
            torch.no_grad(),
            prefix.extended(context) as asked,
        ):
            log_p = asked.log_likelihoods(continuations).double().cpu()
        means = log_p / torch.tensor([len(tokens) for tokens in continuations])
        return dict(zip(options, means.softmax(0).tolist(), strict=True))

    def describe(
        self,
        video: Video,
        every: float = 2.0,
        start: float = 0.0,
        end: float | None = None,
        question: str = CAPTION,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> Iterator[Narration]:
        """Narrate a video of any length; no more than one clip and the visual tokens of 8 are in memory.

        Args:
            video: file or folder of images.
            every: length of the parts that are narrated, in seconds; a rest shorter than half of it joins the last.
            start: start of the narrated span in seconds.
            end: its end; None for the end of the video.
            question: asked about every part.
            max_new_tokens: longest narration of a part.

        Returns:
            An iterator of narrations in the order of time: the first by itself, then 8 that are decoded together
            when the first of them is asked for.

        Raises:
            ClipDecodeError: the video cannot be read, or does not have the span.
            ValueError: ``every`` is not above 0.
        """
        if isinstance(video, Tensor):
            raise ValueError("video: got frames, but a narration needs times: name a file")
        if not every > 0:
            raise ValueError(f"every: got {every}, allowed: above 0 seconds")
        self.encoder.prompt(question)
        parts = _parts(start, self.end_of(video, start, end), every)
        return self._describe(video, parts, question, max_new_tokens)

    def _describe(
        self, video: Video, parts: Sequence[tuple[float, float]], question: str, max_new_tokens: int
    ) -> Iterator[Narration]:
        # The first part does not wait for others.
        start, end = parts[0]
        yield Narration(start, end, self.answer(video, question, start, end, max_new_tokens))
        for number in range(1, len(parts), _NARRATED_TOGETHER):
            yield from self._narrate(video, parts[number : number + _NARRATED_TOGETHER], question, max_new_tokens)

    def _narrate(
        self, video: Video, parts: Sequence[tuple[float, float]], question: str, max_new_tokens: int
    ) -> Iterator[Narration]:
        """Narrate parts of a video together; those before an unreadable one come before the error."""
        visual: list[Tensor] = []
        problem: ClipDecodeError | None = None
        for start, end in parts:
            try:
                visual.append(self.visual_tokens(self.look(video, start, end).frames))
            except ClipDecodeError as error:
                problem = error
                break
        if visual:
            prompt = torch.tensor([self.encoder.prompt(question).input_ids], device=self.device)
            prompts = prompt.expand(len(visual), -1)
            answers = self.model.language_model.generate(
                prompts, torch.ones_like(prompts), torch.stack(visual), max_new_tokens, self._end, self._end
            )
            for (start, end), tokens in zip(parts, answers, strict=False):
                yield Narration(start, end, self._decode(tokens))
        if problem is not None:
            raise problem

    def watch(
        self,
        source: str | int | os.PathLike[str],
        every: float = 2.0,
        question: str = CAPTION,
        window: float | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> Generator[Observation, None, None]:
        """Answer a question about the last seconds of a live source, again and again until it ends.

        A thread decodes meanwhile. Each answer is about the newest window, so that a model that is slower than the
        source leaves frames out and does not fall behind.

        Args:
            source: number of a camera, device, address such as ``rtsp://...`` or ``rtmp://...``, or a file, which is
                read at the pace at which it is displayed.
            every: windows end at multiples of so many seconds.
            question: asked about every window.
            window: length of the windows in seconds, at least ``every``, which is the default.
            max_new_tokens: longest answer.

        Returns:
            A generator; closing it, or leaving its loop, ends the thread and closes the source.

        Raises:
            ClipDecodeError: the source cannot be opened, or broke off.
            UnusableText: the question holds a special token.
            ValueError: ``every`` is not above 0, or ``window`` is below it.
        """
        self.encoder.prompt(question)
        window_s = every if window is None else window
        check_window(every, window_s)
        c = self.description.clips
        name = source if isinstance(source, int) else os.fspath(source)
        open_reader = partial(LiveReader, name, every, window_s, c.num_frames, c.image_size, c.frame_fit, c.pad_rgb)
        return self._watch(open_reader, question, max_new_tokens)

    def _watch(
        self, open_reader: Callable[[], LiveReader], question: str, max_new_tokens: int
    ) -> Generator[Observation, None, None]:
        with closing(open_reader()) as reader:
            while (window := reader.next_window()) is not None:
                answer = self.answer(window.frames, question, max_new_tokens=max_new_tokens)
                lag_s = time.monotonic() - window.ended
                ended = time.time() - lag_s
                yield Observation(ended, window.start_s, window.end_s, answer, lag_s, window.dropped)

    def chat(self, video: Video, start: float = 0.0, end: float | None = None) -> Chat:
        """Start a conversation about a clip, in which every question sees the turns before it.

        Raises:
            ClipDecodeError: the video cannot be read, or does not have the span.
        """
        return Chat(self, video, start, end)

    # ------------------------------------------------------------------------------------------------------- internal

    @contextmanager
    def _prefix(
        self,
        rows: Sequence[EncodedText],
        video: Video,
        start: float,
        end: float | None,
        visual_inputs: Sequence[str] | None,
    ) -> Iterator[SharedPrefix]:
        """Lend the keys and values of everything up to the end of the clip; nobody else uses them meanwhile.

        Args:
            rows: whose tokens before the clip are the same.
            video, start, end, visual_inputs: see ``answer``.
        """
        before = _before_clip(rows[0])
        key = _cache_key(video, start, end, visual_inputs, before)
        with self._lock:
            prefix = self._prefixes.pop(key, None)
        if prefix is None:
            frames = video if isinstance(video, Tensor) else self.look(video, start, end).frames
            prefix = self._read_prefix(before, frames, visual_inputs)
        yield prefix
        # After an error it is not kept.
        if key is not None:
            with self._lock:
                self._prefixes[key] = prefix
                while len(self._prefixes) > _CLIPS_KEPT:
                    self._prefixes.popitem(last=False)

    @torch.no_grad()
    def _read_prefix(self, before: Sequence[int], frames: Tensor, visual_inputs: Sequence[str] | None) -> SharedPrefix:
        visual = self.visual_tokens(frames, visual_inputs)
        language_model = self.model.language_model
        text = language_model.embed(torch.tensor(before, dtype=torch.int64, device=self.device))
        return SharedPrefix(language_model, torch.cat([text, visual.to(text.dtype)]))

    def _split(self, rows: Sequence[EncodedText]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """Return the tokens between the clip and the answers, and those of each answer with its end token."""
        continuations = []
        for row in rows:
            if row.input_ids[-1] != self._end:
                raise UnusableText(
                    f"a question and its option do not fit max_text_tokens={self.encoder.max_text_tokens}: shorten them"
                )
            continuations.append(tuple(row.input_ids[_first_label(row) :]))
        first = rows[0]
        start = first.input_ids.index(VIDEO_TOKEN_ID) + 1
        return tuple(first.input_ids[start : _first_label(first)]), continuations

    @property
    def _end(self) -> int:
        return int(self.encoder.tokenizer.eos_token_id)  # type: ignore[arg-type]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.encoder.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


class Chat:
    """A conversation about one clip.

    Attributes:
        clip: the frames that the model sees; None if it was given frames.
        turns: questions and answers so far.
    """

    def __init__(self, model: Exo2Ego, video: Video, start: float = 0.0, end: float | None = None) -> None:
        self.model, self.video, self.start, self.end = model, video, start, end
        self.clip = None if isinstance(video, Tensor) else model.look(video, start, end)
        self.turns: list[Turn] = []

    def ask(self, question: str, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
        """Answer a question that may refer to earlier turns, and keep both."""
        return "".join(self.stream(question, max_new_tokens))

    def stream(self, question: str, max_new_tokens: int = MAX_NEW_TOKENS) -> Iterator[str]:
        """Do what ``ask`` does piece by piece; the turn is kept when the last piece was taken."""
        pieces = self.model.stream(
            self.video, question, self.start, self.end, max_new_tokens, earlier=tuple(self.turns)
        )
        return self._keep(question, pieces)

    def _keep(self, question: str, pieces: Iterator[str]) -> Iterator[str]:
        answer = ""
        for piece in pieces:
            answer += piece
            yield piece
        self.turns.append((question, answer))


def _cache_key(
    video: Video, start: float, end: float | None, visual_inputs: Sequence[str] | None, before: Sequence[int]
) -> Any:
    """Identify a clip and the tokens before it; None for what cannot be told apart."""
    if isinstance(video, Tensor):
        return None
    path = os.path.abspath(video)
    try:
        status = os.stat(path)
    except OSError:
        return None  # reading it raises the error
    inputs = None if visual_inputs is None else tuple(visual_inputs)
    return path, status.st_mtime_ns, status.st_size, start, end, inputs, tuple(before)


def _parts(start: float, end: float, every: float) -> list[tuple[float, float]]:
    """Cut a span into parts of ``every`` seconds; the last one is from half to one and a half times as long."""
    count = max(1, math.floor((end - start) / every + 0.5))
    borders = [start + number * every for number in range(count)] + [end]
    return list(pairwise(borders))


def _before_clip(row: EncodedText) -> list[int]:
    return row.input_ids[: row.input_ids.index(VIDEO_TOKEN_ID)]


def _after_clip(row: EncodedText) -> list[int]:
    return row.input_ids[row.input_ids.index(VIDEO_TOKEN_ID) + 1 :]


def _first_label(row: EncodedText) -> int:
    return next(index for index, label in enumerate(row.labels) if label != IGNORE_INDEX)
