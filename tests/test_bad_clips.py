"""Corrupt clips in training: they are masked, named once and counted, and too many of them stop the run."""

from __future__ import annotations

import fcntl
import gc
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import tiny
import torch
from lightning.pytorch.loggers import CSVLogger
from test_clip_stream import decode_all, make_video, numbers_on
from torch.utils.data import DataLoader

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID, ClipBatch
from datamodules.clips.dataset import ClipConfig, ClipTextDataset, Span
from datamodules.clips.loader import ReadingStopped, ResumableLoader, TooManyCorrupt
from datamodules.clips.sampler import GlobalBatchSampler
from datamodules.text import TextEncoder
from datamodules.video.errors import NotAVideo, TimedOut
from datamodules.video.reader import ClipReader
from lightning_modules.callbacks.throughput import TrainingMonitor

SIDE = 96


class Files(ClipTextDataset):
    """Sample i is the first second of ``paths[i]``, both views from the one file, and ``answers[i]`` words."""

    def __init__(self, tokenizer, paths, answers=None, timeout_s=None):
        super().__init__(ClipConfig(num_frames=4, image_size=SIDE), TextEncoder(str(tokenizer), max_text_tokens=16))
        self.paths, self.answers = paths, answers or [1] * len(paths)
        self.reader = ClipReader(timeout_s=timeout_s)

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        return f"take{index}"

    def span(self, index, epoch):
        return Span({"ego": self.paths[index], "exo": self.paths[index]}, 0.0, 1.0)

    def text(self, index, epoch):
        return self.encoder.conversation([(" ".join(["left"] * (30 if self.answers[index] > 9 else 1)), "left")])


def load(dataset, size, accumulate=1, num_workers=0, max_corrupt_fraction=1.0, **options):
    sampler = GlobalBatchSampler(len(dataset), size, accumulate, rank=0, world=1, seed=0)
    return ResumableLoader(dataset, sampler, num_workers, max_corrupt_fraction, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("whole") / "whole.mp4", 12)


