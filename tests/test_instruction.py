"""Instruction tuning data: records become text, windows select seconds, and invalid lines are refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from datamodules.batch import IGNORE_INDEX, VIDEO_TOKEN_ID
from datamodules.clips.dataset import ClipConfig
from datamodules.clips.loader import ResumableLoader
from datamodules.clips.sampler import GlobalBatchSampler
from datamodules.egoit.datamodule import InstructionDataModule
from datamodules.egoit.mix import MixConfig, MixSource
from datamodules.egoit.records import InstructionRecord, PromptFields, to_json, write_rows
from datamodules.io.jsonl import InvalidRecords
from datamodules.tools.export import export
from datamodules.toy_world.questions import write_templates
from datamodules.video.errors import FileMissing, SpanOutsideFile
from datamodules.video.probe import probe

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


def test_a_missing_file_without_a_window_is_a_corrupt_sample(read):
    samples = read(without(video="no/such.mp4"))
    (batch,) = ResumableLoader(samples, GlobalBatchSampler(1, 1, 1, 0, 1, 0), 0, max_corrupt_fraction=1.0)
    assert batch.valid.tolist() == [False]
    assert "no/such.mp4" in batch.corrupt[0]


def test_the_view_decides_the_encoder(read, toy_world):
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
        (
            without(conversations=[{"from": "human", "value": "<image><image> What?"}, TURNS[1]]),
            r"conversations\[0\]\.value holds 2 <image>: a record is about one video",
        ),
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
    expected = rf"^data\.sources: no file {tmp_path / 'none.jsonl'}: run `make data` for .*, `make egoit` for .*"
    with pytest.raises(ValueError, match=expected):
        module(toy_tokenizer, tmp_path, [tmp_path / "none.jsonl"])


# --------------------------------------------------------------------------------------------------------------------
# mixing


def write(tmp_path, name, count, start=0, **changes):
    """A file of ``count`` records named ``<name>/<number>``; fields may be functions of the number."""
    file = tmp_path / f"{name}.jsonl"
    numbers = range(start, start + count)
    records = [
        without(id=f"{name}/{n}") | {key: value(n) if callable(value) else value for key, value in changes.items()}
        for n in numbers
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def drawn(samples, epoch=0, world=1, size=4):
    """Names of an epoch by global batch, over all ranks, as the sampler hands them out."""
    ranks = []
    for rank in range(world):
        sampler = GlobalBatchSampler(samples.epoch_length, size, 1, rank, world, 0, epoch_samples=samples.epoch_samples)
        sampler.epoch = epoch
        ranks.append([[samples.name(index) for index in request.indices] for request in sampler])
    return [sorted(name for rank in ranks for name in rank[batch]) for batch in range(len(ranks[0]))]


def sources_of(batches):
    return Counter(name.partition("/")[0] for batch in batches for name in batch)


def mixed(toy_tokenizer, tmp_path, sources, **options):
    shared = {
        "root": str(tmp_path),
        "tokenizer": str(toy_tokenizer),
        "clips": ClipConfig(2, 64),
        "global_batch_size": 4,
    }
    return InstructionDataModule(sources, **shared, **options)


def test_weights_set_the_share_of_every_epoch(toy_tokenizer, tmp_path, capsys):
    files = [write(tmp_path, name, count) for name, count in (("large", 60), ("small", 20))]
    sources = [MixSource(files[0], weight=0.5), MixSource(files[1], weight=0.5)]
    samples = mixed(toy_tokenizer, tmp_path, sources).read()
    assert "an epoch is 80 samples: large 40 of 60 (50.0%), small 40 of 20 (50.0%)\n" in capsys.readouterr().out
    for epoch in range(3):
        batches = drawn(samples, epoch)
        assert len(batches) == 20
        assert sources_of(batches) == {"large": 40, "small": 40}
        counts = Counter(name for batch in batches for name in batch)
        assert {counts[f"small/{n}"] for n in range(20)} == {2}
        assert max(counts[f"large/{n}"] for n in range(60)) <= 2  # two where one pass over all ends and another begins
    seen = {name for epoch in range(3) for batch in drawn(samples, epoch) for name in batch}
    assert len(seen) == 80  # 120 draws of 60: everybody had a turn
    assert drawn(samples, 0) != drawn(samples, 1)


@pytest.mark.parametrize("world", [2, 4])
def test_a_mixed_epoch_is_the_same_on_any_number_of_ranks(toy_tokenizer, tmp_path, world):
    sources = [MixSource(write(tmp_path, "a", 13), samples=30), write(tmp_path, "b", 11)]
    samples = mixed(toy_tokenizer, tmp_path, sources).read()
    assert samples.epoch_length == 41
    for epoch in range(2):
        assert drawn(samples, epoch, world) == drawn(samples, epoch)


def test_a_share_of_the_videos_is_the_same_in_all_sources(toy_tokenizer, tmp_path, capsys):
    files = [write(tmp_path, name, 60, video=lambda n: f"{n // 3}.mp4") for name in ("one", "two")]

    def videos(share, seed=0):
        samples = mixed(toy_tokenizer, tmp_path, [MixSource(file, videos=share) for file in files], seed=seed).read()
        assert samples.sizes[0] == samples.sizes[1]
        used = [str(samples.span(index, 0).paths["ego"].name) for index in range(len(samples))]
        assert set(Counter(used).values()) == {6}  # all records of a video, or none
        return set(used)

    tenth, half = videos(0.2), videos(0.5)
    assert 1 <= len(tenth) < len(half) < 20 and tenth < half and videos(1.0) == {f"{n}.mp4" for n in range(20)}
    assert videos(0.5, seed=1) != half
    assert f"{files[0]}: {60 - 3 * len(tenth)} records left out (videos: 0.2)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"one\.jsonl: videos is 1e-09, which leaves no record: raise it"):
        mixed(toy_tokenizer, tmp_path, [MixSource(files[0], videos=1e-9)]).read()
    with pytest.raises(ValueError, match=r"videos is 1\.5, allowed: above 0, up to 1"):
        MixSource("a.jsonl", videos=1.5)
    assert MixSource("a.jsonl", videos=1e-9).uses("", seed=0)  # text without video


def test_splits_choose_records_and_files_name_sources(toy_tokenizer, tmp_path, capsys):
    both = write(tmp_path, "both", 10, split=lambda n: ("train", "val")[n % 2])
    samples = mixed(toy_tokenizer, tmp_path, [MixSource(both, splits=["val"]), write(tmp_path, "other", 3)]).read()
    names = [samples.name(index) for index in range(len(samples))]
    assert names == [f"both/{n}" for n in (1, 3, 5, 7, 9)] + [f"other/{n}" for n in range(3)]
    assert samples.source_names == ("both", "other")
    assert [samples.source(index) for index in range(8)] == [0] * 5 + [1] * 3
    with pytest.raises(ValueError, match=r"both\.jsonl: no record of tset in it, but train, val"):
        mixed(toy_tokenizer, tmp_path, [MixSource(both, splits=["train", "tset"])]).read()
    (tmp_path / "both.jsonl").open("a").write((tmp_path / "other.jsonl").read_text())
    capsys.readouterr()
    mixed(toy_tokenizer, tmp_path, [MixSource(both, splits=["val"])]).read()
    assert f"{both}: records of other splits left out: 3 of None, 5 of train\n" in capsys.readouterr().out


def test_batches_know_their_sources_and_count_repeated_samples(toy_tokenizer, tmp_path):
    """A sample that comes twice in a global batch counts twice among its tokens."""
    file = write(tmp_path, "few", 1)
    samples = mixed(toy_tokenizer, tmp_path, [MixSource(file, samples=4)]).read()
    sampler = GlobalBatchSampler(4, 4, 1, 0, 1, 0, epoch_samples=samples.epoch_samples)
    (batch,) = ResumableLoader(samples, sampler, 0, max_corrupt_fraction=1.0)
    assert batch.ids == ["few/0"] * 4
    assert (batch.source_names, batch.source.tolist()) == (("few",), [0] * 4)
    assert batch.label_tokens == 4 * samples.text(0, 0).label_tokens == 16


def loader(samples, rank=0, world=1, size=4, seed=0):
    """Its clips are all black, so that no video is needed."""
    samples.videos = lambda span: {"ego": torch.zeros(2, 64, 64, 3, dtype=torch.uint8)}
    sampler = GlobalBatchSampler(samples.epoch_length, size, 1, rank, world, seed, epoch_samples=samples.epoch_samples)
    return ResumableLoader(samples, sampler, 0)


def take(source, count):
    """The next batches, epoch after epoch."""
    batches = []
    while len(batches) < count:
        for batch in source:
            batches.append(batch)
            if len(batches) == count:
                break
    return batches


def test_a_mix_resumes_where_it_was_stopped(toy_tokenizer, tmp_path):
    sources = [MixSource(write(tmp_path, "a", 7), samples=9), write(tmp_path, "b", 3)]

    def start():
        return loader(mixed(toy_tokenizer, tmp_path, sources).read())

    straight = [batch.ids for batch in take(start(), 8)]  # two epochs of three batches, and two more
    stopped, again = start(), start()
    first = [batch.ids for batch in take(stopped, 5)]
    again.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert first + [batch.ids for batch in take(again, 3)] == straight
    assert straight[:3] != straight[3:6]


def test_wrong_records_of_all_files_are_named_at_once(toy_tokenizer, tmp_path):
    sources = [write(tmp_path, "a", 2, video=lambda n: [3, "v"][n]), write(tmp_path, "b", 3, conversations=[])]
    with pytest.raises(InvalidRecords) as caught:
        mixed(toy_tokenizer, tmp_path, sources).read()
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [
        f"{sources[0]} line 1",
        *(f"{sources[1]} line {n}" for n in (1, 2, 3)),
    ]


def test_conversions_are_printed_once_for_each_file(toy_tokenizer, tmp_path, capsys):
    files = [write(tmp_path, "lists", 5, video=[VIDEO]), write(tmp_path, "plain", 5)]
    mixed(toy_tokenizer, tmp_path, files).read()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{files[0]}: field 'video' was a list of one (5x)"
    assert lines[1].startswith("an epoch is 10 samples")
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, r"data\.sources: got none, allowed: one file or more, of own names"),
        ({"sources": ["one.jsonl", "x/one.jsonl"]}, r"data\.sources: got one, one, allowed"),
        ({"instruction_style": "ego"}, r"data\.instruction_style: got 'ego', allowed: base, task, task_ego, raw"),
        (
            {"sources": [{"file": "one.jsonl", "wait": 1}]},
            r"^data\.sources\[0\]: field 'wait' is unknown: remove it",
        ),
        ({"sources": ["one.jsonl", {"weight": 1}]}, r"^data\.sources\[1\]: field 'file' is missing: add it"),
        (
            {"sources": [{"file": "one.jsonl", "weight": "x"}]},
            r"\[0\]: field 'weight' is 'x', expected a valid number",
        ),
        (
            {"sources": [{"file": "one.jsonl", "samples": 1.5}]},
            r"\[0\]: field 'samples' is 1\.5, expected a ",
        ),
        (
            {"sources": [{"file": "one.jsonl", "splits": "val"}]},
            r"\[0\]: field 'splits' is 'val', expected a ",
        ),
        ({"turns_per_clip": 0}, r"data\.turns_per_clip: got 0, allowed: 1 or more"),
        ({"templates": "."}, r"data\.templates: \.: holds no templates"),
        (
            {"mix": MixConfig(alpha=0.5), "sources": [MixSource("one.jsonl", weight=1.0)]},
            r"weight and mix\.alpha exclude each other",
        ),
    ],
)
def test_impossible_mixes_are_refused(toy_tokenizer, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for folder in (tmp_path, tmp_path / "x"):
        write(folder, "one", 1)
    with pytest.raises(ValueError, match=message):
        mixed(toy_tokenizer, tmp_path, **{"sources": ["one.jsonl"], **options})


# --------------------------------------------------------------------------------------------------------------------
# rendering


@pytest.fixture
def official(tmp_path):
    """A hundred questions, as a converter writes them."""
    records = [
        InstructionRecord(
            id=f"egotimeqa/{n}",
            video=f"{n // 3}.mp4",
            prompt=PromptFields("qa", query=f"What {n}?", target="left"),
            source="egotimeqa",
            window_s=(0.0, 1.0),
            split="train",
        )
        for n in range(100)
    ]
    write_rows(tmp_path / "egotimeqa.jsonl", [to_json(record) for record in records])
    return str(tmp_path / "egotimeqa.jsonl")


def test_epoch_0_is_the_exported_text_and_later_epochs_draw_again(toy_tokenizer, tmp_path, official):
    samples = mixed(toy_tokenizer, tmp_path, [official]).read()
    export([Path(official)], "swift", tmp_path / "out")
    exported = str(tmp_path / "out" / "egotimeqa.jsonl")
    raw = mixed(toy_tokenizer, tmp_path, [exported], instruction_style="raw").read()
    assert [samples.turns(n, 0) for n in range(100)] == [raw.turns(n, 0) for n in range(100)]
    assert [raw.turns(n, 1) for n in range(100)] == [raw.turns(n, 0) for n in range(100)]
    # Rows with both a finished text and prompt fields are rendered, as those of earlier versions were.
    again = mixed(toy_tokenizer, tmp_path, [exported]).read()
    for epoch in (0, 1):
        assert [again.turns(n, epoch) for n in range(100)] == [samples.turns(n, epoch) for n in range(100)]
    changed = sum(samples.turns(n, 1) != samples.turns(n, 0) for n in range(100))
    assert 80 <= changed < 100  # nine of ten, but for chance
    assert all(samples.turns(n, 1)[0][0].endswith(f"What {n}?") for n in range(100))
    assert all(samples.turns(n, 1)[0][1] == "Left." for n in range(100))


def test_styles_and_banks_are_keys(toy_tokenizer, tmp_path, official):
    base = mixed(toy_tokenizer, tmp_path, [official], instruction_style="base").read()
    assert max(len(base.turns(n, 0)[0][0]) for n in range(100)) < 60
    write_templates(tmp_path / "mine")
    own = mixed(toy_tokenizer, tmp_path, [official], instruction_style="base", templates=str(tmp_path / "mine")).read()
    asked = {own.turns(n, 0)[0][0].replace(f"What {n}?", "*") for n in range(100)}
    assert asked == {frame.format("*") for frame in ("{}", "What? {}", "{} yes?")} | asked
    assert len(asked) == 10
    assert own.turns(3, 0)[0][1] == "left"  # its answers are phrases


@pytest.mark.parametrize("world", [1, 2, 3])
def test_seed_epoch_and_id_decide_the_prompt_on_any_rank_and_after_a_resume(toy_tokenizer, tmp_path, official, world):
    """Every sample's tokens equal those of a single rank that never stopped, epochs 0 to 2."""
    expected = {}
    whole = mixed(toy_tokenizer, tmp_path, [official], seed=7).read()
    for epoch in range(3):
        for n in range(100):
            expected[epoch, whole.name(n)] = whole.text(n, epoch).input_ids
    different = sum(expected[0, name] != expected[1, name] for _, name in expected) / 3
    assert different > 60  # in the toy's few words: unknown ones are one token, but prompts differ in length

    checked = 0
    for rank in range(world):
        state, step = None, 0
        for until in (5, 21, 37, 48):  # crashes within epochs of 16 steps: another process resumes
            source = loader(mixed(toy_tokenizer, tmp_path, [official], seed=7).read(), rank, world, 6, seed=7)
            if state is not None:
                source.load_state_dict(json.loads(state))
            for batch in take(source, until - step):
                for row_number, name in enumerate(batch.ids):
                    real = batch.text.attention_mask[row_number]
                    assert batch.text.input_ids[row_number][real].tolist() == expected[step // 16, name]
                    checked += 1
                step += 1
            state = json.dumps(source.state_dict())
    assert checked == 3 * 16 * 6


def test_questions_about_one_clip_are_joined(toy_tokenizer, tmp_path, official):
    other = write(tmp_path, "other", 4, video=lambda n: f"{n // 2}.mp4")
    samples = mixed(toy_tokenizer, tmp_path, [official, other], turns_per_clip=2).read()
    # 100 questions, three a clip: 33 clips of 2 + 1, and one of 1; the other file's of the same name are not joined
    assert samples.sizes == [67, 2]
    questions = [[question.rpartition("What ")[2] for question, _ in samples.turns(n, 0)] for n in range(67)]
    assert sorted(int(q.rstrip("?")) for asked in questions for q in asked) == list(range(100))
    for n in range(67):
        clips = {int(question.rstrip("?")) // 3 for question in questions[n]}
        (clip,) = clips
        assert samples.span(n, 0).paths == {"ego": tmp_path / f"{clip}.mp4"}
    orders = {tuple(question for question, _ in samples.turns(0, epoch)) for epoch in range(20)}
    firsts = {question.rpartition("What ")[2] for question, *_ in orders}
    assert firsts == {"0?", "1?"}  # which comes first changes from epoch to epoch
    assert samples.turns(0, 3) == samples.turns(0, 3)
    assert samples.text(0, 0).input_ids.count(VIDEO_TOKEN_ID) == 1
    assert samples.groups()[:3].tolist() == [0, 0, 1]  # for shuffling by video


def test_records_without_a_template_are_named(toy_tokenizer, tmp_path):
    made = {"task": "riddle", "source": "x", "query": "?", "target": "y", "template_id": 3, "conversations": TURNS[:2]}
    file = write(tmp_path, "riddles", 2, **made)
    with pytest.raises(InvalidRecords, match=r"record riddles/0: .*no templates for task 'riddle'.*riddles/1"):
        mixed(toy_tokenizer, tmp_path, [file]).read()
    assert len(mixed(toy_tokenizer, tmp_path, [file], instruction_style="raw").read()) == 2


def test_raw_needs_finished_conversations(toy_tokenizer, tmp_path, official):
    with pytest.raises(InvalidRecords, match=r"egotimeqa/0: has prompt fields only: set instruction_style to"):
        mixed(toy_tokenizer, tmp_path, [official], instruction_style="raw").read()


def test_a_folder_of_frames_is_shown(toy_tokenizer, tmp_path):
    folder = tmp_path / "scan"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(folder / f"{number:03d}-rgb.png")
        Image.new("L", (8, 8), 255).save(folder / f"{number:03d}-depth.png")
    samples = mixed(toy_tokenizer, tmp_path, [write(tmp_path, "scans", 1, video="scan")]).read()
    frames = samples.videos(samples.span(0, 0))["ego"]
    assert frames[:, 32, 32].tolist() == [[60, 0, 0], [180, 0, 0]]  # the middles of both halves of four frames
