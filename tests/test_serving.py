"""Serve a trained model: equal answers, bounded use, and a server that stays up whatever is sent to it."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import tiny
from test_clip_stream import make_video

from lightning_modules import Exo2Ego
from lightning_modules.cli import main

pytest.importorskip("starlette", reason="needs pip install -e '.[serve]'")
pytest.importorskip("uvicorn", reason="needs pip install -e '.[serve]'")
from lightning_modules.serving.server import Limits, build_app, build_server, serve

QUESTION = "Describe the video."
PATH = "/v1/chat/completions"
LIMITS = Limits(running=2, waiting=1, body_mib=1, seconds=20, new_tokens=24)


class GatedModel(Exo2Ego):
    """A model whose answers can be held up after their first piece."""

    gate: threading.Event
    held = 0
    closed = 0

    def pieces(self, *args, **kwargs):
        for number, piece in enumerate(super().pieces(*args, **kwargs)):
            try:
                if number:
                    self.held += not self.gate.is_set()
                    assert self.gate.wait(20)
                yield piece
            except GeneratorExit:
                self.closed += 1
                raise


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a folder with a video, in a folder with another one that is not served."""
    outside = tmp_path_factory.mktemp("videos")
    (outside / "root" / "takes").mkdir(parents=True)
    make_video(outside / "root" / "takes" / "a.mp4")
    make_video(outside / "secret.mp4")
    (outside / "root" / "link.mp4").symlink_to(outside / "secret.mp4")
    (outside / "root" / "folder").symlink_to(outside)
    (outside / "root" / "loop.mp4").symlink_to("loop.mp4")
    (outside / "root" / "list.mp4").write_text("ffconcat version 1.0\nfile takes/a.mp4\n")
    os.mkfifo(outside / "root" / "fifo.mp4")
    return outside / "root"


@pytest.fixture(scope="module")
def model(toy_tokenizer):
    model = tiny.answering_model(toy_tokenizer, GatedModel, read_timeout_s=LIMITS.seconds)
    model.gate = threading.Event()
    model.gate.set()
    return model


@contextmanager
def running(app):
    """Serve an application on a port of its own, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = build_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture(scope="module")
def port(model, root):
    with running(build_app(model, root, LIMITS)) as port:
        yield port


def messages(url="takes/a.mp4", question=QUESTION, **span):
    video = {"type": "video_url", "video_url": {"url": url, **span}}
    return [{"role": "user", "content": [video, {"type": "text", "text": question}]}]


def send(port, body, headers=None):
    """Post a body and return the status and the response's JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", PATH, content, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def data_url(content):
    return "data:video/mp4;base64," + base64.b64encode(content).decode()


