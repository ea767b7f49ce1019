"""Conversations about clips: what is read of a line, which seconds are shown, and which lines are refused."""

from __future__ import annotations

import json

import pytest
import torch

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID
from datamodules.clip_stream import FileMissing, SpanOutsideFile, probe
from datamodules.clips import ClipConfig, GlobalBatchSampler, ResumableLoader
from datamodules.instruction import InstructionDataModule

TURNS = [
    {"from": "human", "value": "<video>\nWhat does the camera-wearer do?"},
    {"from": "gpt", "value": "taps"},
    {"from": "human", "value": "Which hand does the camera-wearer use?"},
    {"from": "gpt", "value": "left"},
]
VIDEO = "practice/P0000-R01-TableTop.mp4"
RECORD = {"id": "one", "video": VIDEO, "conversations": TURNS}


def module(toy_tokenizer, root, sources, **options):
    shared = {"root": str(root), "tokenizer": str(toy_tokenizer), "clips": ClipConfig(2, 64, "squash")}
    return InstructionDataModule([str(source) for source in sources], **shared, global_batch_size=1, **options)


@pytest.fixture
def read(toy_tokenizer, tmp_path):
    def read_records(*records, root=tmp_path, **options):
        file = tmp_path / "some.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return module(toy_tokenizer, root, [file], **options).read()

    return read_records


def without(*names, **changes):
    return {name: value for name, value in {**RECORD, **changes}.items() if name not in names}


def test_every_line_of_every_source_is_a_sample(toy_world, toy_tokenizer):
    files = [toy_world / "instructions" / f"{name}.jsonl" for name in ("egtea", "initialisation")]
    assert len(module(toy_tokenizer, toy_world, files[:1]).read()) == 4 * 6  # takes of six actions
    both = module(toy_tokenizer, toy_world, files)
    samples = both.read()
    assert len(samples) == samples.epoch_length == 4 * 6 + 6 * 6
    assert samples.epoch_samples(3).tolist() == list(range(60))  # each once
    assert both.annotation_files() == files
    ids = [json.loads(line)["id"] for file in files for line in file.read_text().splitlines()]
    assert [samples.name(index) for index in range(len(samples))] == ids


def test_turns_become_text_and_the_tag_the_clip(read):
    samples = read(RECORD, without(conversations=[{"from": "human", "value": "taps <video>"}, TURNS[1]]))
    encoder = samples.encoder
    expected = [("What does the camera-wearer do?", "taps"), ("Which hand does the camera-wearer use?", "left")]
    assert samples.turns(0, 0) == expected
    assert samples.text(0, 0) == encoder.conversation(expected)
    assert samples.text(0, 0).input_ids.count(VIDEO_TOKEN_ID) == 1
    labels = [label for label in samples.text(0, 0).labels if label != IGNORE_INDEX]
    assert encoder.tokenizer.convert_ids_to_tokens(labels) == ["taps", "</s>", "left", "</s>"]
    assert samples.turns(1, 0) == [("taps", "taps")]  # the clip goes to the front wherever its tag was


def test_a_line_without_an_id_is_named_by_its_place(read, tmp_path):
    assert read(RECORD, without("id")).name(1) == f"{tmp_path / 'some.jsonl'} line 2"


def test_a_window_selects_its_seconds(read, toy_world):
    samples = read(without(start=1.0, end=2.0), root=toy_world)
    span = samples.span(0, 0)
    assert (span.paths, span.start_s, span.end_s) == ({"ego": toy_world / VIDEO}, 1.0, 2.0)
    # 8 frames a second: the middles of both halves, 1.25 s and 1.75 s, are frames 10 (binary 1010) and 14 (1110)
    frames = samples.videos(span)["ego"]
    bits = (frames[:, 4, 4::8].float().mean(dim=-1) > 128).int().tolist()
    assert bits == [[0, 1, 0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("window", [{}, {"start": None, "end": None}])
def test_without_a_window_the_whole_file_is_shown(read, toy_world, window):
    samples = read(without(**window), root=toy_world)
    whole = samples.videos(samples.span(0, 0))["ego"]
    length_s = probe(toy_world / VIDEO).num_frames / 8
    named = read(without(start=0.0, end=length_s), root=toy_world)
    assert torch.equal(whole, named.videos(named.span(0, 0))["ego"])


def test_a_missing_file_without_a_window_is_a_skipped_sample(read):
    samples = read(without(video="no/such.mp4"))
    (batch,) = ResumableLoader(samples, GlobalBatchSampler(1, 1, 1, 0, 1, 0), 0, max_skipped_share=1.0)
    assert batch.readable.tolist() == [False]
    assert "no/such.mp4" in batch.skipped[0]


def test_the_view_decides_whose_encoder_looks(read, toy_world):
    samples = read(without(start=0.0, end=1.0), root=toy_world, view="exo")
    assert list(samples.videos(samples.span(0, 0))) == ["exo"]


def test_a_window_outside_the_file_and_a_missing_file_are_named(read, toy_world):
    samples = read(without(start=90.0, end=91.0), without(video="no/such.mp4", start=0.0, end=1.0), root=toy_world)
    with pytest.raises(SpanOutsideFile, match=rf"{VIDEO} \[90\.000, 91\.000\) s: the video ends at"):
        samples.videos(samples.span(0, 0))
    with pytest.raises(FileMissing, match=r"no/such\.mp4"):
        samples.videos(samples.span(1, 0))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (without("video"), "field 'video' is missing"),
        (without("conversations"), "field 'conversations' is missing"),
        (without(conversations=None), "field 'conversations' is missing"),
        (without(conversations="taps"), "field 'conversations' must be a list"),
        (without(conversations=[]), "field 'conversations' has 0 entries: human and gpt must alternate"),
        (without(conversations=TURNS[:3]), "field 'conversations' has 3 entries: human and gpt must alternate"),
        (without(conversations=[TURNS[1], TURNS[0]]), r"conversations\[0\] must be {'from': 'human', 'value': text}"),
        (without(conversations=[TURNS[0], TURNS[2]]), r"conversations\[1\] must be {'from': 'gpt', 'value': text}"),
        (without(conversations=[TURNS[0], {"from": "gpt", "value": 3}]), r"conversations\[1\] must be"),
        (without(conversations=[TURNS[0], "taps"]), r"conversations\[1\] must be"),
        (without(conversations=TURNS[2:]), r"conversations\[0\]\.value lacks <video>"),
        (without(conversations=[*TURNS[:2], *TURNS[:2]]), r"<video> stands for the one clip: only conversations\[0\]"),
        (without(start=1.0), "only one of 'start' and 'end' is given"),
        (without(start=None, end=1.0), "only one of 'start' and 'end' is given"),
        (without(start="00:01", end=2.0), "field 'start' is '00:01', expected seconds"),
        (without(start=1.0, end=True), "field 'end' is True, expected seconds"),
    ],
)
def test_a_wrong_line_is_named(read, tmp_path, record, message):
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'some.jsonl'} line 2: {message}"):
        read(RECORD, record)


def test_a_missing_source_is_named(toy_tokenizer, tmp_path):
    expected = rf"^data\.sources: no file {tmp_path / 'none.jsonl'}: run `make data`, or set data\.init_args\.sources"
    with pytest.raises(ValueError, match=expected):
        module(toy_tokenizer, tmp_path, [tmp_path / "none.jsonl"])
