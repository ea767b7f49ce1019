"""The web page: bounded answers about uploaded videos, and the page itself in a browser."""

from __future__ import annotations

import json
import socket
import sys
import urllib.error
import urllib.request
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
from browser import CHROMIUM, Browser
from test_clip_stream import make_video

from lightning_modules.cli import main

pytest.importorskip("starlette", reason="needs pip install -e '.[serve]'")
pytest.importorskip("uvicorn", reason="needs pip install -e '.[serve]'")
from lightning_modules.serving.page import Page
from lightning_modules.serving.server import Limits

QUESTION = "Describe the video."
LIMITS = Limits(body_mib=0.5, seconds=20, new_tokens=24)


@pytest.fixture(scope="module")
def model(toy_tokenizer):
    return tiny.answering_model(toy_tokenizer)


@pytest.fixture
def page(model, tmp_path):
    (tmp_path / "uploads").mkdir()
    return Page(model, tmp_path / "uploads", LIMITS)


@pytest.fixture
def video(page):
    return str(make_video(page.uploads / "kitchen.mp4"))


# ------------------------------------------------------------------------------------------ functions behind the page


def test_answers_are_those_of_the_model(page, model, video):
    assert page.length_s(video) == 4
    parts = list(page.answer(video, 1, 3, QUESTION, "both"))
    assert parts[-1] == model.answer(video, QUESTION, 1, 3, LIMITS.new_tokens)
    assert len(parts) > 5 and all(after.startswith(before) for before, after in pairwise(parts))
    for inputs, name in ((["ego"], "x only"), (["mapped"], "F(x) only")):
        *_, last = page.answer(video, 0, None, QUESTION, name)
        assert last == model.answer(video, QUESTION, max_new_tokens=LIMITS.new_tokens, visual_inputs=inputs)
    options = ["Left.", "Right."]
    chances = page.choose(video, 0, None, QUESTION, "\n Left. \n\nRight.\n", "F(x) only")
    assert chances == model.choose(video, QUESTION, options, visual_inputs=["mapped"])


def test_frames_are_those_that_the_model_sees(page, model, video):
    clip = model.look(video, 1, 3)
    frames = page.frames(video, 1, 3)
    assert [caption for _, caption in frames] == ["1.50 s", "2.50 s"]
    assert all((frame == seen.numpy()).all() for (frame, _), seen in zip(frames, clip.frames, strict=True))


def test_only_inputs_that_the_model_reads_can_be_chosen(page, model, video, monkeypatch):
    monkeypatch.setattr(type(model), "visual_inputs", ("ego",))
    demonstrator = Page(model, page.uploads, LIMITS)
    assert list(page.inputs) == ["both", "x only", "F(x) only"] and list(demonstrator.inputs) == ["x only"]
    with pytest.raises(ValueError, match="visual inputs: got 'both', allowed: x only"):
        list(demonstrator.answer(video, 0, None, QUESTION, "both"))


def test_nothing_but_uploads_is_read(page, video, tmp_path):
    outside = make_video(tmp_path / "secret.mp4")
    (page.uploads / "link.mp4").symlink_to(outside)
    for path in (outside, page.uploads / "link.mp4", page.uploads / ".." / "secret.mp4", "https://127.0.0.1/a.mp4"):
        for ask in (page.length_s, lambda path: page.frames(path, 0, None)):
            with pytest.raises(ValueError, match="this file was not uploaded here"):
                ask(str(path))
    with pytest.raises(ValueError, match="video: there is none: upload one"):
        page.length_s(None)