@pytest.fixture(scope="module")
def bad(whole, tmp_path_factory):
    """A file of each kind of failure, by a word of its message."""
    folder = tmp_path_factory.mktemp("bad")
    files = {
        "No such file": folder / "missing.mp4",
        "0 bytes": folder / "empty.mp4",
        "Invalid data": folder / "text.mp4",
    }
    files |= {
        "truncated": folder / "cut.mp4",
        "no regular file": folder / "pipe.mp4",
        "video ends at": folder / "short.mp4",
    }
    files["0 bytes"].touch()
    files["Invalid data"].write_text("no video\n" * 100)
    moved = make_video(folder / "faststart.mp4", 12, container_options={"movflags": "faststart"})
    files["truncated"].write_bytes(moved.read_bytes()[: moved.stat().st_size * 2 // 3])
    os.mkfifo(files["no regular file"])  # opening it would wait for ever
    make_video(files["video ends at"], 5)
    return files


# --------------------------------------------------------------------------------------------------------------------
# the batch


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_clips_are_masked_and_say_why_and_the_others_are_as_ever(whole, bad, toy_tokenizer, num_workers):
    paths = [whole, *bad.values(), whole]
    (batch,) = load(Files(toy_tokenizer, paths), len(paths), num_workers=num_workers)
    expected = ClipReader().read(whole, [0.125, 0.375, 0.625, 0.875], SIDE).frames
    tokens = int((batch.text.labels[batch.ids.index("take0")] != IGNORE_INDEX).sum())
    assert tokens > 0
    assert batch.label_tokens == tokens * len(
        paths
    )  # whether a clip can be read is known to the rank that reads it only
    for row, name in enumerate(batch.ids):
        good = name in ("take0", f"take{len(paths) - 1}")
        assert batch.valid[row] == good
        for video in (batch.ego_video[row], batch.exo_video[row]):
            assert torch.equal(video, expected) if good else not video.any()
        assert (batch.text.labels[row] != IGNORE_INDEX).sum() == (tokens if good else 0)
        assert (batch.text.input_ids[row] == VIDEO_TOKEN_ID).sum() == 1
    reasons = {line.partition(": ")[0]: line for line in batch.corrupt}
    assert list(reasons) == [name for row, name in enumerate(batch.ids) if not batch.valid[row]]
    for number, (words, path) in enumerate(bad.items(), start=1):
        line = reasons[f"take{number}"]
        assert str(path) in line and words in line and "[0.000, 1.000) s" in line and "\n" not in line


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_text_that_is_too_long_is_masked_and_left_out_of_the_average(whole, toy_tokenizer, accumulate):
    dataset = Files(toy_tokenizer, [whole] * 4, answers=[1, 10, 1, 1])
    tokens = dataset.text(0, 0).label_tokens
    batches = list(load(dataset, 4, accumulate))
    assert [batch.label_tokens for batch in batches] == [3 * tokens / accumulate] * accumulate
    reasons = [line for batch in batches for line in batch.corrupt]
    assert len(reasons) == 1 and reasons[0].startswith("take1: ") and "max_text_tokens=16" in reasons[0]
    for batch in batches:
        for row, name in enumerate(batch.ids):
            assert batch.valid[row] == batch.ego_video[row].any() == (name != "take1")


def test_texts_of_a_global_batch_are_encoded_once_in_a_process(whole, toy_tokenizer):
    dataset = Files(toy_tokenizer, [whole] * 8)
    encode, encoded = dataset.text, []
    dataset.text = lambda index, epoch: encoded.append(index) or encode(index, epoch)
    list(load(dataset, 4, accumulate=2))
    assert sorted(encoded) == list(range(8))


def test_a_batch_of_nothing_but_too_long_texts_still_divides(whole, toy_tokenizer):
    (batch,) = load(Files(toy_tokenizer, [whole] * 2, answers=[10, 10]), 2)
    assert batch.label_tokens == 1.0
    assert not batch.valid.any()


def test_a_span_to_the_end_of_the_file(whole, toy_tokenizer):
    dataset = Files(toy_tokenizer, [whole])
    frames = dataset.videos(Span({"ego": whole}, 0.4, float("inf")))["ego"]  # [0.4, 1.2) s
    assert torch.equal(frames, dataset.reader.read(whole, [0.5, 0.7, 0.9, 1.1], SIDE).frames)


def test_a_view_that_begins_later_is_read_earlier_in_its_file(whole, toy_tokenizer):
    dataset = Files(toy_tokenizer, [whole])
    videos = dataset.videos(Span({"ego": whole, "exo": whole}, 0.6, 1.0, {"exo": 0.4}))
    assert torch.equal(videos["ego"], dataset.reader.read(whole, [0.65, 0.75, 0.85, 0.95], SIDE).frames)
    assert torch.equal(videos["exo"], dataset.reader.read(whole, [0.25, 0.35, 0.45, 0.55], SIDE).frames)


def damage(data, kind, rng):
    """Cut off, partly never written, or with single bits turned over."""
    damaged, at = bytearray(data), int(rng.integers(len(data) // 10, len(data) * 9 // 10))
    if kind == "cut":
        del damaged[at:]
    elif kind == "hole":
        end = min(len(damaged), at + 512)
        damaged[at:end] = bytes(end - at)
    else:
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


@pytest.mark.parametrize("kind", ["cut", "hole", "bits"])
def test_randomly_damaged_files_give_a_reason_and_never_a_wrong_frame(kind, toy_tokenizer, tmp_path):
    source = make_video(tmp_path / "source.mp4", 12, gop=4, container_options={"movflags": "faststart"})
    _, images = decode_all(source)
    expected = np.stack([images[i] for i in (1, 3, 6, 8)])
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.mp4" for number in range(18)]
    for path in paths:
        path.write_bytes(damage(source.read_bytes(), kind, rng))
    before = len(os.listdir("/proc/self/fd"))
    dataset = Files(toy_tokenizer, paths)
    (batch,) = load(dataset, len(paths))
    assert len(batch.corrupt) >= len(paths) // 2
    for row, valid in enumerate(batch.valid.tolist()):
        frames = batch.ego_video[row].numpy()
        if not valid:
            assert not frames.any()
        elif kind != "bits":  # a turned bit may make another valid frame; only a checksum of the file could tell
            assert np.array_equal(frames, expected)
    dataset.reader.close()
    assert len(os.listdir("/proc/self/fd")) <= before


# --------------------------------------------------------------------------------------------------------------------
# the stop


class Flags(ClipTextDataset):
    """Item i is a batch with a valid sample for each true flag of ``batches[i]``, without frames."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitems__(self, request):
        flags = self.batches[request.indices[0]]
        names = [str(number) for number in range(len(flags))]
        lines = [f"{name}: broken" for name, flag in zip(names, flags, strict=True) if not flag]
        return ClipBatch(names, tiny.clip_batch().text, 1.0, valid=torch.tensor(flags), corrupt=lines)

    name = span = text = None


class InOrder(GlobalBatchSampler):
    def _order(self):
        return np.arange(self.samples)


def watch(share, batches):
    """Number of batches that pass, and the message that stopped them."""
    passed = 0
    try:
        for _ in ResumableLoader(Flags(batches), InOrder(len(batches), 1, 1, 0, 1, 0), 0, share):
            passed += 1
    except TooManyCorrupt as error:
        return passed, str(error)
    return passed, None


GOOD, ONE = [True] * 10, [True] * 9 + [False]


@pytest.mark.parametrize(
    ("share", "batches", "passed"),
    [
        (0.01, [ONE, ONE, GOOD, ONE], 3),  # 3 of 40 count as 3 of 200
        (0.01, [ONE, ONE, *[GOOD] * 27, ONE], 30),  # 3 of 300
        (0.01, [ONE, ONE, *[GOOD] * 26, ONE], 28),  # 3 of 290
        (0.1, [ONE] * 60, 60),
        (0.0, [GOOD, ONE], 1),
        (1.0, [[False] * 10, ONE, [False] * 9 + [True]], 3),  # 10 in a row, twice
        (1.0, [GOOD, [True] + [False] * 9, [False] * 11 + [True]], 2),  # 20 in a row
        (1.0, [[False]] * 30, 19),
    ],
)
def test_when_a_run_stops(share, batches, passed):
    count, message = watch(share, batches)
    assert count == passed
    assert (message is None) == (passed == len(batches))


def test_the_stop_names_the_last_failures_and_what_to_do():
    _, message = watch(0.01, [ONE, [False, False, True, False]])
    assert message == (
        "4 of 14 samples of this rank could not be used (data.max_corrupt_fraction allows 1.0%), the last ones: "
        "0: broken | 1: broken | 3: broken: run `make data-check`, or raise data.init_args.max_corrupt_fraction"
    )
    _, message = watch(1.0, [[False]] * 30)
    assert message.startswith("20 of 20 samples of this rank could not be used (20 of them in a row), the last ones: ")


# --------------------------------------------------------------------------------------------------------------------
# hanging


def new_clip_threads(before):
    return [thread for thread in threading.enumerate() if thread.name == "clip reader" and thread not in before]


@pytest.fixture
def blocked(whole, tmp_path):
    """A file that the kernel lets nobody open: this process holds a lease on it."""
    path = tmp_path / "blocked.mp4"
    path.write_bytes(whole.read_bytes())
    threads = set(threading.enumerate())
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # how the kernel asks for the lease back
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        os.close(descriptor)
        pytest.skip(f"no leases on this file system: {error}")
    yield path
    os.close(descriptor)
    deadline = time.monotonic() + 20
    while new_clip_threads(threads) and time.monotonic() < deadline:
        gc.collect()  # a loader and its reader may hold each other
        time.sleep(0.01)
    signal.signal(signal.SIGIO, before)


def test_a_file_that_does_not_open_is_given_up_and_the_reader_goes_on(whole, blocked):
    reader = ClipReader(timeout_s=0.3)
    first = reader.read(whole, [0.55], SIDE)
    with pytest.raises(TimedOut, match=r"blocked\.mp4 \[0\.500, 0\.500\) s: no answer within 0\.3 s; check the disk"):
        reader.read(blocked, [0.5], SIDE)
    with pytest.raises(TimedOut, match=r"blocked\.mp4 \[0\.000, 1\.000\) s"):
        reader.usable_end_s(blocked, 0.0, 1.0)
    assert numbers_on(first) == numbers_on(reader.read(whole, [0.55], SIDE)) == [5]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_clip_that_does_not_open_is_masked_in_time(whole, blocked, toy_tokenizer, num_workers):
    dataset = Files(toy_tokenizer, [whole, blocked, whole], timeout_s=0.3)
    (batch,) = load(dataset, 3, num_workers=num_workers)
    assert [name for name, valid in zip(batch.ids, batch.valid.tolist(), strict=True) if not valid] == ["take1"]
    assert "blocked.mp4 [0.000, 1.000) s: no answer within 0.3 s" in batch.corrupt[0]


def test_the_thread_of_a_time_limit_ends_with_its_reader_and_is_not_used_after_a_fork(whole):
    threads = set(threading.enumerate())
    reader = ClipReader(timeout_s=5.0)
    first = reader.read(whole, [0.55], SIDE)
    (thread,) = new_clip_threads(threads)
    process = multiprocessing.get_context("fork").Process(target=reader.read, args=(whole, [0.55], SIDE))
    process.start()
    process.join(20.0)
    assert process.exitcode == 0
    assert numbers_on(first) == numbers_on(reader.read(whole, [0.55], SIDE)) == [5]
    del reader
    thread.join(5.0)
    assert not thread.is_alive()


def test_a_time_limit_costs_one_thread_and_leaves_none_and_no_open_files(whole, blocked):
    threads, descriptors = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    reader = ClipReader(timeout_s=5.0)
    for number in range(50):
        assert numbers_on(reader.read(whole, [number % 12 / 10 + 0.05], SIDE)) == [number % 12]
    (thread,) = new_clip_threads(threads)
    reader.close()
    thread.join(5.0)
    assert not thread.is_alive()
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_a_pipe_is_refused_without_waiting_for_its_other_end(bad):
    with pytest.raises(NotAVideo, match=r"pipe\.mp4.*no regular file; re-download"):
        ClipReader().read(bad["no regular file"], [0.0], SIDE)


def test_files_that_refer_to_others_are_no_videos(whole, tmp_path):
    playlist = tmp_path / "list.mp4"
    (tmp_path / "other.mp4").write_bytes(whole.read_bytes())
    playlist.write_text("ffconcat version 1.0\nfile other.mp4\n")  # FFmpeg looks at the content
    with pytest.raises(NotAVideo, match=r"list\.mp4"):
        ClipReader().read(playlist, [0.0], 16)


class Stuck(Files):
    """Reading never ends, or ends the process."""

    def __init__(self, *arguments, dies=False):
        super().__init__(*arguments)
        self.dies = dies

    def text(self, index, epoch):
        if self.dies:
            os._exit(3)
        time.sleep(2.0)


@pytest.mark.parametrize(("dies", "words"), [(False, "timed out after 0.5 seconds"), (True, "exited unexpectedly")])
def test_a_process_that_hangs_or_dies_stops_the_run_and_its_samples_are_named(whole, toy_tokenizer, dies, words):
    source = load(Stuck(toy_tokenizer, [whole] * 4, dies=dies), 2, num_workers=1, timeout_s=60 if dies else 0.5)
    expected = next(iter(source.order)).indices
    with pytest.raises(ReadingStopped) as caught:
        next(iter(source))
    assert words in str(caught.value)
    assert f"the batch waited for holds take{expected[0]}, take{expected[1]}: check these with" in str(caught.value)


def test_errors_that_are_no_clips_pass_through(whole, toy_tokenizer):
    dataset = Files(toy_tokenizer, [whole] * 2)
    dataset.encoder = None
    with pytest.raises(AttributeError, match="conversation"):
        next(iter(load(dataset, 2, num_workers=1)))


# --------------------------------------------------------------------------------------------------------------------
# the stages


def masked(batch, *rows):
    """The batch with these rows as the loader leaves them."""
    for row in rows:
        batch.valid[row] = False
        batch.ego_video[row] = batch.exo_video[row] = 0
        batch.text.labels[row] = IGNORE_INDEX
    batch.corrupt = [f"{batch.ids[row]}: broken" for row in rows]
    return batch


def stage_of(name, tokenizer):
    stage = tiny.make_stage(
        name, tokenizer, **({"bow_weight": 1.0, "grounding_weight": 1.0} if name == "stage0" else {})
    )
    if name == "stage0":
        stage.trainer = L.Trainer(logger=False, enable_checkpointing=False)
        stage.trainer.datamodule = type("Data", (), {"clips": ClipConfig(tiny.FRAMES, tiny.SIZE)})
    stage.configure_model()
    stage.trainer = None  # losses need none
    stage.eval()  # no dropout
    tiny.scatter(stage.model)
    return stage


@pytest.mark.parametrize("name", tiny.STAGES)
def test_a_corrupt_clip_takes_no_part_in_any_loss(toy_tokenizer, name):
    stage = stage_of(name, toy_tokenizer)
    with_bad = stage.losses(masked(tiny.clip_batch(), 1))
    batch = tiny.clip_batch()
    alone = ClipBatch(["a"], batch.text, 5.0, batch.ego_video[:1], batch.exo_video[:1])
    for field in ("input_ids", "attention_mask", "labels"):
        setattr(alone.text, field, getattr(alone.text, field)[:1])
    for loss, value in stage.losses(alone).items():
        share = 1.0 if loss == "vtg" else 0.5  # a sum over tokens, and means over clips
        torch.testing.assert_close(with_bad[loss], share * value)


@pytest.mark.parametrize("name", tiny.STAGES)
def test_a_batch_without_any_valid_clip_gives_zero_losses_and_a_gradient_to_all_that_trains(toy_tokenizer, name):
    stage = stage_of(name, toy_tokenizer).train()
    total = stage.training_step(masked(tiny.clip_batch(), 0, 1), 0)
    total.backward()
    assert total == 0
    for part, parameter_name, parameter in stage.trainable():
        assert parameter.grad is not None, f"{part} {parameter_name}"
        assert not parameter.grad.any(), f"{part} {parameter_name}"
    assert all(bool(value.isfinite()) for value in stage.step_log.values())


def test_the_monitor_names_each_corrupt_sample_once_and_writes_how_many(toy_tokenizer, tmp_path, capsys):
    batches = [tiny.clip_batch(), masked(tiny.clip_batch(), 1), masked(tiny.clip_batch(), 1), tiny.clip_batch()]
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=logger,
        callbacks=[TrainingMonitor(every_n_steps=1)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(tiny.make_stage("stage2", toy_tokenizer), DataLoader(batches, batch_size=None))
    assert capsys.readouterr().out.count("corrupt sample b: broken\n") == 1
    header, *rows = [line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines()]
    written = [{key: row[header.index(f"data/{key}")] for key in ("corrupt", "corrupt_fraction")} for row in rows]
    assert list(written[0].values()) == ["", ""]  # no curves before the first corrupt sample
    assert [float(values["corrupt"]) for values in written[1:]] == [1, 2, 2]
    assert [float(values["corrupt_fraction"]) for values in written[1:]] == pytest.approx([1 / 4, 2 / 6, 2 / 8])
