"""Read requests to ``/v1/chat/completions``: whatever a client may send ends as a question or as a ``BadRequest``."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from datamodules.io.conversation import Turn

MODEL_NAME = "exo2ego"
_FIXED = {"n": 1, "temperature": 0, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "logprobs": False}
"""Settings of other models that have one value here: answers are decoded greedily."""
_READ = {"model", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options"}
_IGNORED = {"user", "seed", "metadata", "store"}
_MAX_CHARACTERS = 1 << 17  # of all texts, since splitting them into tokens takes time


class BadRequest(ValueError):
    """A request that cannot be answered; the message names the field, the problem and the fix.

    Attributes:
        status: of the HTTP response, 400-499 or 503.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Question:
    """A request that was checked, except for its video.

    Attributes:
        url: path of the video below the root, or ``data:`` with the video itself.
        start, end: span in seconds; without an end that of the video.
        text: the last question.
        earlier: questions and answers before it.
        max_new_tokens: longest answer.
        stream: send the answer piece by piece.
        stream_usage: then also count tokens.
    """

    url: str
    start: float
    end: float | None
    text: str
    earlier: tuple[Turn, ...]
    max_new_tokens: int
    stream: bool
    stream_usage: bool


def parse(body: bytes, max_new_tokens: int) -> Question:
    """Read the JSON of a request.

    Args:
        body: the request.
        max_new_tokens: longest answer that may be asked for, and the default.

    Raises:
        BadRequest: it is not JSON, or a field is wrong.
    """
    try:
        request = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"body: not JSON: {error}") from None
    if not isinstance(request, dict):
        raise BadRequest("body: expected a JSON object with messages")
    unknown = sorted(name for name in request.keys() - _READ - _IGNORED - _FIXED.keys() if request[name] is not None)
    if unknown:
        raise BadRequest(f"{unknown[0][:80]}: not supported here: leave it out")
    for name, fixed in _FIXED.items():
        if request.get(name) not in (None, fixed):
            raise BadRequest(f"{name}: allowed: {fixed}, since answers are decoded greedily: leave it out")
    if request.get("model", MODEL_NAME) != MODEL_NAME:
        raise BadRequest(f"model: there is one model here, named {MODEL_NAME}", 404)

    url, start, end, questions, answers = _read_messages(request.get("messages"))
    options = _field(request, "stream_options", dict, {})
    return Question(
        url=url,
        start=start,
        end=end,
        text=questions[-1],
        earlier=tuple(zip(questions[:-1], answers, strict=True)),
        max_new_tokens=_max_tokens(request, max_new_tokens),
        stream=_field(request, "stream", bool, False),
        stream_usage=_field(options, "include_usage", bool, False),
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _field(source: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """Return a field of a JSON object, or the default where it is missing or null."""
    value = source.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise BadRequest(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _max_tokens(request: dict[str, Any], largest: int) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        value = request.get(name)
        if value is None:
            continue
        if type(value) is not int or not 1 <= value <= largest:
            raise BadRequest(f"{name}: allowed: 1 to {largest}")
        return value
    return largest


def _read_messages(messages: Any) -> tuple[str, float, float | None, list[str], list[str]]:
    """Return the video's address, start and end, the questions, and the answers to all but the last of them."""
    if not isinstance(messages, list) or len(messages) % 2 == 0:
        raise BadRequest("messages: expected a list of messages of user and assistant in turn, from user to user")
    videos: list[list[tuple[str, float, float | None]]] = []
    questions: list[str] = []
    answers: list[str] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = "assistant" if number % 2 else "user"
        if not isinstance(message, dict) or message.get("role") != role:
            raise BadRequest(f"{where}.role: expected {role}: user and assistant take turns, without system messages")
        text, found = _read_content(message.get("content"), f"{where}.content")
        (answers if number % 2 else questions).append(text)
        videos.append(found)
    if len(videos[0]) != 1 or any(videos[1:]):
        raise BadRequest("messages: expected one part of type video_url, in the first message")
    if sum(len(text) for text in questions + answers) > _MAX_CHARACTERS:
        raise BadRequest(f"messages: longer than {_MAX_CHARACTERS} characters: leave out the oldest", 413)
    url, start, end = videos[0][0]
    return url, start, end, questions, answers


def _read_content(content: Any, where: str) -> tuple[str, list[tuple[str, float, float | None]]]:
    """Return the text of a message, and its videos."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise BadRequest(f"{where}: expected a text, or a list of parts of types text and video_url")
    texts, videos = [], []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "video_url":
            videos.append(_read_video(part.get("video_url"), f"{where}[{number}].video_url"))
        else:
            raise BadRequest(f"{where}[{number}]: expected a part of type text with text, or video_url with video_url")
    if len(texts) != 1:
        raise BadRequest(f"{where}: expected one part of type text")
    return texts[0], videos


def _read_video(video: Any, where: str) -> tuple[str, float, float | None]:
    if not isinstance(video, dict) or not isinstance(video.get("url"), str):
        raise BadRequest(f"{where}: expected an object with url, and optionally start and end in seconds")
    unknown = sorted(video.keys() - {"url", "start", "end"})
    if unknown:
        raise BadRequest(f"{where}.{unknown[0][:80]}: allowed: url, start, end")
    times = [video.get("start"), video.get("end")]
    for name, time_s in zip(("start", "end"), times, strict=True):
        if time_s is not None and (type(time_s) not in (int, float) or not _is_time(time_s)):
            raise BadRequest(f"{where}.{name}: expected seconds, 0 or more")
    return video["url"], float(times[0] or 0), None if times[1] is None else float(times[1])


def _is_time(value: float) -> bool:
    return 0 <= value < 1e9 and math.isfinite(value)


def find_video(root: Path | None, name: str) -> Path:
    """Return a file below the root; links are followed, and must not lead out of it.

    Args:
        root: resolved folder; None where no files are served.
        name: path below it, taken literally.

    Raises:
        BadRequest: there is no such file below the root. The message does not tell what there is outside of it.
    """
    if "://" in name:
        raise BadRequest("video_url: addresses are not read: send the video as data URL, or name a path below the root")
    if root is None:
        raise BadRequest("video_url: this server reads no files: send the video as data URL, data:video/mp4;base64,...")
    with suppress(OSError, ValueError, RuntimeError):  # too long, a zero byte, or links in a circle
        path = (root / name).resolve()
        if path.is_relative_to(root) and path.is_file():
            return path
    raise BadRequest(f"video_url: {shown(name)}: no such file below the root of this server: correct the path", 404)


def shown(name: str) -> str:
    """Return a client's name for a video as it may appear in a message."""
    return "the video that was sent" if name.startswith("data:") else repr(name[:200])


@contextmanager
def stored(url: str) -> Iterator[Path]:
    """Write the video of a data URL to a temporary file.

    Raises:
        BadRequest: it is not base64.
    """
    header, comma, encoded = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise BadRequest("video_url: expected data:video/mp4;base64,... with the video in base64")
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise BadRequest(f"video_url: the video that was sent is not base64: {error}") from None
    with NamedTemporaryFile(prefix="exo2ego-") as file:
        file.write(content)
        file.flush()
        yield Path(file.name)
