"""The order of samples under any split over ranks and micro-batches, resuming a run, and validation questions."""

from __future__ import annotations

import json
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules.batch import IGNORE_INDEX
from datamodules.clips.datamodule import ClipDataModule
from datamodules.clips.dataset import ClipConfig, ClipTextDataset, Span
from datamodules.clips.loader import ResumableLoader
from datamodules.clips.sampler import GlobalBatchSampler
from datamodules.clips.validation import ValidationDataset
from datamodules.io.jsonl import read_jsonl
from datamodules.text import TextEncoder
from datamodules.video.errors import FileMissing

CLIPS = ClipConfig(num_frames=2, image_size=4)
SPLITS = [(1, 1), (2, 1), (1, 2), (2, 2)]  # ranks, accumulated micro-batches


class Numbers(ClipTextDataset):
    """Sample i has a frame of value i and ``answers[i]`` words to learn, and the end token."""

    def __init__(self, tokenizer, answers):
        super().__init__(CLIPS, TextEncoder(str(tokenizer), max_text_tokens=32))
        self.answers = answers

    def __len__(self):
        return len(self.answers)

    def name(self, index):
        return str(index)

    def span(self, index, epoch):
        return Span({"ego": index}, 0.0, 1.0)

    def videos(self, span):
        return {"ego": torch.full((2, 4, 4, 3), span.paths["ego"], dtype=torch.uint8)}

    def text(self, index, epoch):
        return self.encoder.plain(" ".join(["left"] * self.answers[index]))


class NumbersModule(ClipDataModule):
    def read(self):
        return Numbers(self.encoder.tokenizer.name_or_path, [1] * 11)

    def annotation_files(self):
        return sorted(self.root.glob("*.txt"))


@pytest.fixture
def options(toy_tokenizer, tmp_path):
    return {"root": str(tmp_path), "tokenizer": str(toy_tokenizer), "clips": CLIPS, "global_batch_size": 4}


