"""Answer chat completions over HTTP: bounded in size, number and time, several at once.

A request holds one of a fixed number of places from its first byte until the thread that answers it has ended; without
a free place it is refused at once. The thread sends the pieces of the answer to the connection of the client. It stops
at the next piece when the client leaves or the time is up.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from datamodules.video.errors import ClipDecodeError
from datamodules.video.reader import ClipReader
from lightning_modules.inference.api import Exo2Ego, Piece
from lightning_modules.serving.requests import MODEL_NAME, BadRequest, Question, find_video, parse, shown, stored

_LOG = logging.getLogger(__name__)
_MIB = 1 << 20
_CONNECTIONS = 256


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        running: requests that are answered at the same time, each in a thread.
        waiting: further requests that are accepted; those beyond are refused with status 503.
        body_mib: largest request in MiB; base64 makes a video a third larger.
        seconds: longest time for receiving a request, for reading its video, and for its whole answer.
        new_tokens: longest answer that may be asked for, and the default.
    """

    running: int = 2
    waiting: int = 16
    body_mib: float = 64
    seconds: float = 60
    new_tokens: int = 128

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: one of them is too small.
        """
        for name, least in (("running", 1), ("waiting", 0), ("new_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed: {least} or more")
        for name in ("body_mib", "seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed: above 0")


class _Gone(Exception):
    """The client closed its connection."""


class _Events:
    """Events of an answer on their way from a thread to the connection: pieces, then None, or an error.

    Attributes:
        stopped: nobody waits for further events.
    """

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    def put(self, event: Piece | Exception | None) -> None:
        """Send an event, from any thread."""
        if not self.stopped.is_set():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def get(self) -> Piece | None:
        """Return the next piece, or None at the end; raise the error that came in its place."""
        event = await self._queue.get()
        if isinstance(event, Exception):
            raise event
        return event


class Completions:
    """The ASGI application of ``POST /v1/chat/completions``.

    Args:
        model: answers; its methods are called from several threads.
        root: folder of the videos that requests may name; None for none.
        limits: bounds.

    Attributes:
        taken: places that are taken.
    """

    def __init__(self, model: Exo2Ego, root: Path | None, limits: Limits) -> None:
        self.model, self.limits, self.taken = model, limits, 0
        self.root = None if root is None else root.resolve(strict=True)
        self._threads = ThreadPoolExecutor(limits.running, thread_name_prefix="answer")

    def close(self) -> None:
        """Accept no further requests; threads that run end with their answers."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, whatever it holds."""
        if self.taken >= self.limits.running + self.limits.waiting:
            busy = BadRequest("all places of this server are taken: ask again later", 503)
            await self._refusal(busy)(scope, receive, send)
            return
        self.taken += 1
        submitted = False
        try:
            body = await self._read_body(Request(scope, receive))
            # Many megabytes of JSON would hold up all other connections.
            question = await asyncio.to_thread(parse, body, self.limits.new_tokens)
            del body
            events, loop = _Events(), asyncio.get_running_loop()
            future = self._threads.submit(self._work, question, events)
            submitted = True
            future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._leave))
        except ClientDisconnect:
            return
        except Exception as error:
            await self._refusal(error)(scope, receive, send)
            return
        finally:
            if not submitted:
                self._leave()

        watch = asyncio.create_task(_watch(receive, events))
        try:
            await self._send_answer(question, events, scope, receive, send)
        except _Gone:
            pass
        finally:
            events.stopped.set()
            future.cancel()  # if it did not begin
            watch.cancel()

    def _leave(self) -> None:
        self.taken -= 1

    async def _read_body(self, request: Request) -> bytes:
        """Receive a request of a limited size in a limited time."""
        # A web page of another origin cannot send this type without asking the server first.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise BadRequest("Content-Type: expected application/json", 415)
        largest = int(self.limits.body_mib * _MIB)
        too_large = BadRequest(f"body: larger than {self.limits.body_mib:g} MiB: send a shorter or smaller video", 413)
        if int(request.headers.get("content-length", 0)) > largest:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > largest:
                        raise too_large
        except TimeoutError:
            raise BadRequest(f"body: not received within {self.limits.seconds:g} s", 408) from None
        return bytes(body)

    # ------------------------------------------------------------------------------------------------- in the thread

    def _work(self, question: Question, events: _Events) -> None:
        """Answer a question in a thread."""
        try:
            with closing(self._pieces(question)) as pieces:
                for piece in pieces:
                    if events.stopped.is_set():
                        return
                    events.put(piece)
            events.put(None)
        except ClipDecodeError as error:
            # The client's name for the video, not the server's.
            events.put(type(error)(error.reason, shown(question.url), error.start_s, error.end_s))
        except Exception as error:
            events.put(error)

    def _pieces(self, question: Question) -> Generator[Piece, None, None]:
        tokens = len(self.model.encoder.prompt(question.text, question.earlier).input_ids)
        longest = self.model.encoder.max_text_tokens
        if tokens > longest:
            raise BadRequest(f"messages: {tokens} tokens, but this model reads at most {longest}: leave out the oldest")
        span = (question.start, question.end)
        answer = partial(self.model.pieces, max_new_tokens=question.max_new_tokens, earlier=question.earlier)
        if not question.url.startswith("data:"):
            yield from answer(find_video(self.root, question.url), question.text, *span)
            return
        # The model's own reader would keep the file open.
        reader = ClipReader(max_open=1, timeout_s=self.limits.seconds)
        try:
            with stored(question.url) as file:
                frames = self.model.look(file, *span, reader).frames
        finally:
            reader.close()
        yield from answer(frames, question.text)

    # ------------------------------------------------------------------------------------------------------ responses

    async def _send_answer(
        self, question: Question, events: _Events, scope: Scope, receive: Receive, send: Send
    ) -> None:
        name = f"chat.completion{'.chunk' if question.stream else ''}"
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": name, "created": int(time.time()), "model": MODEL_NAME}
        begun = False
        try:
            async with asyncio.timeout(self.limits.seconds):
                piece = await events.get()
                if question.stream:  # not before the first piece, since an error until there has a status of its own
                    begun = True
                    await _start_stream(send)
                    async for chunk in _chunks(question, events, piece):
                        await _send_event(send, {**about, **chunk})
                    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
                else:
                    text = ""
                    while piece is not None:
                        text, last = text + piece.text, piece
                        piece = await events.get()
                    message = {"role": "assistant", "content": text}
                    choice = {"index": 0, "message": message, "finish_reason": _finish_reason(question, last)}
                    answer = {**about, "choices": [choice], "usage": _usage(last)}
                    await JSONResponse(answer)(scope, receive, send)
        except _Gone:
            raise
        except Exception as error:
            response = self._refusal(error)
            if not begun:
                await response(scope, receive, send)
                return
            await send({"type": "http.response.body", "body": b"data: %b\n\n" % bytes(response.body)})

    def _refusal(self, error: Exception) -> Response:
        """Return the response to a request that failed, in the form that OpenAI's clients read."""
        status, message = 400, str(error)
        if isinstance(error, BadRequest):
            status = error.status
        elif isinstance(error, TimeoutError):
            status, message = 504, f"no answer within {self.limits.seconds:g} s: ask for fewer tokens, or later"
        elif not isinstance(error, ValueError):
            _LOG.error("a request failed", exc_info=error)
            status, message = 500, "the server failed; its log has the reason"
        return _error(status, message)