def places_taken(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", "/health")
        return json.loads(connection.getresponse().read())["taken"]
    finally:
        connection.close()


def wait_for(condition):
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("as_data", [False, True])
def test_answers_are_those_of_the_model(port, model, root, as_data):
    file = root / "takes" / "a.mp4"
    expected = model.answer(file, QUESTION, 0.5, 2.5, max_new_tokens=12)
    assert len(expected) > 5
    url = data_url(file.read_bytes()) if as_data else "takes/a.mp4"
    status, answer = send(port, {"messages": messages(url, start=0.5, end=2.5), "max_tokens": 12, "temperature": 0})
    assert status == 200, answer
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
    *_, last = model.pieces(file, QUESTION, 0.5, 2.5, max_new_tokens=12)
    assert answer["choices"][0]["finish_reason"] == ("length" if last.completion_tokens == 12 else "stop")
    assert answer["usage"]["completion_tokens"] == last.completion_tokens
    visual = len(model.visual_tokens(model.look(file, 0.5, 2.5).frames))
    assert answer["usage"]["prompt_tokens"] == visual + len(model.encoder.prompt(QUESTION).input_ids) - 1


def test_a_conversation_sees_its_earlier_turns(port, model, root):
    chat = model.chat(root / "takes" / "a.mp4")
    turns = messages()
    for question in (QUESTION, "Where is the cup?"):
        if len(turns) > 1:
            turns.append({"role": "user", "content": question})
        answer = send(port, {"model": "exo2ego", "messages": turns})[1]["choices"][0]["message"]
        assert answer["content"] == chat.ask(question, max_new_tokens=LIMITS.new_tokens)
        turns.append(answer)


def test_the_openai_client_is_answered(port, model, root):
    openai = pytest.importorskip("openai", reason="needs pip install openai")
    expected = model.answer(root / "takes" / "a.mp4", QUESTION, max_new_tokens=LIMITS.new_tokens)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        assert [each.id for each in client.models.list()] == ["exo2ego"]
        answer = client.chat.completions.create(model="exo2ego", messages=messages())
        assert answer.choices[0].message.content == expected
        chunks = list(
            client.chat.completions.create(
                model="exo2ego", messages=messages(), stream=True, stream_options={"include_usage": True}
            )
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
        assert chunks[-1].usage == answer.usage
        assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason
        with pytest.raises(openai.NotFoundError, match=r"'b\.mp4': no such file below the root of this server"):
            client.chat.completions.create(model="exo2ego", messages=messages("b.mp4"))


def test_pieces_arrive_while_the_answer_is_decoded(port, model, root):
    expected = model.answer(root / "takes" / "a.mp4", QUESTION, max_new_tokens=LIMITS.new_tokens)
    model.gate.clear()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        body = json.dumps({"messages": messages(), "stream": True})
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        lines = [response.readline() for _ in range(4)]
        deltas = [json.loads(line.removeprefix(b"data: "))["choices"][0]["delta"] for line in lines if line.strip()]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert expected.startswith(deltas[1]["content"]) and deltas[1]["content"] != expected
        model.gate.set()
        rest = [line.removeprefix(b"data: ") for line in response.read().splitlines() if line]
        assert rest.pop() == b"[DONE]"
        deltas += [json.loads(line)["choices"][0]["delta"] for line in rest]
        assert "".join(delta.get("content", "") for delta in deltas) == expected
    finally:
        model.gate.set()
        connection.close()


# ------------------------------------------------------------------------------------------------------------- bounds


def ask_and_leave(port, stream):
    """Send a request on a connection that the caller closes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(
        "POST", PATH, json.dumps({"messages": messages(), "stream": stream}), {"Content-Type": "application/json"}
    )
    return connection


def test_places_are_bounded_and_those_of_clients_that_leave_are_free_again(port, model):
    wait_for(lambda: places_taken(port) == 0)
    held, closed = model.held, model.closed
    model.gate.clear()
    clients = []
    try:
        for taken, stream in enumerate((True, False, True), start=1):
            clients.append(ask_and_leave(port, stream))
            wait_for(lambda taken=taken: places_taken(port) == taken)
        wait_for(lambda: model.held == held + 2)
        status, refused = send(port, {"messages": messages()})
        assert status == 503 and refused["error"]["message"] == "all places of this server are taken: ask again later"
        for client in clients:
            client.close()
        wait_for(lambda: places_taken(port) == 2)  # the waiting one never began
        model.gate.set()
        wait_for(lambda: places_taken(port) == 0)
        assert model.closed == closed + 2  # neither answer was decoded to its end
    finally:
        model.gate.set()
    assert send(port, {"messages": messages()})[0] == 200


def test_answers_and_uploads_have_a_time_limit(model, root):
    with running(build_app(model, root, Limits(seconds=0.3))) as port:
        model.gate.clear()
        try:
            status, answer = send(port, {"messages": messages()})
            assert status == 504 and answer["error"]["message"].startswith("no answer within 0.3 s")
        finally:
            model.gate.set()
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            client.sendall(raw_head(100) + b"{")  # and nothing more
            assert b"408" in client.recv(4096).split(b"\r\n")[0]
        wait_for(lambda: places_taken(port) == 0)


def raw_head(length):
    return (
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def test_without_a_root_no_file_is_read(model):
    with running(build_app(model, None, LIMITS)) as port:
        assert "this server reads no files" in send(port, {"messages": messages()})[1]["error"]["message"]


# ------------------------------------------------------------------------------------------------------- bad requests

CONCAT = "ffconcat version 1.0\nfile '{}'\n"
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nfile://{}\n#EXT-X-ENDLIST\n"


def bad_requests(root):
    """Return pairs of a request and the beginning of the message that refuses it."""
    video, secret = (root / "takes" / "a.mp4").read_bytes(), root.parent / "secret.mp4"
    names = ["../secret.mp4", "takes/../../secret.mp4", str(secret), "link.mp4", "folder/secret.mp4", "loop.mp4"]
    names += ["%2e%2e/secret.mp4", "..%2fsecret.mp4", "..\\secret.mp4", "takes/a.mp4\0.txt", "takes", ".", "", "~"]
    names += ["fifo.mp4", "/dev/zero", "/proc/self/environ", "a" * 5000, "../" * 50 + "etc/passwd", "\ud800"]
    yield from (({"messages": messages(name)}, "video_url: ") for name in names)
    for address in ("http://127.0.0.1/a.mp4", "file:///etc/passwd", f"file://{secret}", "rtsp://x/y", "concat://a"):
        yield {"messages": messages(address)}, "video_url: addresses are not read"
    for content in (
        b"",
        b"text",
        video[: len(video) // 2],
        video[:100],
        os.urandom(999),
        CONCAT.format(secret).encode(),
    ):
        yield {"messages": messages(data_url(content))}, "the video that was sent"
    yield {"messages": messages(data_url(PLAYLIST.format(secret).encode()))}, "the video that was sent"
    yield {"messages": messages("list.mp4")}, "'list.mp4'"
    for url in ("data:", "data:video/mp4;base64", "data:video/mp4,abc", "data:video/mp4;base64,?", "data:;base64,a"):
        yield {"messages": messages(url)}, "video_url: "
    for start, end in ((2, 1), (0, 0), (100, 200), (1, 1)):
        yield {"messages": messages(start=start, end=end)}, "'takes/a.mp4'"
    for span in ({"start": -1}, {"end": "3"}, {"start": True}, {"end": 1e300}, {"fps": 3}, {"start": [0]}):
        yield {"messages": messages(**span)}, "messages[0].content[0].video_url"
    for body in (
        b"",
        b"{",
        b"[" * 100_000,
        b"nul",
        b"\xff\xfe\x00",
        b'{"messages": NaN}',
        b"1" * 10_000,
        b"[]",
        b'"a"',
    ):
        yield body, "body: "
    text = [{"type": "text", "text": "Hello."}]
    wrong = [None, 3, "text", {}, [], [None], [{}], [{"role": "user"}], [{"role": "user", "content": 3}]]
    wrong += [[{"role": "user", "content": QUESTION}], [{"role": "user", "content": [3]}], messages() * 2]
    wrong += [messages() * 3, [{"role": "system", "content": "x"}], [{"role": "user", "content": text}]]
    wrong += [[{"role": "user", "content": text + messages()[0]["content"]}]]
    wrong += [[{"role": "user", "content": [{"type": "video_url"}, *text]}]]
    wrong += [[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}, *text]}]]
    wrong += [messages(question="a " * 500), messages(question="x" * (1 << 18))]
    yield from (({"messages": each}, "messages") for each in wrong)
    yield {"messages": messages(question="<video>")}, ""
    values = [
        ("n", 2),
        ("temperature", 0.7),
        ("tools", [{}]),
        ("max_tokens", 0),
        ("max_tokens", 1 << 40),
        ("stop", "a"),
    ]
    values += [("max_tokens", 1.5), ("max_tokens", True), ("stream", "yes"), ("stream_options", 3), ("__class__", {})]
    values += [("model", "gpt"), ("model", ["exo2ego"]), ("n", {}), ("logprobs", True), ("max_completion_tokens", -1)]
    values += [("top_p", 0.5), ("response_format", {"type": "json_object"}), ("code", "import os"), ("pickle", "gASV")]
    values += [("model", "../" * 9), ("n", [[]]), ("messages_", [])]
    for name, value in values:
        yield {"messages": messages(), name: value}, name


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_bad_requests_are_refused_and_leave_nothing_behind(port, root, tmp_path, monkeypatch):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("counts file descriptors in /proc")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # uploads are written there
    good = {"messages": messages()}
    status, expected = send(port, good)
    assert status == 200
    wait_for(lambda: places_taken(port) == 0)
    before = open_descriptors()

    requests = list(bad_requests(root))
    assert len(requests) >= 100
    for body, beginning in requests:
        status, answer = send(port, body)
        message = answer["error"]["message"]
        assert 400 <= status < 500, (body, answer)
        assert message.startswith(beginning) and "\n" not in message, (body, answer)
        assert str(root) not in message and str(tmp_path) not in message  # places of the server are its own

    # Larger than allowed: by its own account, and without one.
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(raw_head(10_000_000_000) + b"{")
        assert b"413" in client.recv(4096).split(b"\r\n")[0]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(raw_head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
        with pytest.raises(OSError):  # refused while it sends
            for _ in range(1000):
                client.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
    assert send(port, good, {"Content-Type": "text/plain"})[0] == 415
    # Clients that go away in the middle of the head, of the body, and of the answer.
    for part in (b"POST", raw_head(1000) + b'{"mess', raw_head(len(json.dumps(good))) + json.dumps(good).encode()):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            client.sendall(part)

    wait_for(lambda: places_taken(port) == 0)
    assert send(port, good)[1]["choices"] == expected["choices"]
    wait_for(lambda: open_descriptors() <= before)
    assert os.listdir(tmp_path) == []


def test_several_clients_are_answered_at_once(port, model, root):
    questions = [QUESTION, "Where is the cup?"] * 4
    file = root / "takes" / "a.mp4"
    expected = {question: model.answer(file, question, max_new_tokens=LIMITS.new_tokens) for question in questions}
    found = []

    def ask(question):
        while (answer := send(port, {"messages": messages(question=question)}))[0] == 503:
            time.sleep(0.02)
        found.append((question, answer[1]["choices"][0]["message"]["content"]))

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted((question, expected[question]) for question in questions)


# ------------------------------------------------------------------------------------------------------------ command


def test_wrong_settings_are_refused_before_the_model_is_read(tmp_path, capsys):
    missing, empty = str(tmp_path / "missing"), str(tmp_path)
    assert main(["serve", empty, "--root", missing]) == 2
    assert "is no folder: name the folder of the videos" in capsys.readouterr().err
    assert main(["serve", empty, "--seconds", "0"]) == 2
    assert "seconds: got 0.0, allowed: above 0" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as used, pytest.raises(ValueError, match="choose another"):
        serve(missing, None, "127.0.0.1", used.getsockname()[1], LIMITS)