def global_batches(samples, size, world, accumulate, epoch=0, seed=3):
    """Per global batch the indices of each of its micro-batches, over all ranks."""
    ranks = []
    for rank in range(world):
        sampler = GlobalBatchSampler(samples, size, accumulate, rank, world, seed)
        sampler.epoch = epoch
        requests = list(sampler)
        assert len(requests) == len(sampler) == samples // size * accumulate
        ranks.append(requests)
    return [
        [request.indices for requests in ranks for request in requests[start : start + accumulate]]
        for start in range(0, samples // size * accumulate, accumulate)
    ]


def loader(tokenizer, answers, size=4, accumulate=1, rank=0, world=1, num_workers=0):
    sampler = GlobalBatchSampler(len(answers), size, accumulate, rank, world, seed=3)
    return ResumableLoader(Numbers(tokenizer, answers), sampler, num_workers)


def take(source, batches):
    """Names in the next batches, epoch after epoch, as a Trainer asks for them: it never exhausts an iterator."""
    names = []
    while len(names) < batches:
        for batch in source:
            names.append(batch.ids)
            if len(names) == batches or source.position == len(source):
                break
    return names


# --------------------------------------------------------------------------------------------------------------------
# order


@pytest.mark.parametrize(("world", "accumulate"), SPLITS)
def test_a_global_batch_holds_the_same_samples_however_it_is_split(world, accumulate):
    whole = global_batches(samples=42, size=8, world=1, accumulate=1)
    split = global_batches(samples=42, size=8, world=world, accumulate=accumulate)
    assert len(split) == 5  # 42 // 8, two samples are left out
    for parts, (together,) in zip(split, whole, strict=True):
        assert [len(part) for part in parts] == [8 // (world * accumulate)] * (world * accumulate)
        assert sorted(chain(*parts)) == sorted(together)  # as lists: disjoint and complete
    seen = [index for parts in split for part in parts for index in part]
    assert len(set(seen)) == 40
    assert set(seen) < set(range(42))


def test_epochs_and_seeds_differ_and_repeat():
    first = global_batches(42, 8, 1, 1, epoch=0)
    assert first == global_batches(42, 8, 1, 1, epoch=0)
    assert first != global_batches(42, 8, 1, 1, epoch=1)
    assert first != global_batches(42, 8, 1, 1, epoch=0, seed=4)
    assert first[0][0] != sorted(first[0][0])


def test_every_request_knows_its_global_batch():
    sampler = GlobalBatchSampler(samples=9, global_batch_size=4, accumulate=2, rank=1, world=2, seed=0)
    sampler.epoch = 5
    requests = list(sampler)
    assert [request.epoch for request in requests] == [5] * 4
    assert [request.micro_batches for request in requests] == [4] * 4
    assert requests[0].global_indices == requests[1].global_indices != requests[2].global_indices
    assert all(set(request.indices) <= set(request.global_indices) for request in requests)


def block_shuffled(groups, block_groups, epoch=0, size=1):
    sampler = GlobalBatchSampler(len(groups), size, 1, 0, 1, 3, groups, block_groups)
    sampler.epoch = epoch
    return np.array([index for request in sampler for index in request.indices])


def test_block_shuffle_keeps_samples_of_a_few_groups_together():
    groups = np.random.default_rng(0).permutation(np.repeat(np.array([7, 3, 90, 41, 8]), 40))
    order = block_shuffled(groups, block_groups=2)
    assert sorted(order) == list(range(200))
    blocks = [groups[order[:80]], groups[order[80:160]], groups[order[160:]]]
    assert [len(set(block)) for block in blocks] == [2, 2, 1]
    changes = sum(a != b for a, b in zip(blocks[0], blocks[0][1:], strict=False))
    assert changes > 20  # the two groups of a block are mixed, about every second sample
    assert list(order[:80]) != sorted(order[:80])


def test_block_shuffle_differs_by_epoch_and_repeats():
    groups = np.repeat(np.arange(6), 10)
    first = block_shuffled(groups, 2)
    assert (first == block_shuffled(groups, 2)).all()
    again = block_shuffled(groups, 2, epoch=1)
    assert {frozenset(groups[order[at : at + 20]]) for order in (first,) for at in (0, 20, 40)} != {
        frozenset(groups[again[at : at + 20]]) for at in (0, 20, 40)
    }


@pytest.mark.parametrize("block_groups", [0, 6, 100])
def test_blocks_of_all_groups_are_a_full_shuffle(block_groups):
    groups = np.repeat(np.arange(6), 10)
    full = global_batches(60, 1, 1, 1)
    assert block_shuffled(groups, block_groups).tolist() == [index for ((index,),) in full]


@pytest.mark.parametrize(("world", "accumulate"), SPLITS)
def test_block_shuffled_batches_hold_the_same_samples_however_they_are_split(world, accumulate):
    groups = np.repeat(np.arange(6), 7)
    whole = block_shuffled(groups, 2, size=8)
    ranks = [list(GlobalBatchSampler(42, 8, accumulate, rank, world, 3, groups, 2)) for rank in range(world)]
    for batch in range(5):
        split = [
            i for requests in ranks for r in requests[batch * accumulate : (batch + 1) * accumulate] for i in r.indices
        ]
        assert sorted(split) == sorted(whole[batch * 8 : (batch + 1) * 8])


def test_requests_hold_plain_numbers():
    (request,) = GlobalBatchSampler(4, 4, 1, 0, 1, 0)
    assert {type(index) for index in request.indices} == {int}


# --------------------------------------------------------------------------------------------------------------------
# resuming after a stop

ANSWERS = [1] * 13  # 3 batches of 4 an epoch


@pytest.mark.parametrize("steps", [0, 1, 3, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stopped_loader_goes_on_as_if_it_had_not_stopped(toy_tokenizer, steps, accumulate):
    stop = steps * accumulate
    uninterrupted = take(loader(toy_tokenizer, ANSWERS, accumulate=accumulate), 18)
    stopped = loader(toy_tokenizer, ANSWERS, accumulate=accumulate)
    before = take(stopped, stop)
    state = json.loads(json.dumps(stopped.state_dict()))
    restarted = loader(toy_tokenizer, ANSWERS, accumulate=accumulate)
    restarted.load_state_dict(state)
    assert before + take(restarted, 18 - stop) == uninterrupted
    epoch = 3 * accumulate
    assert uninterrupted[:epoch] != uninterrupted[epoch : 2 * epoch]


def test_a_step_that_was_not_complete_is_repeated_whole(toy_tokenizer):
    stopped = loader(toy_tokenizer, ANSWERS, accumulate=2)
    names = take(stopped, 3)
    restarted = loader(toy_tokenizer, ANSWERS, accumulate=2)
    restarted.load_state_dict(stopped.state_dict())
    assert take(restarted, 1) == names[2:]


def test_another_number_of_micro_batches_goes_on_with_the_same_samples(toy_tokenizer):
    stopped = loader(toy_tokenizer, ANSWERS)
    take(stopped, 4)
    restarted = loader(toy_tokenizer, ANSWERS, accumulate=2)
    restarted.load_state_dict(stopped.state_dict())
    halves = take(restarted, 4)
    assert [[*halves[0], *halves[1]], [*halves[2], *halves[3]]] == take(stopped, 2)


def test_the_state_counts_what_was_handed_out(toy_tokenizer):
    source = loader(toy_tokenizer, ANSWERS)
    assert source.state_dict() == {"epoch": 0, "global_batch": 0}
    take(source, 2)
    assert source.state_dict() == {"epoch": 0, "global_batch": 2}
    take(source, 1)
    assert source.state_dict() == {"epoch": 0, "global_batch": 3}
    take(source, 1)
    assert source.state_dict() == {"epoch": 1, "global_batch": 1}


def test_an_exhausted_iterator_moves_to_the_next_epoch(toy_tokenizer):
    source = loader(toy_tokenizer, ANSWERS)
    epochs = [[batch.ids for batch in source] for _ in range(2)]
    assert list(chain(*epochs)) == take(loader(toy_tokenizer, ANSWERS), 6)


def test_worker_processes_change_nothing(toy_tokenizer):
    here = take(loader(toy_tokenizer, ANSWERS), 5)
    source = loader(toy_tokenizer, ANSWERS, num_workers=1)
    assert take(source, 2) + take(source, 3) == here  # its state counts what was handed out, not what was read ahead


def test_ranks_of_a_restart_stay_disjoint(toy_tokenizer):
    state = {"epoch": 2, "global_batch": 1}
    batches = []
    for rank in range(2):
        source = loader(toy_tokenizer, ANSWERS, rank=rank, world=2)
        source.load_state_dict(state)
        batches.append(next(iter(source)).ids)
    whole = loader(toy_tokenizer, ANSWERS)
    whole.load_state_dict(state)
    assert sorted(chain(*batches)) == sorted(next(iter(whole)).ids)


# --------------------------------------------------------------------------------------------------------------------
# batches


def test_label_tokens_make_the_average_over_micro_batches_the_mean_over_tokens(toy_tokenizer):
    answers = [1, 4, 2, 9]  # with the end token 2, 5, 3 and 10 supervised tokens, 20 in all
    token_loss = {"0": 0.5, "1": 2.0, "2": 1.0, "3": 0.1}  # of every token of a sample
    mean = (2 * 0.5 + 5 * 2.0 + 3 * 1.0 + 10 * 0.1) / 20  # 0.75
    for world, accumulate in SPLITS:
        losses = []
        for rank in range(world):
            for batch in take_batches(loader(toy_tokenizer, answers, 4, accumulate, rank, world), accumulate):
                assert batch.label_tokens == 20 / (world * accumulate)
                counts = (batch.text.labels != IGNORE_INDEX).sum(dim=1).tolist()
                summed = sum(count * token_loss[name] for count, name in zip(counts, batch.ids, strict=True))
                losses.append(summed / batch.label_tokens)
        assert np.mean(losses) == pytest.approx(mean) == pytest.approx(0.75)


def take_batches(source, batches):
    iterator = iter(source)
    return [next(iterator) for _ in range(batches)]


def test_a_batch_keeps_frames_texts_and_names_together(toy_tokenizer):
    (batch,) = take_batches(loader(toy_tokenizer, [1, 4, 2, 9]), 1)
    assert batch.ego_video.shape == (4, 2, 4, 4, 3)
    assert batch.ego_video.dtype == torch.uint8
    assert batch.exo_video is None
    assert batch.num_frames == 8
    for row, name in enumerate(batch.ids):
        assert batch.ego_video[row].unique().tolist() == [int(name)]
        assert (batch.text.labels[row] != IGNORE_INDEX).sum() == [1, 4, 2, 9][int(name)] + 1


def test_moving_a_batch_moves_every_tensor(toy_tokenizer):
    (batch,) = take_batches(loader(toy_tokenizer, [1, 4, 2, 9]), 1)
    moved = batch.to("meta")
    assert {moved.ego_video.device.type, moved.text.input_ids.device.type, moved.text.labels.device.type} == {"meta"}


# --------------------------------------------------------------------------------------------------------------------
# data module


def test_missing_paths_name_the_key_and_what_to_do(options, tmp_path):
    with pytest.raises(ValueError, match=r"^data\.root: no folder \S+/none: run `make data` .*, or set data\.init_"):
        NumbersModule(**{**options, "root": str(tmp_path / "none")})
    with pytest.raises(ValueError, match=r"^data\.held_out: no file \S+/none: run .* set data\.init_args\.held_out"):
        NumbersModule(**options, held_out=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"^data\.held_out: got null.*set data\.init_args\.held_out"):
        NumbersModule(**options).held_out_set()


def test_impossible_sizes_are_refused(options):
    with pytest.raises(ValueError, match=r"^data\.global_batch_size: got 0"):
        NumbersModule(**{**options, "global_batch_size": 0})
    for key, value, allowed in (
        ("micro_batch_size", 0, "1 or more"),
        ("shuffle_block_groups", -1, "0 or more"),
        ("max_corrupt_fraction", 1.5, "from 0 to 1"),
        ("decode_timeout_s", 0.0, "above 0"),
    ):
        with pytest.raises(ValueError, match=rf"^data\.{key}: got {value}, allowed: {allowed}$"):
            NumbersModule(**{**options, key: value})
    for name in ("num_frames", "image_size"):
        with pytest.raises(ValueError, match=rf"^clips\.{name}: got 0"):
            ClipConfig(**{"num_frames": 1, "image_size": 1, name: 0})


def test_a_global_batch_larger_than_the_data_is_refused(options):
    NumbersModule(**{**options, "global_batch_size": 11}).setup("fit")
    with pytest.raises(ValueError, match=r"^data\.global_batch_size: got 12, but there are only 11 training samples"):
        NumbersModule(**{**options, "global_batch_size": 12}).setup("fit")


@pytest.mark.parametrize(("world", "accumulate", "size"), [(1, 1, 6), (2, 1, 3), (1, 3, 2), (2, 3, 1)])
def test_the_loader_follows_the_trainer(options, world, accumulate, size):
    module = NumbersModule(**{**options, "global_batch_size": 6})
    module.setup("fit")
    module.trainer = SimpleNamespace(accumulate_grad_batches=accumulate, world_size=world, global_rank=world - 1)
    source = module.train_dataloader()
    assert len(source) == accumulate  # 11 // 6 global batches
    assert module.steps_per_epoch() == 1
    assert len(next(iter(source)).ids) == size


@pytest.mark.parametrize(("world", "accumulate"), [(3, 1), (1, 3), (2, 4)])
def test_a_global_batch_that_does_not_split_is_refused(options, world, accumulate):
    module = NumbersModule(**options)
    module.setup("fit")
    module.trainer = SimpleNamespace(accumulate_grad_batches=accumulate, world_size=world, global_rank=0)
    expected = rf"4 does not split into {world} ranks times {accumulate} accumulated .*trainer\.accumulate_grad_batches"
    with pytest.raises(ValueError, match=expected):
        module.train_dataloader()


@pytest.mark.parametrize(("world", "size", "expected"), [(1, 4, 6), (2, 4, 3), (3, 8, 1), (4, 1, 6)])
def test_accumulation_follows_the_size_of_micro_batches(options, world, size, expected):
    module = NumbersModule(**{**options, "global_batch_size": 24}, micro_batch_size=size)
    assert module.accumulation(world) == expected


@pytest.mark.parametrize(
    ("together", "world", "size", "near"),
    [
        (24, 2, 5, "global_batch_size 20, global_batch_size 30, micro_batch_size 4, micro_batch_size 6"),
        (24, 5, 4, "global_batch_size 20, global_batch_size 40"),
        (6, 2, 8, "global_batch_size 16, micro_batch_size 1, micro_batch_size 3"),
    ],
)
def test_micro_batches_that_do_not_fit_are_refused_with_sizes_that_do(options, together, world, size, near):
    module = NumbersModule(**{**options, "global_batch_size": together}, micro_batch_size=size)
    with pytest.raises(ValueError) as caught:
        module.accumulation(world)
    assert str(caught.value) == (
        f"data.global_batch_size: {together} does not split into {world} ranks times micro-batches of {size} "
        f"(data.micro_batch_size); near it, these do: {near}"
    )


def test_a_trainer_that_accumulates_otherwise_is_refused(options):
    module = NumbersModule(**options, micro_batch_size=1)
    module.setup("fit")
    module.trainer = SimpleNamespace(accumulate_grad_batches=2, world_size=1, global_rank=0)
    with pytest.raises(ValueError, match=r"^trainer\.accumulate_grad_batches: got 2, but .* needs 4: set it to that$"):
        module.train_dataloader()
    module.trainer.accumulate_grad_batches = 4
    assert len(next(iter(module.train_dataloader())).ids) == 1


def test_the_loader_is_made_as_the_module_says(options):
    class Grouped(NumbersModule):
        def read(self):
            samples = super().read()
            samples.groups = lambda: np.arange(11) // 4
            return samples

    module = Grouped(**options, shuffle_block_groups=2, max_corrupt_fraction=0.5, decode_timeout_s=7.0)
    module.setup("fit")
    module.trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=1, global_rank=0)
    source = module.train_dataloader()
    assert source.max_corrupt_fraction == 0.5
    assert module.train_set.reader.timeout_s == 7.0
    assert (source.order.block_groups, source.order.groups.tolist()) == (2, [0] * 4 + [1] * 4 + [2] * 3)


def test_the_fingerprint_follows_the_bytes_of_the_annotations(options, tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    module = NumbersModule(**options)
    assert module.fingerprint() == "ba7816bf8f01cfea"  # SHA-256 of "abc", FIPS 180-2 appendix B.1
    (tmp_path / "a.txt").write_text("abd")
    assert module.fingerprint() != "ba7816bf8f01cfea"


def test_sample_frames_are_spread_over_the_training_clips(options):
    module = NumbersModule(**options)
    module.setup("fit")
    frames = module.sample_frames(3)
    assert frames.shape == (6, 4, 4, 3)
    assert frames[::2, 0, 0, 0].tolist() == [0, 5, 10]


def test_sample_frames_leave_out_what_cannot_be_read(options, monkeypatch):
    module = NumbersModule(**options)
    module.setup("fit")
    bad, read = {5}, module.train_set.videos

    def videos(span):
        if span.paths["ego"] in bad:
            raise FileMissing("no such file")
        return read(span)

    monkeypatch.setattr(module.train_set, "videos", videos)
    assert module.sample_frames(3)[::2, 0, 0, 0].tolist() == [0, 10]
    bad |= {0, 10}
    with pytest.raises(FileMissing):
        module.sample_frames(3)


def test_nothing_is_asked_without_held_out_clips(options):
    assert NumbersModule(**options).val_dataloader() == []


# --------------------------------------------------------------------------------------------------------------------
# JSON Lines and validation questions


def test_a_malformed_line_is_named(tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text('{"a": 1}\n{"a": 2,}\n')
    lines = read_jsonl(file)
    assert next(lines) == (f"{file} line 1", {"a": 1})
    with pytest.raises(ValueError, match=rf"^{file} line 2: invalid JSON \(.* at column \d+\): fix this line$"):
        next(lines)
    file.write_text('{"a": 1}\n\n{"a": 2]\n')
    with pytest.raises(ValueError, match="line 3: invalid JSON"):
        list(read_jsonl(file))
    file.write_bytes('{"a": "\u00e9"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match="line 1: no UTF-8 text"):
        list(read_jsonl(file))
    file.write_text('{"a": 2]\n')
    with pytest.raises(ValueError, match=r"line 1: invalid JSON .*at column 8"):
        list(read_jsonl(file))
    file.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match="line 1: expected a JSON object, got list"):
        list(read_jsonl(file))


RECORD = {
    "id": "one",
    "views": {"ego": "no.mp4"},
    "start": 0.0,
    "end": 1.0,
    "questions": [{"task": "qa_verb", "question": "What?", "answer": "taps"}],
}


def held_out(tmp_path, tokenizer, *records):
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return ValidationDataset(tmp_path, file, CLIPS, TextEncoder(str(tokenizer), max_text_tokens=64))


@pytest.mark.parametrize("field", ["id", "views", "start", "end", "questions"])
def test_a_missing_field_is_named(field, tmp_path, toy_tokenizer):
    broken = {name: value for name, value in RECORD.items() if name != field}
    with pytest.raises(ValueError, match=rf"held_out\.jsonl line 2: field '{field}' is missing: add it$"):
        held_out(tmp_path, toy_tokenizer, RECORD, broken)


@pytest.mark.parametrize("value", [None, "00:01", [1.0]])
def test_a_time_that_is_no_number_is_named(value, tmp_path, toy_tokenizer):
    with pytest.raises(
        ValueError, match=r"held_out\.jsonl line 2: field 'start' is .*, expected a valid number: correct it$"
    ):
        held_out(tmp_path, toy_tokenizer, RECORD, {**RECORD, "start": value})


QUESTION = {"task": "choice", "question": "Which?", "answer": "x", "options": ["x", "y"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": float("nan")}, "field 'start' is nan, expected a finite number"),
        ({"start": -1.0}, "field 'start' is -1.0, expected greater than or equal to 0"),
        ({"start": 2.0, "end": 1.0}, "field 'end' is 1.0, expected more than 'start' 2.0"),
        ({"start": 1.0, "end": 1.0}, "field 'end' is 1.0, expected more than 'start' 1.0"),
        ({"ego_visible": "0"}, "field 'ego_visible' is '0', expected a valid boolean"),
        ({"ego_visible": None}, "field 'ego_visible' is None, expected a valid boolean"),
        ({"views": None}, "field 'views' is None"),
        ({"views": {}}, "field 'views' is {}"),
        ({"views": {"ego": None}}, "field 'views.ego' is None, expected a text"),
        ({"views": {"ego": " "}}, "field 'views.ego' is ' ', expected the path of a video"),
        ({"views": {"exo": "x.mp4"}}, "field 'views' has exo, expected ego as in the first line"),
        ({"questions": []}, r"field 'questions' is \[\], expected at least one entry"),
        ({"questions": [{**QUESTION, "answer": "z"}]}, r"field 'questions\[0\].answer' is 'z', none of the options"),
        (
            {"questions": [{**QUESTION, "answer": " ", "options": []}]},
            r"field 'questions\[0\].answer' is ' ', expected",
        ),
        ({"questions": [{**QUESTION, "options": "xy"}]}, r"field 'questions\[0\].options' is 'xy', expected"),
        ({"questions": [{**QUESTION, "options": None}]}, r"field 'questions\[0\].options' is None, expected"),
        ({"questions": [{**QUESTION, "options": ["x", "x"]}]}, r"field 'questions\[0\].options' is .* repeats one"),
        ({"questions": [{**QUESTION, "options": ["x", ""]}]}, r"field 'questions\[0\]': the answer of turn 1 is empty"),
        ({"questions": [{**QUESTION, "question": "<video>?"}]}, r"field 'questions\[0\]': text holds '<video>'"),
    ],
)
def test_validation_clips_are_checked_when_the_data_module_is_made(changes, message, tmp_path, toy_tokenizer, options):
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in (RECORD, RECORD | changes)))
    with pytest.raises(ValueError, match=rf"held_out\.jsonl line 2: {message}"):
        NumbersModule(**options, held_out=str(file))


def test_validation_clips_may_be_an_array_but_not_none(tmp_path, toy_tokenizer):
    file, encoder = tmp_path / "held_out.json", TextEncoder(str(toy_tokenizer), max_text_tokens=64)
    file.write_text(json.dumps([RECORD | {"questions": [QUESTION]}], indent=1))
    assert len(ValidationDataset(tmp_path, file, CLIPS, encoder)) == 1
    file.write_text("")
    with pytest.raises(ValueError, match=r"held_out\.json: holds no validation clip"):
        ValidationDataset(tmp_path, file, CLIPS, encoder)


@pytest.mark.parametrize("field", ["task", "question", "answer"])
def test_a_missing_field_of_a_question_is_named(field, tmp_path, toy_tokenizer):
    question = {name: value for name, value in RECORD["questions"][0].items() if name != field}
    with pytest.raises(ValueError, match=rf"line 1: field 'questions\[0\]\.{field}' is missing: add it$"):
        held_out(tmp_path, toy_tokenizer, {**RECORD, "questions": [question]})


def test_a_validation_clip_whose_file_is_missing_is_named(tmp_path, toy_tokenizer):
    with pytest.raises(FileMissing, match=r"no\.mp4"):
        held_out(tmp_path, toy_tokenizer, RECORD)[0]


@pytest.fixture
def questions(toy_world):
    encoder = TextEncoder(str(toy_world / "tokenizer"), max_text_tokens=64)
    clips = ClipConfig(num_frames=3, image_size=16)
    return ValidationDataset(toy_world, toy_world / "instructions" / "held_out.jsonl", clips, encoder)


def test_validation_clips_collate_with_their_questions(questions):
    batch = questions.collate([questions[7], questions[0]])
    assert batch.ids == [questions.items[7].name, questions.items[0].name]
    assert batch.ego_video.shape == batch.exo_video.shape == (2, 3, 16, 16, 3)
    torch.testing.assert_close(batch.ego_video[1], questions[0][1]["ego"], rtol=0, atol=0)
    # a caption, a choice of four and five short questions for each clip
    tasks = ["caption", "choice", "qa_verb", "qa_object", "qa_colour", "qa_hand", "qa_check"]
    assert [question.task for question in batch.questions] == tasks * 2
    assert [question.clip for question in batch.questions] == [0] * 7 + [1] * 7
    assert batch.prompt_clip.tolist() == [0] * 6 + [1] * 6
    assert batch.option_clip.tolist() == [0] * 4 + [1] * 4
    assert batch.prompts.input_ids.shape[0] == 12
    assert bool((batch.prompts.labels == IGNORE_INDEX).all())


def test_prompt_and_option_rows_follow_the_order_of_the_questions(questions):
    batch = questions.collate([questions[3], questions[5]])
    encoder = questions.encoder
    open_ended = [question for question in batch.questions if not question.options]
    for row, question in enumerate(open_ended):
        ids = batch.prompts.input_ids[row][batch.prompts.attention_mask[row]].tolist()
        assert ids == encoder.prompt(question.question).input_ids
        assert batch.prompt_clip[row] == question.clip
    options = [option for question in batch.questions for option in question.options]
    assert len(options) == 8
    for row, option in enumerate(options):
        labels = batch.options.labels[row]
        assert labels[labels != IGNORE_INDEX].tolist() == [*encoder.plain(option).input_ids[2:]]


def test_ranks_share_the_validation_clips(toy_world, options):
    file = str(toy_world / "instructions" / "held_out.jsonl")
    module = NumbersModule(**{**options, "root": str(toy_world)}, held_out=file, num_workers=0)
    names = []
    for rank in range(2):
        module.trainer = SimpleNamespace(world_size=2, global_rank=rank)
        (loader,) = module.val_dataloader()
        names.append([name for batch in loader for name in batch.ids])
    assert [len(part) for part in names] == [6, 6]
    assert sorted(chain(*names)) == sorted(item.name for item in module.held_out_set().items)


def test_all_questions_and_flags_of_the_file(questions, toy_world):
    lines = (toy_world / "instructions" / "held_out.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(questions.all_questions()) == sum(len(record["questions"]) for record in records) == 12 * 7
    assert [item.ego_visible for item in questions.items] == [record["ego_visible"] for record in records]