def test_errors_are_one_line_and_name_the_video_as_the_user_does(page, video):
    (page.uploads / "text.mp4").write_text("no video")
    calls = {
        r"^text.mp4.*re-download it": lambda: page.length_s(str(page.uploads / "text.mp4")),
        r"^kitchen.mp4 \[100.000, .*the video ends at 4.000 s": lambda: page.frames(video, 100, None),
        r"^kitchen.mp4 \[3.000, 2.000\) s: the end must": lambda: list(page.answer(video, 3, 2, QUESTION, "both")),
        r"^question: it is empty": lambda: list(page.answer(video, 0, None, " ", "both")),
        r"^question: longer than 64 tokens": lambda: list(page.answer(video, 0, None, "a " * 99, "both")),
        r"^options: got 1, allowed: 2 to 26": lambda: page.choose(video, 0, None, QUESTION, "Left.", "both"),
        r"^options: .*at least two different": lambda: page.choose(video, 0, None, QUESTION, "a\na", "both"),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1 and str(page.uploads) not in str(caught.value)


def test_an_answer_that_takes_too_long_is_cut(model, page, video):
    parts = Page(model, page.uploads, Limits(seconds=1e-9)).answer(video, 0, None, QUESTION, "both")
    assert next(parts)
    with pytest.raises(ValueError, match="the answer was cut after 1e-09 s"):
        next(parts)


def test_a_missing_package_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "lightning_modules.serving.demo", raising=False)
    assert main(["demo", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: gradio is not installed: pip install -e '.[demo]'\n"


# --------------------------------------------------------------------------------------------------- the page itself


@pytest.fixture
def address(page, monkeypatch):
    """Serve the page and return its address."""
    if not find_spec("gradio"):
        pytest.skip("needs pip install -e '.[demo]'")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(page.uploads))
    from lightning_modules.serving.demo import build_demo, launch

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    demo = build_demo(page)
    yield launch(demo, "127.0.0.1", port, LIMITS)
    demo.close()


@pytest.fixture
def browser(address, tmp_path):
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    browser = Browser(tmp_path / "profile")
    browser.open(address)
    browser.wait("!!document.querySelector('#ask')")
    yield browser
    browser.close()


ANSWER = "document.querySelector('#answer textarea').value"
PAGE = "document.body.innerText"


def press(browser, button):
    """Click a button when everything before has ended, since the page takes no second question before."""
    browser.wait("!document.querySelector('.generating, .pending')")
    browser.click(button)


@pytest.mark.slow
def test_the_page_answers_in_a_browser(browser, address, model, page, tmp_path):
    (tmp_path / "mine").mkdir()
    video = make_video(tmp_path / "mine" / "kitchen.mp4")
    assert "Video, at most 0.5 MiB" in browser.evaluate(PAGE)
    browser.upload("input[type=file]", video)
    browser.wait("document.querySelector('#end input').value", lambda value: value == "4")

    # The answer grows in the page, and is that of the model.
    browser.fill("#start input", "1")
    press(browser, "#ask")
    expected = model.answer(video, QUESTION, 1, 4, LIMITS.new_tokens)
    browser.wait(ANSWER, lambda answer: answer == expected)
    assert browser.evaluate("document.querySelectorAll('#frames img').length") == tiny.FRAMES
    assert "1.70 s 3.20 s" in browser.evaluate("document.querySelector('#frames').innerText").replace("\n", " ")

    # What the mapping adds.
    browser.click("#inputs label:nth-of-type(3) input")
    press(browser, "#ask")
    expected = model.answer(video, QUESTION, 1, 4, LIMITS.new_tokens, visual_inputs=["mapped"])
    browser.wait(ANSWER, lambda answer: answer == expected)

    browser.fill("#options textarea", "Left.\nRight.")
    press(browser, "#choose")
    chances = model.choose(video, QUESTION, ["Left.", "Right."], 1, 4, visual_inputs=["mapped"])
    shown = browser.wait("document.querySelector('#chances').innerText", lambda text: "%" in text)
    assert all(f"{round(100 * chance)}%" in shown for chance in chances.values())

    # Errors are the messages of the repository.
    browser.fill("#start input", "100")
    press(browser, "#ask")
    browser.wait(PAGE, lambda text: "kitchen.mp4 [100.000, 4.000) s: the end must come after the start" in text)

    # Nothing comes from another host.
    hosts = {url.split("/")[2] for url in browser.requested if url.startswith("http")}
    assert hosts == {address.split("/")[2]}
    trimming = "[...document.querySelectorAll('button')].filter(button => /trim/i.test(button.ariaLabel))"
    assert browser.evaluate(f"{trimming}.length && !{trimming}.some(button => button.offsetParent)")


@pytest.mark.slow
def test_the_page_shows_why_a_file_is_refused(browser, tmp_path):
    (tmp_path / "text.mp4").write_bytes(b"no video")
    browser.upload("input[type=file]", tmp_path / "text.mp4")
    browser.wait(PAGE, lambda text: "text.mp4 [0.000, inf) s: " in text)


@pytest.mark.slow
def test_a_large_upload_is_refused(address, page):
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    body = head + bytes(1 << 20) + b"\r\n--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/upload", body, headers))
    assert caught.value.code == 413
    assert not list(page.uploads.rglob("a.mp4"))


def outcome(address, path):
    """Return how the page's function for uploads ends for a request that names a path, as the browser would send it."""
    video = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [video], "fn_index": 0, "session_hash": "stranger"}).encode()
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/queue/join", body, headers)).close()
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash=stranger", timeout=20) as events:
        for line in events:
            event = json.loads(line.removeprefix(b"data:")) if line.startswith(b"data:") else {}
            if event.get("msg") == "process_completed":
                return event
    raise AssertionError("no end")


@pytest.mark.slow
def test_no_other_file_is_read_or_sent(address, page, video, tmp_path):
    assert outcome(address, video)["success"]
    outside = make_video(tmp_path / "secret.mp4")
    for path in (outside, Path("pyproject.toml").resolve(), "/etc/passwd", f"{page.uploads}/../secret.mp4"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert caught.value.code in (403, 404)
        refused = outcome(address, str(path))
        assert not refused["success"] and "4.0" not in str(refused["output"])
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.5)
        refused = outcome(address, f"http://127.0.0.1:{other.getsockname()[1]}/a.mp4")
        assert refused["output"]["error"] == "video: addresses are not read: upload the file"
        with pytest.raises(TimeoutError):
            other.accept()
