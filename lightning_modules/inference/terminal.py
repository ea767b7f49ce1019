"""Ask a trained model in the terminal: one question, a conversation, or a narration with subtitles."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from datamodules.io.atomic import atomic_path
from datamodules.text import UnusableText
from lightning_modules.inference.api import CAPTION, Chat, Exo2Ego, Narration

SUBTITLES = (".srt", ".vtt")


def ask(model: Exo2Ego, video: str, question: str | None, start: float, end: float | None) -> None:
    """Answer a question about a clip, or those that are typed in until an empty line or the end of the input.

    Raises:
        ClipDecodeError: the video cannot be read, or does not have the span.
        UnusableText: ``question`` holds a special token.
    """
    chat = model.chat(video, start, end)
    print(seconds_seen(chat))
    if question is not None:
        _print_answer(chat, question)
        return
    print(f"Ask about the clip, such as {CAPTION!r}; an empty line ends.")
    for line in _typed_lines():
        try:
            _print_answer(chat, line)
        except UnusableText as error:
            print(f"error: {error}")


def seconds_seen(chat: Chat) -> str:
    """Return a line with the times of the frames that the model sees."""
    assert chat.clip is not None
    times = ", ".join(f"{time_s:.2f}" for time_s in chat.clip.times_s)
    return f"{chat.video}: frames at {times} s"


def _print_answer(chat: Chat, question: str) -> None:
    for piece in chat.stream(question):
        print(piece, end="", flush=True)
    print()


def _typed_lines() -> Iterator[str]:
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if not line:
            return
        yield line


def narrate(
    model: Exo2Ego, video: str, every: float, start: float, end: float | None, question: str, out: Path | None
) -> None:
    """Print a narration of a video line by line as it is made, and write it as subtitles.

    Args:
        out: an ``.srt`` or ``.vtt`` file; None for none. It appears when it is complete.

    Raises:
        ClipDecodeError: the video cannot be read, or does not have the span.
        ValueError: ``out`` has another ending, or its folder does not exist.
    """
    if out is not None:
        check_subtitles(out)
    narrations = []
    for narration in model.describe(video, every, start, end, question):
        print(f"{_clock(narration.start_s, '.')} - {_clock(narration.end_s, '.')}  {narration.text}", flush=True)
        narrations.append(narration)
    if out is not None:
        write_subtitles(out, narrations)
        print(f"{out}: {len(narrations)} subtitles")


def watch(model: Exo2Ego, source: str, every: float, window: float | None, question: str) -> None:
    """Print a line about every window of a live source, until it ends or Ctrl-C.

    Raises:
        ClipDecodeError: the source cannot be opened, or broke off.
        ValueError: ``every`` or ``window`` is not usable.
    """
    with suppress(KeyboardInterrupt), closing(model.watch(source, every, question, window)) as observations:
        for o in observations:
            clock = time.strftime("%H:%M:%S", time.localtime(o.time))
            dropped = f", {o.dropped} frames dropped" if o.dropped else ""
            print(f"{clock}  {o.start_s:.1f}-{o.end_s:.1f} s  {o.answer}  (lag {o.lag_s:.1f} s{dropped})", flush=True)


def check_subtitles(out: Path) -> None:
    """Refuse a file that cannot be written, before anything is computed.

    Raises:
        ValueError: its ending is neither ``.srt`` nor ``.vtt``, or its folder does not exist.
    """
    if out.suffix not in SUBTITLES:
        raise ValueError(f"{out}: unknown kind of subtitles: let the name end in {' or '.join(SUBTITLES)}")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"{out}: {out.parent} is no folder that can be written to: make it, or name another file")


def write_subtitles(out: Path, narrations: Iterable[Narration]) -> None:
    """Write subtitles in the format that the file's ending names: SubRip (``.srt``) or WebVTT (``.vtt``)."""
    decimal = "," if out.suffix == ".srt" else "."
    blocks = ["WEBVTT\n"] if out.suffix == ".vtt" else []
    for number, narration in enumerate(narrations, start=1):
        # A blank line ends a subtitle, and an arrow would be read as times.
        text = " ".join(narration.text.split()).replace("-->", "->")
        times = f"{_clock(narration.start_s, decimal)} --> {_clock(narration.end_s, decimal)}"
        blocks.append(f"{number}\n{times}\n{text}\n")
    with atomic_path(out) as unfinished:
        unfinished.write_text("\n".join(blocks), encoding="utf-8")


def _clock(seconds: float, decimal: str) -> str:
    """Write a time as hours, minutes, seconds and milliseconds, such as 00:01:02.500."""
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds // 1000:02d}{decimal}{milliseconds % 1000:03d}"
