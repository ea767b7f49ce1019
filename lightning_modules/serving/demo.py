"""Web page to ask a trained model about uploaded videos, built on Gradio.

Gradio keeps uploads in a folder that is removed at the end, and serves no other files. The page loads nothing from
other hosts.
"""

from __future__ import annotations

import html
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
import gradio as gr

from lightning_modules.inference.api import CAPTION, Exo2Ego
from lightning_modules.serving.page import Page
from lightning_modules.serving.server import Limits

_KEPT_S = 3600
"""Time after which an upload is removed."""
_INTRODUCTION = """# Exo2Ego

Upload an egocentric video and ask about a part of it. The model answers from x, the features of the frames, and from
F(x), the same features mapped towards those of an exocentric view: the switch shows what the mapping adds.
"""


def _refuse_addresses(field: gr.Video) -> None:
    """Let a field take uploads alone; Gradio would also fetch an address that a request names."""
    keep = field.async_move_resource_to_block_cache

    async def keep_file(path: Any) -> str | None:
        if "://" in str(path):
            raise gr.Error("video: addresses are not read: upload the file", print_exception=False)
        kept: str | None = await keep(path)
        return kept

    # A subclass would do, but Gradio writes a file next to the module of each.
    field.async_move_resource_to_block_cache = keep_file


def build_demo(page: Page) -> gr.Blocks:
    """Build the page.

    Args:
        page: functions behind it.
    """
    span = {"minimum": 0, "precision": 3}
    with gr.Blocks(title="Exo2Ego", analytics_enabled=False, delete_cache=(_KEPT_S // 6, _KEPT_S)) as demo:
        gr.Markdown(_INTRODUCTION)
        with gr.Row():
            with gr.Column():
                video = gr.Video(label=f"Video, at most {page.limits.body_mib:g} MiB", sources=["upload"], height=280)
                _refuse_addresses(video)
                with gr.Row():
                    start = gr.Number(0, label="Start in seconds", elem_id="start", **span)
                    end = gr.Number(None, label="End in seconds", elem_id="end", **span)
                names = list(page.inputs)
                inputs = gr.Radio(names, value=names[0], label="Visual inputs", elem_id="inputs")
                question = gr.Textbox(CAPTION, label="Question", elem_id="question")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                options = gr.Textbox(label="Options, one a line", lines=3, elem_id="options")
                choose = gr.Button("Choose", elem_id="choose")
            with gr.Column():
                frames = gr.Gallery(
                    label="Frames that the model saw", columns=4, height=280, format="png", elem_id="frames"
                )
                answer = gr.Textbox(label="Answer", lines=3, elem_id="answer")
                chances = gr.Label(label="Probabilities of the options", elem_id="chances", show_heading=False)

        clip = [video, start, end]
        length = _shown(lambda uploaded: (0, round(page.length_s(uploaded), 3), [], "", None))
        private: dict[str, Any] = {"api_visibility": "private"}
        video.upload(length, video, [start, end, frames, answer, chances], **private)
        video.clear(lambda: (0, None, [], "", None), None, [start, end, frames, answer, chances], **private)
        asked = _shown_pieces(lambda *values: _answer(page, *values))
        gr.on([ask.click, question.submit], asked, [*clip, question, inputs], [frames, answer], **private)
        chosen = _shown(lambda *values: (page.frames(*values[:3]), page.choose(*values)))
        choose.click(chosen, [*clip, question, options, inputs], [frames, chances], **private)
    demo.queue(max_size=page.limits.waiting or 1, default_concurrency_limit=page.limits.running)
    return demo


def _answer(
    page: Page, video: str | None, start: float | None, end: float | None, question: str, inputs: str
) -> Iterator[tuple[Any, Any]]:
    """Yield the frames, then the answer as it grows."""
    yield page.frames(video, start, end), ""
    for text in page.answer(video, start, end, question, inputs):
        yield gr.update(), text


def _shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let the page show the errors of a function."""

    @wraps(function)
    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except ValueError as error:
            raise _message(error) from None

    return call


def _shown_pieces(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Let the page show the errors of a generator."""

    @wraps(function)
    def call(*values: Any) -> Iterator[Any]:
        try:
            yield from function(*values)
        except ValueError as error:
            raise _message(error) from None

    return call


def _message(error: ValueError) -> gr.Error:
    # The page shows HTML; a message may hold the name of a file.
    return gr.Error(html.escape(" ".join(str(error).split())), duration=None, print_exception=False)


def launch(demo: gr.Blocks, host: str, port: int, limits: Limits) -> str:
    """Start to serve a page in threads, and return its address.

    Args:
        demo: see ``build_demo``; ``demo.close()`` ends it.
        host: address to listen on.
        port: port to listen on.
        limits: ``body_mib`` bounds an upload.
    """
    # The time range takes the place of Gradio's trimming, whose code comes from another host.
    css = "button[aria-label*='Trim' i], button[title*='Trim' i] { display: none }"
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, address, _ = demo.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        css=css,
        max_file_size=int(limits.body_mib * (1 << 20)),
        share=False,
        inbrowser=False,
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        footer_links=[],
        prevent_thread_lock=True,
        quiet=True,
    )
    return str(address)


def serve(source: str, host: str, port: int, limits: Limits) -> None:
    """Load a model and serve the page until a signal stops the process.

    Args:
        source: see ``Exo2Ego.from_pretrained``.
        host: address to listen on.
        port: port to listen on.
        limits: bounds; ``body_mib`` is that of an upload.

    Raises:
        ValueError: the address cannot be listened on, or there is no such model.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"port: cannot listen on {host}, port {port}: {error}: choose another") from None
    model = Exo2Ego.from_pretrained(source, read_timeout_s=limits.seconds)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with TemporaryDirectory(prefix="exo2ego-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        demo = build_demo(Page(model, Path(uploads), limits))
        try:
            print(f"{model.name}: {launch(demo, host, port, limits)}", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        finally:
            demo.close()