async def _watch(receive: Receive, events: _Events) -> None:
    """Wait for the client to close the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    events.put(_Gone())
    events.stopped.set()


async def _chunks(question: Question, events: _Events, piece: Piece | None) -> AsyncIterator[dict[str, Any]]:
    """Return what differs between the chunks of a stream."""

    def choices(delta: Mapping[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}

    yield choices({"role": "assistant", "content": ""})
    while piece is not None:
        last = piece
        if piece.text:
            yield choices({"content": piece.text})
        piece = await events.get()
    yield choices({}, _finish_reason(question, last))
    if question.stream_usage:
        yield {"choices": [], "usage": _usage(last)}


async def _start_stream(send: Send) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _send_event(send: Send, event: Mapping[str, Any]) -> None:
    data = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
    await send({"type": "http.response.body", "body": data, "more_body": True})


def _finish_reason(question: Question, last: Piece) -> str:
    return "length" if last.completion_tokens == question.max_new_tokens else "stop"


def _usage(last: Piece) -> dict[str, int]:
    prompt, completion = last.prompt_tokens, last.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _error(status: int, message: str) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": " ".join(message.split()), "type": kind, "param": None, "code": None}
    # What is left of a body that was refused is not received.
    headers = {503: {"Retry-After": "1"}, 408: {"Connection": "close"}, 413: {"Connection": "close"}}.get(status)
    return JSONResponse({"error": error}, status, headers)


def build_app(model: Exo2Ego, root: Path | None = None, limits: Limits | None = None) -> Starlette:
    """Build the web application; ``/v1/chat/completions``, ``/v1/models`` and ``/health``.

    Args:
        model: answers.
        root: folder of the videos that requests may name; None for none, so that videos come with the requests.
        limits: bounds; None for the defaults.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    completions = Completions(model, root, limits or Limits())

    async def models(request: Request) -> Response:
        entry = {"id": MODEL_NAME, "object": "model", "created": 0, "owned_by": "exo2ego"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "taken": completions.taken})

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _error(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        completions.close()

    routes = [
        Route("/v1/chat/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: refuse}, lifespan=lifespan)


def build_server(app: Starlette) -> uvicorn.Server:
    """Build the HTTP server of an application; ``run(sockets=[...])`` serves it until a signal."""
    return uvicorn.Server(
        uvicorn.Config(app, ws="none", server_header=False, limit_concurrency=_CONNECTIONS, timeout_graceful_shutdown=5)
    )


def serve(source: str, root: Path | None, host: str, port: int, limits: Limits) -> None:
    """Load a model and serve it until a signal stops the process.

    Args:
        source: see ``Exo2Ego.from_pretrained``.
        root: see ``build_app``.
        host: address to listen on.
        port: port to listen on.
        limits: bounds.

    Raises:
        ValueError: the address cannot be listened on, the root is no folder, or there is no such model.
    """
    if root is not None and not root.is_dir():
        raise ValueError(f"root: {root} is no folder: name the folder of the videos that requests may ask about")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"port: cannot listen on {host}, port {port}: {error}: choose another") from None
    with listening:
        model = Exo2Ego.from_pretrained(source, read_timeout_s=limits.seconds)
        print(f"{model.name}: serving http://{host}:{port}/v1", flush=True)
        build_server(build_app(model, root, limits)).run(sockets=[listening])
