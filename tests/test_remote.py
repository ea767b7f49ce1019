"""Videos on a web server: the frames of a local disk, few bytes, and every failure by name."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import threading
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image
from range_server import serving
from test_clip_stream import FPS, SIDE, make_video, number_on, numbers_on, painted

from datamodules.clips.folders import require_data
from datamodules.ego_exo_clip.footage import find_footage
from datamodules.io import block_cache
from datamodules.io.block_cache import BlockCache
from datamodules.tools import data_check, reencode
from datamodules.video import remote
from datamodules.video.errors import Changed, ClipDecodeError, FileMissing, NotAVideo, Unreachable
from datamodules.video.probe import probe
from datamodules.video.reader import ClipReader
from datamodules.video.remote import RemoteFile, RemotePath, data_path

BLOCK = 8192
FRAMES = 200


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    # Noise at high quality: some 30 blocks, of which a clip needs a few.
    noise = np.random.default_rng(0).integers(0, 25, (FRAMES, SIDE, SIDE, 1)).astype(np.uint8)

    def noisy(number, width, height):
        return np.minimum(painted(number, width, height), 255 - noise[number]) + noise[number]

    make_video(folder / "take.mp4", FRAMES, draw=noisy)
    make_video(folder / "other.mp4", FRAMES, draw=lambda number, *size: noisy(FRAMES - 1 - number, *size))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_bytes(b"no video, but some text that is long enough to be looked at\n" * 20)
    return folder


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Make blocks and pauses small, and give the test a cache of its own."""
    monkeypatch.setattr(remote, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(remote, "_versions", {})
    monkeypatch.setenv("EXO2EGO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def server(videos, small):
    with serving(videos) as server:
        yield server


def clip_times(number, count=4):
    return [(number + step) / FPS + 0.01 for step in range(count)]


def read(reader, path, number, count=4):
    return numbers_on(reader.read(path, clip_times(number, count), SIDE))


# --------------------------------------------------------------------------------------------------------------------
# paths


def test_an_address_is_joined_and_passed_on_like_a_path():
    root = data_path("s3://bucket/takes/")
    file = root / "a b" / "cam01.mp4"
    assert isinstance(file, RemotePath)
    assert str(file) == os.fspath(file) == "s3://bucket/takes/a b/cam01.mp4"
    assert pickle.loads(pickle.dumps(file)) == file and str(file.parent.parent) == "s3://bucket/takes"
    assert file.relative_to(root).as_posix() == "a b/cam01.mp4"
    assert file.name == "cam01.mp4" and root.is_dir() is False
    for name in ("data/toy", "/data/12:30.mp4", "s3:", "file.mp4"):
        assert type(data_path(name)) is type(Path(name)) and str(data_path(name)) == str(Path(name))


def test_a_path_tells_whether_its_file_exists(server, videos):
    root = data_path(server.url)
    assert (root / "take.mp4").is_file() and (root / "take.mp4").exists()
    assert (root / "take.mp4").stat().st_size == (videos / "take.mp4").stat().st_size
    assert not (root / "none.mp4").exists() and not (root / "empty.mp4").is_file()
    assert find_footage([root / "take.mp4", root / "none.mp4"], 0).keys() == {root / "take.mp4"}


# --------------------------------------------------------------------------------------------------------------------
# frames


def test_clips_are_those_of_the_local_file_for_few_bytes(server, videos):
    file, size = data_path(server.url) / "take.mp4", (videos / "take.mp4").stat().st_size
    assert size > 20 * BLOCK
    assert probe(file) == probe(videos / "take.mp4")
    reader, local = ClipReader(), ClipReader()
    for number in (150, 20, 90):
        server.reset()
        times_s = clip_times(number)
        there, here = reader.read(file, times_s, SIDE), local.read(videos / "take.mp4", times_s, SIDE)
        assert there.frames.equal(here.frames) and (there.times_s == here.times_s).all()
        # The packets of a group of 12 frames, in one request, and a look at the version after it.
        assert server.sent_bytes < size / 4
        assert [method for method, _ in server.requests] == ["GET", "HEAD"]
    reader.close()


def test_an_image_is_read_like_a_video(server, videos):
    Image.fromarray(painted(37, SIDE, SIDE)).save(videos / "image.png")
    assert numbers_on(ClipReader().read(data_path(server.url) / "image.png", [0.0, 0.0], SIDE)) == [37, 37]
    (videos / "image.png").unlink()


def test_blocks_are_fetched_once_for_all_readers(server):
    file = data_path(server.url) / "take.mp4"
    assert read(ClipReader(), file, 60) == [60, 61, 62, 63]
    server.reset()
    assert read(ClipReader(), file, 60) == [60, 61, 62, 63]
    assert server.requests == []


def test_a_reader_with_a_time_limit_reads_from_its_thread(server):
    with_limit = ClipReader(timeout_s=30)
    assert read(with_limit, data_path(server.url) / "take.mp4", 33) == [33, 34, 35, 36]
    with_limit.close()


def test_a_whole_file_is_read_ahead(server, videos):
    content = (videos / "take.mp4").read_bytes()
    with RemoteFile(f"{server.url}/take.mp4") as file:
        assert file.readall() == content
        assert file.seek(-5, os.SEEK_END) == len(content) - 5 and file.read(9) == content[-5:] and file.read(9) == b""
    gets = sum(method == "GET" for method, _ in server.requests)
    assert gets <= len(content) / BLOCK / 3


def test_storage_without_asynchronous_requests(videos, small):
    memory = fsspec.filesystem("memory")
    content = (videos / "take.mp4").read_bytes()
    memory.pipe_file("/exo2ego/take.mp4", content)
    fsspec_class = type(memory)
    assert fsspec_class.store
    assert read(ClipReader(), data_path("memory://exo2ego") / "take.mp4", 100) == [100, 101, 102, 103]
    memory.rm("/exo2ego", recursive=True)


def _read_in_process(path, order, queue):
    reader = ClipReader()
    queue.put([number for start in order for number in read(reader, path, start, 2)])


def test_forked_processes_share_the_cache(server, monkeypatch):
    """The parent's connections, open files and threads are of no use to its children; the cache evicts all the time."""
    monkeypatch.setattr(BlockCache, "from_environment", classmethod(_tiny_cache))
    path = data_path(server.url) / "take.mp4"
    reader = ClipReader()
    assert read(reader, path, 10) == [10, 11, 12, 13]
    context = multiprocessing.get_context("fork")
    orders = [random.Random(seed).sample(range(0, FRAMES - 2), 12) for seed in range(2)]
    queues = [context.Queue() for _ in orders]
    children = [
        context.Process(target=_read_in_process, args=(path, order, queue), daemon=True)
        for order, queue in zip(orders, queues, strict=True)
    ]
    for child in children:
        child.start()
    for start in orders[0][::-1]:
        assert read(reader, path, start, 2) == [start, start + 1]
    for order, queue, child in zip(orders, queues, children, strict=True):
        assert queue.get(timeout=60) == [number for start in order for number in (start, start + 1)]
        child.join(timeout=60)
        assert child.exitcode == 0


def _tiny_cache(cls):
    return cls(Path(os.environ["EXO2EGO_CACHE"]), 8 * BLOCK)


# --------------------------------------------------------------------------------------------------------------------
# trouble


def test_failing_requests_are_sent_again(server):
    draw = random.Random(3)
    kinds = ["drop", "cut", 500, 503, 429]
    server.trouble = lambda method, path, count: draw.choice(kinds) if draw.random() < 0.2 else None
    reader = ClipReader()
    for number in range(0, FRAMES - 4, 13):
        assert read(reader, data_path(server.url) / "take.mp4", number) == [number + step for step in range(4)]
    assert len(server.requests) > 30


def error_of(call, kind):
    with pytest.raises(ClipDecodeError) as caught:
        call()
    assert type(caught.value) is kind, caught.value
    return str(caught.value)


@pytest.mark.parametrize(
    ("trouble", "cause", "requests"),
    [
        (503, "503, message='Service Unavailable', url='{url}/take.mp4', 6 times in a row", 12),
        (403, "the storage refuses: ClientResponseError: 403, message='Forbidden'", 2),
        ("drop", "6 times in a row", 12),
    ],
)
def test_storage_that_cannot_be_read_is_named(server, trouble, cause, requests):
    server.trouble = lambda *_: trouble
    message = error_of(lambda: read(ClipReader(), data_path(server.url) / "take.mp4", 5), Unreachable)
    assert message.startswith(f"{server.url}/take.mp4 [0.510, 0.810) s: ")
    assert cause.format(url=server.url) in message
    assert message.endswith("; check the address, the network and the credentials")
    assert len(server.requests) <= 2 * requests  # some clients send a request again by themselves


def test_storage_that_fails_in_the_middle_gives_no_frames(server):
    """FFmpeg takes bytes that cannot be read for the end of the file, and would return the frames before it."""
    reader = ClipReader()
    file = data_path(server.url) / "take.mp4"
    assert read(reader, file, 0) == [0, 1, 2, 3]
    server.trouble = lambda *_: 500
    assert "500" in error_of(lambda: read(reader, file, FRAMES - 8), Unreachable)
    assert "500" in error_of(lambda: list(data_check.decode_whole(file)), Unreachable)
    server.trouble = lambda *_: None
    assert read(reader, file, FRAMES - 8) == [192, 193, 194, 195]


def test_a_request_that_hangs_is_given_up(server, monkeypatch):
    monkeypatch.setattr(remote, "_REQUEST_S", 0.2)
    monkeypatch.setattr(remote, "_TRIES", 2)
    monkeypatch.setattr(RemoteFile, "prefetch", lambda *_: None)
    probe(data_path(server.url) / "take.mp4")
    server.trouble = lambda method, *_: "hang" if method == "GET" else None
    message = error_of(lambda: read(ClipReader(), data_path(server.url) / "take.mp4", 120), Unreachable)
    assert "no answer within 0.2 s, 2 times in a row" in message


def test_a_file_that_changes_under_way_is_named_and_never_mixed(videos, small, tmp_path):
    file = tmp_path / "take.mp4"
    file.write_bytes((videos / "take.mp4").read_bytes())
    with serving(tmp_path) as server:
        reader, path = ClipReader(), data_path(server.url) / "take.mp4"
        assert read(reader, path, 100) == [100, 101, 102, 103]
        # The new content comes after the answer to the second request for bytes has begun.
        server.trouble = lambda method, *_: file.write_bytes((videos / "other.mp4").read_bytes()) and None
        message = error_of(lambda: read(reader, path, 30), Changed)
        assert message.startswith(f"{path} [3.010, 3.310) s: the file changed while it was read; keep the files")
        server.trouble = lambda *_: None
        # Afterwards, all frames are of the new file, those whose blocks of the old one are in the cache too.
        for number in (100, 30):
            assert read(reader, path, number) == [FRAMES - 1 - number - step for step in range(4)]
        # A shorter file answers that the range is not in it.
        make_video(tmp_path / "short.mp4", 20)
        (tmp_path / "short.mp4").replace(file)
        error_of(lambda: read(reader, path, 170), Changed)
        file.unlink()
        remote._versions.clear()
        error_of(lambda: read(reader, path, 170), FileMissing)


def test_files_that_are_no_videos_have_the_errors_of_local_files(server, videos):
    reader = ClipReader()
    for name, kind in (("none.mp4", FileMissing), ("empty.mp4", NotAVideo), ("text.mp4", NotAVideo)):
        messages = []
        for root in (videos, data_path(server.url)):
            messages.append(error_of(partial(reader.read, root / name, [0.5], SIDE), kind))
        assert messages[1] == messages[0].replace(str(videos), server.url)


def test_a_server_without_ranges_is_named(server):
    server.ignores_ranges = True
    message = error_of(lambda: read(ClipReader(), data_path(server.url) / "take.mp4", 5), Unreachable)
    assert "the server ignores range requests" in message
    assert sum(method == "GET" for method, _ in server.requests) == 1


# --------------------------------------------------------------------------------------------------------------------
# cache


def test_the_cache_removes_what_was_used_least_recently(tmp_path, monkeypatch):
    cache = BlockCache(tmp_path, 10_000)
    now = time.time()
    for number in range(9):
        cache.write(f"{number:032x}-0", bytes([number]) * 1000)
        file = next(tmp_path.glob(f"blocks/*/{number:032x}-0"))
        os.utime(file, (now - 1000 + number, now - 1000 + number))
    abandoned, current = (tmp_path / "blocks" / "00" / f".{name}.partial" for name in ("old", "new"))
    for file in (abandoned, current):
        file.write_bytes(b"")
    os.utime(abandoned, (now - 7200, now - 7200))
    (tmp_path / "blocks" / "00" / "notes.txt").write_text("not ours")
    assert cache.read(f"{0:032x}-0", 1000) == bytes(1000)  # used now, so it stays
    for number in range(9, 12):
        cache.write(f"{number:032x}-0", bytes([number]) * 1000)
    cache.remove_oldest()
    kept = [number for number in range(12) if cache.read(f"{number:032x}-0", 1000) is not None]
    assert kept[0] == 0 and kept[-3:] == [9, 10, 11] and len(kept) <= 9
    assert not abandoned.exists() and current.exists() and (tmp_path / "blocks" / "00" / "notes.txt").exists()


def test_blocks_that_are_not_as_they_were_written_are_fetched_again(server, tmp_path):
    file = data_path(server.url) / "take.mp4"
    assert read(ClipReader(), file, 80) == [80, 81, 82, 83]
    blocks = sorted((tmp_path / "cache" / "blocks").glob("*/*-*"))
    for place, block in enumerate(blocks):
        content = bytearray(block.read_bytes())
        content[len(content) // 2] ^= 1
        block.write_bytes(content[: len(content) // 2] if place % 2 else content)
    server.reset()
    assert read(ClipReader(), file, 80) == [80, 81, 82, 83]
    assert server.sent_bytes


def test_blocks_appear_whole_while_others_write_and_remove_them(tmp_path):
    cache = BlockCache(tmp_path, 6 * 50_000)
    names = [f"{number:032x}-{number}" for number in range(10)]
    found, stop = [], threading.Event()

    def read_all():
        while not stop.is_set():
            found.extend(block for name in names if (block := cache.read(name, 50_000)) is not None)

    readers = [threading.Thread(target=read_all) for _ in range(2)]
    for thread in readers:
        thread.start()
    for turn in range(6):
        for name in names:
            cache.write(name, bytes([turn]) * 50_000)
    stop.set()
    for thread in readers:
        thread.join()
    assert found and all(len(set(block)) == 1 for block in found)


def test_without_a_cache_that_can_be_written_reading_continues(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(block_cache, "_warned", False)
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert read(ClipReader(), data_path(server.url) / "take.mp4", 42) == [42, 43, 44, 45]
    warnings = capsys.readouterr().err
    assert warnings.count("EXO2EGO_CACHE: cannot write to") == 1


# --------------------------------------------------------------------------------------------------------------------
# configuration and tools


def test_settings_are_checked_before_anything_else(small, monkeypatch, tmp_path):
    require_data("http://127.0.0.1:1/takes", None)
    with pytest.raises(ValueError, match=r"data.root: s5://b/x: s5:// is no kind of storage .*: use s3://, gs://"):
        require_data("s5://b/x", None)
    missing = next(name for name in ("gs", "s3", "az") if find_spec(remote._PACKAGES[name]) is None)
    package = remote._PACKAGES[missing]
    with pytest.raises(ValueError, match=f"reads {missing}:// is not installed: pip install {package}"):
        require_data(f"{missing}://bucket/takes", None)
    for text in ("many", "0", "-3", "nan", "inf", "0.001"):
        monkeypatch.setenv("EXO2EGO_CACHE_GB", text)
        with pytest.raises(ValueError, match=f"EXO2EGO_CACHE_GB: got {text}, allowed: a number of gigabytes, at least"):
            require_data("https://host/takes", None)
    monkeypatch.setenv("EXO2EGO_CACHE_GB", "1")
    monkeypatch.setenv("EXO2EGO_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="EXO2EGO_CACHE: cannot write to"):
        require_data("https://host/takes", None)


def test_tools_refuse_what_is_read_or_written_locally(capsys, tmp_path, small):
    index = tmp_path / "rows.jsonl"
    index.write_text(json.dumps({"video": "take.mp4", "conversations": [{"from": "human", "value": "What?"}]}))
    assert data_check.main(["http://host/index", "--root", "http://host/takes"]) == 2
    assert "annotations are read from local disks" in capsys.readouterr().err
    assert data_check.main([str(index), "--root", "s5://host/takes"]) == 2
    assert "--root: s5://host/takes: s5:// is no kind of storage" in capsys.readouterr().err
    words = ["--root", "http://host/takes", "--index", str(index), "--out", "s3://bucket/out"]
    assert reencode.main(words) == 2
    assert "--out is s3://bucket/out: files are written to local disks" in capsys.readouterr().err


def test_files_are_checked_where_they_are(server):
    root = data_path(server.url)
    spans = [(1.0, 2.0), (15.0, 16.0)]
    assert data_check.check_file(data_check.VideoFile("take.mp4", FPS, FRAMES, 20.0, spans, 2), root, True) is None
    problem = data_check.check_file(data_check.VideoFile("take.mp4", spans_s=[(30.0, 31.0)]), root, False)
    assert problem is not None and problem.kind == "SpanOutsideFile"
    problem = data_check.check_file(data_check.VideoFile("none.mp4"), root, False)
    assert problem == data_check.Problem("FileMissing", "No such file or directory")


def test_remote_files_are_reencoded_to_local_ones(server, videos, tmp_path):
    make_video(videos / "few.mp4", 24)
    encoding = reencode.Encoding(short_side=64, gop=4, preset="ultrafast")
    out = tmp_path / "few.mp4"
    assert reencode.reencode(data_path(server.url) / "few.mp4", out, encoding)
    assert not reencode.reencode(data_path(server.url) / "few.mp4", out, encoding)
    frames = ClipReader().read(out, clip_times(3), 64).frames.numpy()
    assert [number_on(frame) for frame in frames] == [3, 4, 5, 6]
    error_of(lambda: reencode.reencode(data_path(server.url) / "none.mp4", out, encoding), FileMissing)
