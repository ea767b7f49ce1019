"""Answers about live sources: the newest window, at the pace of the source."""

from __future__ import annotations

import math
import socket
import struct
import threading
import time

import pytest
import tiny
from test_clip_stream import FPS, make_video

from datamodules.video import live
from datamodules.video.errors import ClipDecodeError, FileMissing, NotAVideo
from datamodules.video.live import LiveReader, LiveStopped
from lightning_modules import Exo2Ego
from lightning_modules.cli import main

QUESTION = "Describe the video."


class SlowModel(Exo2Ego):
    """A model whose answers take time."""

    seconds = 0.0

    def answer(self, *args, max_new_tokens):
        time.sleep(self.seconds)
        return super().answer(*args, max_new_tokens=min(max_new_tokens, 4))


@pytest.fixture(scope="module")
def model(toy_tokenizer):
    return tiny.answering_model(toy_tokenizer, SlowModel)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Return a video of 1.5 s."""
    return make_video(tmp_path_factory.mktemp("live") / "kitchen.mp4", num_frames=15)


def live_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("live ")]


def test_a_file_is_answered_at_its_own_pace(model, video):
    begun = time.monotonic()
    seen = list(model.watch(video, 0.5, QUESTION, max_new_tokens=4))
    assert 1.4 < time.monotonic() - begun < 4
    assert seen[-1].end_s == pytest.approx(1.5) and not live_threads()
    before_s = 0.0
    for o in seen:
        # Frames, and so answers, are those of reading the file.
        assert o.answer == model.answer(video, QUESTION, o.start_s, o.end_s, max_new_tokens=4)
        assert (o.end_s - o.start_s, 2 * o.end_s) == pytest.approx((0.5, round(2 * o.end_s)))
        assert o.dropped == round(FPS * (o.start_s - before_s))
        assert 0 <= o.lag_s < 1 and abs(time.time() - o.time) < 10
        before_s = o.end_s


def test_a_slow_model_drops_frames_and_does_not_fall_behind(model, video, monkeypatch):
    monkeypatch.setattr(model, "seconds", 0.4)
    seen = list(model.watch(video, 0.1, QUESTION, max_new_tokens=1))
    assert 2 <= len(seen) < 6
    assert all(0.4 <= o.lag_s < 0.4 + 0.1 + 0.4 for o in seen), seen
    covered = sum(round(FPS * (o.end_s - o.start_s)) for o in seen)
    assert sum(o.dropped for o in seen) + covered == round(FPS * seen[-1].end_s) and covered < 10


def test_windows_may_overlap(model, video):
    seen = list(model.watch(video, 0.5, QUESTION, window=1.0, max_new_tokens=1))
    assert all(o.start_s == pytest.approx(max(0, o.end_s - 1)) and not o.dropped for o in seen)


def test_leaving_the_loop_ends_the_thread(model, video):
    for _ in model.watch(video, 0.2, QUESTION, max_new_tokens=1):
        assert live_threads()
        break
    assert not live_threads()


def test_a_slow_decoder_skips_frames_until_it_has_caught_up(video, monkeypatch):
    write = live.FrameConverter.write

    def write_slowly(*args):
        time.sleep(0.13)
        write(*args)

    monkeypatch.setattr(live.FrameConverter, "write", write_slowly)
    monkeypatch.setattr(live, "_BEHIND_S", 0.06)
    begun = time.monotonic()
    reader = LiveReader(video, 0.5, 0.5, tiny.FRAMES, tiny.SIZE)
    windows = list(iter(reader.next_window, None))
    reader.close()
    assert time.monotonic() - begun < 15 * 0.13 + 1
    assert sum(window.dropped for window in windows) >= 2


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing.mp4", FileMissing, r"missing.mp4: No such file or directory"),
        ("text.mp4", NotAVideo, r"text.mp4: Invalid data"),
        ("rtmp://127.0.0.1:1/live", LiveStopped, r"rtmp://127.0.0.1:1/live: Connection refused; check the source"),
    ],
)
def test_sources_that_cannot_be_opened_are_one_line(model, tmp_path, name, error, message):
    (tmp_path / "text.mp4").write_text("no video")
    source = name if "://" in name else tmp_path / name
    with pytest.raises(error, match=message) as caught:
        next(model.watch(source, 0.5, QUESTION))
    assert len(str(caught.value).splitlines()) == 1 and not live_threads()


@pytest.mark.parametrize("breaks", [False, True], ids=["ends", "breaks"])
def test_a_stream_of_the_network_ends_or_breaks(model, tmp_path, breaks):
    content = make_video(tmp_path / "a.ts", num_frames=15).read_bytes()
    seen = threading.Event()

    def send(listening):
        connection, _ = listening.accept()
        connection.sendall(content)
        assert seen.wait(20)
        if breaks:  # closing resets the connection
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        sender = threading.Thread(target=send, args=(listening,))
        sender.start()
        observations = model.watch(f"tcp://127.0.0.1:{listening.getsockname()[1]}", 0.5, QUESTION, max_new_tokens=1)
        first = next(observations)
        assert first.end_s in (0.5, 1.0) and first.dropped == round(FPS * first.start_s)
        seen.set()
        if breaks:
            with pytest.raises(LiveStopped, match=r"tcp://.*: Connection reset by peer; check the source and start"):
                list(observations)
        else:
            assert [round(o.end_s, 3) for o in observations][-1:] in ([], [1.5])
        sender.join(20)
    assert not live_threads()


def test_wrong_settings_are_refused_at_once(model, video):
    for every, window, message in (
        (0, None, "every: got 0"),
        (math.inf, None, "every: got inf"),
        (2.0, 1.0, r"window: got 1.0, allowed: 2.0 \(every\) or more"),
    ):
        with pytest.raises(ValueError, match=message):
            model.watch(video, every, QUESTION, window)
    with pytest.raises(ClipDecodeError, match=r"No such file|no numbers here"):
        next(model.watch(99, 1.0, QUESTION))


def test_lines_in_the_terminal(model, tmp_path, monkeypatch, capsys):
    video = make_video(tmp_path / "short.mp4", num_frames=6)
    monkeypatch.setattr(Exo2Ego, "from_pretrained", lambda source: model)
    words = ["watch", str(video), "--model", str(video.parent), "--every", "0.3", "--question", QUESTION]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(" s  " in line and "(lag " in line for line in lines)
